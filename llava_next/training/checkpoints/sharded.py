"""The tensors of a run on disk: one safetensors file a rank, and a JSON file that says what is where.

torch's distributed checkpoint decides which rank writes which piece (a replica is written once) and, on reading, which
pieces a rank of any other world needs. Its own file format describes the pieces by a pickle; here it is JSON, so that
no checkpoint, wherever it was copied from, can run code when it is read.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, WriteItem
from torch.futures import Future

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
PIECE = 16 * 2**20  # bytes that are written and summed at a time


def rank_file(rank: int) -> str:
    """`rank-00003.safetensors`"""
    return f"rank-{rank:05d}.safetensors"


def piece_name(name: str, offsets: Iterable[int]) -> str:
    """Name of a piece of a tensor in a rank's file: the tensor's name and where the piece begins, `NAME@1024,0`."""
    return f"{name}@{','.join(map(str, offsets))}"


class Layout:
    """Which rank writes which piece of which tensor. Made once a run, by all ranks; shapes and sharding stay.

    Args:
        tensors: name to tensor, `DTensor`s for what is sharded. Ranks may have names of their own.
        group: of all ranks, for the host.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], group: dist.ProcessGroup):
        self._planner = dcp.DefaultSavePlanner()
        self._planner.set_up_planner(tensors)
        plans = [None] * dist.get_world_size()
        dist.all_gather_object(plans, self._planner.create_local_plan(), group=group)
        # every rank computes the same global plan, so nothing has to be sent back
        plans, _ = self._planner.create_global_plan(plans)
        self.description = _describe([plan.items for plan in plans])
        # widest type first: every piece is then aligned in the staging buffer, without gaps in the file
        mine = (item for item in plans[dist.get_rank()].items if item.tensor_data.chunk.sizes.numel())
        self._items = sorted(mine, key=lambda item: -item.tensor_data.properties.dtype.itemsize)
        self._buffer: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of tensors that this rank writes."""
        return sum(map(_nbytes, self._items))

    def stage(self, tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """Copies this rank's pieces to host memory, which is kept for the next time; when it returns, training may
        change the tensors. The copies are valid until the next call."""
        if self._buffer is None:
            self._buffer = _host_buffer(self.nbytes)
        copies, end = [], 0
        for item, tensor in zip(self._items, self.pieces(tensors), strict=True):
            begin, end = end, end + _nbytes(item)
            copies.append(self._buffer[begin:end].view(tensor.dtype).view(tensor.shape))
            copies[-1].copy_(tensor, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies

    def pieces(self, tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """This rank's pieces where they are: views, which training changes."""
        self._planner.set_up_planner(tensors)
        return [self._planner.resolve_data(item).detach() for item in self._items]

    def write(self, path: Path, pieces: list[torch.Tensor]) -> dict:
        """Writes this rank's file, on disk when it returns. Returns its `bytes` and `crc32`."""
        header, end = {}, 0
        for item in self._items:
            begin, end = end, end + _nbytes(item)
            header[piece_name(item.index.fqn, item.tensor_data.chunk.offsets)] = {
                "dtype": DTYPES[item.tensor_data.properties.dtype],
                "shape": list(item.tensor_data.chunk.sizes),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with open(path, "wb") as file:
            head = len(text).to_bytes(8, "little") + text
            file.write(head)
            crc = zlib.crc32(head)
            for piece in pieces:
                data = memoryview(piece.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
                for begin in range(0, len(data), PIECE):
                    part = data[begin : begin + PIECE]
                    file.write(part)
                    crc = zlib.crc32(part, crc)
            file.flush()
            os.fsync(file.fileno())
        return {"bytes": len(head) + end, "crc32": crc}


def _nbytes(item: WriteItem) -> int:
    return item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize


def _host_buffer(size: int) -> torch.Tensor:
    """Host memory that a GPU copies into at full speed. torch's own pinned memory comes in powers of two."""
    buffer = torch.empty(size, dtype=torch.uint8)
    if size and torch.cuda.is_available():
        torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), size, 0)
    return buffer


def _describe(plans: list[list[WriteItem]]) -> dict:
    """Tensor name -> dtype, shape, and [offsets, sizes, rank] of its pieces. JSON."""
    tensors = {}
    for rank, items in enumerate(plans):
        for item in items:
            data = item.tensor_data
            dtype = str(data.properties.dtype).removeprefix("torch.")
            entry = tensors.setdefault(item.index.fqn, {"dtype": dtype, "shape": list(data.size), "pieces": []})
            if data.chunk.sizes.numel():
                entry["pieces"].append([list(data.chunk.offsets), list(data.chunk.sizes), rank])
    return tensors


def read_tensors(folder: Path, description: dict, tensors: dict[str, torch.Tensor], group: dist.ProcessGroup) -> None:
    """Fills `tensors` in place from the files of any world; each rank reads only what it holds. A collective.

    Args:
        description: `Layout.description` of the writer.
    """
    dcp.load(tensors, storage_reader=_Reader(folder, description), process_group=group)


class _Reader(dcp.StorageReader):
    """torch's distributed checkpoint reads through this."""

    def __init__(self, folder: Path, description: dict):
        self._folder, self._description = folder, description

    def read_metadata(self, *args, **kwargs) -> Metadata:
        tensors, files = {}, {}
        for name, entry in self._description.items():
            chunks = []
            for offsets, sizes, rank in entry["pieces"]:
                chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
                files[MetadataIndex(name, offsets)] = rank_file(rank)
            properties = TensorProperties(dtype=getattr(torch, entry["dtype"]))
            tensors[name] = TensorStorageMetadata(properties, torch.Size(entry["shape"]), chunks)
        return Metadata(tensors, storage_data=files)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args, **kwargs) -> None:
        self._files = metadata.storage_data

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self._files[item.storage_index], []).append(item)
        for name, items in by_file.items():
            with safe_open(self._folder / name, framework="pt") as file:
                for item in items:
                    key = piece_name(item.storage_index.fqn, item.storage_index.offset)
                    if item.lengths:
                        part = [slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True)]
                        tensor = file.get_slice(key)[tuple(part)]
                    else:
                        tensor = file.get_tensor(key)
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(tensor)
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def reset(self, checkpoint_id=None) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id) -> bool:
        return False
