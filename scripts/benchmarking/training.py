"""A training step without a data set: this project's model, sharding, optimizer and `Trainer`, random weights.

The `Trainer` is the one of the training scripts; what it is fed from memory here is what the loader's workers make
elsewhere, packed by the same collator.
"""

from __future__ import annotations

import contextlib
import io
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.autograd import DeviceType
from transformers import LlavaNextConfig

from benchmarking.samples import STAGES, model_config, packed_step, profile_samples
from llava_next.data.loading.batch import PackedBatch
from llava_next.data.plan.order import Source
from llava_next.model.forward.attention import attention_names, choose_attention
from llava_next.model.forward.modeling import LlavaNextForConditionalGeneration, used_layers
from llava_next.training.devices.float8 import use_float8
from llava_next.training.devices.launch import layer_stacks
from llava_next.training.devices.parallel import shard
from llava_next.training.forecast.activations import Compute
from llava_next.training.forecast.budget import Layout, choose, estimate, units
from llava_next.training.forecast.flops import Checkpointing
from llava_next.training.loop import Trainer
from llava_next.training.recipe.config import RunConfig
from llava_next.training.recipe.optim import Rates, build_optimizer, freeze
from llava_next.training.watch.journal import Journal
from llava_next.training.watch.metrics import Progress
from llava_next.training.watch.stopping import StopRequest
from llava_next.training.watch.timing import PHASES, StepTimer

SPARE = 0.93  # share of a GPU's memory that the estimate may fill


@dataclass(frozen=True)
class Work:
    """What is trained and in which portions.

    Args:
        model, tower, scale: the pairing, see `samples`; stage: 1 or 2.
        token_budget, tile_budget: of a micro-batch.
        samples: of a step, on this rank; shortened: see `profile_samples`.
    """

    model: str
    tower: str
    scale: str
    stage: int
    token_budget: int
    tile_budget: int
    samples: int
    shortened: int = 1

    @property
    def rates(self) -> Rates:
        """What the stage trains."""
        return STAGES[self.stage].rates

    def config(self, depth: int | None = None) -> LlavaNextConfig:
        """The model's config with so many layers."""
        return model_config(self.model, self.tower, self.scale, depth)

    def steps(self, count: int, config: LlavaNextConfig, seed: int = 0) -> list[list[PackedBatch]]:
        """Steps of micro-batches, each with samples of its own."""
        return [
            packed_step(
                profile_samples(self.samples, config, seed + step, self.stage, self.shortened),
                *(config, self.token_budget, self.tile_budget, self.rates, step),
            )
            for step in range(count)
        ]


def empty_units(config: LlavaNextConfig, rates: Rates):
    """`budget.units` of a model without memory."""
    with torch.device("meta"):
        model = LlavaNextForConditionalGeneration(config)
    freeze(model, rates)
    return units(model)


def pick(work: Work, memory: float, wanted: str = "auto", ranks: int = 8) -> tuple[int, Checkpointing]:
    """(depth, policy): the policy that `ranks` GPUs would take at full depth, and the depth that one of them holds.

    Args:
        memory: bytes of a GPU; wanted: a policy to insist on, or `auto`.

    Raises:
        ValueError: not even one layer fits.
    """
    full, budgets = work.config(), (work.token_budget, work.tile_budget)
    policy = wanted
    if wanted == "auto":
        layout = Layout(shard=ranks, compute=Compute())
        policy = choose(full, empty_units(full, work.rates), work.rates, layout, *budgets, SPARE * memory).picked
    one = Layout(shard=1, compute=Compute())

    def fits(depth: int) -> bool:
        config = work.config(depth)
        counts = empty_units(config, work.rates)
        return estimate(config, counts, work.rates, policy, one, *budgets).total <= SPARE * memory

    fitting, too_deep = 0, full.text_config.num_hidden_layers + 1
    while too_deep - fitting > 1:
        middle = (fitting + too_deep) // 2
        fitting, too_deep = (middle, too_deep) if fits(middle) else (fitting, middle)
    if not fitting:
        raise ValueError(f"{work.model} does not fit {memory / 1e9:.0f} GB with a single layer; lower --token_budget")
    return fitting, policy


@dataclass(frozen=True)
class How:
    """In which way a step is computed.

    Args:
        policy: activation checkpointing.
        reshard: free gathered weights after a layer's forward.
        compiled: each layer by torch.compile.
        float8: linears of the decoder layers by torchao; on a CPU emulated.
        prefetch: gather the weights of so many layers ahead; 0: as FSDP2 does by itself.
    """

    policy: Checkpointing = "none"
    reshard: bool = True
    compiled: bool = False
    float8: bool = False
    prefetch: int = 0


def build(
    accelerator: Accelerator, config: LlavaNextConfig, rates: Rates, how: How = How()
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model with random weights, made on the device, sharded as a run shards it; and its optimizer.

    Raises:
        ValueError: float8 cannot run here, see `use_float8`.
    """
    device, half = accelerator.device, accelerator.mixed_precision == "bf16"
    dtype = torch.bfloat16 if half else torch.float32
    plugin = accelerator.state.fsdp_plugin
    plugin.activation_checkpointing, plugin.reshard_after_forward = how.policy != "none", how.reshard
    plugin.cpu_ram_efficient_loading = False  # there is no file to spare the other ranks
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = LlavaNextForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(torch.float32)
    kernel, _ = choose_attention("auto", device, dtype)
    model.set_attn_implementation(attention_names(kernel))
    freeze(model, rates)
    if how.float8:
        use_float8(model, emulate=device.type == "cpu")
    made = shard(
        accelerator, model, lambda m: build_optimizer(m, rates, (0.9, 0.999), 1e-8, 0.0), how.policy, how.compiled
    )
    if how.prefetch:
        prefetch(made[0], how.prefetch)
    return made


def prefetch(model: nn.Module, ahead: int) -> None:
    """Has each sharded layer gather the weights of the `ahead` layers after it, in forward and in backward.

    By itself FSDP2 gathers one layer ahead in backward, and in forward as soon as the host comes to the next layer.
    """
    tower, decoder = (list(layers) for layers in layer_stacks(model))  # each a unit of FSDP2
    # what is gathered ahead must be used, or it stays in memory: not layers that never run, nor, going backward, frozen
    tower = tower[: used_layers(len(tower), model.config.vision_feature_layer)]
    trained = [unit for unit in tower if any(p.requires_grad for p in unit.parameters())]
    forward, backward = [*tower, *decoder], [*trained, *decoder][::-1]
    for number, unit in enumerate(forward):
        unit.set_modules_to_forward_prefetch(forward[number + 1 : number + 1 + ahead])
    for number, unit in enumerate(backward):
        unit.set_modules_to_backward_prefetch(backward[number + 1 : number + 1 + ahead])


class Feed:
    """Steps from memory, in place of `llava_next.data.loading.feed.Feed`; notes when each is asked for."""

    def __init__(self, steps: list[list[PackedBatch]], device: torch.device, on_step: Callable[[], None]):
        self._on_step = on_step
        pinned = device.type == "cuda"
        self._steps = [[batch.pin_memory() if pinned else batch for batch in step] for step in steps]
        self._next, self.asked_at = 0, []

    @property
    def ready(self) -> int:
        """Micro-batches that wait."""
        return sum(map(len, self._steps[self._next :]))

    def take(self, unless: Callable[[], bool]) -> tuple[int, list[PackedBatch]]:
        """The next step."""
        self.asked_at.append(time.perf_counter())
        self._on_step()
        step, self._next = self._next, self._next + 1
        return step, self._steps[step]

    def close(self) -> None:
        """There is nothing to end."""


class Plan:
    """As much of a `Mixture` as the trainer asks for: one source, one epoch."""

    names = ("profile",)

    def __init__(self, steps: int, batch_size: int):
        self.total_steps, self.batch_size, self.samples_per_epoch = steps, batch_size, steps * batch_size
        self.plan_sources = [Source("profile", [self.samples_per_epoch])]

    def epoch(self, step: int) -> int:
        """The first and only."""
        return 0

    def step_ids(self, step: int) -> np.ndarray:
        """Sample ids of a step."""
        return np.arange(step * self.batch_size, (step + 1) * self.batch_size)

    def source_of(self, ids: np.ndarray) -> np.ndarray:
        """Always the one source."""
        return np.zeros(len(ids), np.int64)

    def state(self) -> dict:
        """Nothing is resumed."""
        return {}


class NoCheckpoints:
    """In place of `Checkpoints`: a benchmark writes none."""

    failed, saved_step = False, None

    def take_stalled(self) -> float:
        """Seconds that writing cost."""
        return 0.0

    def save(self, *_) -> None:
        """Nothing."""

    wait = settle = close = save


class PartTimer:
    """Device time of the forward's parts: tower with projector, decoder layers, head. Use it as a context manager."""

    PARTS = ("vision", "llm", "head")

    def __init__(self, model: nn.Module, device: torch.device):
        self._model, self._timer, self._steps = model, StepTimer(device), []

    def __enter__(self) -> PartTimer:
        model = self._model
        self._methods = {"image_features": "vision", "decode_segments": "llm"}
        for name, part in self._methods.items():
            setattr(model, name, self._wrapped(getattr(model, name), part))
        head = model.lm_head
        self._hooks = [
            head.register_forward_pre_hook(lambda *_: self._timer.mark("head")),
            head.register_forward_hook(lambda *_: self._timer.mark("rest")),
        ]
        return self

    def _wrapped(self, method, part: str):
        def call(*args, **kwargs):
            self._timer.mark(part)
            result = method(*args, **kwargs)
            self._timer.mark("rest")
            return result

        return call

    def __exit__(self, *_) -> None:
        for name in self._methods:
            delattr(self._model, name)
        for hook in self._hooks:
            hook.remove()

    def next_step(self) -> None:
        """A step begins here."""
        self._steps.append(self._timer.take())

    def seconds(self, counted: slice) -> dict[str, float]:
        """Mean seconds of each part in the steps `counted`; the device must have passed all of them."""
        self.next_step()
        steps = [self._timer.seconds(marks, self.PARTS) for marks in self._steps[1:][counted]]
        return {part: float(np.mean([step[f"{part}_s"] for step in steps])) for part in self.PARTS}


@dataclass
class Run:
    """What a measured run of steps gave.

    Args:
        records: the journal's, one a step, without the warm-up.
        step_s: wall time of each of these steps, from one request for data to the next.
        parts: seconds a step of vision, llm and head in the forward.
        memory: most bytes allocated on the GPU; None on a CPU.
        operators: of the step that was profiled, see `top_operators`; empty without.
    """

    records: list[dict]
    step_s: list[float]
    parts: dict[str, float]
    memory: int | None
    operators: list[dict]

    def mean(self, name: str) -> float:
        """Mean of a field of the records."""
        return float(np.mean([record[name] for record in self.records]))

    @property
    def phases(self) -> dict[str, float]:
        """Mean seconds of a step's phases, on the device."""
        return {phase: self.mean(f"{phase}_s") for phase in PHASES}


def run_steps(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    work: Work,
    steps: list[list[PackedBatch]],
    warmup: int,
    run_dir: Path,
    profile: bool = False,
) -> Run:
    """Trains `steps` by the `Trainer`; the first `warmup` of them are not counted.

    Args:
        profile: trace the last step into `run_dir`; it is not counted either.
    """
    device, config = accelerator.device, RunConfig(model="none", run_dir=str(run_dir))
    config.data.batch_size, config.optim.rates, config.log_every = work.samples, work.rates, 10**9
    config.profile.steps = [len(steps)] if profile else []
    on_gpu, counted = device.type == "cuda", slice(warmup, len(steps) - profile)
    parts = PartTimer(model, device)
    plan, feed = Plan(len(steps), work.samples), Feed(steps, device, parts.next_step)
    journal = Journal(config, accelerator, plan, Progress(len(steps), 0))
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.redirect_stdout(io.StringIO()), parts, StopRequest() as stop:
        fresh = {"step": 0, "counters": {}}
        trainer = Trainer(config, accelerator, model, optimizer, feed, plan, journal, NoCheckpoints(), fresh, stop)
        trainer.train()
    if on_gpu:
        torch.cuda.synchronize(device)
    times = np.diff([*feed.asked_at, time.perf_counter()])
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    memory = torch.cuda.max_memory_allocated(device) if on_gpu else None
    operators = top_operators(trainer.profiler.operators, on_gpu)
    return Run(records[counted], times[counted].tolist(), parts.seconds(counted), memory, operators)


def top_operators(averages: list, on_gpu: bool, count: int = 10) -> list[dict]:
    """The operators that took most by themselves: name, share of the step's time on the device, seconds, calls.

    Args:
        averages: the profiler's `key_averages()`. On a GPU time is that of the kernels which an operator started.
    """
    kind = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    # on a GPU kernels have entries of their own: the whole, but their names say little
    counted = [e for e in averages if (e.device_type == DeviceType.CUDA) == on_gpu and not e.is_user_annotation]
    whole = sum(getattr(event, kind) for event in counted)
    operators = [event for event in averages if event.device_type == DeviceType.CPU]
    operators = sorted(operators, key=lambda event: getattr(event, kind), reverse=True)[:count]
    return [
        {"name": e.key, "share": spent / max(whole, 1e-9), "seconds": spent / 1e6, "calls": e.count}
        for e in operators
        if (spent := getattr(e, kind))
    ]
