"""What each lever gives: the step as it is against the same step with one thing different, in one process.

Switches that need no other model are measured in turns with the step as it is; checkpointing, resharding, compilation
and the like each get a model of their own, from the same seed. Every row says how far loss and gradients moved: a lever
may cost or save time, it may not change the result. Float8 does, by rounding: see `benchmark.py float8` for its losses.
"""

from __future__ import annotations

import gc
import time
import warnings
from dataclasses import dataclass, replace
from statistics import median

import torch
from accelerate import Accelerator
from torch import nn

from benchmarking.cards import CARDS, table, write_card
from benchmarking.levers import GPU_ONLY, REBUILT, SWITCHES, Bench, Micros, Unavailable, ready
from benchmarking.samples import packed_step, profile_samples
from benchmarking.step import add_work_arguments, begin, card_name
from benchmarking.training import How, Work, build
from llava_next.paths import local_path
from llava_next.training.devices.parallel import finish
from llava_next.training.forecast.budget import POLICIES

LATE = "not begun: no time left"


def add_arguments(parser) -> None:
    """Options of `benchmark.py ablate`."""
    add_work_arguments(parser)
    parser.add_argument("--checkpointing", choices=["auto", *POLICIES], default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--padded_batch", type=int, default=4, help="samples that are padded to one length")
    parser.add_argument("--levers", nargs="+", choices=[*SWITCHES, *REBUILT, "optimizer"], help="default: all")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no lever after so many")
    parser.add_argument("--out", type=local_path, default=CARDS)


@dataclass
class Outcome:
    """A step without its update: seconds of each repeat, loss, gradients by name (their norms on a GPU), peak bytes."""

    seconds: list[float]
    loss: float
    gradients: dict[str, torch.Tensor]
    memory: int | None

    def distance(self, other: Outcome) -> float:
        """Largest relative distance of a gradient: of its values on a CPU, of its norm on a GPU.

        Some gradients are zero but for rounding (a key bias shifts all scores alike), so none counts as smaller than
        1e-4 of all together.
        """
        least = 1e-4 * torch.stack([value.norm() for value in other.gradients.values()]).norm()
        pairs = [(self.gradients[name], value) for name, value in other.gradients.items()]
        return max(float((a - b).norm() / b.norm().clamp_min(least)) for a, b in pairs)


def measure(model: nn.Module, micros: Micros, device: torch.device, repeats: int, warmup: int = 0) -> Outcome:
    """Forward and backward of the step, `repeats` times after `warmup`; the gradients are those of the last."""
    seconds, on_gpu = [], device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(warmup + repeats):
        model.zero_grad()
        begin = time.perf_counter()
        loss = torch.zeros((), device=device)
        for batch in micros:
            output = model(**batch.model_inputs(device)).loss
            output.backward()
            loss += output.detach()
        total = loss.item()
        seconds.append(time.perf_counter() - begin)
    memory = torch.cuda.max_memory_allocated(device) if on_gpu else None
    return Outcome(seconds[warmup:], total, gradients(model, norms=on_gpu), memory)


def gradients(model: nn.Module, norms: bool) -> dict[str, torch.Tensor]:
    """Of every parameter that has one, by name; only the norms where copies would not fit."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            whole = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
            found[name] = whole.float().norm() if norms else whole.clone()
    return found


def run(args) -> None:
    """Measures the levers and writes their card."""
    work, config, policy, accelerator = begin(args)
    deadline = time.monotonic() + args.seconds
    wanted = args.levers or [*SWITCHES, *REBUILT, "optimizer"]
    model, optimizer = build(accelerator, config, work.rates, How(policy))
    bench = bench_of(accelerator, model, work, args.padded_batch, policy)
    base = measure(model, bench.micros, accelerator.device, args.repeats, args.warmup)
    rows = [row("as it is", base, base)]
    rows += switches(bench, [name for name in SWITCHES if name in wanted], args.repeats, deadline)
    figures = {"layers": config.text_config.num_hidden_layers, "checkpointing": policy, "samples": work.samples}
    if accelerator.device.type == "cuda":
        figures["host_waits"] = host_waits(bench)
    if "optimizer" in wanted:
        figures["optimizer_s"] = optimizers(bench, optimizer, args.repeats)
    del model, optimizer
    bench.model = None
    rows += rebuilt(bench, config, work, base, [name for name in REBUILT if name in wanted], args, deadline)
    figures["levers"] = rows
    print(table(("lever", "seconds", "against as it is", "loss moved", "gradients moved", "GB"), map(line, rows)))
    print({name: value for name, value in figures.items() if name != "levers"}, flush=True)
    write_card(card_name("ablate", work, args.device), figures, args.out)
    finish(accelerator)


def bench_of(accelerator: Accelerator, model: nn.Module, work: Work, padded_batch: int, policy: str) -> Bench:
    """A step of the work."""
    samples = profile_samples(work.samples, model.config, 0, work.stage, work.shortened)
    bench = Bench(accelerator, model, samples, [], padded_batch, policy)
    micros = packed_step(samples, model.config, work.token_budget, work.tile_budget, work.rates)
    bench.micros = ready([batch.weighted(bench.weights) for batch in micros], accelerator.device)
    return bench


def switches(bench: Bench, names: list[str], repeats: int, deadline: float = float("inf")) -> list[dict]:
    """The step as it is and the step with one thing different, in turns."""
    device, rows = bench.accelerator.device, []
    for name in names:
        if name in GPU_ONLY and device.type != "cuda":
            continue
        what, lever = SWITCHES[name]
        if time.monotonic() > deadline:
            rows.append({"lever": f"{name}: {what}", "error": LATE})
            continue
        plain, different = [], []
        try:
            for _ in range(repeats):
                on = measure(bench.model, bench.micros, device, 1)
                with lever(bench) as micros:
                    off = measure(bench.model, micros, device, 1)
                plain += on.seconds
                different += off.seconds
        except torch.OutOfMemoryError:
            rows.append({"lever": f"{name}: {what}", "error": "out of memory"})
            continue
        except Unavailable as reason:
            rows.append({"lever": f"{name}: {what}", "error": str(reason)})
            continue
        on.seconds, off.seconds = plain, different
        rows.append(row(f"{name}: {what}", off, on))
    return rows


def rebuilt(bench: Bench, config, work: Work, base: Outcome, names: list[str], args, deadline: float) -> list[dict]:
    """Each model of its own against the first measurement."""
    rows, device = [], bench.accelerator.device
    for name in names:
        if time.monotonic() > deadline:
            rows.append({"lever": name, "error": LATE})
            continue
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            model, _ = build(bench.accelerator, config, work.rates, replace(How(bench.policy), **REBUILT[name]))
            rows.append(row(name, measure(model, bench.micros, device, args.repeats, args.warmup), base))
        except torch.OutOfMemoryError:
            rows.append({"lever": name, "error": "out of memory"})
        except ValueError as error:  # float8 where it cannot run
            rows.append({"lever": name, "error": str(error)})
        model = None
        bench.accelerator.free_memory()
    return rows


def optimizers(bench: Bench, optimizer: torch.optim.Optimizer, repeats: int) -> dict[str, float]:
    """Seconds of an update by AdamW's three implementations. Comes last: it moves the weights."""
    inner, found = getattr(optimizer, "optimizer", optimizer), {}
    for name, flags in (("fused", (True, False)), ("foreach", (False, True)), ("loop", (False, False))):
        seconds = []
        for group in inner.param_groups:
            group["fused"], group["foreach"] = flags
        for _ in range(repeats + 1):
            wait(bench.accelerator.device)
            begin = time.perf_counter()
            inner.step()
            wait(bench.accelerator.device)
            seconds.append(time.perf_counter() - begin)
        found[name] = median(seconds[1:])
    return found


def host_waits(bench: Bench) -> int:
    """Times that the host waited for the GPU in forward and backward of the step; reading the loss is not counted."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for batch in bench.micros:
                bench.model(**batch.model_inputs(bench.accelerator.device)).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def wait(device: torch.device) -> None:
    """Until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def row(name: str, outcome: Outcome, base: Outcome) -> dict:
    """A line of the table; the first repeats of both are as warm as the others."""
    return {
        "lever": name,
        "seconds": median(outcome.seconds),
        "ratio": median(outcome.seconds) / median(base.seconds),
        "loss_moved": abs(outcome.loss / base.loss - 1),
        "gradients_moved": outcome.distance(base),
        "memory_gb": outcome.memory and outcome.memory / 1e9,
    }


def line(row: dict) -> tuple:
    """A row for people."""
    if "error" in row:
        return row["lever"], row["error"], "", "", "", ""
    memory = f"{row['memory_gb']:.1f}" if row["memory_gb"] else ""
    moved = (f"{row[name]:.1e}" for name in ("loss_moved", "gradients_moved"))
    return row["lever"], f"{row['seconds']:.3f}", f"{row['ratio']:.2f}", *moved, memory
