"""The folder of scores: scores.json, the samples with their answers, and the row; each file whole or absent."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from evaluation.published import comparable, noise, published_scores, row
from llava_next.data.storage.client import Storage, written_aside
from llava_next.data.storage.lease import Lease
from llava_next.model.folders.adapters import CONFIG, read_adapter
from llava_next.model.folders.check import ModelFolder
from llava_next.model.folders.companions import COMPANION_FILES
from llava_next.versions import installed

PACKAGES = ("lmms-eval", "transformers", "torch", "tokenizers", "pillow", "vllm")
CHUNK = 2**24
NAME = re.compile(r"[\w][\w.+-]*")


def model_hash(folder: Path) -> str:
    """Names what a folder's answers depend on: every byte of weights, config, tokenizer, processor and template; of an
    adapter, its base's too."""
    digest = hashlib.sha256()
    names = {CONFIG, "config.json", *COMPANION_FILES, *(path.name for path in folder.glob("*.safetensors"))}
    for name in sorted(names):
        if not (folder / name).is_file():
            continue
        digest.update(f"{name} {(folder / name).stat().st_size}\n".encode())
        with open(folder / name, "rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
    if (folder / CONFIG).exists():
        digest.update(model_hash(read_adapter(folder).base).encode())
    return digest.hexdigest()[:32]


@dataclass(frozen=True)
class Sample:
    """A question with its answer. `score`: 0 to 1, or what the benchmark gives; None: it scores as a whole only."""

    id: str
    question: str
    answer: str
    target: object
    score: float | None


@dataclass(frozen=True)
class Score:
    """A benchmark's result.

    Attributes:
        metric: main one; others: the values of the rest.
        lower_is_better: of two values; written only where it is so.
    """

    name: str
    value: float
    metric: str
    samples: list[Sample]
    others: dict[str, float]
    lower_is_better: bool = False


class ScoreFolder:
    """A folder with the scores of one model.

    Args:
        template, width: of the model's chats and language model, which say what published scores are comparable.

    Raises:
        ValueError: it has scores of another model, or that were made with other packages.
    """

    def __init__(self, path: Path, model: str, hash: str, backend: str, template: str | None, width: int):
        self.path, self.models = path, comparable(template, width)
        self.head = {"model": model, "model_hash": hash, "backend": backend, "versions": installed(PACKAGES)}
        if path.exists() and not path.is_dir():
            raise ValueError(f"--out {path} is a file: give a folder")
        self.scores = self._read()

    def _read(self) -> dict[str, dict]:
        file = self.path / "scores.json"
        if not file.exists():
            return {}
        try:
            found = json.loads(file.read_bytes())
            scores, head = found["scores"], {key: found[key] for key in self.head}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"--out: {file} holds no scores ({type(error).__name__}): give another folder") from None
        if head["model_hash"] != self.head["model_hash"]:
            raise ValueError(
                f"--out {self.path} has scores of another model, {head['model']} as it was then: give another folder"
            )
        for key in ("backend", "versions"):
            if head[key] != self.head[key]:
                raise ValueError(
                    f"--out {self.path} has scores made with {key} {head[key]}, now it is {self.head[key]}: give "
                    "another folder"
                )
        return scores

    def hold(self) -> Lease:
        """The right to score into this folder, for as long as the block lasts. Raises LeaseHeld: another process has
        it."""
        self.path.mkdir(parents=True, exist_ok=True)
        cure = "Two at once lose scores: wait for it or end it (it goes on when started again), or give another --out"
        lease = Lease(Storage(self.path), "scoring", cure).take(say=lambda text: print(text, file=sys.stderr))
        self.scores = self._read()  # what it has added meanwhile
        return lease

    def check_limit(self, name: str, limit: int) -> None:
        """Refuses to replace a score by one of fewer samples. Raises ValueError."""
        there = self.scores.get(name, {}).get("samples", 0)
        if 0 < limit < there:
            raise ValueError(
                f"--limit {limit}: {self.path} has a score of {there} samples of {name}: give another folder for fewer"
            )

    def add(self, score: Score) -> dict:
        """Writes a score, its samples and the row. Returns its entry in scores.json."""
        per_sample = [sample.score for sample in score.samples]
        entry = {
            "value": score.value,
            "metric": score.metric,
            "samples": len(score.samples),
            "noise": noise(score.name, score.metric, score.value, len(score.samples), per_sample),
            "published": published_scores(score.name, score.metric, self.models),
        }
        if score.others:
            entry["others"] = score.others
        if score.lower_is_better:
            entry["lower_is_better"] = True
        (self.path / "samples").mkdir(parents=True, exist_ok=True)
        with written_aside(self.path / "samples" / f"{score.name}.jsonl") as temporary:
            temporary.write_text(
                "".join(json.dumps(vars(sample), ensure_ascii=False) + "\n" for sample in score.samples)
            )
        self.scores[score.name] = entry
        with written_aside(self.path / "scores.json") as temporary:
            temporary.write_text(json.dumps({**self.head, "scores": self.scores}, indent=1, ensure_ascii=False) + "\n")
        with written_aside(self.path / "row.md") as temporary:
            temporary.write_text(self.row())
        return entry

    def row(self) -> str:
        """The Markdown row of all scores."""
        return row(self.head["model"], self.scores, self.models)


def open_scores(path: Path, model: str, hash: str, backend: str, folder: ModelFolder) -> ScoreFolder:
    """The scores of a model folder. Raises ValueError as `ScoreFolder`."""
    try:
        template = folder.template.name
    except ValueError:  # one of its own
        template = None
    return ScoreFolder(path, str(model), hash, backend, template, folder.config.get_text_config().hidden_size)


def score_name(args: Namespace) -> str:
    """What a command line calls the score of --json: a file's name too. Raises ValueError."""
    if args.name is None and args.json is None:
        raise ValueError("--name: how is the score of --hf or --shards to be called?")
    name = args.name or args.json.stem
    if not NAME.fullmatch(name):
        raise ValueError(f"--name {name!r}: give letters, digits, '.', '_', '+' and '-' only")
    return name
