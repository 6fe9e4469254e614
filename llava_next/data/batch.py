"""Samples in, one flat micro-batch out: `PackedBatch`."""

from __future__ import annotations

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
    `target_weights float32 [K]`, `target_source [K]`. All others int64.
    On the host: `target_slot [K]` (place in the step of the sample that a target belongs to), `slots`,
    `sample_ids` and `supervised` (targets per sample) of the samples packed here, in order; what they hold in
    total; holes; and where the batch stands: micro-batch `micro` of `num_micro` in step `step`.

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

    MODEL_FIELDS = (
        "input_ids",
        "position_ids",
        "cu_seqlens",
        "max_seqlen",
        "tiles",
        "feature_index",
        "image_positions",
        "target_positions",
        "target_ids",
        "target_weights",
        "target_source",
    )

    @property
    def num_tokens(self) -> int:
        """Tokens of real samples (0 for an empty batch, which carries one filler token)."""
        return self.input_ids.shape[0] if self.sample_ids else 0

    def weighted(self, slot_weights: torch.Tensor) -> PackedBatch:
        """A copy whose `target_weights` are multiplied by its samples' weights.

        Args:
            slot_weights: float32 `[B]` on the host, weight of each supervised token of the sample in that slot.
        """
        return replace(self, target_weights=self.target_weights * slot_weights[self.target_slot])

    def model_inputs(self, device: torch.device) -> dict:
        """The fields that the model's forward takes, tensors copied to `device` without waiting."""
        values = {name: getattr(self, name) for name in self.MODEL_FIELDS}
        return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in values.items()}

    def pin_memory(self) -> PackedBatch:
        """Called by torch's DataLoader: page-locks the tensors so that copies to the device can overlap."""
        pinned = {f.name: v.pin_memory() for f in fields(self) if torch.is_tensor(v := getattr(self, f.name))}
        return replace(self, **pinned)


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
    """
    lengths = [len(e.input_ids) for e in examples]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tile_starts = np.concatenate([[0], np.cumsum([len(e.tiles) for e in examples])]).astype(np.int64)

    def concat(parts: list[np.ndarray], dtype=np.int64) -> np.ndarray:
        return np.concatenate(parts).astype(dtype, copy=False) if parts else np.zeros(0, dtype)

    def rows(example: Example, tile_start: int) -> np.ndarray:
        # row 0 is the newline and is shared; patches move on by the tiles of the samples before
        index = example.feature_index
        return np.where(index > 0, index + tile_start * patches_per_tile, 0)

    # The label at t is predicted from t - 1; the first token of a segment has nothing before it.
    targets = [np.flatnonzero(e.labels[1:] != IGNORE) for e in examples]
    supervised = [len(t) for t in targets]
    target_positions = concat([t + s for t, s in zip(targets, starts[:-1], strict=True)])
    target_ids = concat([e.labels[1:][t] for e, t in zip(examples, targets, strict=True)])
    target_weights = np.ones(len(target_positions), np.float32)
    target_source = np.repeat(np.array([e.source for e in examples], np.int64), supervised)
    target_slot = np.repeat(np.array([e.slot for e in examples], np.int64), supervised)
    if not len(target_positions):
        target_positions = target_ids = target_source = target_slot = np.zeros(1, np.int64)
        target_weights = np.zeros(1, np.float32)

    tiles = [e.tiles for e in examples if len(e.tiles)]
    return PackedBatch(
        input_ids=torch.from_numpy(concat([e.input_ids for e in examples]) if examples else np.zeros(1, np.int64)),
        position_ids=torch.from_numpy(concat([np.arange(n) for n in lengths]) if examples else np.zeros(1, np.int64)),
        cu_seqlens=torch.from_numpy((starts if examples else np.array([0, 1])).astype(np.int32)),
        max_seqlen=max(lengths, default=1),
        tiles=torch.from_numpy(concat(tiles, np.uint8) if tiles else np.zeros((1, tile_size, tile_size, 3), np.uint8)),
        feature_index=torch.from_numpy(concat([rows(e, t) for e, t in zip(examples, tile_starts, strict=False)])),
        image_positions=torch.from_numpy(
            concat([e.image_positions + s for e, s in zip(examples, starts[:-1], strict=True)])
        ),
        target_positions=torch.from_numpy(target_positions),
        target_ids=torch.from_numpy(target_ids),
        target_weights=torch.from_numpy(target_weights),
        target_source=torch.from_numpy(target_source),
        target_slot=torch.from_numpy(target_slot),
        slots=[e.slot for e in examples],
        sample_ids=[e.sample_id for e in examples],
        supervised=supervised,
        num_tiles=int(tile_starts[-1]),
        num_truncated=sum(e.truncated > 0 for e in examples),
        holes=list(holes),
        step=step,
        micro=micro,
        num_micro=num_micro,
    )
