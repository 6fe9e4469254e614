"""Inputs that hold their pictures: Hugging Face data sets (parquet) and webdataset shards with raw images."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from building.shard_walk import Stream, samples_in, shard_files
from llava_next.data.format.picture_forms import PICTURE_KEYS, Picture
from llava_next.data.format.records import SYSTEM_KEYS, TEXT_KEYS, source_name
from llava_next.data.format.shards import RawSample, read_sample
from llava_next.data.format.tar import BadSample
from llava_next.data.inputs.listing import Lister, Listing
from llava_next.data.storage.client import Storage
from llava_next.versions import install

SHARDS_AT_ONCE = 4


class HubReader:
    """Rows of a `datasets.Dataset`, which lies memory-mapped on disk; an address is (0, row, 0)."""

    def __init__(self, dataset):
        self.dataset = dataset

    def read(self, address: np.ndarray) -> dict:
        """See `listing.Reader`."""
        return self.dataset[int(address[1])]


def list_hub(name: str, split: str) -> Listing:
    """A data set of the Hugging Face hub by its id, a local folder of parquet files, or one such file: `datasets`
    copies them into its cache as Arrow files, from which any row is read at once.

    Raises:
        ValueError: no such data set, or one without a column of texts.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(f"--hf needs the package datasets: {install('data')}") from None
    try:
        if Path(name).exists():
            found = Path(name).rglob("*.parquet") if Path(name).is_dir() else [Path(name)]
            files = sorted(map(str, found))
            dataset = load_dataset("parquet", data_files={split: files}, split=split)
        else:
            dataset = load_dataset(name, split=split)
    except Exception as error:  # whatever the network, the hub or a damaged file make of it
        cure = f"`hf download {name} --repo-type dataset --local-dir DIR` where there is a network, then --hf DIR"
        cure = "" if Path(name).exists() else f". If it cannot be reached from here: {cure}"
        raise ValueError(f"--hf {name}: {type(error).__name__}: {str(error).rstrip('.')}{cure}") from None
    if not set(TEXT_KEYS) & set(dataset.column_names):
        raise ValueError(
            f"--hf {name}: no column conversations (or messages, or prompt and completion), only "
            f"{', '.join(dataset.column_names)}"
        )
    for column, feature in dataset.features.items():
        as_stored = _undecoded(feature)
        if as_stored != feature:
            dataset = dataset.cast_column(column, as_stored)
    return _list_rows(dataset)


def _undecoded(feature):
    """A column's type with its pictures, however deep, left as bytes and path."""
    from datasets import Image, List

    if isinstance(feature, Image):
        return Image(decode=False)
    if isinstance(feature, dict):
        return {name: _undecoded(inner) for name, inner in feature.items()}
    if isinstance(feature, List):
        return List(_undecoded(feature.feature), length=feature.length)
    return feature


def _list_rows(dataset) -> Listing:
    """Hashes ids, texts and names of sources; pictures are not looked at."""
    lister, digest = Lister(), hashlib.sha256()
    wanted = ("id", "source", "data_source", *SYSTEM_KEYS, *TEXT_KEYS)
    texts = [name for name in wanted if name in dataset.column_names]
    has_images = any(name in dataset.column_names for group in PICTURE_KEYS for name in group)
    for row, record in enumerate(dataset.select_columns(texts)):
        digest.update(json.dumps(record, sort_keys=True, default=str).encode())
        # one source a set, unless the rows say otherwise
        name = source_name(record | {"image": Picture("", b"")} if has_images else record)
        lister.add((0, row, 0), name)
    return lister.listing(digest.hexdigest(), HubReader(dataset))


@dataclass(frozen=True)
class ShardReader:
    """Samples of webdataset shards; an address is (shard, first byte, bytes)."""

    storage: Storage
    names: tuple[str, ...]

    def read(self, address: np.ndarray) -> dict:
        """See `listing.Reader`."""
        shard, start, length = address.tolist()
        return _record(read_sample(self.storage.read_range(self.names[shard], start, length)))


def list_shards(url: str) -> Listing:
    """All samples of the `*.tar` files at a URL.

    Raises:
        ValueError: no shards, or damaged ones, each with its reason.
        StorageError: a read failed.
    """
    storage = Storage(url)
    shards = shard_files(storage)
    with ThreadPoolExecutor(SHARDS_AT_ONCE) as pool:
        listed = list(pool.map(lambda shard: _list_shard(storage, *shard), shards))
    damaged = [problem for _, _, problem in listed if problem]
    if damaged:
        raise ValueError(f"--shards: {len(damaged)} damaged shard(s), copy them again: {'; '.join(damaged[:10])}")
    lister, digest = Lister(), hashlib.sha256()
    for number, (found, sha256, _) in enumerate(listed):
        digest.update(sha256.encode())
        for start, length, source in found:
            lister.add((number, start, length), source)
    return lister.listing(digest.hexdigest(), ShardReader(storage, tuple(name for name, _ in shards)))


def _list_shard(storage: Storage, name: str, size: int) -> tuple[list[tuple[int, int, str]], str, str]:
    """Of each sample first byte, bytes and source; sha256 of the shard; what is wrong with it, or nothing."""
    stream, found = Stream(storage, name, size), []
    try:
        for sample in samples_in(stream):
            if sample.problem:
                return found, "", f"{storage.address(name)}: {sample.problem}"
            try:
                source = source_name(_record(read_sample(sample.data)))
            except BadSample:
                source = "image"  # the build reads it again, and reports it
            found.append((sample.start, len(sample.data), source))
    except BadSample as error:
        return found, "", f"{storage.address(name)}: {error}"
    return found, stream.sha256(), ""


def _record(sample: RawSample) -> dict:
    """A sample of a shard as a record. Raises BadSample."""
    if not all(image.is_raw for image in sample.images):
        raise BadSample(f"sample {sample.key!r} holds tiles already; build from shards with raw images")
    pictures = [Picture(f"{sample.key}.{image.ext}", image.data) for image in sample.images]
    record = {"id": sample.id, "source": sample.source, "conversations": sample.conversations}
    return record | {"image": pictures} if pictures else record
