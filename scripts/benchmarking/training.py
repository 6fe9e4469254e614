"""A training step without a data set: this project's model, sharding, optimizer and `Trainer`, random weights.

The `Trainer` is the one of the training scripts; what it is fed from memory here is what the loader's workers make
elsewhere, packed by the same collator.
"""

from __future__ import annotations

import bisect
import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.autograd import DeviceType
from torch.utils.data import DataLoader
from transformers import LlavaNextConfig

from benchmarking.cards import ROOT, add_out
from benchmarking.samples import LLMS, STAGES, TOWERS, model_config, packed_step, profile_samples
from llava_next.data.loading.batch import PackedBatch
from llava_next.data.loading.feed import Feed
from llava_next.data.plan.order import Source
from llava_next.model.forward.attention import attention_names, choose_attention
from llava_next.model.forward.fused import Kernels, choose_fused, fuse_layers
from llava_next.model.forward.modeling import LlavaNextForConditionalGeneration, used_layers
from llava_next.training.devices.float8 import use_float8
from llava_next.training.devices.hardware import prepare_allocator
from llava_next.training.devices.launch import layer_stacks
from llava_next.training.devices.parallel import build_accelerator, shard
from llava_next.training.forecast.activations import Compute
from llava_next.training.forecast.budget import POLICIES, Layout, Units, estimate, units
from llava_next.training.forecast.flops import Checkpointing
from llava_next.training.loop import Trainer
from llava_next.training.recipe.config import RunConfig
from llava_next.training.recipe.optim import Rates, build_optimizer, freeze
from llava_next.training.watch.journal import Journal
from llava_next.training.watch.metrics import Progress
from llava_next.training.watch.stopping import StopRequest
from llava_next.training.watch.timing import PHASES, StepTimer
from support.launching import rank_environment

RANKS = 8  # of the run whose step is measured: one of them has an eighth of the recipe's samples
SPARE = 0.93  # share of a GPU's memory that the estimate may fill
PARTS = ("vision", "llm", "head")  # of the forward: tower with projector, decoder layers, head


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

    def step(self, config: LlavaNextConfig, number: int = 0) -> tuple[Sequence, list[PackedBatch]]:
        """The samples of a step, and its micro-batches."""
        samples = profile_samples(self.samples, config, number, self.stage, self.shortened)
        return samples, packed_step(samples, config, self.token_budget, self.tile_budget, self.rates, number)


def add_work_arguments(parser) -> None:
    """Options that say what is trained, and how it is checkpointed."""
    parser.add_argument("--model", default="vicuna-7b", choices=list(LLMS))
    parser.add_argument("--tower", default="clip-336", choices=list(TOWERS))
    parser.add_argument("--stage", type=int, default=2, choices=list(STAGES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--scale", default=None, help="of the model: full on a GPU, tiny on a CPU")
    parser.add_argument("--depth", type=int, help="layers of the language model; default: as many as fit")
    parser.add_argument("--checkpointing", choices=["auto", *POLICIES], default="auto")
    parser.add_argument("--samples", type=int, help="of a step on this rank; default: an eighth of the recipe's")
    parser.add_argument("--token_budget", type=int, default=8192, help="of a micro-batch")
    parser.add_argument("--tile_budget", type=int, default=48)
    parser.add_argument("--shortened", type=int, default=1, help="divide texts' lengths, for tests")
    parser.add_argument("--warmup", type=int, default=3, help="steps before")
    add_out(parser)


def begin(args) -> tuple[Work, LlavaNextConfig, Checkpointing, Accelerator]:
    """What is trained, the model cut to the depth that fits, how it is checkpointed; as if launched with one process.

    The launch file decides on FSDP and precision, as in a run.
    """
    on_gpu = args.device == "cuda"
    prepare_allocator()
    if not on_gpu and torch.cuda.is_available():  # once more, with no GPU to be seen
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.execv(sys.executable, sys.orig_argv)
    file = ROOT / "accelerate_configs" / f"{'gpu1' if on_gpu else 'cpu2_fsdp'}.yaml"
    os.environ |= rank_environment(
        ["--config_file", str(file), "--num_processes", "1", "--main_process_port", "0", __file__], 0, 1
    )
    args.scale = args.scale or ("full" if on_gpu else "tiny")
    args.samples = args.samples or STAGES[args.stage].batch_size // RANKS
    work = Work(**{field.name: getattr(args, field.name) for field in fields(Work)})
    depth, policy = work.config().text_config.num_hidden_layers, args.checkpointing
    if on_gpu:
        depth, policy = pick(work, torch.cuda.get_device_properties(0).total_memory, policy)
    elif policy == "auto":
        policy = "none"
    return work, work.config(min(args.depth or depth, depth)), policy, build_accelerator()


def card_name(what: str, work: Work, device: str, extra: Sequence[str] = ()) -> str:
    """`WHAT-MODEL-TOWER[-stage1][-EXTRA]-SCALE-DEVICE`, the GPU by its name."""
    if device == "cuda":
        device = "-".join(torch.cuda.get_device_name().lower().removeprefix("nvidia ").split()[:2])
    stage = ["stage1"] if work.stage == 1 else []
    return "-".join([what, work.model, work.tower, *stage, *extra, work.scale, device])


def empty_units(config: LlavaNextConfig, rates: Rates) -> Units:
    """`budget.units` of a model without memory."""
    with torch.device("meta"):
        model = LlavaNextForConditionalGeneration(config)
    freeze(model, rates)
    return units(model)


def pick(work: Work, memory: float, wanted: str = "auto") -> tuple[int, Checkpointing]:
    """(depth, policy): the policy that `RANKS` GPUs would take at full depth, and the depth that one of them holds.

    Args:
        memory: bytes of a GPU; wanted: a policy to insist on, or `auto`.

    Raises:
        ValueError: not even one layer fits.
    """
    full, budgets, policy = work.config(), (work.token_budget, work.tile_budget), wanted
    if wanted == "auto":
        layout, counts = Layout(shard=RANKS, compute=Compute()), empty_units(full, work.rates)
        totals = {p: estimate(full, counts, work.rates, p, layout, *budgets).total for p in POLICIES}
        policy = next((p for p, total in totals.items() if total <= SPARE * memory), "full")

    def too_deep(depth: int) -> bool:
        config, one = work.config(depth), Layout(shard=1, compute=Compute())
        counts = empty_units(config, work.rates)
        return estimate(config, counts, work.rates, policy, one, *budgets).total > SPARE * memory

    depth = bisect.bisect(range(1, full.text_config.num_hidden_layers + 1), False, key=too_deep)
    if not depth:
        raise ValueError(f"{work.model} does not fit {memory / 1e9:.0f} GB with a single layer; lower --token_budget")
    return depth, policy


@dataclass(frozen=True)
class How:
    """In which way a step is computed.

    Args:
        policy: activation checkpointing.
        reshard: free gathered weights after a layer's forward.
        compiled: each layer by torch.compile.
        float8: linears of the decoder layers by torchao; on a CPU emulated.
        fused: Liger's kernels, see `RunConfig.fused_layers`.
        prefetch: gather the weights of so many layers ahead; 0: as FSDP2 does by itself.
    """

    policy: Checkpointing = "none"
    reshard: bool = True
    compiled: bool = False
    float8: bool = False
    fused: bool | str = False
    prefetch: int = 0

    def kernels(self, device: torch.device | str) -> tuple[Kernels, str]:
        """Liger's kernels for this step, and why (not)."""
        elsewhere = "compile_layers" if self.compiled else "float8" if self.float8 else None
        return choose_fused(self.fused, torch.device(device), elsewhere)


def build(
    accelerator: Accelerator, config: LlavaNextConfig, rates: Rates, how: How
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model with random weights, made on the device, sharded as a run shards it; and its optimizer.

    Raises:
        ValueError: float8 cannot run here, see `use_float8`.
    """
    device = accelerator.device
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
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
    kernels, _ = how.kernels(device)
    if kernels:
        fuse_layers(model.model.language_model, kernels)
    if how.float8:
        use_float8(model, emulate=device.type == "cpu")
    optimizer_of = partial(build_optimizer, rates=rates, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    made = shard(accelerator, model, optimizer_of, how.policy, how.compiled)
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


def run_steps(
    accelerator: Accelerator,
    config: LlavaNextConfig,
    how: How,
    work: Work,
    rates: Rates,
    steps: list[list[PackedBatch]],
    run_dir: Path,
    profile: bool = False,
) -> tuple[list[dict], list[dict]]:
    """Builds the model and trains `steps` by the `Trainer`.

    Args:
        profile: trace the last step into `run_dir`.

    Returns:
        The run's records of the steps, to which seconds of `PARTS` are added; the operators of the profiled step, see
        `top_operators`.
    """
    device, run, size = accelerator.device, RunConfig(model="none", run_dir=str(run_dir)), work.samples
    run.data.batch_size, run.optim.rates, run.log_every = size, rates, 10**9
    run.profile.steps = [len(steps)] if profile else []
    model, optimizer = build(accelerator, config, rates, how)
    # as much of a `Mixture` as the trainer asks for: one source, one epoch
    plan = SimpleNamespace(names=("profile",), total_steps=len(steps), samples_per_epoch=size * len(steps), state=dict)
    plan.plan_sources = [Source("profile", [plan.samples_per_epoch])]
    plan.epoch, plan.step_ids = lambda step: 0, lambda step: np.arange(step * size, (step + 1) * size)
    plan.source_of = lambda ids: np.zeros(len(ids), np.int64)
    no_checkpoints = mock.Mock(failed=False, saved_step=None, **{"take_stalled.return_value": 0.0})
    batches = [replace(batch, step=number) for number, step in enumerate(steps) for batch in step]
    on_gpu = device.type == "cuda"
    feed = Feed(DataLoader(batches, batch_size=None, pin_memory=on_gpu))
    (run_dir / "metrics.jsonl").unlink(missing_ok=True)  # of a run before, which it would be added to
    journal = Journal(run, accelerator, plan, Progress(len(steps), 0))
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.redirect_stdout(io.StringIO()), StopRequest() as stop:
        fresh = {"step": 0, "counters": {}}
        trainer = Trainer(run, accelerator, model, optimizer, feed, plan, journal, no_checkpoints, fresh, stop)
        with timed_parts(model, trainer.timer):
            trainer.train()
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return records, top_operators(trainer.profiler.operators, on_gpu)


@contextlib.contextmanager
def timed_parts(model: nn.Module, timer: StepTimer) -> Iterator[None]:
    """Has a step's timer know `PARTS` and `rest` as well; `forward` is then what comes before the first of them."""

    def timed(part: str, function):
        def call(*args, **kwargs):
            timer.mark(part)
            result = function(*args, **kwargs)
            timer.mark("rest")
            return result

        return call

    functions = ((model, "image_features"), (model, "decode_segments"), (model.lm_head, "forward"))
    timer.seconds = partial(timer.seconds, phases=(*PHASES, *PARTS, "rest"))
    with contextlib.ExitStack() as stack:
        for part, (owner, name) in zip(PARTS, functions, strict=True):
            stack.enter_context(mock.patch.object(owner, name, timed(part, getattr(owner, name))))
        yield


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
