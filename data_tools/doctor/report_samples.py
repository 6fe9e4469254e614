"""What the page shows of a sample: its tiles in place with the unpadded area, and every token with its supervision.

A picture is shown as the vision tower gets it: the base tile, and the canvas put together again from the tiles as they
are stored. The area given is the one whose patches the language model sees, see `llava_next/anyres.py`.
"""

import base64
import codecs
import io
from collections.abc import Iterable

import numpy as np
from einops import rearrange
from PIL import Image
from transformers.convert_slow_tokenizer import bytes_to_unicode

from doctor.checking import Checked, Checker, Findings
from llava_next.anyres import AnyRes
from llava_next.data.format.index import Index
from llava_next.data.format.tar import BadSample
from llava_next.data.loading.batch import IGNORE
from llava_next.data.loading.encode import picture_tiles
from llava_next.shuffling import permutation

THUMBNAIL_SIDE = 168  # px of a tile on the page: half of CLIP's
QUALITY = 72
MAX_TOKENS = 5000  # shown of a sample; the rest is counted
MAX_PICTURES = 8
_PER_KIND = 4  # samples of each kind of problem that come first


class TokenTexts:
    """Token ids as the text they stand for, one piece a token."""

    def __init__(self, tokenizer):
        self._tokenizer, self._special = tokenizer, set(tokenizer.all_special_ids)
        self._special |= set(tokenizer.added_tokens_decoder)
        # The two kinds of vocabulary: bytes spelled as letters, or text with marked spaces and named bytes.
        self._is_byte_level = "ByteLevel" in repr(tokenizer.backend_tokenizer.decoder)
        self._byte = {letter: byte for byte, letter in bytes_to_unicode().items()}

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """One string a token; a character of several tokens stands at its last one, the others are empty."""
        decoder, texts = codecs.getincrementaldecoder("utf-8")("replace"), []
        for id, token in zip(ids, self._tokenizer.convert_ids_to_tokens(list(ids)), strict=True):
            if id in self._special or token is None:
                texts.append(decoder.decode(b"", True) + (token or f"<{id}>"))
                decoder.reset()
            else:
                texts.append(decoder.decode(self._bytes(token)))
        return texts

    def _bytes(self, token: str) -> bytes:
        if self._is_byte_level:
            return bytes(self._byte[letter] for letter in token if letter in self._byte)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace("▁", " ").encode()


def choose(index: Index, findings: Findings, count: int) -> list[int]:
    """Rows to show: some of each kind of problem, then an even share of every source, at random."""
    kinds = {kind: None for found in findings.problems.values() for kind, _ in found}
    chosen = {row: None for kind in kinds for row in findings.rows(kind)[:_PER_KIND]}
    shuffled = permutation(len(index), 0)
    queues = [shuffled[index.source[shuffled] == number].tolist() for number in range(len(index.source_names))]
    depth = 0
    while len(chosen) < min(count, len(index)) and any(len(queue) > depth for queue in queues):
        for queue in queues:
            if depth < len(queue) and len(chosen) < count:
                chosen[queue[depth]] = None
        depth += 1
    return list(chosen)


def describe(
    checked: Checked,
    checker: Checker,
    index: Index,
    row: int,
    problems: list[tuple[str, str]],
    texts: TokenTexts | None,
) -> dict:
    """A sample as the page takes it.

    Args:
        problems: (kind, reason) of the sample.
        texts: of the model's tokenizer; without a model the conversation is shown as it is stored.
    """
    where, info = index.locate(row), checker.info
    entry = {
        "row": row,
        "key": where.key,
        "shard": info.shards[where.shard].name,
        "offset": where.offset,
        "bytes": where.nbytes,
        "source": index.source_names[index.source[row]],
        "problems": [{"kind": kind, "reason": reason} for kind, reason in problems],
    }
    sample, example = checked.sample, checked.example
    if sample is None:
        return entry
    entry |= {"id": sample.id, "pictures": [], "hidden_pictures": max(0, len(sample.images) - MAX_PICTURES)}
    for number, image in enumerate(sample.images[:MAX_PICTURES]):
        picture = {"width": image.width, "height": image.height, "stored": image.ext, "bytes": len(image.data)}
        try:
            tiles = picture_tiles(image, number, info.anyres)
            picture |= show_picture(tiles, image.width, image.height, info.anyres)
        except BadSample as error:
            picture["error"] = str(error)
        entry["pictures"].append(picture)
    if example is None:
        entry["turns"] = [[turn["from"], turn["value"][: 4 * MAX_TOKENS]] for turn in sample.conversations]
    else:
        lengths = [info.anyres.num_tokens(image.width, image.height) for image in sample.images]
        entry |= show_tokens(example.input_ids, example.labels, lengths, checker.encoder, texts)
    return entry


def show_picture(tiles: np.ndarray, width: int, height: int, anyres: AnyRes) -> dict:
    """Thumbnails of the base tile and the canvas as data URIs, and the kept area as shares of the canvas.

    Args:
        tiles: uint8 [n, S, S, 3]; width, height: of the original picture, in pixels.
    """
    rows, cols, kept_rows, kept_cols = (int(v[0]) for v in anyres.layout_many([width], [height]))
    shown = {"rows": rows, "cols": cols, "tokens": anyres.num_tokens(width, height), "base": _data_uri(tiles[0], 1, 1)}
    if rows * cols:
        canvas = rearrange(tiles[1:], "(r c) y x rgb -> (r y) (c x) rgb", r=rows, c=cols)
        shown["canvas"] = _data_uri(canvas, rows, cols)
        top, bottom = kept_pixels(rows, kept_rows, anyres)
        left, right = kept_pixels(cols, kept_cols, anyres)
        size = anyres.tile_size
        shown["kept"] = [left / (cols * size), top / (rows * size), right / (cols * size), bottom / (rows * size)]
        shown["kept_patches"] = [kept_rows, kept_cols]
    return shown


def kept_pixels(tiles: int, kept: int, anyres: AnyRes) -> tuple[int, int]:
    """First and last pixel + 1, along one side of `tiles` tiles, of the `kept` patches in its middle."""
    first = (tiles * anyres.patches_per_side - kept) // 2

    def pixel(patch: int, is_end: bool) -> int:
        # A tile's pixels beyond its last whole patch belong to none.
        tile, place = divmod(patch - is_end, anyres.patches_per_side)
        return tile * anyres.tile_size + (place + is_end) * anyres.patch_size

    return (pixel(first, False), pixel(first + kept, True)) if kept else (0, 0)


def _data_uri(pixels: np.ndarray, rows: int, cols: int) -> str:
    image, buffer = Image.fromarray(np.ascontiguousarray(pixels)), io.BytesIO()
    side = min(THUMBNAIL_SIDE, pixels.shape[0] // rows)
    image.resize((cols * side, rows * side), Image.Resampling.LANCZOS).save(buffer, "WEBP", quality=QUALITY)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def show_tokens(
    input_ids: np.ndarray, labels: np.ndarray, image_lengths: list[int], encoder, texts: TokenTexts
) -> dict:
    """The uncut sequence: `[text, id, is_supervised]` for a token, `[count]` for an image, and what is kept of it."""
    shown, is_image = [], input_ids == encoder.image_token_id
    image_starts = np.flatnonzero(is_image)[np.cumsum([0, *image_lengths])[:-1]]  # two may touch each other
    borders = np.union1d(np.flatnonzero(np.diff(is_image)) + 1, image_starts)
    supervised = labels != IGNORE
    supervised[:1] = False  # nothing stands before the first token, so it is never a target
    used = 0
    for run in np.split(np.arange(len(input_ids)), borders):
        if not len(run) or used >= MAX_TOKENS:
            break
        if is_image[run[0]]:
            shown.append([len(run)])
            continue
        ids = input_ids[run].tolist()[: MAX_TOKENS - used]
        used += len(ids)
        flags = supervised[run].astype(int).tolist()
        shown += [[text, id, flag] for text, id, flag in zip(texts.pieces(ids), ids, flags, strict=False)]
    counted = sum(entry[0] if len(entry) == 1 else 1 for entry in shown)
    return {
        "tokens": shown,
        "length": len(input_ids),
        "supervised": int(supervised[: encoder.max_length].sum()),
        "max_length": encoder.max_length,
        "hidden_tokens": len(input_ids) - counted,
    }
