"""The ledger: a JSON line for each finished run, with all that is needed to set runs side by side."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path

from evaluation.published import standard_error
from reproducing.steps import ROOT, whole_model

LEDGER = ROOT / "scripts" / "benchmarks" / "ledger.jsonl"
KEPT = ("value", "metric", "samples", "noise")  # of a score


def read_ledger(path: Path) -> list[dict]:
    """The lines. Raises ValueError: there is none, or one is no JSON."""
    if not path.exists():
        raise ValueError(f"{path}: there is no ledger; scripts/reproduce.py --record RUN_DIR begins one")
    lines = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            lines.append(json.loads(line))
            lines[-1]["name"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}: line {number} is none of a ledger ({error}): mend it or take it out") from None
    return lines


def line_of(run_dir: Path, name: str, scores: dict[str, dict]) -> dict:
    """A finished run as a line.

    Args:
        name: of the recipe.
        scores: as scores.json has them.

    Raises:
        ValueError: the run has not ended, or wrote no provenance.json.
    """
    from llava_next.model.folders.card import thinned
    from llava_next.model.folders.starting import model_fingerprint
    from llava_next.training.provenance import PROVENANCE, losses_of, numbers_of

    if not whole_model(run_dir / "model"):
        raise ValueError(f"{run_dir} has no whole model/: give the run_dir of a run that has ended")
    try:
        made = json.loads((run_dir / PROVENANCE).read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{run_dir / PROVENANCE} cannot be read ({error}): it is written by a run of this version"
        ) from None
    losses, seconds = losses_of(run_dir), sum(numbers_of(run_dir, "step_s").values())
    return {
        "name": name,
        "title": made["stage"]["title"],
        "date": datetime.now(timezone.utc).date().isoformat(),
        "recipe": made["stage"]["recipe"],
        "data": made["stage"]["data"],
        "plan": made["plan"],
        "start": made["start"],
        "result": model_fingerprint(run_dir / "model"),
        "code": made["code"],
        "versions": made["stage"]["versions"],
        "hardware": made["hardware"],
        "steps": losses[-1][0] if losses else 0,
        "hours": round(seconds / 3600, 4),
        "scores": {key: {k: v for k, v in found.items() if k in KEPT} for key, found in scores.items()},
        "loss": thinned(losses),
    }


def record(line: dict, path: Path) -> bool:
    """Appends a line. Returns False when the result is in the ledger already, with these scores."""
    there = read_ledger(path) if path.exists() else []
    if any((old["result"], old["scores"]) == (line["result"], line["scores"]) for old in there):
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return True


def read_scores(path: Path | None) -> dict[str, dict]:
    """Scores of an evaluation: the `scores` of a scores.json, or exact answers (`evaluate.py --out FILE.json`).

    Raises:
        ValueError: neither.
    """
    if path is None:
        return {}
    try:
        found = json.loads(path.read_bytes())
        if "scores" in found:
            return {name: {**score, "value": float(score["value"])} for name, score in found["scores"].items()}
        share, count = found["exact"] / found["of"], found["of"]
        return {
            "exact": {"value": share, "metric": "exact match", "samples": count, "noise": standard_error(share, count)}
        }
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"--scores: {path} holds no scores ({type(error).__name__}: {error})") from None


def check_scores(path: Path, run_dir: Path) -> None:
    """Refuses scores of a model that is not this run's, where the file says whose they are. Raises ValueError."""
    from evaluation.scores import model_hash  # no step waits for torch

    found = json.loads(path.read_bytes())
    results = [run_dir / name for name in ("model", "adapter") if (run_dir / name).is_dir()]
    if "model_hash" in found and found["model_hash"] not in map(model_hash, results):
        raise ValueError(
            f"--scores: {path} is of {found['model']} as it was then, which is not what {run_dir} holds: score it again"
        )


def last_scores(run_dir: Path) -> Path | None:
    """The scores.json of a run's result, where it was made on the way (`evaluate.every`)."""
    from llava_next.training.provenance import losses_of
    from llava_next.training.scores import folder_of

    losses = losses_of(run_dir)
    path = folder_of(run_dir, losses[-1][0] if losses else 0) / "scores.json"
    return path if path.exists() else None


def ledger_table(lines: list[dict]) -> str:
    """Markdown: a row for each line."""
    from llava_next.model.folders.card import points_of, table  # no step waits for the hub's package

    names = list(dict.fromkeys(name for line in lines for name in line["scores"]))
    rows = []
    for line in lines:
        points = points_of(line)
        scores = [_score(line["scores"].get(name)) for name in names]
        data = " + ".join(f"{row['name']} {row['samples']:,}" for row in line["data"])
        hours = f"{line['hours']:.3g}"
        loss = f"{points[-1][1]:.4g}" if points else ""
        rows.append(
            (
                label(line),
                line["date"],
                data,
                line["steps"],
                line["hardware"]["name"],
                hours,
                loss,
                *scores,
                line["code"],
            )
        )
    head = ("run", "date", "data", "steps", "hardware", "hours", "last loss", *names, "code")
    return table(head, rows)


def label(line: dict) -> str:
    """What a run is called in table and picture."""
    return f"{line['name']}, {line['title']}"


def _score(found: dict | None) -> str:
    if found is None:
        return "-"
    noise = f" ± {found['noise']:.2g}" if found.get("noise") else ""
    return f"{found['value']:.4g}{noise}"


def known_index(ledger: Path, name: str, source: str) -> str:
    """Sha256 of dataset.json, which names index and shards by theirs, that a recipe's last run in the ledger had for a
    data set; empty when none had it."""
    lines = read_ledger(ledger) if ledger.exists() else []
    rows = [row for line in lines if line["name"] == name for row in line["data"] if row["name"] == source]
    return rows[-1]["index"] if rows else ""
