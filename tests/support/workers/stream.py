"""One rank of a run that reads its data and trains nothing: what it is given, sample by sample, goes to a file.

Usage: stream.py FILE, where the file is a pickle of what `read_rank` is called with, positional and by name.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import sys
import time
from pathlib import Path

from llava_next.data.loading.batch import PackedBatch
from llava_next.data.loading.feed import Feed
from llava_next.data.loading.loader import LoaderOptions, build_loader
from llava_next.data.plan.mixture import Mixture
from llava_next.data.storage.client import Storage


def contents(batch: PackedBatch, patches_per_tile: int) -> list[tuple[int, int, str]]:
    """(slot, sample id, hash of its tokens and pixels) of each sample in a batch."""
    found, bounds = [], batch.cu_seqlens.tolist()
    for slot, sample_id, begin, end in zip(batch.slots, batch.sample_ids, bounds, bounds[1:], strict=False):
        digest = hashlib.sha256(batch.input_ids[begin:end].numpy().tobytes())
        features = batch.feature_index[(batch.image_positions >= begin) & (batch.image_positions < end)]
        tiles = ((features[features > 0] - 1) // patches_per_tile).unique()
        digest.update(batch.tiles[tiles].numpy().tobytes())
        found.append((slot, sample_id, digest.hexdigest()[:16]))
    return found


def read_rank(
    url: str,
    encoder,
    out: Path,
    rank: int = 0,
    world: int = 1,
    num_workers: int = 0,
    start_step: int = 0,
    batch_size: int = 8,
    epochs: int = 2,
    pause: float = 0.0,
    last_step: int | None = None,
    **storage_options,
) -> None:
    """Reads all steps from `start_step` on; appends a JSON line a step to `out`: step, samples, counters."""
    storage = Storage(url, **storage_options)
    mixture = Mixture([(storage, "data", 1.0)], encoder.anyres, batch_size, epochs, max_length=encoder.max_length)
    options = LoaderOptions(num_workers, reads_in_flight=16, dump_folder=out.parent)
    feed = Feed(build_loader(mixture, encoder, rank, world, 1500, 60, start_step, options))
    with open(out, "a") as file:
        for step, micros in feed:
            samples = [row for batch in micros for row in contents(batch, encoder.anyres.patches_per_tile)]
            io = {key: sum(batch.io[key] for batch in micros) for key in micros[0].io}
            holes = [hole.sample_id for batch in micros for hole in batch.holes]
            print(json.dumps({"step": step, "samples": samples, "io": io, "holes": holes}), file=file, flush=True)
            time.sleep(pause)
            if step == last_step:
                break
    feed.close()


if __name__ == "__main__":
    positional, named = pickle.loads(Path(sys.argv[1]).read_bytes())
    read_rank(*positional, **named)
