"""The model folders and adapters that can be talked with, and loading them with stock transformers and peft.

A run writes each folder aside and renames it when it is whole, so what carries its final name is; folders that are
being copied or downloaded are told by their weight files' headers and by the files beside them.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

from llava_next.anyres import AnyRes
from llava_next.model.folders.adapters import CONFIG as ADAPTER_CONFIG
from llava_next.model.folders.adapters import adapter_base, read_adapter
from llava_next.model.folders.check import ModelFolder
from llava_next.model.forward.nf4 import bitsandbytes
from llava_next.repositories import resolve_folder
from llava_next.versions import install

ASIDE = (".tmp", ".old")  # endings of folders that are being written or replaced
BESIDE = ("tokenizer_config.json", "preprocessor_config.json")
TEMPLATE = "chat_template.*"
STEP = "model-step-"


@dataclass(frozen=True)
class Choice:
    """Something to talk with.

    Args:
        name: as shown, within its run folder or as it was given.
        where: folder, or name on the hub.
        stamp: changes when the folder is replaced by another.
    """

    name: str
    where: str
    stamp: int = 0

    @property
    def is_adapter(self) -> bool:
        return (Path(self.where) / ADAPTER_CONFIG).is_file()


def choices(given: str) -> list[Choice]:
    """What can be talked with, the given one or the run's result first.

    Args:
        given: a model folder, an adapter folder, a run folder, or a name on the hub. Of a run come all its folders
            that are whole now.

    Raises:
        ValueError: no such folder, or one without a model in which nothing is whole.
    """
    folder = Path(given)
    if not folder.is_dir():
        if folder.is_absolute() or len(folder.parts) != 2:  # a name on the hub has two
            raise ValueError(f"{given}: no such folder")
        return [Choice(given, given)]
    is_model = (folder / "config.json").is_file() or (folder / ADAPTER_CONFIG).is_file()
    run = folder.resolve().parent if is_model else folder
    others = []
    if not is_model or (run / "config.yaml").is_file():  # a run's; beside other folders lies what may
        others = [Choice(path.name, str(path), stamp(path)) for path in _in_run(run) if is_whole(path)]
    if not is_model:
        if not others:
            raise ValueError(
                f"{given} has no finished model or adapter: give a model folder, or wait for the run's first "
                "(--checkpoint.export_every writes some on the way)"
            )
        return others
    own = Choice(folder.resolve().name, given, stamp(folder))
    return [own, *(other for other in others if other.name != own.name)]


def _in_run(run: Path) -> list[Path]:
    """Folders of a run that may be models: the result, adapter, those of steps, newest first, and the others."""

    def rank(path: Path) -> tuple:
        step = path.name.removeprefix(STEP)
        order = ["model", "adapter"].index(path.name) if path.name in ("model", "adapter") else 3
        return (2, -int(step), "") if path.name.startswith(STEP) and step.isdecimal() else (order, 0, path.name)

    return sorted((path for path in run.iterdir() if path.is_dir() and path.suffix not in ASIDE), key=rank)


def stamp(folder: Path) -> int:
    """Nanoseconds of its last change, 0 when it is gone."""
    try:
        return max(path.stat().st_mtime_ns for path in (folder, *folder.glob("*.json")))
    except OSError:
        return 0


def is_whole(folder: Path) -> bool:
    """Whether a model folder, or an adapter with its base, has all that loading needs; reads headers only."""
    try:
        if (folder / ADAPTER_CONFIG).is_file():
            return is_whole(read_adapter(folder).base)
        subject = ModelFolder(folder)
        subject.json("config.json")
        beside = all((folder / name).is_file() for name in BESIDE) and any(folder.glob(TEMPLATE))
        return beside and bool(subject.tensors)
    except Exception:  # whatever half a file makes the libraries raise
        return False


def load(where: str) -> tuple[torch.nn.Module, object]:
    """Model and processor of a model folder, an adapter folder or a hub repository, on the GPU if there is one.

    Raises:
        ValueError: as `resolve_folder`; it cannot be talked with, an adapter's base is not the one it was trained on,
            or peft is missing.
        OSError: as transformers.
    """
    logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = str(resolve_folder(where))
    base = adapter_base(where)
    model = AutoModelForImageTextToText.from_pretrained(base or where, dtype="auto")
    if base:
        if find_spec("bitsandbytes"):
            bitsandbytes()  # peft imports it: in the way that fetches no code
        try:
            from peft import PeftModel
        except ImportError:
            raise ValueError(
                f"{where} is an adapter, which needs peft: {install('lora')}, or put it into "
                "its base by scripts/merge.py"
            ) from None
        model = PeftModel.from_pretrained(model, where)
    processor = AutoProcessor.from_pretrained(where if not base or (Path(where) / BESIDE[1]).is_file() else base)
    if getattr(processor, "chat_template", None) is None:
        raise ValueError(f"{where} has no processor with a chat template: give a folder that training has written")
    return model.to(device).eval(), processor


def geometry(where: str) -> AnyRes | None:
    """How a model cuts pictures; None for one that does it in another way."""
    config = AutoConfig.from_pretrained(adapter_base(where) or resolve_folder(where, "config"))
    if config.model_type != "llava_next":
        return None
    vision = config.vision_config
    return AnyRes(vision.image_size, vision.patch_size, [tuple(pair) for pair in config.image_grid_pinpoints])
