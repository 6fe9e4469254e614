"""A published data set by its sizes and lengths alone, in the place of one that is not at hand: for plans only.

The profiles (`mix665k.json`, `pretrain558k.json`) are assumed distributions, drawn from with a fixed seed.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from llava_next.anyres import AnyRes
from llava_next.data.format.dataset import DatasetInfo, ShardInfo
from llava_next.data.format.index import Index

PREFIX = "profile:"
FOLDER = Path(__file__).parent
BYTES_PER_PIXEL = 0.33  # of a strip: photos at JPEG quality 95
TEXT_LIMITS = (16, 3800)  # tokens


def profile_names() -> list[str]:
    """Data sets that there is a profile of."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


class Profile:
    """What stands in for a data set: `info` and `index` as if it had been built.

    Args:
        label: `profile:mix665k`.
        anyres: the model's geometry.

    Raises:
        ValueError: no such profile.
    """

    def __init__(self, label: str, anyres: AnyRes):
        self.label, self.anyres, name = label, anyres, label.removeprefix(PREFIX)
        if name not in profile_names():
            raise ValueError(f"data.sources: {label}: there are profiles of {', '.join(profile_names())}")
        self.sources = json.loads((FOLDER / f"{name}.json").read_text())["sources"]

    @cached_property
    def index(self) -> Index:
        """One row a sample, its source's together; the order of a plan shuffles them."""
        rng, parts = np.random.default_rng(0), []
        for number, source in enumerate(self.sources):
            count, text = source["samples"], source["text_tokens"]
            tokens = rng.lognormal(np.log(text["mean"]) - text["sigma"] ** 2 / 2, text["sigma"], count)
            sizes = np.zeros((0, 2), np.int32)
            if source["sizes"]:
                known, weights = zip(*source["sizes"], strict=True)
                sizes = np.array(known, np.int32)[rng.choice(len(known), count, p=np.array(weights) / sum(weights))]
            parts.append((np.full(count, number, np.int32), np.clip(tokens, *TEXT_LIMITS), sizes))
        source, tokens, sizes = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        rows, cols = self.anyres.grid_many(*sizes.T)
        pictures = np.concatenate([np.full(len(part[0]), len(part[2]) > 0) for part in parts])
        side = self.anyres.tile_size
        nbytes = np.ceil(4 * tokens)
        nbytes[pictures] += np.ceil((1 + rows * cols) * side * side * BYTES_PER_PIXEL)
        count = len(source)
        zeros = np.zeros(count, np.int64)
        return Index(
            shard=zeros.astype(np.int32),
            offset=zeros,
            nbytes=nbytes.astype(np.int32),
            crc32=zeros.astype(np.uint32),
            keys=pa.nulls(count, pa.string()),
            source_names=tuple(part["name"] for part in self.sources),
            source=source,
            image_offsets=np.concatenate([[0], np.cumsum(pictures)]),
            widths=sizes[:, 0],
            heights=sizes[:, 1],
            rows=rows.astype(np.int16),
            cols=cols.astype(np.int16),
            # so that `Index.text_tokens` estimates what was drawn
            text_bytes=np.floor(3.6 * (np.floor(tokens) - 8)).astype(np.int32),
            turns=np.zeros(count, np.int32),
            exact_text_tokens={},
            first_targets={},
            digest=self.label,
        )

    @cached_property
    def info(self) -> DatasetInfo:
        """Its totals, as of a single shard."""
        index, names = self.index, [source["name"] for source in self.sources]
        shard = ShardInfo("", int(index.nbytes.sum(dtype=np.int64)), len(index), "")
        return DatasetInfo(
            *(self.anyres.tile_size, self.anyres.patch_size, self.anyres.pinpoints, "auto"),
            samples=len(index),
            images=len(index.widths),
            tiles=int(index.num_tiles.sum()),
            text_bytes=int(index.text_bytes.sum(dtype=np.int64)),
            sources=dict(zip(names, np.bincount(index.source).tolist(), strict=True)),
            index_bytes=0,
            index_sha256="",
            shards=(shard,),
            square=self.anyres.square,
        )
