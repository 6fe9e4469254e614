"""Model folders in the llava-hf layout, written and read.

Of the layouts in circulation this is the one that transformers 4.45 to 5.x and vLLM all load with zero missing keys:
`language_model.model.*`, `language_model.lm_head.weight`, `vision_tower.vision_model.*`,
`multi_modal_projector.linear_{1,2}.*`, `image_newline`. `save_pretrained` of transformers 5 writes other names for a
freshly composed model, and older releases load those as random weights with only a warning; so the names are written
explicitly here, one tensor at a time.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor

from llava_next.model.folders.companions import copy_companions
from llava_next.model.forward.kinds import language_kind, rotary_parameters
from llava_next.model.forward.lora import ADAPTER, BASE, adapter_parameters, is_adapter, merged_weight, plain_name
from llava_next.model.forward.nf4 import PACKED, SCALES

INDEX_NAME = "model.safetensors.index.json"
MAX_FILE_BYTES = 5 * 10**9


def file_key(name: str) -> str:
    """The llava-hf key of a parameter of `LlavaNextForConditionalGeneration`.

    Raises:
        ValueError: for a name that is not part of the model.
    """
    if name == "lm_head.weight":
        return "language_model.lm_head.weight"
    prefix, _, rest = name.removeprefix("model.").partition(".")
    if prefix == "language_model":
        return f"language_model.model.{rest}"
    if prefix == "vision_tower":
        # transformers 5.17 nests the tower in `vision_model`, 5.23 does not; the file always does
        return f"vision_tower.vision_model.{rest.removeprefix('vision_model.')}"
    if prefix in ("multi_modal_projector", "image_newline"):
        return name.removeprefix("model.")
    raise ValueError(f"parameter {name!r} has no place in the llava-hf layout")


class SafetensorsWriter:
    """Writes tensors one by one into safetensors files of limited size plus their index.

    Holds at most one file's tensors in memory. Use as a context manager; nothing counts until `__exit__` has written
    the index. A single file is named `model.safetensors` and has no index.
    """

    def __init__(self, folder: Path, max_file_bytes: int = MAX_FILE_BYTES, dtype: torch.dtype | None = None):
        self.folder = Path(folder)
        self.dtype = dtype  # None: as the tensors come
        self.max_file_bytes = max_file_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._files: list[dict[str, int]] = []

    def add(self, key: str, tensor: torch.Tensor) -> None:
        """Takes a tensor (any device); writes out a file when the limit would be passed."""
        dtype = self.dtype or tensor.dtype
        size = tensor.numel() * dtype.itemsize
        if self._pending and self._pending_bytes + size > self.max_file_bytes:
            self._flush()
        # one copy, always: a view would keep its whole buffer alive, and safetensors refuses shared memory
        self._pending[key] = tensor.detach().to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)
        self._pending_bytes += size

    def _flush(self) -> None:
        path = self.folder / f"part-{len(self._files):05d}.safetensors"
        try:
            save_file(self._pending, path, metadata={"format": "pt"})
        except SafetensorError as error:
            raise _os_error(error, path) from error
        # safetensors makes files that only their owner may read: as readable as their folder, which honours the umask
        path.chmod(self.folder.stat().st_mode & 0o666)
        flush_to_disk(path)
        self._files.append({k: v.numel() * v.element_size() for k, v in self._pending.items()})
        self._pending, self._pending_bytes = {}, 0

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, exc_type, exc, tb) -> None:
        if exc_type is not None:
            return
        if self._pending:
            self._flush()
        count = len(self._files)
        names = [
            "model.safetensors" if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)
        ]
        for i, name in enumerate(names):
            os.replace(self.folder / f"part-{i:05d}.safetensors", self.folder / name)
        if count > 1:
            weight_map = {key: name for name, keys in zip(names, self._files, strict=True) for key in keys}
            total = sum(size for keys in self._files for size in keys.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (self.folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def _os_error(error: SafetensorError, path: Path) -> Exception:
    """What the system said when safetensors could not write, which it passes on as text only."""
    number = re.search(r"os error (\d+)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1])), str(path)) if number else error


def full_tensors(
    model: nn.Module, unquantised: Callable[[str], torch.Tensor] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, whole tensor) of every parameter, gathered one at a time. A collective: all ranks must run it to the end.

    Tied weights come once, under the name of the embedding. Adapters are merged: a matrix that has one comes float32.

    Args:
        unquantised: gives the matrix of a name that the model has in 4 bits, as it was; without it, it is left out.
    """
    for name, parameter in model.named_parameters():
        if is_adapter(name) or name.endswith(SCALES):
            continue
        in_4_bits = name.endswith(PACKED)
        name = name.removesuffix(PACKED) + ".weight" if in_4_bits else name
        tensor = None if in_4_bits else whole(parameter)
        if BASE in name and name.endswith("weight"):
            layer = model.get_submodule(name.partition(BASE)[0])
            adapter = {kind: whole(part) for kind, part in adapter_parameters(layer).items()}
            if in_4_bits and unquantised:
                tensor = unquantised(plain_name(name)).to(parameter.device)
            if tensor is not None:
                tensor = merged_weight(tensor, layer.scaling[ADAPTER], **adapter)
        if tensor is not None:
            yield plain_name(name), tensor


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter without its gradient, gathered where it is sharded: a collective then."""
    tensor = parameter.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def save_model(
    model: nn.Module,
    folder: str | Path,
    companions: str | Path | None = None,
    dtype: torch.dtype = torch.bfloat16,
    is_main_process: bool = True,
    max_file_bytes: int = MAX_FILE_BYTES,
    unquantised: Callable[[str], torch.Tensor] | None = None,
    tell: Callable[[Path], None] = lambda folder: None,
) -> Path:
    """Writes a model folder that stock `from_pretrained` loads. All ranks must call it; the main one writes.

    The folder appears under its name only when it is complete and on disk; an older one of that name is replaced.
    At no moment is there neither: a kill between the two renames leaves the old one as `FOLDER.old`, which the next
    call puts back before it starts.

    Args:
        model: the model, sharded by FSDP2 or not, wrapped for activation checkpointing or not.
        companions: folder with tokenizer, processor and template files to take along.
        dtype: of every tensor written, and what config.json states.
        max_file_bytes: size limit of one safetensors file. Beside the model, memory holds one file's tensors and
            the gathered tensor that is being copied into it.
        unquantised: see `full_tensors`; used on the main process.
        tell: called with the folder before it gets its name, to write the card.

    Returns:
        The folder.

    Raises:
        ValueError: a parameter that is not part of the layout.
        OSError: the folder cannot be written. The other ranks are not left waiting: the main one gathers to the end
            before it raises.
    """
    if is_main_process and unquantised is None and any(name.endswith(PACKED) for name, _ in model.named_parameters()):
        raise ValueError("a model in 4 bits is written from what it was before; give `unquantised`")
    folder, gathered = Path(folder), full_tensors(model, unquantised if is_main_process else None)
    try:
        if is_main_process:
            with made_aside(folder) as aside:
                write_weights(((file_key(name), t) for name, t in gathered), aside, max_file_bytes, dtype)
                write_config(model.config, aside, dtype)
                if companions is not None:
                    copy_companions(companions, aside)
                tell(aside)
    finally:
        for _ in gathered:
            pass
    return folder


@contextlib.contextmanager
def made_aside(folder: Path) -> Iterator[Path]:
    """An empty folder, which takes the place of `folder` when the block ends well; if not, nothing of it stays."""
    aside, old = (folder.with_name(folder.name + ending) for ending in (".tmp", ".old"))
    if old.exists() and not folder.exists():  # a kill came between the renames of `replace_folder`
        os.replace(old, folder)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    is_whole = False
    try:
        yield aside
        is_whole = True
        replace_folder(aside, folder)
    except BaseException as error:
        if not is_whole or isinstance(error, OSError):  # a full disk needs the room
            shutil.rmtree(aside, ignore_errors=True)
        raise


def replace_folder(aside: Path, folder: Path) -> None:
    """Puts the finished folder `aside` in the place of `folder`, on disk before it is visible.

    A folder with files in it cannot be renamed over: the previous one waits as `FOLDER.old` for the new one.
    """
    old = folder.with_name(folder.name + ".old")
    for path in aside.iterdir():
        flush_to_disk(path)
    flush_to_disk(aside)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(aside, folder)
    flush_to_disk(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def flush_to_disk(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        # some network file systems cannot do this for a folder
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def write_weights(
    tensors: Iterable[tuple[str, torch.Tensor]], folder: Path, max_file_bytes: int, dtype: torch.dtype | None = None
) -> None:
    """Writes (key, tensor) pairs, already under the file's names; in `dtype`, or each in its own."""
    with SafetensorsWriter(folder, max_file_bytes, dtype) as writer:
        for key, tensor in tensors:
            writer.add(key, tensor)


def write_config(config, folder: Path, dtype: torch.dtype) -> None:
    """Writes config.json with the class name that stock transformers knows and the dtype in the files.

    Every value is spelled out, because defaults differ between releases. Older releases read `torch_dtype`,
    `rope_theta` and `rope_scaling` where newer ones read `dtype` and `rope_parameters`: both are written.
    """
    state = json.loads(config.to_json_string(use_diff=False))
    name = str(dtype).removeprefix("torch.")
    for part in (state, state["text_config"], state["vision_config"]):
        part.pop("_name_or_path", None)
        part["dtype"] = part["torch_dtype"] = name
    state["text_config"] |= old_rope(config.text_config)
    state["architectures"] = ["LlavaNextForConditionalGeneration"]
    (folder / "config.json").write_text(json.dumps(state, indent=2, sort_keys=True) + "\n")


def old_rope(text) -> dict:
    """A language model's rotary embedding in the words of releases before 5: `rope_theta`, `rope_scaling` and more.

    Where types of layers have embeddings of their own, those of layers with a window have the local base.
    """
    by_kind = rotary_parameters(text)
    rope = by_kind.get(None) or by_kind["full_attention"]
    old = {"rope_theta": rope["rope_theta"], "rope_scaling": None}
    if "sliding_attention" in by_kind:
        old["rope_local_base_freq"] = by_kind["sliding_attention"]["rope_theta"]
    if "partial_rotary_factor" in rope:
        old["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if rope["rope_type"] != "default":
        keys = language_kind(text).old_rope or [key for key in rope if key not in old]
        old["rope_scaling"] = {key: (rope | {"type": rope["rope_type"]})[key] for key in keys}
    return old
