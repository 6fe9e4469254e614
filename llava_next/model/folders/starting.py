"""A model folder that training is to start from: its weights are whole, and its result will be.

Folders that others wrote (stock `save_pretrained`, say) load, but lack files that older releases, vLLM or evaluation
kits read. What can be made is made before the training, so that days later the result is a whole folder; the rest is
refused with what to do.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import safe_open
from transformers import LlavaNextConfig, PreTrainedTokenizerBase

from llava_next.model.folders.check import CHECKS, ModelFolder, check_folder
from llava_next.model.folders.companions import copy_companions, write_companions
from llava_next.model.folders.export import file_key, write_config

HEAD, EMBEDDING = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
WEIGHT_CHECKS = ("keys", "shapes", "dtypes")  # of the files that training ends with: not there yet
ROWS = 8192  # of the vocabulary that are compared at a time


def check_weights(path: str | Path) -> None:
    """Whether the weight files hold what config.json says, by their headers; a head of a tied model by its values.

    Raises:
        ValueError: weights are missing or of other shapes, or a tied model has an output head that is not its
            embedding.
    """
    folder = ModelFolder(Path(path))
    shapes, found = folder.shapes, {}
    for key, (file, shape, _) in folder.tensors.items():
        found[key if key in shapes else own_key(key)] = (key, file, shape)
    if missing := sorted(shapes.keys() - found.keys()):
        raise ValueError(
            f"model: {path} lacks {len(missing)} of the {len(shapes)} weights that its config.json asks for, e.g. "
            f"{', '.join(missing[:3])}; they would begin as random numbers. Copy the folder again, or compose it again"
        )
    for key, due in shapes.items():
        if found[key][2] != due:
            raise ValueError(
                f"model: {path / Path(found[key][1])}: {found[key][0]} is {found[key][2]}, config.json asks for {due}; "
                "weights and config are of two models: copy both from one"
            )
    if HEAD in found and HEAD not in shapes and not _equal(folder.path, found[HEAD], found[EMBEDDING]):
        raise ValueError(
            f"model: config.json in {path} says tie_word_embeddings: true, but {found[HEAD][0]} in {found[HEAD][1]} is "
            "not the embedding: the head would be lost. Set tie_word_embeddings: false there, at the top and in "
            "text_config, to train the two apart; or remove the head from the file"
        )


def model_fingerprint(folder: Path) -> str:
    """Names a model folder by its config and its weight files: their sizes and samples of their bytes."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            for part in range(16):
                file.seek(part * size // 16)
                digest.update(file.read(4096))
    return digest.hexdigest()[:16]


def own_key(key: str) -> str:
    """The llava-hf key of a tensor under one of the names that transformers has saved it by."""
    if key.startswith("language_model."):  # as it is in the layout
        return key
    with suppress(ValueError):
        return file_key(key)
    return key


def _equal(folder: Path, *places: tuple[str, str, tuple[int, ...]]) -> bool:
    """Whether two tensors (key, file, shape) hold the same numbers."""
    (key, file, shape), (other_key, other_file, other_shape) = places
    if shape != other_shape:
        return False
    with safe_open(folder / file, "pt") as one, safe_open(folder / other_file, "pt") as two:
        ours, theirs = one.get_slice(key), two.get_slice(other_key)
        return all(torch.equal(ours[i : i + ROWS], theirs[i : i + ROWS]) for i in range(0, shape[0], ROWS))


def make_companions(
    source: str | Path,
    out: Path,
    config: LlavaNextConfig,
    tokenizer: PreTrainedTokenizerBase,
    anew: bool = False,
    keep_template: bool = False,
) -> None:
    """Everything of the result beside its weights, config.json included: copied from the folder that training starts
    with, or written as every release reads it.

    Args:
        out: empty folder, made when missing.
        config, tokenizer: of the model, as loaded from `source`.
        anew: write what can be written, over what is copied.
        keep_template: the folder has a chat template of its own, which says how generation ends.
    """
    out.mkdir(parents=True, exist_ok=True)
    copy_companions(source, out)
    write_config(config, out, torch.bfloat16)
    if anew and tokenizer.chat_template:
        write_companions(config, tokenizer, tokenizer.chat_template, out)
        if keep_template and (generation := Path(source) / "generation_config.json").exists():
            shutil.copyfile(generation, out / generation.name)


def must_be_anew(source: str | Path, *model, excused: Collection[str] = (), keep_template: bool = False) -> list[str]:
    """What the companions of `source` lack, if they can be made so that the result is whole.

    Args:
        model: config and tokenizer, see `make_companions`.
        excused: checks that need not pass.

    Returns:
        Names of the checks that the copied files fail and those written pass; empty: all can be copied.

    Raises:
        ValueError: something cannot be made from what the folder has.
    """
    names = [name for name in CHECKS if name not in (*WEIGHT_CHECKS, *excused)]
    failed = []
    with TemporaryDirectory() as folder:
        for anew in (False, True):
            out = Path(folder) / ("anew" if anew else "copied")
            make_companions(source, out, *model, anew=anew, keep_template=keep_template)
            found = [finding for finding in check_folder(out, names) if not finding.ok]
            if not found:
                return failed
            failed = failed or [finding.check for finding in found]
    text = found[0].text.replace(f"{out}/", "")
    raise ValueError(
        f"model: what training makes of {source} could not be used: {found[0].check}: {text}. Mend that in the folder, "
        "or compose it again"
    )
