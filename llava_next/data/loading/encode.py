"""A sample's bytes become token ids, labels, tiles and the gather that places their features."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from transformers import PreTrainedTokenizerBase

from llava_next.anyres import AnyRes
from llava_next.data.format.pictures import open_picture
from llava_next.data.format.shards import BadSample, RawSample, StripInfo, decode_strip
from llava_next.data.loading.batch import Example, move_features
from llava_next.templates import Template

ENCODER_VARIABLE = "LLAVA_NEXT_ENCODER"  # tells the server of workers which file `load_encoder` is to read


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, num_rows: int) -> None:
    """Refuses a tokenizer that can produce ids for which the model has no embedding.

    Args:
        num_rows: rows of the model's embedding (`text_config.vocab_size`).

    Raises:
        ValueError: naming the token.
    """
    token, highest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if highest >= num_rows:
        raise ValueError(
            f"token {token!r} of the tokenizer has id {highest}, but the model's embedding has {num_rows} rows; were "
            "tokens added after scripts/compose.py made the folder? Compose it again with this tokenizer"
        )


@dataclass(eq=False)
class Encoder:
    """Everything needed to encode a sample; made once and shared by a rank's workers, see `preload.py`.

    Args:
        template: chat template of the training text.
        tokenizer: fast tokenizer of the model folder.
        image_token_id: id that image positions carry.
        anyres: geometry of the model's tiles.
        max_length: tokens kept of a sample; the rest is cut at the end, image tokens too, as in the original.
    """

    template: Template
    tokenizer: PreTrainedTokenizerBase
    image_token_id: int
    anyres: AnyRes
    max_length: int

    def encode(self, raw: RawSample, sample_id: int, slot: int, source: int) -> Example:
        """One sample, ready to be packed.

        Raises:
            BadSample: a strip that does not decode, tiles of another geometry, conversations that the template
                refuses; the message says which.
        """
        tiles = [picture_tiles(image, number, self.anyres) for number, image in enumerate(raw.images)]
        indices = [self.anyres.feature_index(image.width, image.height) for image in raw.images]
        try:
            input_ids, labels = self.template.encode(
                raw.conversations, self.tokenizer, self.image_token_id, [len(index) for index in indices]
            )
        except ValueError as error:
            raise BadSample(str(error)) from error
        image_positions = np.flatnonzero(input_ids == self.image_token_id)
        feature_index = self._join(indices, [len(t) for t in tiles])
        truncated = max(0, len(input_ids) - self.max_length)
        if truncated:
            input_ids, labels = input_ids[: self.max_length], labels[: self.max_length]
            image_positions = image_positions[image_positions < self.max_length]
            feature_index = feature_index[: len(image_positions)]
        size = self.anyres.tile_size
        return Example(
            sample_id=sample_id,
            slot=slot,
            source=source,
            input_ids=input_ids,
            labels=labels,
            tiles=np.concatenate(tiles) if tiles else np.zeros((0, size, size, 3), np.uint8),
            feature_index=feature_index,
            image_positions=image_positions,
            truncated=truncated,
        )

    def _join(self, indices: list[np.ndarray], num_tiles: list[int]) -> np.ndarray:
        """Feature indices of several images as one, tiles counted on; the newline row stays 0."""
        starts = np.cumsum([0, *num_tiles])[: len(indices)]
        moved = [move_features(i, s, self.anyres.patches_per_tile) for i, s in zip(indices, starts, strict=True)]
        return np.concatenate(moved) if moved else np.zeros(0, np.int64)


class SharedEncoder:
    """Stands for an encoder in what is sent to a worker: unpickled there, it is the encoder.

    Args:
        path: file with the pickled encoder.
    """

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return load_encoder, (self.path,)


@lru_cache(maxsize=1)
def load_encoder(path: str) -> Encoder:
    """The encoder in a file that this rank has written; read once, also for the processes that are forked from here."""
    with open(path, "rb") as file:
        return pickle.load(file)


def picture_tiles(image: StripInfo, number: int, anyres: AnyRes) -> np.ndarray:
    """Tiles of a stored picture, decoded or cut: uint8 [n, S, S, 3].

    Args:
        number: of the picture in its sample, for messages.

    Raises:
        BadSample: it does not decode, or was cut for another geometry than `anyres`.
    """
    if image.is_raw:
        try:
            return anyres.tiles(open_picture(image.data))
        except ValueError as error:
            raise BadSample(str(error)) from error
    grid = anyres.grid(image.width, image.height)
    if grid != (image.rows, image.cols):
        raise BadSample(
            f"image {number} is cut into {image.rows} x {image.cols} tiles, this model wants {grid[0]} x {grid[1]} "
            f"for {image.width} x {image.height} px; rebuild the shards for this vision tower"
        )
    tiles = decode_strip(image.data, anyres.tile_size)
    if len(tiles) != 1 + image.rows * image.cols:
        raise BadSample(f"image {number} holds {len(tiles)} tiles instead of {1 + image.rows * image.cols}")
    return tiles
