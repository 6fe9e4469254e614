"""What a data set consists of, in numbers and in words: totals, sources, histograms, steps of a recipe, and a verdict.

Everything here is plain Python values, ready for JSON; the terminal and the page show the same.
"""

import math
from dataclasses import dataclass

import numpy as np

from doctor.checking import KINDS, Findings
from llava_next.anyres import AnyRes
from llava_next.data.format.dataset import DatasetInfo
from llava_next.data.format.index import Index
from llava_next.data.inputs.samples import by_reason
from llava_next.data.plan.mixture import Mixture
from llava_next.training.banner import deal_some
from llava_next.training.recipe.config import RunConfig
from llava_next.training.setup import Parts

BARS = 24  # of a histogram, at most
TAIL = 0.995  # of the values lie before the last bar, which takes all larger ones
EXAMPLES = 5  # rows named for each kind of problem
ONE_BATCH = 128  # samples of a step as published, where no recipe says otherwise


@dataclass
class Training:
    """The run that a data set is inspected for."""

    config: RunConfig
    parts: Parts
    mixture: Mixture


def token_lengths(index: Index, anyres: AnyRes, fingerprint: str | None, findings: Findings) -> tuple[np.ndarray, bool]:
    """Tokens of every sample, image tokens included: as counted when it was read, as the index knows, or estimated.

    Returns:
        int64 [n], and whether all of them are exact.
    """
    text, exact = index.text_tokens(fingerprint)
    counted = findings.tokens >= 0
    return np.where(counted, findings.tokens, text + index.image_tokens(anyres)), bool(exact or counted.all())


def totals(info: DatasetInfo, index: Index, tokens: np.ndarray) -> dict:
    """Numbers of the whole data set."""
    return {
        "samples": info.samples,
        "images": info.images,
        "tiles": info.tiles,
        "tokens": int(tokens.sum()),
        "image_tokens": int(index.image_tokens(info.anyres).sum()),
        "bytes": sum(shard.bytes for shard in info.shards),
        "shards": len(info.shards),
    }


def by_source(index: Index, tokens: np.ndarray) -> list[dict]:
    """One entry a source, the largest first."""
    images = np.diff(index.image_offsets)
    found = []
    for number, name in enumerate(index.source_names):
        mine = index.source == number
        if mine.any():
            entry = {"name": name, "samples": int(mine.sum()), "images": int(images[mine].sum())}
            for key, values in (("tokens", tokens), ("tiles", index.num_tiles), ("bytes", index.nbytes)):
                entry[key] = int(values[mine].sum(dtype=np.int64))
            entry["turns"] = int(index.turns[mine].sum(dtype=np.int64))
            found.append(entry)
    return sorted(found, key=lambda entry: (-entry["samples"], entry["name"]))


def histogram(title: str, unit: str, values: np.ndarray) -> dict:
    """Counts of whole numbers in bars of equal width.

    Returns:
        title, unit; `start` and `width` of the bars and `counts`; whether the last bar holds all that is larger
        (`is_open`); least, median, mean and most of the values.
    """
    values = np.asarray(values, np.int64)
    if not values.size:
        return {"title": title, "unit": unit, "start": 0, "width": 1, "counts": [], "is_open": False}
    low, high = int(values.min()), int(np.quantile(values, TAIL))
    width = _round_width((high - low + 1) / BARS)
    start = low // width * width
    bars = (high - start) // width + 1
    places = np.minimum((values - start) // width, bars - 1)
    return {
        "title": title,
        "unit": unit,
        "start": start,
        "width": width,
        "counts": np.bincount(places, minlength=bars).tolist(),
        "is_open": bool(values.max() >= start + bars * width),
        "least": low,
        "median": float(np.median(values)),
        "mean": float(values.mean()),
        "most": int(values.max()),
    }


def _round_width(least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, ... that is not below `least`."""
    for digits in range(20):
        for step in (1, 2, 5):
            if step * 10**digits >= least:
                return step * 10**digits
    raise AssertionError(least)


def histograms(info: DatasetInfo, index: Index, tokens: np.ndarray, findings: Findings) -> list[dict]:
    """Those that the page shows."""
    sides = np.maximum(index.widths, index.heights)
    found = [
        histogram("Tokens of a sample", "tokens", tokens),
        histogram("Tiles of a sample", "tiles", index.num_tiles),
        histogram("Messages of a conversation", "messages", index.turns),
        histogram("Longer side of a picture", "px", sides),
        histogram("Size of a sample", "kB", np.ceil(index.nbytes / 1000)),
    ]
    if findings.is_read.all() and (findings.supervised >= 0).any():
        known = findings.supervised[findings.supervised >= 0]
        found.append(histogram("Supervised tokens of a sample", "tokens", known))
    return found


def grids(index: Index) -> list[dict]:
    """How many pictures are cut into which grid of tiles, the most frequent first."""
    pairs, counts = np.unique(np.stack([index.rows, index.cols], axis=1), axis=0, return_counts=True)
    found = [{"rows": int(r), "cols": int(c), "count": int(k)} for (r, c), k in zip(pairs, counts, strict=True)]
    return sorted(found, key=lambda entry: -entry["count"])


def recipe_figures(training: Training | None, samples: int, ranks: int) -> dict:
    """Steps of a run on this data set, and how full and how even its micro-batches are (by the first steps)."""
    if training is None:
        return {"batch_size": ONE_BATCH, "epochs": 1, "steps": math.ceil(samples / ONE_BATCH)}
    config, mixture = training.config, training.mixture
    dealt = deal_some(config, mixture, ranks)
    data = config.data
    return {
        "model": config.model,
        "template": data.template,
        "batch_size": data.batch_size,
        "epochs": data.epochs,
        "steps": mixture.total_steps,
        "max_length": data.max_length,
        "ranks": ranks,
        "exact": mixture.exact_lengths,
        "dealt_steps": dealt.steps,
        "micro_batches": float(dealt.micro_batches),
        "samples_per_micro_batch": float(dealt.samples),
        "filled": float(dealt.filled),
        "token_budget": data.token_budget,
        "fill": float(dealt.filled) / data.token_budget,
        "balance": float(dealt.balance),
        "most_tokens": dealt.most_tokens,
        "most_tiles": dealt.most_tiles,
        "tile_budget": data.tile_budget,
    }


def found_problems(findings: Findings, index: Index) -> list[dict]:
    """One entry for each kind of problem that was found, faults first."""
    found = []
    for name, kind in KINDS.items():
        rows = findings.rows(name)
        if rows:
            examples = [
                {"row": row, "key": index.keys[row].as_py(), "reason": reason}
                for row in rows[:EXAMPLES]
                for problem, reason in findings.problems[row]
                if problem == name
            ]
            found.append({"kind": name, **kind._asdict(), "count": len(rows), "examples": examples})
    return found


def left_out(rejected: list[dict], are_too_many: bool) -> list[dict]:
    """The same for samples that a build would leave out: one entry a reason."""
    about = {
        "kind": "left_out",
        "level": "fault" if are_too_many else "warning",
        "advice": "Mend the records or the pictures; a build leaves such samples out, and fails when they are many.",
    }
    return [
        about
        | {
            "title": f"left out by a build, {reason}",
            "count": len(entries),
            "examples": [
                {"row": entry["row"], "key": str(entry["id"]), "reason": entry["reason"]}
                for entry in entries[:EXAMPLES]
            ],
        }
        for reason, entries in by_reason(rejected)
    ]


def verdict(
    findings: Findings, problems: list[dict], is_verified: bool, max_skip_share: float, looked: str | None = None
) -> dict:
    """Whether to train on it.

    Args:
        looked: what was read of data that is not built yet.

    Returns:
        level: good, fair or bad; headline: a sentence.
    """
    n, unusable = len(findings.is_read), findings.count("unusable")
    read = n if is_verified else int(findings.is_read.sum())
    to_be_sure = "To be sure, run with --verify." if looked is None else "The build reads the rest."
    looked = looked or (f"all {n:,} samples were read" if is_verified else f"{read:,} of {n:,} samples were read")
    faults = _enumerated([entry for entry in problems if entry["level"] == "fault"])
    others = _enumerated([entry for entry in problems if entry["level"] != "fault"])
    if findings.shards:
        count = len(findings.shards)
        faults.insert(0, f"{count:,} shard{'s are' if count != 1 else ' is'} not as indexed")
    few = len(faults) == 1 and 0 < unusable <= max_skip_share * n  # a run does without them
    if faults and not few:
        return {"level": "bad", "headline": f"Not fit for training: {'; '.join(faults)} ({looked})."}
    if faults or others:
        headline = f"Fit for training, but look at this: {'; '.join(faults + others)} ({looked})."
        return {"level": "fair", "headline": headline}
    if is_verified:
        return {"level": "good", "headline": f"Fit for training: {looked}, and nothing is wrong."}
    return {"level": "good", "headline": f"Looks fit for training: {looked}. {to_be_sure}"}


def _enumerated(problems: list[dict]) -> list[str]:
    return [f"{entry['count']:,} sample{'s' * (entry['count'] != 1)}: {entry['title']}" for entry in problems]
