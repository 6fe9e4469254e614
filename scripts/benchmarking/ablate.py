"""What each lever gives: the step as it is against the same step with one thing different, in one process.

Switches that need no other model are measured in turns with the step as it is; checkpointing, resharding, compilation
and the like each get a model of their own, from the same seed. Every row says how far loss and gradients moved: a lever
may cost or save time, it may not change the result. Float8 does, by rounding: see `benchmark.py float8` for its losses.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import nn

from benchmarking.cards import table, write_card
from benchmarking.levers import GPU_ONLY, REBUILT, SWITCHES, Bench, Unavailable, ready
from benchmarking.training import How, add_work_arguments, begin, build, card_name
from llava_next.data.storage.errors import first_line
from llava_next.training.devices.parallel import finish


def add_arguments(parser) -> None:
    """Options of `benchmark.py ablate`."""
    add_work_arguments(parser)
    parser.add_argument("--steps", "--repeats", type=int, default=3, help="of each lever")
    parser.add_argument("--levers", nargs="+", choices=[*SWITCHES, *REBUILT], default=[*SWITCHES, *REBUILT])
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no lever after so many")


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


def measure(
    model: nn.Module,
    micros: Sequence,
    device: torch.device,
    repeats: int,
    warmup: int = 0,
    loss: Callable | None = None,
    keep: bool = False,
) -> Outcome:
    """Forward and backward of the step, `repeats` times after `warmup`; the gradients are those of the last.

    Args:
        loss: of one of `micros`; default: what the model makes of a `PackedBatch`.
        keep: gathered weights for the whole step, as the training loop does where they are not freed after forward.
    """
    loss = loss or (lambda batch: model(**batch.model_inputs(device)).loss)
    seconds, on_gpu = [], device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(warmup + repeats):
        model.zero_grad()
        begin, total = time.perf_counter(), torch.zeros((), device=device)
        for batch in micros:
            part = loss(batch)
            if keep:
                model.set_reshard_after_backward(batch is micros[-1])
            part.backward()
            total += part.detach()
        total = total.item()
        seconds.append(time.perf_counter() - begin)
    memory, gradients = torch.cuda.max_memory_allocated(device) if on_gpu else None, {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            whole = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
            gradients[name] = whole.float().norm() if on_gpu else whole.clone()  # copies would not fit a GPU
    return Outcome(seconds[warmup:], total, gradients, memory)


def run(args) -> None:
    """Measures the levers and writes their card."""
    work, config, policy, accelerator = begin(args)
    deadline, device = time.monotonic() + args.seconds, accelerator.device
    model, _ = build(accelerator, config, work.rates, How(policy))
    samples, micros = work.step(config)
    bench = Bench(accelerator, model, samples, [])
    bench.micros = ready([batch.weighted(bench.weights) for batch in micros], device)
    base = measure(model, bench.micros, device, args.steps, args.warmup)
    figures = {"layers": config.text_config.num_hidden_layers, "checkpointing": policy, "samples": work.samples}
    if device.type == "cuda":
        figures["host_waits"] = host_waits(bench)
    figures["levers"] = [compared(base, base) | {"lever": "as it is"}]

    def add(found: dict) -> None:
        figures["levers"].append(found)
        write_card(card_name("ablate", work, args.device), figures, args.out)  # now: a later lever may take too long

    for name in SWITCHES:
        if name in args.levers and not (name in GPU_ONLY and device.type != "cuda"):
            add(row(f"{name}: {SWITCHES[name][0]}", deadline, switch, bench, name, args.steps))
    del model, _
    bench.model = None

    def rebuilt(name: str) -> dict:
        accelerator.free_memory()
        gc.collect()
        torch.cuda.empty_cache()
        how = replace(How(policy), **REBUILT[name])
        other, _ = build(accelerator, config, work.rates, how)
        return compared(measure(other, bench.micros, device, args.steps, args.warmup, keep=not how.reshard), base)

    for name in (name for name in REBUILT if name in args.levers):
        add(row(name, deadline, rebuilt, name))
    head = ("lever", "seconds", "against as it is", "loss moved", "gradients moved", "GB")
    print(table(head, map(line, figures["levers"])))
    print({name: value for name, value in figures.items() if name != "levers"}, flush=True)
    finish(accelerator)


def row(lever: str, deadline: float, measure_it: Callable[..., dict], *arguments) -> dict:
    """What was measured of a lever, or why nothing was."""
    if time.monotonic() > deadline:
        return {"lever": lever, "error": "not begun: no time left"}
    try:
        return {"lever": lever, **measure_it(*arguments)}
    except torch.OutOfMemoryError:
        return {"lever": lever, "error": "out of memory"}
    except (Unavailable, ValueError) as reason:  # ValueError: float8 where it cannot run
        return {"lever": lever, "error": str(reason)}
    except Exception as error:  # of a kernel or a compiler: the levers after it have figures of their own
        return {"lever": lever, "error": f"{type(error).__name__}: {first_line(error)}"}


def switch(bench: Bench, name: str, repeats: int) -> dict:
    """The step as it is and the step with one thing different, in turns."""
    device, plain, different = bench.accelerator.device, [], []
    for _ in range(repeats):
        on = measure(bench.model, bench.micros, device, 1)
        with SWITCHES[name][1](bench) as micros:
            off = measure(bench.model, micros, device, 1)
        plain += on.seconds
        different += off.seconds
    return compared(replace(off, seconds=different), replace(on, seconds=plain))


def compared(outcome: Outcome, base: Outcome) -> dict:
    """A lever's figures; the first repeats of both are as warm as the others."""
    return {
        "seconds": median(outcome.seconds),
        "ratio": median(outcome.seconds) / median(base.seconds),
        "loss_moved": abs(outcome.loss / base.loss - 1),
        "gradients_moved": outcome.distance(base),
        "memory_gb": outcome.memory and outcome.memory / 1e9,
    }


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


def line(row: dict) -> tuple:
    """A row for people."""
    if "error" in row:
        return row["lever"], row["error"], "", "", "", ""
    memory = f"{row['memory_gb']:.1f}" if row["memory_gb"] else ""
    moved = (f"{row[name]:.1e}" for name in ("loss_moved", "gradients_moved"))
    return row["lever"], f"{row['seconds']:.3f}", f"{row['ratio']:.2f}", *moved, memory
