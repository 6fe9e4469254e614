"""Published scores beside a model's own: the table in published.json, noise, and the Markdown row."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

WIDTH = 4096  # of the published models' language models: others are not compared with them
NOISES = 2  # a difference of at most this many standard errors is within the noise
JUDGED, RULED = ("gpt_eval_score", "llm_as_judge_eval"), "_dev_static"  # metrics with a judge; tasks that do without
RULE = (
    "± is one binomial standard error, sqrt(v (1 - v) / n) for a share v of n questions, an upper bound where answers "
    f"score in between; a difference of at most {NOISES} of them is within the noise. A score without one is no share."
)


@cache
def table() -> dict:
    """`benchmarks`: label -> task, metric, `scale` from lmms-eval's figure to the published one, `share`: whether it is
    a share of right answers, `of`: how many of how many samples are independent, `as`: the label of its published
    figures, or `why` no task gives it. `models`: name, template, source, scores by label."""
    return json.loads(Path(__file__).with_name("published.json").read_text())


def benchmark(task: str, metric: str | None = None) -> tuple[str, dict] | None:
    """Label and entry of a task's first (or that) metric in the table."""
    for label, entry in table()["benchmarks"].items():
        if entry["task"] == task and metric in (None, entry["metric"]):
            return label, entry
    return None


def needs_judge(task: str, metrics: Sequence[str]) -> bool:
    """Whether answers to a task are read by a judge at OpenAI."""
    return not task.endswith(RULED) and any(metric in JUDGED for metric in metrics)


def comparable(template: str | None, width: int) -> list[dict]:
    """The published models whose scores can be compared with a model's: of its chat template and width."""
    return [model for model in table()["models"] if model["template"] == template] if width == WIDTH else []


def published_scores(task: str, metric: str, models: Sequence[dict]) -> dict[str, float] | None:
    """Published model -> its score in the unit of `task`; None: none is known."""
    found = benchmark(task, metric)
    if found is None:
        return None
    label, entry = found
    label = entry.get("as", label)
    scores = {model["name"]: model["scores"][label] / entry["scale"] for model in models if label in model["scores"]}
    return scores or None


def noise(task: str, metric: str, value: float, samples: int, per_sample: Sequence[float | None]) -> float | None:
    """One binomial standard error of a score, in its own unit; None where it is no share of right answers.

    Args:
        per_sample: score of each sample; a value that is their mean, all of 0 to 1, is a share whatever its task.
    """
    found = benchmark(task, metric)
    if found and found[1]["share"]:
        # a share in percent, where lmms-eval gives percent
        unit, (some, of) = 100 / found[1]["scale"], found[1].get("of", (1, 1))
        share, count = value / unit, max(1, round(samples * some / of))
    else:
        if not per_sample or not all(score is not None and 0 <= score <= 1 for score in per_sample):
            return None
        if not math.isclose(sum(per_sample) / len(per_sample), value, abs_tol=1e-6):
            return None
        unit, share, count = 1, value, samples
    return unit * standard_error(share, count) if 0 <= share <= 1 else None


def standard_error(share: float, count: int) -> float:
    """One binomial standard error of a share of `count` questions."""
    return math.sqrt(share * (1 - share) / count)


def row(model: str, scores: dict[str, dict], models: Sequence[dict]) -> str:
    """A Markdown table: a row for the model, and one for each published model with the differences.

    Args:
        scores: as in scores.json.
        models: published ones to compare with.
    """
    columns = []  # (heading, name, metric, factor)
    for name, score in scores.items():
        metrics = [metric for metric in (score["metric"], *score.get("others", {})) if benchmark(name, metric)]
        for metric in metrics or [score["metric"]]:
            found = benchmark(name, metric)
            factor = found[1]["scale"] if found else 100 if score["noise"] is not None else 1
            columns.append((found[0] if found else name, name, metric, factor))
    lines = [["", *(heading for heading, *_ in columns)], ["---"] * (len(columns) + 1), [model]]
    for _, name, metric, factor in columns:
        score = scores[name]
        if metric != score["metric"]:
            lines[2].append(_figure(score["others"][metric] * factor))
        else:
            about = "" if score["noise"] is None else f" ± {_figure(score['noise'] * factor)}"
            lines[2].append(_figure(score["value"] * factor) + about)
    for other in models:
        cells = [
            _beside(other["name"], scores[name], name, metric, factor, models) for _, name, metric, factor in columns
        ]
        if any(cells):
            lines.append([f"[{other['name']}]({other['source']})", *(cell or "-" for cell in cells)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{RULE}\n"


def _beside(other: str, score: dict, name: str, metric: str, factor: float, models: Sequence[dict]) -> str | None:
    """A published score, the difference to it, and whether that is within the noise."""
    theirs = (published_scores(name, metric, models) or {}).get(other)
    if theirs is None:
        return None
    is_main = metric == score["metric"]
    ours = score["value"] if is_main else score["others"][metric]
    text = f"{_figure(theirs * factor)} ({_figure((ours - theirs) * factor, '+')}"
    if is_main and score["noise"] is not None:
        within = abs(ours - theirs) <= NOISES * score["noise"]
        text += f", {'within' if within else 'beyond'} noise"
    return text + ")"


def _figure(value: float, sign: str = "") -> str:
    """One decimal, none from 1000 on."""
    return f"{value:{sign}.0f}" if abs(value) >= 1000 else f"{value:{sign}.1f}"
