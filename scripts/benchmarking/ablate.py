"""What each lever gives: the step as it is against the same step with one lever taken away, in one process.

Switches that need no other model are measured in turns with the step as it is; checkpointing, resharding and
compilation each get a model of their own, from the same seed. Every row says how far loss and gradients moved: a lever
may cost or save time, it may not change the result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from benchmarking.cards import CARDS, table, write_card
from benchmarking.launching import launched, relaunch
from benchmarking.samples import geometry, packed_step, profile_samples, supervised
from benchmarking.step import add_work_arguments, card_name, plan_of, work_of
from benchmarking.training import Work, build
from llava_next.data.batch import IGNORE, Example, PackedBatch, pack
from llava_next.model import head, modeling
from llava_next.model.attention import attention_names
from llava_next.training.agreement import slot_weights
from llava_next.training.budget import POLICIES
from llava_next.training.parallel import build_accelerator, finish

Micros = list[PackedBatch]


def add_arguments(parser) -> None:
    """Options of `benchmark.py ablate`."""
    add_work_arguments(parser)
    parser.add_argument("--checkpointing", choices=["auto", *POLICIES], default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--padded_batch", type=int, default=4, help="samples that are padded to one length")
    parser.add_argument("--levers", nargs="+", choices=[*SWITCHES, *REBUILT, "optimizer"], help="default: all")
    parser.add_argument("--out", type=Path, default=CARDS)


@dataclass
class Bench:
    """The step that is measured: model, samples of the step, and its micro-batches, weighted."""

    accelerator: Accelerator
    model: nn.Module
    samples: list
    micros: Micros
    padded_batch: int

    @property
    def weights(self) -> torch.Tensor:
        """Weight of a supervised token by slot."""
        return slot_weights(supervised(self.samples), "token")


@contextlib.contextmanager
def padding(bench: Bench) -> Iterator[Micros]:
    """Samples in groups, each padded to its group's longest, as a batch of the stock way."""
    groups = [bench.samples[i : i + bench.padded_batch] for i in range(0, len(bench.samples), bench.padded_batch)]
    anyres = geometry(bench.model.config)
    packed = []
    for group in groups:
        longest = max(len(example.input_ids) for example, _ in group)
        examples = [padded(example, longest) for example, _ in group]
        packed.append(pack(examples, anyres.tile_size, anyres.patches_per_tile).weighted(bench.weights))
    yield ready(packed, bench.accelerator.device)


def padded(example: Example, length: int) -> Example:
    """The sample with unsupervised words at its end: under the causal mask they change nothing before them."""
    more = length - len(example.input_ids)
    ids = np.concatenate([example.input_ids, np.zeros(more, np.int64)])
    return dataclasses.replace(
        example, input_ids=ids, labels=np.concatenate([example.labels, np.full(more, IGNORE, np.int64)])
    )


@contextlib.contextmanager
def all_logits(bench: Bench) -> Iterator[Micros]:
    """The head at every position, those without a label at weight 0."""
    yield ready([everywhere(batch) for batch in bench.micros], bench.accelerator.device)


def everywhere(batch: PackedBatch) -> PackedBatch:
    """The micro-batch with a target at each of its positions."""
    length, positions = len(batch.input_ids), batch.target_positions

    def spread(values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(length, dtype=values.dtype).index_put((positions,), values)

    names = ("target_ids", "target_weights", "target_source", "target_slot")
    return dataclasses.replace(
        batch, target_positions=torch.arange(length), **{name: spread(getattr(batch, name)) for name in names}
    )


@contextlib.contextmanager
def one_chunk(bench: Bench) -> Iterator[Micros]:
    """Logits of all supervised positions at once."""
    with patched(head, "CHUNK", 1 << 30):
        yield bench.micros


@contextlib.contextmanager
def every_vision_layer(bench: Bench) -> Iterator[Micros]:
    """The tower to its end, features taken from before: transformers' own way."""

    def whole_tower(tower, pixels, feature_layer):
        hidden = features = run_tower(tower, pixels, feature_layer)
        for layer in tower.encoder.layers[modeling.used_layers(len(tower.encoder.layers), feature_layer) :]:
            hidden = layer(hidden, attention_mask=None)
        return features

    run_tower = modeling.run_tower
    with patched(modeling, "run_tower", whole_tower):
        yield bench.micros


@contextlib.contextmanager
def float_tiles(bench: Bench) -> Iterator[Micros]:
    """Tiles normalised on the host and copied as float32."""
    mean, std = modeling.NORMALISATION[bench.model.config.vision_config.model_type]
    micros = [dataclasses.replace(b, tiles=modeling.normalise(b.tiles, mean, std)) for b in bench.micros]
    with patched(modeling, "normalise", lambda tiles, *_: tiles):
        yield ready(micros, bench.accelerator.device)


@contextlib.contextmanager
def pageable(bench: Bench) -> Iterator[Micros]:
    """Copies to the device from memory that is not page-locked: each waits (GPU only)."""
    tensors = [f.name for f in dataclasses.fields(PackedBatch) if torch.is_tensor(getattr(bench.micros[0], f.name))]
    yield [
        dataclasses.replace(batch, **{name: getattr(batch, name).clone() for name in tensors}) for batch in bench.micros
    ]


@contextlib.contextmanager
def attention_loop(bench: Bench) -> Iterator[Micros]:
    """One SDPA call a segment in place of the variable-length kernel (GPU only)."""
    before = bench.model.config.text_config._attn_implementation
    bench.model.set_attn_implementation(attention_names("sdpa"))
    try:
        yield bench.micros
    finally:
        bench.model.set_attn_implementation({"text_config": before, "vision_config": "sdpa"})


# name: (without it, what is different), in the order of the table
SWITCHES: dict[str, tuple[str, Callable]] = {
    "packing": ("padded to the longest of a group", padding),
    "supervised_logits": ("logits at all positions", all_logits),
    "chunked_loss": ("logits in one piece", one_chunk),
    "unused_layer": ("the tower's last layer is computed", every_vision_layer),
    "uint8_tiles": ("tiles copied as float32", float_tiles),
    "pinned": ("copies from pageable memory", pageable),
    "varlen": ("one SDPA call a segment", attention_loop),
}
GPU_ONLY = ("pinned", "varlen")
REBUILT: dict[str, dict] = {
    "checkpointing_none": {"policy": "none"},
    "checkpointing_selective": {"policy": "selective"},
    "checkpointing_full": {"policy": "full"},
    "no_reshard": {"reshard": False},
    "compile": {"compiled": True},
}


@contextlib.contextmanager
def patched(module, name: str, value) -> Iterator[None]:
    """`module.name` is `value` inside."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def ready(micros: Micros, device: torch.device) -> Micros:
    """Page-locked where there is a GPU."""
    return [batch.pin_memory() for batch in micros] if device.type == "cuda" else micros


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


def measure(model: nn.Module, micros: Micros, device: torch.device, repeats: int) -> Outcome:
    """Forward and backward of the step, `repeats` times; the gradients are those of the last."""
    seconds, on_gpu = [], device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(repeats):
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
    return Outcome(seconds, total, gradients(model, norms=on_gpu), memory)


def gradients(model: nn.Module, norms: bool) -> dict[str, torch.Tensor]:
    """Of every parameter that has one, under its plain name; only the norms where copies would not fit."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            whole = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
            plain = name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")
            found[plain] = whole.float().norm() if norms else whole.clone()
    return found


def run(args) -> None:
    """Measures the levers and writes their card."""
    if not launched():
        relaunch(args.device)
    work = work_of(args)
    depth, policy = plan_of(args, work)
    config, accelerator = work.config(depth), build_accelerator()
    wanted = args.levers or [*SWITCHES, *REBUILT, "optimizer"]
    model, optimizer = build(accelerator, config, work.rates, policy)
    bench = bench_of(accelerator, model, work, args.padded_batch)
    measure(model, bench.micros, accelerator.device, args.warmup)
    base = measure(model, bench.micros, accelerator.device, args.repeats)
    rows = [row("as it is", base, base)]
    rows += switches(bench, [name for name in SWITCHES if name in wanted], args.repeats)
    figures = {"layers": depth, "checkpointing": policy, "samples": work.samples}
    if accelerator.device.type == "cuda":
        figures["host_waits"] = host_waits(bench)
    if "optimizer" in wanted:
        figures["optimizer_s"] = optimizers(bench, optimizer, args.repeats)
    del model, optimizer
    bench.model = None
    rows += rebuilt(bench, config, work, policy, base, [name for name in REBUILT if name in wanted], args)
    figures["levers"] = rows
    print(table(("lever", "seconds", "without / with", "loss moved", "gradients moved", "GB"), map(line, rows)))
    print({name: value for name, value in figures.items() if name != "levers"}, flush=True)
    write_card(card_name(work, args.device).replace("step", "ablate", 1), figures, args.out)
    finish(accelerator)


def bench_of(accelerator: Accelerator, model: nn.Module, work: Work, padded_batch: int) -> Bench:
    """A step of the work."""
    samples = profile_samples(work.samples, model.config, 0, work.stage, work.shortened)
    bench = Bench(accelerator, model, samples, [], padded_batch)
    micros = packed_step(samples, model.config, work.token_budget, work.tile_budget, work.rates)
    bench.micros = ready([batch.weighted(bench.weights) for batch in micros], accelerator.device)
    return bench


def switches(bench: Bench, names: list[str], repeats: int) -> list[dict]:
    """Each lever off and on in turns."""
    device, rows = bench.accelerator.device, []
    for name in names:
        if name in GPU_ONLY and device.type != "cuda":
            continue
        what, lever = SWITCHES[name]
        with_it, without = [], []
        try:
            for _ in range(repeats):
                on = measure(bench.model, bench.micros, device, 1)
                with lever(bench) as micros:
                    off = measure(bench.model, micros, device, 1)
                with_it += on.seconds
                without += off.seconds
        except torch.OutOfMemoryError:
            rows.append({"lever": f"{name}: {what}", "error": "out of memory without it"})
            continue
        on.seconds, off.seconds = with_it, without
        rows.append(row(f"{name}: {what}", off, on))
    return rows


def rebuilt(bench: Bench, config, work: Work, policy: str, base: Outcome, names: list[str], args) -> list[dict]:
    """Each model of its own against the first measurement."""
    rows, device = [], bench.accelerator.device
    for name in names:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        how = {"policy": policy, **REBUILT[name]}
        try:
            model, _ = build(bench.accelerator, config, work.rates, **how)
            measure(model, bench.micros, device, args.warmup)
            rows.append(row(name, measure(model, bench.micros, device, args.repeats), base))
        except torch.OutOfMemoryError:
            rows.append({"lever": name, "error": "out of memory"})
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
