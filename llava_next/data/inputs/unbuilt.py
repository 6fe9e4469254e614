"""A data set that is not built yet: its index, made of records and the headers of pictures, with exact lengths.

Samples, their order in the shards and what is left out are those of the build with default arguments. Damage behind a
picture's header shows in the build only.
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from llava_next.anyres import AnyRes
from llava_next.data.format.dataset import DatasetInfo, ShardInfo
from llava_next.data.format.index import Index, Lengths
from llava_next.data.format.shards import RawSample, sample_members
from llava_next.data.format.tar import one_line
from llava_next.data.format.writer import IndexRows, index_only, index_row, shard_name
from llava_next.data.inputs.listing import Reader, list_json
from llava_next.data.inputs.samples import (
    TURN_COUNTS,
    SampleMaker,
    by_reason,
    common_reasons,
    make_samples,
    turn_counts,
)
from llava_next.data.inputs.text_lengths import fingerprints
from llava_next.paths import PathError, local_path
from llava_next.progress import Progress, worker_pool
from llava_next.shuffling import permutation

# What a build does unless it is told otherwise.
SHARD_SAMPLES, SEED, MAX_REJECTED_SHARE = 1000, 0, 0.05
RECORD_FILES = (".json", ".jsonl", ".yaml", ".yml")
IN_PROCESS = 4 * SHARD_SAMPLES  # with more samples than this, worker processes are worth their start
BYTES_PER_PIXEL = 0.33  # of a strip: photos at quality 95 take 39 kB a tile of 336 px, 47 kB of 384 px


@dataclass(frozen=True)
class Unbuilt:
    """What would be built of a file of records.

    Args:
        label: the file.
        info, index: of the data set; sizes in bytes are estimates, places in shards are 0.
        rejected: samples left out (`row`, `id`, `file`, `reason`), in the order of the file.
    """

    label: str
    info: DatasetInfo
    index: Index
    rejected: list[dict]

    @property
    def listed(self) -> int:
        """Samples of the file."""
        return self.info.samples + len(self.rejected)

    def report(self) -> list[str]:
        """Lines on the samples left out, by reason, the first of each by name; none when there are none."""
        if not self.rejected:
            return []
        lines = [f"{len(self.rejected):,} of {self.listed:,} samples a build would leave out:"]
        groups, reasons = by_reason(self.rejected), common_reasons(self.rejected)
        lines += [f"  {text}" for text in reasons]
        if others := groups[len(reasons) :]:
            lines.append(f"  {sum(len(entries) for _, entries in others):,} for {len(others)} other reasons")
        if len(self.rejected) > MAX_REJECTED_SHARE * self.listed:
            lines.append(f"  the build refuses more than {100 * MAX_REJECTED_SHARE:g} % (--max_rejected_share)")
        return list(map(one_line, lines))


def records_file(source: str) -> Path | None:
    """The file of records that a data source names; None: a folder of shards, or a URL."""
    try:
        path = local_path(source)
    except PathError:
        return None
    return path if path.is_file() or (path.suffix.lower() in RECORD_FILES and not path.is_dir()) else None


def measure(path: Path, maker: SampleMaker, tokenizers: tuple[str, ...]) -> Unbuilt:
    """The data set that a build would make of a file of records.

    Args:
        maker: of its samples, by the headers of their pictures.
        tokenizers: `NAME_OR_FOLDER:template` of those whose lengths are counted.

    Raises:
        ValueError: no such file, not one of records, or no sample that can be used; naming the file.
    """
    listing = list_json(path, SEED, maker.root)
    order = permutation(len(listing), SEED)
    rows = [order[start : start + SHARD_SAMPLES] for start in range(0, len(order), SHARD_SAMPLES)]
    work = partial(_measure_shard, listing.reader, maker, tokenizers)
    rejected, build = [], dict.fromkeys(TURN_COUNTS, 0)

    def parts() -> Iterator[tuple[ShardInfo, pa.Table]]:
        done = 0
        workers = 0 if len(listing) <= IN_PROCESS else os.cpu_count()
        with worker_pool(workers) as pool, Progress(len(listing)) as progress:
            found = pool.map(work, rows, (listing.addresses[part] for part in rows))
            for number, (table, left_out, counted) in enumerate(found):
                rejected.extend(left_out)
                build.update({name: build[name] + count for name, count in counted.items()})
                done += len(rows[number])
                progress.show(done, len(rejected))
                if len(table):
                    size = int(table["nbytes"].to_numpy().sum(dtype=np.int64))
                    yield ShardInfo(shard_name(number), size, len(table), ""), table
        build["rejected"] = len(rejected)

    info, index = index_only(maker.anyres, "auto", parts(), build)
    if not info.samples:
        raise ValueError(
            f"{path}: {len(rejected)} of {len(listing)} samples rejected; most often: "
            f"{'; '.join(common_reasons(rejected))}. Images are looked for in {maker.root} (data.image_root)"
        )
    return Unbuilt(str(path), info, index, sorted(rejected, key=lambda entry: entry["row"]))


def _measure_shard(
    reader: Reader, maker: SampleMaker, tokenizers: tuple[str, ...], rows: np.ndarray, addresses: np.ndarray
) -> tuple[pa.Table, list[dict], Counter]:
    """Rows of the index for the samples of one shard, those left out, and `TURN_COUNTS`; runs in a worker."""
    columns, counts = IndexRows(fingerprints(tokenizers)), Counter()

    def keep(sample: RawSample, lengths: dict[str, Lengths]) -> None:
        members = sample_members(sample)
        grids = [(image.rows, image.cols) for image in sample.images]
        size = len(members["json"]) + _strip_bytes(grids, maker.anyres)
        columns.add(index_row(sample, 0, size, 0, grids), lengths)
        counts.update(turn_counts(sample))

    made = make_samples(reader, maker, tokenizers, rows.tolist(), addresses, keep)
    rejected = [entry for entry in made if entry]
    return columns.table(), rejected, counts


def _strip_bytes(grids: list[tuple[int, int]], anyres: AnyRes) -> int:
    """What the pictures of a sample take, estimated."""
    return round(sum(1 + rows * cols for rows, cols in grids) * anyres.tile_size**2 * BYTES_PER_PIXEL)
