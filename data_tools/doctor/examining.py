"""One data set looked at as a whole: what is read of it, what is reported, and which samples are shown."""

import argparse
from pathlib import PurePosixPath

from doctor import survey
from doctor.checking import Checker, Findings, check_some, look_at, verify
from doctor.report_samples import TokenTexts, choose, describe
from llava_next.data.format.dataset import DatasetInfo
from llava_next.data.format.index import Index, read_dataset
from llava_next.data.inputs.samples import TURN_COUNTS
from llava_next.data.inputs.unbuilt import MAX_REJECTED_SHARE, Unbuilt
from llava_next.data.storage.client import Storage

SUSPECTS = 200  # samples of the same size in every respect, and longest ones, that are read without --verify
MAX_SKIP_SHARE = 0.001  # of a run, where no recipe says otherwise


def examine(options: argparse.Namespace, training: survey.Training | None) -> dict:
    """The report on a data set, plain values only. Raises ValueError or StorageError when it cannot be opened."""
    if training and isinstance(training.mixture.storages[0], Unbuilt):
        return examine_unbuilt(options, training.mixture.storages[0], training)
    storage = Storage(options.url)
    info, index = read_dataset(storage)
    encoder, fingerprint = (training.parts.encoder, training.parts.fingerprint) if training else (None, None)
    checker = Checker(storage, info, encoder, fingerprint)
    estimate, _ = survey.token_lengths(index, info.anyres, fingerprint, Findings(len(index)))
    if options.verify:
        findings = verify(checker, index, options.workers)
    else:
        rows = {**dict.fromkeys(suspects(index, estimate)), **dict.fromkeys(some_rows(index, options.samples))}
        findings = check_some(checker, index, rows)
    findings.find_duplicates(index)
    report = figures(options, storage.label, info, index, findings, training)
    tolerated = training.config.data.max_skip_share if training else MAX_SKIP_SHARE
    return report | {
        "verdict": survey.verdict(findings, report["problems"], options.verify, tolerated),
        "notes": notes(options, training, findings, report["exact"]),
        "samples": show(options, checker, index, findings),
    }


def examine_unbuilt(options: argparse.Namespace, unbuilt: Unbuilt, training: survey.Training) -> dict:
    """The report on a file of records of which nothing is built yet: as of a data set, but for samples to look at."""
    findings, share = Findings(unbuilt.info.samples), len(unbuilt.rejected) / unbuilt.listed
    report = figures(options, unbuilt.label, unbuilt.info, unbuilt.index, findings, training)
    left_out = survey.left_out(unbuilt.rejected, share > MAX_REJECTED_SHARE)
    in_all = [left_out[0] | {"title": "left out by a build", "count": len(unbuilt.rejected)}] if left_out else []
    looked = f"{unbuilt.listed:,} records and the headers of their pictures were read"
    counts = unbuilt.info.build
    findings.first_turns_left_out, findings.system_prompts = (counts[name] for name in TURN_COUNTS)
    return report | {
        "read": unbuilt.listed,
        "problems": left_out + report["problems"],
        "verdict": survey.verdict(
            findings, in_all + report["problems"], False, training.config.data.max_skip_share, looked
        ),
        "notes": [
            "Nothing is built yet: sizes on disk are estimates; damage behind a picture's header shows in the build.",
            *turn_notes(findings, ""),
        ],
        "samples": [],
    }


def figures(
    options: argparse.Namespace,
    label: str,
    info: DatasetInfo,
    index: Index,
    findings: Findings,
    training: survey.Training | None,
) -> dict:
    """What a report says of any data set, built or not; enters samples that are too long into the findings."""
    fingerprint = training.parts.fingerprint if training else None
    tokens, exact = survey.token_lengths(index, info.anyres, fingerprint, findings)
    if training:
        first_target, is_known = index.first_target(fingerprint, info.anyres)
        findings.find_long(tokens, exact, first_target if is_known else None, training.config.data.max_length)
    return {
        "name": options.name or PurePosixPath(label).name,
        "url": label,
        "is_verified": options.verify,
        "with_model": training is not None,
        "read": int(findings.is_read.sum()),
        "exact": exact,
        "totals": survey.totals(info, index, tokens),
        "sources": survey.by_source(index, tokens),
        "histograms": survey.histograms(info, index, tokens, findings),
        "grids": survey.grids(index),
        "recipe": survey.recipe_figures(training, len(index), options.ranks),
        "problems": survey.found_problems(findings, index),
        "shards_wrong": findings.shards,
    }


def suspects(index: Index, tokens) -> list[int]:
    """Rows worth reading without --verify: pairs that agree in every number of the index, then the longest."""
    seen, twins = {}, []
    for row in range(len(index)):
        images = slice(index.image_offsets[row], index.image_offsets[row + 1])
        sizes = (index.widths[images].tobytes(), index.heights[images].tobytes())
        numbers = (int(index.nbytes[row]), int(index.text_bytes[row]), int(index.turns[row]), *sizes)
        if numbers in seen and len(twins) < SUSPECTS:
            twins += [seen[numbers], row]
        seen.setdefault(numbers, row)
    longest = tokens.argsort()[::-1][: SUSPECTS // 4].tolist()
    return [*twins, *longest]


def some_rows(index: Index, count: int) -> list[int]:
    """Rows at random, as many of each source as there are."""
    return choose(index, Findings(len(index)), count)


def show(options, checker: Checker, index: Index, findings: Findings) -> list[dict]:
    """The samples of the page, those with problems first. They are read again: decoded ones are too large to keep."""
    if options.html is None:
        return []
    texts = TokenTexts(checker.encoder.tokenizer) if checker.encoder else None
    return [
        describe(look_at(checker, index, row), checker, index, row, findings.problems.get(row, []), texts)
        for row in choose(index, findings, options.samples)
    ]


def notes(options, training: survey.Training | None, findings: Findings, exact: bool) -> list[str]:
    """What a reader should know besides problems."""
    found = []
    among = "" if options.verify else " among the samples that were read"
    if findings.shared_pictures:
        found.append(f"{findings.shared_pictures:,} pictures are stored more than once{among}.")
    if findings.shared_conversations:
        found.append(f"{findings.shared_conversations:,} samples share their conversation{among}, with other pictures.")
    found += turn_notes(findings, among)
    if findings.special_spelled:
        found.append(
            f"{findings.special_spelled:,} samples{among} spell special tokens of the tokenizer, which are characters "
            "in training and one token at inference; those that are meant: data_tokens in tokenizer_config.json."
        )
    if not exact:
        found.append(
            "Text lengths are estimated from bytes; index_shards.py URL --tokenizer MODEL:TEMPLATE counts them."
        )
    if training is None:
        found.append("No recipe or model was given, so tokens, supervision and packing were not looked at (--config).")
    if not options.verify:
        found.append("Only some samples were read; --verify reads all, and finds every duplicate.")
    return found


def turn_notes(findings: Findings, among: str) -> list[str]:
    """Of conversations that begin in ways a person may not expect."""
    found = []
    if findings.first_turns_left_out:
        found.append(
            f"{findings.first_turns_left_out:,} samples{among} begin with a turn that is not human, which training "
            "leaves out as the original does."
        )
    if findings.system_prompts:
        found.append(f"{findings.system_prompts:,} samples{among} have a system prompt of their own.")
    return found


def summarise(report: dict) -> list[str]:
    """The report as lines for a terminal."""
    totals, recipe = report["totals"], report["recipe"]
    about = "" if report["exact"] else "about "
    lines = [
        f"{report['url']}: {totals['samples']:,} samples, {totals['images']:,} pictures, {totals['tiles']:,} tiles, "
        f"{about}{totals['tokens']:,} tokens, {totals['bytes'] / 1e6:,.1f} MB in {totals['shards']:,} shards"
    ]
    lines.append(f"  {'source':<24}{'samples':>10}{'pictures':>10}{'tiles':>10}{'tokens':>14}{'MB':>10}")
    lines += [
        f"  {s['name'][:23]:<24}{s['samples']:>10,}{s['images']:>10,}{s['tiles']:>10,}{s['tokens']:>14,}"
        f"{s['bytes'] / 1e6:>10,.1f}"
        for s in report["sources"]
    ]
    lines.append(f"{recipe['steps']:,} step(s) of {recipe['batch_size']} samples, {recipe['epochs']} epoch(s)")
    if "fill" in recipe:
        lines.append(
            f"  on {recipe['ranks']} ranks {recipe['micro_batches']:.1f} micro-batches a step, filled to "
            f"{100 * recipe['fill']:.1f} % of {recipe['token_budget']:,} tokens, balanced to "
            f"{100 * recipe['balance']:.1f} %"
        )
    for entry in report["problems"]:
        lines.append(f"{entry['level']}: {entry['count']:,} samples: {entry['title']}")
        lines += [f"  row {e['row']} (key {e['key']}): {e['reason']}" for e in entry["examples"]]
    lines += [f"fault: shard not as indexed: {reason}" for reason in report["shards_wrong"]]
    return [*lines, *(f"note: {note}" for note in report["notes"]), report["verdict"]["headline"]]
