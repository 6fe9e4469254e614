"""Feeds mutated samples and index files to the readers, in a process of its own: a crash or a hang is then a failure.

Usage: fuzz.py NAME FOLDER [SECONDS], where FOLDER holds a valid data set. Without SECONDS the examples are the same
each time; with them, new ones are drawn until the time is over. The only outcomes allowed are a value that keeps its
contract, and BadSample, ValueError or StorageError with a message of one printable line. What was being read when the
process died lies in FOLDER/last. Prints the number of examples, how many were read and how many refused, and the peak
of the memory in MB.
"""

import faulthandler
import hashlib
import io
import json
import random
import resource
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from llava_next.anyres import MAX_SIDE
from llava_next.data.format.dataset import DATASET_FILE, MAX_TILES, DatasetInfo, read_info
from llava_next.data.format.index import INDEX_FILE, SCHEMA, read_dataset
from llava_next.data.format.lazy_index import LazyIndex
from llava_next.data.format.pictures import open_picture
from llava_next.data.format.shards import BadSample, decode_strip, read_sample, sample_members
from llava_next.data.storage.client import Storage, StorageError

EXAMPLES = 300  # of a run without SECONDS
MEMORY = 4 << 30  # bytes of address space beyond what the process has at its start
HANG = 30  # seconds without a new example

PLACES = st.integers(0, 1 << 20)
SIZES = st.sampled_from([1, 2, 4, 8, 100, 512, 1024])
NUMBERS = st.sampled_from(
    [0, 1, -1, 2, 7, 127, 128, 255, 2**15 - 1, 2**16, 2**31 - 1, -(2**31), 2**32, 2**62, 2**63 - 1, -(2**63), 2**64]
)
TEXTS = st.sampled_from(
    ["", "\0", "\n", "\x1b[31m", "\x9b2J", "\ud800", "\u202e", "é", "a/b", "../x", "/x", "a\\b", "pipe:x", "x" * 5000]
) | st.text(max_size=5)
SCALARS = (
    NUMBERS | TEXTS | st.sampled_from([None, True, False, 0.5, float("nan"), float("inf"), 10**30]) | st.integers()
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)
BYTE_STEPS = st.lists(
    st.tuples(st.just("flip"), PLACES, st.integers(0, 7))
    | st.tuples(st.just("set"), PLACES, st.binary(min_size=1, max_size=9))
    | st.tuples(st.just("cut"), PLACES, SIZES)
    | st.tuples(st.just("repeat"), PLACES, SIZES)
    | st.tuples(st.just("insert"), PLACES, st.binary(max_size=600)),
    min_size=1,
    max_size=4,
)
# Start and width of a tar header's fields: name, mode, size, type, link, magic, prefix
FIELDS = st.sampled_from([(0, 100), (100, 8), (124, 12), (156, 1), (157, 100), (257, 8), (345, 155)])
FIELD_VALUES = st.binary(max_size=12) | st.sampled_from(
    [b"x", b"g", b"L", b"K", b"S", b"0", b"1", b"2", b"5", b"\0", b"../k.json", b"/k.json", b"k.0.jpg", b"k.pkl"]
    + [b"%o" % size for size in (0, 1, 511, 512, 513, 2**20, 2**33 - 1)]
    + [b"-1", b"\x80" + bytes(10) + b"\x01", b"\xff" * 12, b"7" * 12]
)
HEADER_STEPS = st.lists(st.tuples(PLACES, FIELDS, FIELD_VALUES), min_size=1, max_size=3)
TREE_STEPS = st.lists(
    st.tuples(st.sampled_from(["set", "delete", "repeat", "add"]), PLACES, TEXTS, VALUES), min_size=1, max_size=3
)


def mutate_bytes(data: bytes, steps) -> bytes:
    """`data` with bits flipped, bytes set, and slices removed, repeated or put in."""
    data = bytearray(data)
    for kind, place, what in steps:
        at = place % (len(data) + 1)
        if kind == "flip" and at < len(data):
            data[at] ^= 1 << what
        elif kind == "set":
            data[at : at + len(what)] = what
        elif kind == "cut":
            del data[at : at + what]
        elif kind == "repeat":
            data[at:at] = data[at : at + what]
        elif kind == "insert":
            data[at:at] = what
    return bytes(data)


def mutate_headers(data: bytes, headers: list[int], steps) -> bytes:
    """`data` with fields of the tar headers at `headers` replaced and their checksums put right."""
    data = bytearray(data)
    for place, (start, width), value in steps:
        at = headers[place % len(headers)]
        data[at + start : at + start + width] = value[:width].ljust(width, b"\0")
        data[at + 148 : at + 156] = b" " * 8
        data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    return bytes(data)


def mutate_tree(tree, steps):
    """A JSON value with entries replaced, deleted, repeated or added, at any depth."""
    tree = json.loads(json.dumps(tree))
    for kind, place, name, value in steps:
        containers = [tree]
        for container in containers:
            children = container.values() if isinstance(container, dict) else container
            containers += [child for child in children if isinstance(child, dict | list)]
        container = containers[place % len(containers)]
        keys = list(container) if isinstance(container, dict) else list(range(len(container)))
        if kind == "add" or not keys:
            container.update({name: value}) if isinstance(container, dict) else container.append(value)
        elif kind == "set":
            container[keys[place % len(keys)]] = value
        elif kind == "delete":
            del container[keys[place % len(keys)]]
        elif isinstance(container, list):
            container.append(container[place % len(keys)])
    return tree


def tar_member(name: str, content: bytes) -> bytes:
    """A member with a plain header."""
    header = bytearray(512)
    header[124:136], header[156:157], header[257:265] = b"%011o\0" % len(content), b"0", b"ustar\x0000"
    member = bytes(header) + content + bytes(-len(content) % 512)
    return mutate_headers(member, [0], [(0, (0, 100), name.encode())])


class Target:
    """One fuzzer: `strategy` draws the mutations, `read` applies them, reads, and checks what came out."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.info, self.index = read_dataset(folder)
        where = self.index.locate(2)  # two pictures
        self.key = where.key
        self.sample = Storage(folder).read_range(self.info.shards[where.shard].name, where.offset, where.nbytes)
        self.text = (folder / DATASET_FILE).read_bytes()
        self.parquet = (folder / INDEX_FILE).read_bytes()

    def keep(self, data: bytes) -> bytes:
        """Notes what is read next, for the case of a crash."""
        (self.folder / "last").write_bytes(data)
        return data


class Samples(Target):
    """Samples of ours and of others: bytes, tar headers, description or a picture, one of them mutated."""

    strategy = (
        st.tuples(st.just("bytes"), BYTE_STEPS)
        | st.tuples(st.just("headers"), HEADER_STEPS)
        | st.tuples(st.just("tree"), TREE_STEPS)
        | st.tuples(st.sampled_from(["json", "0", "1", "jpg", "png"]), BYTE_STEPS)
    )

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.members = sample_members(read_sample(self.sample))
        strips = [content for name, content in self.members.items() if name != "json"]
        buffer = io.BytesIO()
        Image.open(io.BytesIO(strips[1])).save(buffer, "PNG")
        self.members = {"0.jpg": strips[0], "1.png": buffer.getvalue(), "json": self.members["json"]}
        turns = [{"from": "human", "value": "<image> ?"}, {"from": "gpt", "value": "!"}]
        text = json.dumps({"id": 3, "conversations": turns}).encode()
        self.foreign = {"jpg": strips[0], "json": text}, {"png": buffer.getvalue(), "txt": b"caption"}

    def mutated(self, kind: str, steps) -> bytes:
        if kind == "bytes":
            return mutate_bytes(self.sample, steps)
        headers, at = [], 0
        members = dict({"jpg": self.foreign[0], "png": self.foreign[1]}.get(kind, self.members))
        for name, content in members.items():
            headers.append(at)
            at += 512 + len(content) + -len(content) % 512
            if kind == "tree" and name == "json":
                members[name] = json.dumps(mutate_tree(json.loads(content), steps)).encode()
            elif name.split(".")[0] == kind:
                members[name] = mutate_bytes(content, steps)
        data = b"".join(tar_member(f"{self.key}.{name}", content) for name, content in members.items())
        return mutate_headers(data, headers, steps) if kind == "headers" else data

    def read(self, drawn) -> None:
        sample = read_sample(self.keep(self.mutated(*drawn)), self.key)
        for image in sample.images:
            if image.is_raw:
                tiles = self.info.anyres.tiles(open_picture(image.data))
            else:
                tiles = decode_strip(image.data, self.info.tile_size)
            assert tiles.dtype == np.uint8 and tiles.shape[1:] == (self.info.tile_size,) * 2 + (3,)
        if not any(image.is_raw for image in sample.images):
            again = [tar_member(f"{self.key}.{name}", content) for name, content in sample_members(sample).items()]
            assert read_sample(b"".join(again), self.key) == sample


class Indexes(Target):
    """index.parquet, as bytes or as columns with hostile values; dataset.json names its right sha256."""

    strategy = st.tuples(st.just("bytes"), BYTE_STEPS) | st.tuples(
        st.just("columns"), st.lists(st.tuples(st.sampled_from(SCHEMA.names), PLACES, VALUES), min_size=1, max_size=2)
    )

    def mutated(self, kind: str, steps) -> bytes:
        if kind == "bytes":
            return mutate_bytes(self.parquet, steps)
        table = pq.read_table(io.BytesIO(self.parquet))
        for name, place, value in steps:
            column = table[name].to_pylist()
            column[place % len(column)] = value
            place_in_table = table.column_names.index(name)
            try:
                table = table.set_column(place_in_table, name, pa.array(column, SCHEMA.field(name).type))
            except (pa.ArrowException, TypeError, ValueError, OverflowError):
                table = table.set_column(place_in_table, name, pa.array([repr(entry) for entry in column]))
        buffer = io.BytesIO()
        with pq.ParquetWriter(buffer, table.schema) as writer:
            for start, shard in zip(np.cumsum([0, *(s.samples for s in self.info.shards)]), self.info.shards):  # noqa: B905
                writer.write_table(table.slice(start, shard.samples))
        return buffer.getvalue()

    def read(self, drawn) -> None:
        data = self.keep(self.mutated(*drawn))
        (self.folder / INDEX_FILE).write_bytes(data)
        values = json.loads(self.text) | {"index_bytes": len(data), "index_sha256": hashlib.sha256(data).hexdigest()}
        (self.folder / DATASET_FILE).write_text(json.dumps(values))
        refusals = []
        for reader in (read_dataset, self.read_lazily):
            try:
                self.check(*reader(Storage(self.folder)))
            except (ValueError, StorageError) as error:
                check_refusal(error, self.folder)
                refusals.append(error)
        if refusals:
            raise refusals[0]

    def read_lazily(self, storage: Storage):
        """As training reads large data sets."""
        info, digest = read_info(storage)
        return info, LazyIndex(storage, info, digest, keep_shards=2).take(np.arange(info.samples))

    def check(self, info, index) -> None:
        for row in range(info.samples):
            where = index.locate(row)
            assert 0 <= where.offset < where.offset + where.nbytes <= info.shards[where.shard].bytes
            assert where.key.isprintable()
            assert all(1 <= side <= MAX_SIDE for size in index.image_sizes(row) for side in size)
        assert len(index) == info.samples and (index.num_tiles <= MAX_TILES * np.diff(index.image_offsets)).all()
        assert (index.text_tokens()[0] > 0).all() and (index.image_tokens(info.anyres) >= 0).all()


class Descriptions(Target):
    """dataset.json, as bytes or with hostile entries."""

    strategy = st.tuples(st.just("bytes"), BYTE_STEPS) | st.tuples(st.just("json"), TREE_STEPS)

    def read(self, drawn) -> None:
        kind, steps = drawn
        text = mutate_bytes(self.text, steps) if kind == "bytes" else self._tree(steps)
        (self.folder / DATASET_FILE).write_bytes(self.keep(text))
        info, _ = read_dataset(self.folder)
        assert DatasetInfo.from_json(info.to_json()).to_json() == info.to_json()
        assert info.samples == len(self.index) and info.tiles == self.index.num_tiles.sum()
        assert all(".." not in shard.name and shard.name[0] != "/" for shard in info.shards)

    def _tree(self, steps) -> bytes:
        return json.dumps(mutate_tree(json.loads(self.text), steps)).encode()


def check_refusal(error: Exception, folder: Path) -> None:
    """An error must be one of ours, in one printable line, that names the file unless it is about a sample's bytes."""
    message = str(error)
    assert type(error) in (BadSample, ValueError, StorageError), type(error)
    assert message.isprintable() and 0 < len(message) < 800, message
    assert isinstance(error, BadSample) or str(folder) in message, message


def fuzz(target: Target, seconds: float) -> str:
    """Runs the target; raises what the first failing example raises. Returns the counts."""
    counts = {"read": 0, "refused": 0}
    start = time.monotonic()

    def one(drawn):
        faulthandler.dump_traceback_later(HANG, exit=True)
        try:
            target.read(drawn)
            counts["read"] += 1
        except (BadSample, ValueError, StorageError) as error:
            check_refusal(error, target.folder)
            counts["refused"] += 1

    options = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    while True:
        run = settings(max_examples=EXAMPLES, derandomize=not seconds, **options)(given(target.strategy)(one))
        if seconds:
            run = seed(random.SystemRandom().getrandbits(64))(run)
        run()
        if time.monotonic() - start >= seconds:
            break
    faulthandler.cancel_dump_traceback_later()
    # not ru_maxrss: that of a process begins with what its parent had
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) >> 10
    return f"{sum(counts.values())} examples, {counts['read']} read, {counts['refused']} refused, {peak} MB"


if __name__ == "__main__":
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    kind = {"samples": Samples, "indexes": Indexes, "descriptions": Descriptions}[sys.argv[1]]
    print(fuzz(kind(Path(sys.argv[2])), float(sys.argv[3]) if len(sys.argv) > 3 else 0))
