"""Draws loss, throughput and learning rates of one or several runs to one picture, from their metrics.jsonl.

    python scripts/plot_run.py runs/vicuna-7b runs/vicuna-7b-again --out compare.png
    python scripts/plot_run.py --ledger scripts/benchmarks/ledger.jsonl --out ledger.png

Works while a run is going on. Steps that a resumed run did again count once, as done last; a line that a crash cut off
is left out; a step whose loss was not finite is marked. With two to five sources the fourth panel is the loss of each,
else the gradient norm. Scores made on the way (`evaluate.every`) have a panel. Of a ledger (scripts/reproduce.py)
losses and scores are drawn, and a table is printed.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from jsonargparse import ArgumentParser

matplotlib.use("agg")
from matplotlib import pyplot as plt

from llava_next.model.folders.card import points_of
from llava_next.paths import drawing_path, local_path
from reproducing.ledger import label, ledger_table, read_ledger

# Okabe and Ito's palette without yellow and black: distinct also for colour-blind readers
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
LINES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))
STYLE = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


@dataclass
class Run:
    """What is drawn of a run: arrays over its steps.

    Args:
        steps: int64 [n], ascending, each once.
        values: name -> float64 [n]; NaN where a step has no such number. Keys below `rates` and `source_loss` are
            `rates/llm`, `source_loss/NAME`.
        held_out: (steps, losses) of validation.jsonl, or None.
        scores: name -> (steps, values, standard errors), in percent where a score is a share; NaN: it has no error.
        unreadable: lines of metrics.jsonl that are no JSON.
    """

    name: str
    steps: np.ndarray
    values: dict[str, np.ndarray]
    held_out: tuple[np.ndarray, np.ndarray] | None
    scores: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]
    unreadable: int

    def broken_steps(self) -> np.ndarray:
        """Steps with a loss that is not finite, int64."""
        return self.steps[~np.isfinite(self.values["loss"])] if "loss" in self.values else self.steps[:0]

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        """The values below a prefix, by what follows it."""
        return {key.removeprefix(prefix): v for key, v in self.values.items() if key.startswith(prefix)}


def read_lines(path: Path) -> tuple[list[dict], list[dict], int]:
    """Records by step, the last one of each step; those of scores; and how many lines were unreadable."""
    steps, scores, unreadable = {}, {}, 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            (scores if "scores" in record else steps)[int(record["step"])] = record
        except (ValueError, KeyError, TypeError):
            unreadable += 1
    return *([found[step] for step in sorted(found)] for found in (steps, scores)), unreadable


def read_scores(records: list[dict]) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Scores as `Run` has them."""
    points: dict[str, list] = {}
    for record in records:
        for name, found in record["scores"].items():
            value, noise = (np.nan if found.get(key) is None else found[key] for key in ("value", "noise"))
            unit = 100 if found.get("noise") is not None and 0 <= value <= 1 else 1
            points.setdefault(name, []).append((record["step"], unit * value, unit * noise))
    return {name: tuple(np.array(column, float) for column in zip(*of, strict=True)) for name, of in points.items()}


def read_run(folder: Path, name: str) -> Run:
    """Reads a run folder.

    Raises:
        ValueError: no metrics.jsonl there, or no step in it yet.
    """
    path = folder / "metrics.jsonl"
    if not path.exists():
        raise ValueError(f"{folder} has no metrics.jsonl; give the run_dir of a run that has made its first step")
    records, scored, unreadable = read_lines(path)
    if not records:
        raise ValueError(f"{path} holds no step yet; wait for the first one")
    flat = []
    for record in records:
        nested = {f"{k}/{n}": v for k in ("rates", "source_loss") for n, v in record.get(k, {}).items()}
        values = {k: np.nan if v is None else v for k, v in {**record, **nested}.items()}  # null: not finite
        flat.append({k: v for k, v in values.items() if isinstance(v, (int, float))})
    keys = {key for record in flat for key in record}
    values = {key: np.array([record.get(key, np.nan) for record in flat], dtype=np.float64) for key in sorted(keys)}
    held_out = None
    if (folder / "validation.jsonl").exists():
        points = [(r["step"], r["loss/all"]) for r in read_lines(folder / "validation.jsonl")[0] if "loss/all" in r]
        held_out = tuple(np.array(column, float) for column in zip(*points, strict=True)) if points else None
    return Run(name, values["step"].astype(np.int64), values, held_out, read_scores(scored), unreadable)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Exponential moving average, float64 [n], started without a bias towards 0; NaN takes no part.

    Args:
        window: steps that the average looks back on, roughly: the newest weighs 2 / (window + 1).
    """
    keep = 1 - 2 / (window + 1)
    out, total, weight = np.empty(len(values)), 0.0, 0.0
    for i, value in enumerate(values):
        if np.isfinite(value):
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        out[i] = total / weight if weight else np.nan
    return out


def labels(folders: list[Path]) -> list[str]:
    """The shortest ends of the paths that tell the runs apart."""
    parts, names = [folder.resolve().parts for folder in folders], []
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            break
    return names


def draw(runs: list[Run], window: int | None = None) -> plt.Figure:
    """The figure of several runs, a colour each.

    Args:
        window: steps of smoothing; None: a fiftieth of the longest run.
    """
    window = window or max(1, max(len(run.steps) for run in runs) // 50)
    few_sources = any(2 <= len(run.group("source_loss/")) <= len(LINES) for run in runs)
    with plt.rc_context(STYLE):
        panels = [["loss", "fourth"], ["speed", "rates"]]
        panels += [["scores", "scores"]] if any(run.scores for run in runs) else []
        figure, axes = plt.subplot_mosaic(panels, figsize=(12, 3.7 * len(panels)), layout="constrained")
        loss, fourth, speed, rates = (axes[name] for name in ("loss", "fourth", "speed", "rates"))
        if "scores" in axes:
            draw_scores(axes["scores"], runs)
        for number, run in enumerate(runs):
            colour = COLOURS[number % len(COLOURS)]
            draw_loss(loss, run, colour, window)
            draw_speed(speed, run, colour, window)
            if few_sources:
                draw_sources(fourth, run, colour, window, several=len(runs) > 1)
            else:
                draw_smoothed(fourth, run, "grad_norm", colour, window, run.name)
        draw_rates(rates, runs)
        smoothing = f", average over about {window} steps" if window > 1 else ""
        # the fall of the first steps may leave the picture, or nothing else could be seen in it
        losses = [run.values["loss"][len(run.steps) // 25 :] for run in runs if "loss" in run.values]
        finish(loss, f"Loss{smoothing}", robust=losses)
        finish(speed, f"Throughput, tokens/s{smoothing}", bottom=0)
        finish(rates, "Learning rate", bottom=0)
        grads = [run.values.get("grad_norm") for run in runs]
        finish(fourth, f"Loss by source{smoothing}") if few_sources else finish(fourth, "Gradient norm", robust=grads)
        for axis in (speed, rates):
            axis.set_xlabel("step")
    return figure


def draw_smoothed(axis, run: Run, key: str, colour, window: int, label: str, line="-") -> None:
    """A quantity over the steps: faint as logged, strong smoothed."""
    if key not in run.values:
        return
    if window > 1:
        axis.plot(run.steps, run.values[key], color=colour, alpha=0.22, linewidth=0.7)
    axis.plot(run.steps, smooth(run.values[key], window), color=colour, linewidth=1.6, label=label, linestyle=line)


def draw_loss(axis, run: Run, colour, window: int) -> None:
    """The loss, held out too, and at the foot a mark for each step whose loss is no finite number."""
    draw_smoothed(axis, run, "loss", colour, window, run.name)
    broken = run.broken_steps()
    if len(broken):
        foot = {"transform": axis.get_xaxis_transform(), "clip_on": False}
        axis.plot(broken, np.zeros(len(broken)), "x", color=colour, label=f"{run.name}, not finite", **foot)
    if run.held_out is not None:
        axis.plot(
            *run.held_out, "o", color=colour, markersize=4, markeredgecolor="white", label=f"{run.name}, held out"
        )


def draw_speed(axis, run: Run, colour, window: int) -> None:
    if "tokens_per_s" not in run.values:
        return
    label = f"{run.name}: median {np.nanmedian(run.values['tokens_per_s']):,.0f}"
    if "mfu" in run.values:
        label += f", MFU {100 * np.nanmedian(run.values['mfu']):.1f} %"
    draw_smoothed(axis, run, "tokens_per_s", colour, window, label)


def draw_rates(axis, runs: list[Run]) -> None:
    """A line for each rate; modules that share one share the line, and so do runs in which it is the same."""
    alike: dict[tuple, list[int]] = {}  # steps, rate, modules and their place -> numbers of the runs
    for number, run in enumerate(runs):
        together: dict[bytes, list[str]] = {}
        for module, rate in run.group("rates/").items():
            together.setdefault(rate.tobytes(), []).append(module)
        for place, (rate, modules) in enumerate(together.items()):
            alike.setdefault((run.steps.tobytes(), rate, tuple(modules), place), []).append(number)
    for (*_, modules, place), numbers in alike.items():
        run, others = runs[numbers[0]], f" and {len(numbers) - 1} more" if len(numbers) > 1 else ""
        label = f"{run.name}{others}: {', '.join(modules)}" if len(runs) > 1 else ", ".join(modules)
        style = {"color": COLOURS[numbers[0] % len(COLOURS)], "linestyle": LINES[place % len(LINES)]}
        axis.plot(run.steps, run.values[f"rates/{modules[0]}"], **style, linewidth=1.6, label=label)


def draw_sources(axis, run: Run, colour, window: int, several: bool) -> None:
    """A line for each source: by colour when there is one run, else by line style in the run's colour."""
    for number, source in enumerate(list(run.group("source_loss/"))[: len(LINES)]):
        chosen = (colour, LINES[number]) if several else (COLOURS[number], "-")
        label = f"{run.name}: {source}" if several else source
        draw_smoothed(axis, run, f"source_loss/{source}", chosen[0], window, label, chosen[1])


def draw_scores(axis, runs: list[Run]) -> None:
    """A line for each score of each run, with two standard errors; sums, which are larger, at the right of shares."""
    several, right = len(runs) > 1, None
    shares = any(not np.isnan(errors).all() for run in runs for *_, errors in run.scores.values())
    for number, run in enumerate(runs):
        for place, (name, (steps, values, errors)) in enumerate(run.scores.items()):
            colour, line = COLOURS[(number if several else place) % len(COLOURS)], LINES[place % len(LINES)]
            on = axis
            if shares and np.isnan(errors).all():
                right = on = right or axis.twinx()
            label = f"{run.name}: {name}" if several else name
            look = {"color": colour, "linestyle": line if several else "-", "label": label}
            on.errorbar(steps, values, np.nan_to_num(2 * errors), marker="o", markersize=4, capsize=3, **look)
    finish(axis, "Scores, ± two standard errors; shares in percent", bottom=0)
    axis.set_xlim(left=0)
    if right is not None:
        finish(right, "")
        right.spines["right"].set_visible(True)
        right.grid(False)
        right.legend(loc="lower right")
    axis.set_xlabel("step")


def draw_ledger(lines: list[dict]) -> plt.Figure:
    """Losses of the runs of a ledger, and of each benchmark their scores with two standard errors."""
    with plt.rc_context(STYLE):
        figure, (loss, scores) = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
        names = list(dict.fromkeys(name for line in lines for name in line["scores"]))
        for number, line in enumerate(lines):
            colour, style = COLOURS[number % len(COLOURS)], LINES[number // len(COLOURS) % len(LINES)]
            if points := points_of(line):
                text = f"{label(line)}, {line['date']}"
                loss.plot(*zip(*points, strict=True), color=colour, linestyle=style, linewidth=1.6, label=text)
            shift = 0.5 * (number + 1) / (len(lines) + 1) - 0.25
            for name, found in line["scores"].items():
                place, noise = names.index(name) + shift, 2 * (found.get("noise") or 0)
                scores.errorbar(place, found["value"], noise, fmt="o", color=colour, capsize=3)
        scores.set_xticks(range(len(names)), names)
        finish(loss, "Loss")
        scores.set_title("Scores, ± two standard errors" if names else "No scores yet")
        scores.set_xlim(-0.5, max(len(names), 1) - 0.5)
    return figure


def finish(axis, title: str, bottom: float | None = None, robust: list | None = None) -> None:
    """Title, legend and limits of a panel.

    Args:
        bottom: lower limit.
        robust: values whose highest per mille may leave the picture, so that one spike does not flatten the rest.
    """
    axis.set_title(title)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc="best")
    axis.margins(x=0.01)
    axis.xaxis.set_major_locator(plt.MaxNLocator(integer=True, nbins=8))
    axis.yaxis.set_major_formatter(plt.FuncFormatter(number))
    values = [v[np.isfinite(v)] for v in robust or [] if v is not None]
    values = np.concatenate(values) if values else np.empty(0)
    if len(values) > 200:
        low, high = np.min(values), np.quantile(values, 0.999)
        axis.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    if bottom is not None:
        axis.set_ylim(bottom=bottom)


def number(value: float, position=None) -> str:
    """An axis label: 12,000, 0.25, 2e-05."""
    if value and abs(value) < 1e-3:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="*", type=local_path, help="run folders (run_dir of a training)")
    parser.add_argument("--ledger", type=local_path, help="draw the runs of this ledger instead, print a table")
    parser.add_argument("--out", type=drawing_path, default=Path("runs.png"), help="PNG or WebP file")
    parser.add_argument("--smooth", type=int | None, help="steps to average over; default: a fiftieth of the run")
    args = parser.parse_args()
    if bool(args.runs) == bool(args.ledger):
        parser.error("give run folders, or --ledger")
    try:
        lines = read_ledger(args.ledger) if args.ledger else []
        runs = [read_run(folder, name) for folder, name in zip(args.runs, labels(args.runs), strict=True)]
    except ValueError as error:
        sys.exit(f"error: {error}")
    aside = args.out.with_name(f".{args.out.name}.tmp")
    figure = draw_ledger(lines) if lines else draw(runs, args.smooth)
    figure.savefig(aside, dpi=140, format=args.out.suffix[1:])
    os.replace(aside, args.out)  # a viewer that reloads never sees half a picture
    print(ledger_table(lines) if lines else "", end="\n" if lines else "")
    for run in runs:
        loss = smooth(run.values["loss"], max(1, len(run.steps) // 50))[-1] if "loss" in run.values else np.nan
        cut = f"; loss not finite in {len(run.broken_steps())} steps" if len(run.broken_steps()) else ""
        cut += f"; {run.unreadable} unreadable lines left out" if run.unreadable else ""
        for name, (steps, values, _) in run.scores.items():
            cut += f"; {name} {values[-1]:.4g} after step {steps[-1]:.0f}"
        print(f"{run.name}: steps {run.steps[0]} to {run.steps[-1]}, loss {loss:.4f}{cut}")
    print(args.out)


if __name__ == "__main__":
    main()
