"""Samples read again and checked: bytes, pictures and texts, against the index and against what a model is trained on.

One sample is checked by `Checker.check`, a whole shard in one pass by `Checker.check_shard`, a data set by `verify`.
What was found about many samples is held in columns (`Findings`), about 40 bytes a sample.
"""

import hashlib
import json
import zlib
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from building.shard_walk import Stream
from llava_next.data.format.dataset import DatasetInfo
from llava_next.data.format.index import Index
from llava_next.data.format.records import drops_first_turn, has_text_image_token, states_system
from llava_next.data.format.shards import RawSample, read_sample
from llava_next.data.format.tar import BadSample
from llava_next.data.format.writer import index_row
from llava_next.data.inputs.samples import check_text
from llava_next.data.loading.batch import IGNORE, Example
from llava_next.data.loading.encode import Encoder, picture_tiles
from llava_next.data.storage.client import Storage, StorageError
from llava_next.progress import Progress, worker_pool
from llava_next.tokenise import IMAGE_TOKEN, data_tokens

UNCUT = 1 << 40  # tokens: longer than any sample
UNKNOWN = -1


class Kind(NamedTuple):
    """A kind of problem. `level`: fault (training stops, or leaves the sample out) or warning (it trains, badly)."""

    level: str
    title: str
    advice: str


KINDS = {
    "unreadable": Kind("fault", "missing bytes", "A run stops here. Copy the shard again, or build it again."),
    "checksum": Kind(
        "fault", "damaged bytes", "A run stops here: these are not the bytes that were indexed. Copy the shard again."
    ),
    "unusable": Kind(
        "fault",
        "cannot be used",
        "Training leaves them out, lists them in skipped.jsonl, and stops when they are many.",
    ),
    "mismatch": Kind("fault", "not as indexed", "Runs are planned from the index. Index or build the data set again."),
    "lost_picture": Kind(
        "warning",
        "<image> in a question, and no picture",
        "Trained as characters. If their records have pictures, build again: they are taken under any usual key. If "
        "the characters are meant, build with --allow_text_image_token.",
    ),
    "nothing_learned": Kind(
        "warning",
        "nothing left to learn",
        "The cut at the maximum length takes every supervised token. Raise data.max_length, or leave them out.",
    ),
    "truncated": Kind(
        "warning", "cut at the maximum length", "The end is not trained on. Raise data.max_length if that matters."
    ),
    "duplicate": Kind(
        "warning",
        "same pictures and same conversation",
        "Seen more than once in an epoch. Remove the copies unless that is meant.",
    ),
}


class Facts(NamedTuple):
    """What was found about one sample.

    Args:
        problems: (kind, reason) each.
        tokens: of the whole sample, image tokens included; supervised: targets up to the maximum length. `UNKNOWN`
            without a model, or when the sample cannot be used.
        pictures: 64-bit hash of each picture's stored bytes; conversation: of the text, 0 when it could not be read.
        drops_first_turn: the conversation begins with a turn that is not human, which training leaves out.
        has_system: it has a system prompt of its own.
        spells_special: it spells a special token of the tokenizer that is not declared for data.
    """

    problems: tuple[tuple[str, str], ...]
    tokens: int = UNKNOWN
    supervised: int = UNKNOWN
    pictures: tuple[int, ...] = ()
    conversation: int = 0
    drops_first_turn: bool = False
    has_system: bool = False
    spells_special: bool = False


class Checked(NamedTuple):
    """A sample's facts with the sample itself, as far as it could be read, and as it is encoded, uncut."""

    facts: Facts
    sample: RawSample | None
    example: Example | None


@dataclass
class Checker:
    """Checks samples of one data set. Picklable.

    Args:
        storage, info: of the data set.
        encoder: of the model that is to be trained; None checks bytes, pictures and roles only.
        fingerprint: of its tokenizer and template: the index's exact lengths for it are checked too.
    """

    storage: Storage
    info: DatasetInfo
    encoder: Encoder | None = None
    fingerprint: str | None = None

    def read(self, index: Index, row: int) -> bytes:
        """The sample's bytes. Raises StorageError."""
        where = index.locate(row)
        return self.storage.read_range(self.info.shards[where.shard].name, where.offset, where.nbytes)

    def check(self, index: Index, row: int, data: bytes) -> Checked:
        """Checks the sample in row `row`, whose bytes are `data`."""
        where, found = index.locate(row), zlib.crc32(data)
        problems = []
        if found != where.crc32:
            problems.append(("checksum", f"its bytes have the crc32 {found:08x}, the index says {where.crc32:08x}"))
        sample = example = None
        try:
            sample = read_sample(data, where.key)
            example = self._encode(sample, row)
        except BadSample as error:
            problems.append(("unusable", str(error)))
        if sample is None:
            return Checked(Facts(tuple(problems)), None, None)
        problems += self._differences(index, row, sample, data)
        meant = self.info.build.get("allow_text_image_token", False)
        if not sample.images and not meant and has_text_image_token(sample.conversations):
            problems.append(("lost_picture", "a question has <image>, and the sample has no picture"))
        pictures = tuple(_hash(image.data) for image in sample.images)
        text = json.dumps([(turn["from"], turn["value"]) for turn in sample.conversations]).encode()
        tokens = supervised = UNKNOWN
        if example is not None:
            tokens = len(example.input_ids)
            supervised = int((example.labels[1 : self.encoder.max_length] != IGNORE).sum())  # the first has no context
            problems += self._wrong_length(index, row, example)
        facts = Facts(
            tuple(problems),
            tokens,
            supervised,
            pictures,
            _hash(text),
            drops_first_turn(sample.conversations),
            states_system(sample.conversations),
            self._spells_special(sample.conversations),
        )
        return Checked(facts, sample, example)

    def _spells_special(self, conversations: list[dict]) -> bool:
        return any(token in turn["value"] for turn in conversations for token in self._undeclared)

    @cached_property
    def _undeclared(self) -> list[str]:
        """Special tokens of the tokenizer that are characters where data spells them."""
        if self.encoder is None:
            return []
        declared = (*data_tokens(self.encoder.tokenizer), IMAGE_TOKEN)
        added = self.encoder.tokenizer.added_tokens_decoder.values()
        return [token.content for token in added if token.special and token.content not in declared]

    def _encode(self, sample: RawSample, row: int) -> Example | None:
        """The sample as training sees it, but uncut. Without a model only checked. Raises BadSample."""
        if self.encoder is not None:
            return replace(self.encoder, max_length=UNCUT).encode(sample, row, 0, 0)
        for number, image in enumerate(sample.images):
            picture_tiles(image, number, self.info.anyres)
        check_text(sample.conversations, len(sample.images))
        return None

    def _differences(self, index: Index, row: int, sample: RawSample, data: bytes) -> list[tuple[str, str]]:
        """Entries of the index that are not what the sample says."""
        anyres = self.info.anyres
        grids = [anyres.grid(i.width, i.height) if i.is_raw else (i.rows, i.cols) for i in sample.images]
        expected = index_row(sample, 0, len(data), 0, grids)
        images = slice(index.image_offsets[row], index.image_offsets[row + 1])
        stored = {name: getattr(index, name)[images].tolist() for name in ("widths", "heights", "rows", "cols")}
        stored |= {name: int(getattr(index, name)[row]) for name in ("nbytes", "text_bytes", "turns")}
        return [
            ("mismatch", f"the index says {name} {value}, the sample has {expected[name]}")
            for name, value in stored.items()
            if value != expected[name]
        ]

    def _wrong_length(self, index: Index, row: int, example: Example) -> list[tuple[str, str]]:
        text = len(example.input_ids) - len(example.image_positions)
        first = int(np.argmax(example.labels != IGNORE))
        found = []
        for what, columns, value in (
            ("text tokens", index.exact_text_tokens, text),
            ("tokens before its first answer", index.first_targets, first),
        ):
            stored = int(columns[self.fingerprint][row]) if self.fingerprint in columns else value
            if stored != value:
                found.append(("mismatch", f"the index says {stored} {what}, the sample has {value}"))
        return found

    def check_shard(self, number: int, index: Index) -> tuple[list[Facts], list[str]]:
        """Reads shard `number` from front to back.

        Args:
            index: of its samples only.

        Returns:
            facts of each sample, and what is wrong with the shard as a file.
        """
        shard = self.info.shards[number]
        stream, facts, wrong, is_whole = Stream(self.storage, shard.name, shard.bytes), [], [], True
        try:
            self.storage.read_range(shard.name, 0, min(512, shard.bytes), size=shard.bytes)
        except StorageError as error:
            wrong.append(str(error))
        for row in range(len(index)):
            start, length = int(index.offset[row]), int(index.nbytes[row])
            try:
                if is_whole:
                    try:
                        data = stream.read(start, length)
                    except StorageError:
                        is_whole = False  # large reads fail far before the place where bytes are missing
                data = data if is_whole else self.read(index, row)
            except StorageError as error:
                facts += [Facts((("unreadable", str(error)),))] * (len(index) - row)
                break
            facts.append(self.check(index, row, data).facts)
            stream.release(start + length)
        if is_whole and not wrong:
            try:
                stream.read(shard.bytes, 0)
                if stream.sha256() != shard.sha256:
                    wrong.append(f"{self.storage.address(shard.name)}: sha256 is not the one in dataset.json")
            except StorageError as error:
                wrong.append(str(error))
        return facts, wrong


def _hash(data: bytes) -> int:
    """64 bits: among ten million pictures two different ones coincide with a chance of 1 in 400,000."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


class Findings:
    """What is known of all n samples of a data set.

    Attributes:
        is_read: bool [n]; tokens, supervised: int64 [n] as in `Facts`.
        problems: (kind, reason) pairs by row.
        shards: what is wrong with shards as files.
        first_turns_left_out: samples that begin with a turn that is not human; system_prompts: that have one of their
            own; special_spelled: that spell a special token.
        shared_pictures: pictures stored again in another sample; shared_conversations: samples whose conversation
            comes with other pictures too (`find_duplicates` counts both).
    """

    def __init__(self, n: int):
        self.is_read = np.zeros(n, bool)
        self.tokens, self.supervised = np.full(n, UNKNOWN), np.full(n, UNKNOWN)
        self.problems: dict[int, list[tuple[str, str]]] = defaultdict(list)
        self.shards: list[str] = []
        self.first_turns_left_out = self.system_prompts = self.special_spelled = 0
        self.shared_pictures = self.shared_conversations = 0
        self._conversation, self._pictures = np.zeros(n, np.uint64), np.zeros(n, np.uint64)
        self._hashes: list[np.ndarray] = []  # of every picture

    def add(self, rows: Iterable[int], facts: list[Facts]) -> None:
        """Enter the facts of these rows."""
        for row, found in zip(rows, facts, strict=True):
            self.is_read[row], self.tokens[row], self.supervised[row] = True, found.tokens, found.supervised
            self._conversation[row] = found.conversation
            self._pictures[row] = _hash(np.array(found.pictures, np.uint64).tobytes()) if found.pictures else 0
            self.first_turns_left_out += found.drops_first_turn
            self.system_prompts += found.has_system
            self.special_spelled += found.spells_special
            if found.problems:
                self.problems[int(row)] += found.problems
        self._hashes.append(np.array([p for found in facts for p in found.pictures], np.uint64))

    def count(self, kind: str) -> int:
        """Samples with a problem of this kind."""
        return len(self.rows(kind))

    def rows(self, kind: str) -> list[int]:
        """Rows with a problem of this kind, in order."""
        return sorted(row for row, found in self.problems.items() if any(name == kind for name, _ in found))

    def find_duplicates(self, index: Index) -> None:
        """Compares the samples that were read; of equal ones, all but the first get a problem."""
        rows = np.flatnonzero(self._conversation)
        both = np.stack([self._conversation[rows], self._pictures[rows]], axis=1)
        _, first, group = np.unique(both, axis=0, return_index=True, return_inverse=True)
        original = rows[first[group.reshape(-1)]]
        for row, earlier in zip(rows[rows != original], original[rows != original], strict=True):
            reason = f"the same as row {earlier} (key {index.keys[earlier].as_py()})"
            self.problems[int(row)].append(("duplicate", reason))
        _, counts = np.unique(both[first, 0], return_counts=True)  # conversations of distinct samples
        self.shared_conversations = int(counts[counts > 1].sum())
        hashes = np.concatenate(self._hashes) if self._hashes else np.zeros(0, np.uint64)
        self.shared_pictures = len(hashes) - len(np.unique(hashes))

    def find_long(self, tokens: np.ndarray, exact: bool, first_target: np.ndarray | None, max_length: int) -> None:
        """Enters samples that are cut, and those that lose all supervision.

        Args:
            tokens: of each sample, int64 [n], and whether all are exact.
            first_target: position of its first supervised token, int64 [n], where the index has it.
        """
        if first_target is not None:
            self.supervised[(first_target >= max_length) & (self.supervised < 0)] = 0
        for row in np.flatnonzero(tokens > max_length).tolist():
            about = "" if exact or self.tokens[row] >= 0 else "about "
            reason = f"{about}{tokens[row]:,} tokens: {about}{tokens[row] - max_length:,} are cut off at {max_length:,}"
            self.problems[row].append(("truncated", reason))
        for row in np.flatnonzero(self.supervised == 0).tolist():
            self.problems[row].append(("nothing_learned", f"none of its first {max_length:,} tokens is supervised"))


_checker: Checker | None = None  # of this worker process


def _start(checker: Checker) -> None:
    global _checker
    _checker = checker


def _check_shard(work: tuple[int, Index]) -> tuple[list[Facts], list[str]]:
    return _checker.check_shard(*work)


def verify(checker: Checker, index: Index, workers: int) -> Findings:
    """Reads and checks everything.

    Args:
        workers: processes; 0: none.
    """
    findings, done, faulty = Findings(len(index)), 0, 0
    ends = np.cumsum([shard.samples for shard in checker.info.shards])
    work = ((number, index.take(rows)) for number, rows in enumerate(np.split(np.arange(len(index)), ends[:-1])))
    with worker_pool(workers, _start, (checker,)) as pool, Progress(len(index), bad="faulty") as progress:
        for facts, wrong in pool.map(_check_shard, work):
            findings.add(range(done, done + len(facts)), facts)
            findings.shards += wrong
            done, faulty = done + len(facts), faulty + sum(bool(found.problems) for found in facts)
            progress.show(done, faulty)
    return findings


def check_some(checker: Checker, index: Index, rows: Collection[int]) -> Findings:
    """Reads and checks these samples only."""
    findings, faulty = Findings(len(index)), 0
    with Progress(len(rows), bad="faulty") as progress:
        for done, row in enumerate(rows, start=1):
            facts = look_at(checker, index, row).facts
            findings.add([row], [facts])
            faulty += bool(facts.problems)
            progress.show(done, faulty)
    return findings


def look_at(checker: Checker, index: Index, row: int) -> Checked:
    """Reads and checks one sample."""
    try:
        data = checker.read(index, row)
    except StorageError as error:
        return Checked(Facts((("unreadable", str(error)),)), None, None)
    return checker.check(index, row, data)
