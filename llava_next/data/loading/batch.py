"""Samples in, one flat micro-batch out: `PackedBatch`."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch

IGNORE = -100


@dataclass
class Example:
    """One encoded sample.

    Args:
        sample_id: global id in the run's plan.
        slot: place of the sample in its optimizer step, 0 to B-1.
        source: index of the configured source.
        input_ids: int64 `[t]`, each image already expanded to its number of image tokens.
        labels: int64 `[t]`, unshifted, -100 = not supervised.
        tiles: uint8 `[n, S, S, 3]`, all images' tiles in order; n = 0 without images.
        feature_index: int64 `[m]`: 0 = newline, 1 + tile * patches + patch, tiles counted within this sample.
        image_positions: int64 `[m]`, where the features go in `input_ids`.
        truncated: tokens cut off at the maximum length.
    """

    sample_id: int
    slot: int
    source: int
    input_ids: np.ndarray
    labels: np.ndarray
    tiles: np.ndarray
    feature_index: np.ndarray
    image_positions: np.ndarray
    truncated: int = 0


@dataclass
class Hole:
    """A sample that could not be used: it is left out of its micro-batch and nothing takes its place."""

    sample_id: int
    slot: int
    key: str
    shard: str
    offset: int
    reason: str


@dataclass
class PackedBatch:
    """A micro-batch of T tokens, N tiles, M image positions, K targets and G segments, without padding.

    On the device: `input_ids [T]`, `position_ids [T]` (restart per segment), `cu_seqlens int32 [G+1]`, `max_seqlen`
    (int), `tiles uint8 [N, S, S, 3]`, `feature_index [M]` into the rows [newline, tile 0 patch 0, ...],
    `image_positions [M]`, `target_positions [K]` (the position *before* the supervised token), `target_ids [K]`,
    `target_weights float32 [K]`, `target_source [K]`; `token_keys int32 [T]` and `tile_keys int32 [N]`: random bits by
    step, sample and place in it, for dropout. All others int64.
    On the host: `target_slot [K]` (place in the step of the sample that a target belongs to), `slots`,
    `sample_ids` and `supervised` (targets per sample) of the samples packed here, in order; what they hold in
    total; holes; where the batch stands: micro-batch `micro` of `num_micro` in step `step`; and `io`, what its worker
    has read since its last batch (requests, retries, bytes, cache_hits) and the seconds it waited and encoded.

    A batch without images carries one zero tile, so that the vision tower always runs; a batch without targets
    carries one target of weight 0; an empty batch carries one token.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    tiles: torch.Tensor
    feature_index: torch.Tensor
    image_positions: torch.Tensor
    target_positions: torch.Tensor
    target_ids: torch.Tensor
    target_weights: torch.Tensor
    target_source: torch.Tensor
    token_keys: torch.Tensor
    tile_keys: torch.Tensor
    target_slot: torch.Tensor
    slots: list[int]
    sample_ids: list[int]
    supervised: list[int]
    num_tiles: int
    num_truncated: int = 0
    holes: list[Hole] = field(default_factory=list)
    step: int = 0
    micro: int = 0
    num_micro: int = 1
    io: dict[str, float] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Tokens of real samples (0 for an empty batch, which carries one filler token)."""
        return self.input_ids.shape[0] if self.sample_ids else 0

    def weighted(self, slot_weights: torch.Tensor) -> PackedBatch:
        """A copy whose `target_weights` are multiplied by its samples' weights.

        Args:
            slot_weights: float32 `[B]` on the host, weight of each supervised token of the sample in that slot.
        """
        weights = self.target_weights * slot_weights[self.target_slot]
        # a copy from pageable memory may wait for all that the device has been given
        return replace(self, target_weights=weights.pin_memory() if self.target_weights.is_pinned() else weights)

    def model_inputs(self, device: torch.device) -> dict:
        """The fields that the model's forward takes, tensors copied to `device` without waiting."""
        names = [f.name for f in fields(self)]
        values = {name: getattr(self, name) for name in names[: names.index("target_slot")]}
        return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in values.items()}

    def pin_memory(self) -> PackedBatch:
        """Called by torch's DataLoader: page-locks the tensors so that copies to the device can overlap."""
        pinned = {f.name: v.pin_memory() for f in fields(self) if torch.is_tensor(v := getattr(self, f.name))}
        return replace(self, **pinned)


def move_features(feature_index: np.ndarray, tiles_before: int, patches_per_tile: int) -> np.ndarray:
    """A feature index behind `tiles_before` other tiles; the newline's row 0 is shared and stays."""
    return np.where(feature_index > 0, feature_index + tiles_before * patches_per_tile, 0)


def pack(
    examples: Sequence[Example],
    tile_size: int,
    patches_per_tile: int,
    holes: Sequence[Hole] = (),
    step: int = 0,
    micro: int = 0,
    num_micro: int = 1,
) -> PackedBatch:
    """Concatenates samples to one flat micro-batch.

    Args:
        examples: any number of encoded samples, none included.
        tile_size: S, side of a tile in pixels; patches_per_tile: feature rows per tile (576 for CLIP-L/336).

    Raises:
        ValueError: a sample whose features are not one for each image position, or point outside of its tiles.
    """
    for example in examples:
        _check_features(example, patches_per_tile)
    lengths = [len(e.input_ids) for e in examples]
    starts = np.cumsum([0, *lengths])
    tile_starts = np.cumsum([0, *(len(e.tiles) for e in examples)])
    targets = _targets(examples, starts)
    tiles = [e.tiles for e in examples if len(e.tiles)] or [np.zeros((1, tile_size, tile_size, 3), np.uint8)]
    feature_index = [
        move_features(e.feature_index, tile_start, patches_per_tile)
        for e, tile_start in zip(examples, tile_starts[:-1], strict=True)
    ]
    image_positions = [e.image_positions + start for e, start in zip(examples, starts[:-1], strict=True)]
    filler = [np.zeros(1, np.int64)]  # the one token of an empty batch
    tensors = {
        "input_ids": _concat([e.input_ids for e in examples] or filler),
        "position_ids": _concat([np.arange(n) for n in lengths] or filler),
        "cu_seqlens": (starts if examples else np.array([0, 1])).astype(np.int32),
        "tiles": np.concatenate(tiles),
        "feature_index": _concat(feature_index),
        "image_positions": _concat(image_positions),
        **targets,
        "token_keys": _keys(step, [(e.slot, n) for e, n in zip(examples, lengths, strict=True)] or [(0, 1)], "token"),
        "tile_keys": _keys(step, [(e.slot, len(e.tiles)) for e in examples if len(e.tiles)] or [(0, 1)], "tile"),
    }
    return PackedBatch(
        **{name: torch.from_numpy(array) for name, array in tensors.items()},
        max_seqlen=max(lengths, default=1),
        slots=[e.slot for e in examples],
        sample_ids=[e.sample_id for e in examples],
        supervised=[int((e.labels[1:] != IGNORE).sum()) for e in examples],
        num_tiles=int(tile_starts[-1]),
        num_truncated=sum(e.truncated > 0 for e in examples),
        holes=list(holes),
        step=step,
        micro=micro,
        num_micro=num_micro,
    )


def _keys(step: int, counts: Sequence[tuple[int, int]], kind: str) -> np.ndarray:
    """int32: random bits of each token (or tile) of samples, given as (slot, how many); what else is packed is nothing
    to them."""
    starts = [np.uint32(zlib.crc32(f"{kind} {step} {slot}".encode())) for slot, _ in counts]
    bits = np.concatenate([np.arange(n, dtype=np.uint32) + s for s, (_, n) in zip(starts, counts, strict=True)])
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):  # lowbias32 by C. Wellons
        bits = (bits ^ (bits >> np.uint32(shift))) * np.uint32(factor)
    return (bits ^ (bits >> np.uint32(16))).view(np.int32)


def _check_features(example: Example, patches_per_tile: int) -> None:
    # on the host, where it costs nothing: on a GPU a wrong index is an assertion far from its cause
    index, positions = example.feature_index, example.image_positions
    where = f"sample {example.sample_id}"
    if len(index) != len(positions):
        raise ValueError(
            f"{where}: {len(index)} image features for {len(positions)} image tokens; the image sizes in the data are "
            "not those that the text was expanded for"
        )
    rows, tokens = 1 + len(example.tiles) * patches_per_tile, len(example.input_ids)
    if len(index) and not (0 <= index.min() <= index.max() < rows and 0 <= positions.min() <= positions.max() < tokens):
        raise ValueError(
            f"{where}: image features up to row {index.max()} at positions up to {positions.max()}, but its "
            f"{len(example.tiles)} tiles have {rows} rows and it has {tokens} tokens; were they cut for another tower?"
        )


def _targets(examples: Sequence[Example], starts: np.ndarray) -> dict[str, np.ndarray]:
    """The `target_*` fields: the label at t is predicted from t - 1, a segment's first token has nothing before it."""
    found = [np.flatnonzero(e.labels[1:] != IGNORE) for e in examples]
    if not sum(map(len, found)):
        nothing = np.zeros(1, np.int64)  # one target of weight 0, so that the head always runs
        names = ("target_positions", "target_ids", "target_source", "target_slot")
        return {**dict.fromkeys(names, nothing), "target_weights": np.zeros(1, np.float32)}
    positions = _concat([t + start for t, start in zip(found, starts[:-1], strict=True)])
    counts = [len(t) for t in found]
    return {
        "target_positions": positions,
        "target_ids": _concat([e.labels[1:][t] for e, t in zip(examples, found, strict=True)]),
        "target_weights": np.ones(len(positions), np.float32),
        "target_source": np.repeat(np.array([e.source for e in examples], np.int64), counts),
        "target_slot": np.repeat(np.array([e.slot for e in examples], np.int64), counts),
    }


def _concat(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts).astype(np.int64, copy=False) if parts else np.zeros(0, np.int64)
