"""One real training step: packed forward, backward, clip, AdamW under FSDP2 at world size 1, at full width.

Where a GPU cannot hold all layers with weights, gradients and Adam's moments, the depth is cut to what fits; MFU and
HFU are then those of the shallower model, and full-depth times follow from them by FLOPs. A step is what a rank of
eight has: an eighth of the recipe's samples.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch._dynamo.utils import counters
from transformers import LlavaNextConfig

from benchmarking.cards import CARDS, table, write_card
from benchmarking.launching import launched, relaunch
from benchmarking.projection import Node, project
from benchmarking.samples import LLMS, STAGES, TOWERS, model_config, profile_samples
from benchmarking.stock import against_stock
from benchmarking.training import How, Run, Work, build, empty_units, pick, run_steps
from llava_next.paths import local_path
from llava_next.training.devices.hardware import peak_flops
from llava_next.training.devices.parallel import build_accelerator, finish
from llava_next.training.forecast.activations import Compute
from llava_next.training.forecast.budget import POLICIES, Layout, estimate
from llava_next.training.forecast.flops import Checkpointing, flops_model

RANKS = 8


def add_arguments(parser) -> None:
    """Options of `benchmark.py step`."""
    add_work_arguments(parser)
    parser.add_argument("--steps", type=int, default=8, help="measured")
    parser.add_argument("--checkpointing", choices=["auto", *POLICIES], default="auto")
    parser.add_argument("--compile", action="store_true", help="each layer by torch.compile")
    parser.add_argument("--float8", action="store_true", help="float8 linears in the decoder layers, by torchao")
    parser.add_argument("--bandwidth", type=float, default=Node.bandwidth, help="bytes/s, for the projection")
    parser.add_argument("--padded_batch", type=int, default=4, help="samples of a batch of the stock way, on a CPU")
    parser.add_argument(
        "--profile", type=local_path, help="folder for a trace of one more step; its operators are in the card"
    )
    parser.add_argument("--out", type=local_path, default=CARDS)


def add_work_arguments(parser) -> None:
    """Options that say what is trained."""
    parser.add_argument("--model", default="vicuna-7b", choices=list(LLMS))
    parser.add_argument("--tower", default="clip-336", choices=list(TOWERS))
    parser.add_argument("--stage", type=int, default=2, choices=list(STAGES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--scale", default=None, help="of the model: full on a GPU, tiny on a CPU")
    parser.add_argument("--depth", type=int, help="layers of the language model; default: as many as fit")
    parser.add_argument("--samples", type=int, help="of a step on this rank; default: an eighth of the recipe's")
    parser.add_argument("--token_budget", type=int, default=8192, help="of a micro-batch")
    parser.add_argument("--tile_budget", type=int, default=48)
    parser.add_argument("--shortened", type=int, default=1, help="divide texts' lengths, for tests")
    parser.add_argument("--warmup", type=int, default=3, help="steps before")


def work_of(args) -> Work:
    """The work that the options ask for."""
    scale = args.scale or ("full" if args.device == "cuda" else "tiny")
    samples = args.samples or STAGES[args.stage].batch_size // RANKS
    return Work(
        *(args.model, args.tower, scale, args.stage, args.token_budget, args.tile_budget, samples, args.shortened)
    )


def plan_of(args, work: Work) -> tuple[int, Checkpointing]:
    """(depth, policy) on the device at hand."""
    layers = work.config().text_config.num_hidden_layers
    wanted = getattr(args, "checkpointing", "auto")
    if args.device == "cpu":
        return args.depth or layers, "none" if wanted == "auto" else wanted
    memory = torch.cuda.get_device_properties(0).total_memory
    depth, policy = pick(work, memory, wanted, RANKS)
    return min(args.depth or layers, depth), policy


def begin(args) -> tuple[Work, LlavaNextConfig, Checkpointing, Accelerator]:
    """What is trained, the model cut to the depth that fits, how it is checkpointed; in a process that was launched.

    The first process does not come back: it launches this command again, and ends with it.
    """
    if not launched():
        relaunch(args.device)
    work = work_of(args)
    depth, policy = plan_of(args, work)
    return work, work.config(depth), policy, build_accelerator()


def run(args) -> None:
    """Measures a step and writes its card."""
    work, config, policy, accelerator = begin(args)
    how = How(policy, compiled=args.compile, float8=args.float8)
    model, optimizer = build(accelerator, config, work.rates, how)
    steps = work.steps(args.warmup + args.steps + (args.profile is not None), config)
    with tempfile.TemporaryDirectory() as scratch:
        run_dir = args.profile or Path(scratch)
        run_dir.mkdir(parents=True, exist_ok=True)
        found = run_steps(accelerator, model, optimizer, work, steps, args.warmup, run_dir, args.profile is not None)
    figures = figures_of(found, work, config, policy, steps, args)
    if args.device == "cpu":
        samples = profile_samples(work.samples, config, 0, work.stage, work.shortened)
        figures["against_stock"] = against_stock(
            config, samples, args.padded_batch, work.token_budget, work.tile_budget, repeats=min(args.steps, 5)
        )
    print(table(("what", "measured"), lines_of(figures)), flush=True)
    if found.operators:
        rows = ((o["name"], f"{100 * o['share']:.1f} %", f"{o['seconds']:.4f}", o["calls"]) for o in found.operators)
        print(table(("operator", "share", "seconds", "calls"), rows), flush=True)
    extra = [name for name, on in (("compile", args.compile), ("float8", args.float8)) if on]
    write_card(card_name("step", work, args.device, extra), figures, args.out)
    finish(accelerator)


def card_name(what: str, work: Work, device: str, extra: Sequence[str] = ()) -> str:
    """`WHAT-MODEL-TOWER[-stage1][-EXTRA]-SCALE-DEVICE`, the GPU by its name."""
    if device == "cuda":
        name = torch.cuda.get_device_name().lower().removeprefix("nvidia ").split()
        device = "-".join(name[:2])
    stage = ["stage1"] if work.stage == 1 else []
    return "-".join([what, work.model, work.tower, *stage, *extra, work.scale, device])


def figures_of(found: Run, work: Work, config, policy: str, steps: list, args) -> dict:
    """What the card says of a run."""
    seconds = sum(found.step_s) / len(found.step_s)
    flops = flops_model(config, work.rates, policy)
    amounts = [found.mean(name) for name in ("tokens", "squared_lengths", "tiles", "supervised", "chunked")]
    spent, hardware = flops.step_flops(*amounts)
    peak = peak_flops(torch.cuda.get_device_name()) if args.device == "cuda" else None
    full, _ = flops_model(work.config(), work.rates, policy).step_flops(*amounts)
    longer = full.total / spent.total
    phases = found.phases
    figures = {
        "layers": [config.text_config.num_hidden_layers, work.config().text_config.num_hidden_layers],
        "checkpointing": policy,
        "compiled_graphs": counters["stats"]["unique_graphs"],  # few, whatever the lengths; 0 without --compile
        "float8": args.float8,  # MFU and HFU are of the bf16 peak all the same
        "samples_a_step": found.mean("samples"),
        "micro_batches": found.mean("micro_batches"),
        "tokens_a_step": amounts[0],
        "step_s": seconds,
        "steps_s": found.step_s,  # one by one: a step that compiles stands out
        "tokens_per_s": amounts[0] / seconds,
        "samples_per_s": found.mean("samples") / seconds,
        "tflop_per_s": spent.total / seconds / 1e12,
        "hardware_tflop_per_s": hardware.total / seconds / 1e12,
        "mfu": peak and spent.total / seconds / peak,
        "hfu": peak and hardware.total / seconds / peak,
        "tflop_a_sample": full.total / found.mean("samples") / 1e12,
        "full_depth": {
            "is": "measured at full depth" if longer == 1 else "scaled by FLOPs from the layers that were measured",
            "samples_per_s": found.mean("samples") / seconds / longer,
            "tokens_per_s": amounts[0] / seconds / longer,
        },
        "seconds_by_part": {
            "vision_forward": found.parts["vision"],
            "llm_forward": found.parts["llm"],
            "head_forward": found.parts["head"],
            "rest_of_forward": phases["forward"] - sum(found.parts.values()),
            "backward": phases["backward"],
            "optimizer": phases["optimizer"],
            "between": seconds - sum(phases.values()),  # data, agreement, the host behind the device
        },
        "losses": [record["loss"] for record in found.records],
        "memory_gb": found.memory and found.memory / 1e9,
        "estimated_memory_gb": estimated(work, config, policy, steps, args.device == "cuda") / 1e9,
    }
    if found.operators:
        figures["operators"] = found.operators
    if args.device == "cuda":
        figures["projection"] = projection(figures, work, longer, args)
    return figures


def estimated(work: Work, config, policy: str, steps: list, on_gpu: bool) -> float:
    """Bytes that `budget` expects at the peak of the largest micro-batch, without CUDA's own and fragments."""
    layout = Layout(shard=1, compute=Compute() if on_gpu else Compute(4, fused=False), on_gpu=on_gpu)
    counts = empty_units(config, work.rates)
    totals = []
    for batch in (batch for step in steps for batch in step):
        sizes = (len(batch.input_ids), len(batch.tiles), len(batch.target_ids))
        found = estimate(config, counts, work.rates, policy, layout, *sizes)
        totals.append(found.total - found.workspace)
    return max(totals)


def projection(figures: dict, work: Work, longer: float, args) -> dict:
    """The step on eight GPUs, and the hours of the recipe's epoch, from one GPU's parts."""
    parts = figures["seconds_by_part"]
    full = empty_units(work.config(), work.rates).whole
    cut = empty_units(model_config(work.model, work.tower, work.scale, figures["layers"][0]), work.rates).whole
    compute = (figures["step_s"] - parts["optimizer"]) * longer
    update = parts["optimizer"] * full.trainable / max(cut.trainable, 1)
    found = project(compute, update, figures["micro_batches"], full, Node(RANKS, args.bandwidth))
    stage = STAGES[work.stage]
    epoch = stage.samples / (figures["samples_a_step"] * RANKS) / 3600
    found["hours_an_epoch"] = [epoch * found["step_s_all_hidden"], epoch * found["step_s_none_hidden"]]
    return found


def lines_of(figures: dict) -> list[tuple[str, str]]:
    """The figures for people."""
    measured, layers = figures["layers"]
    percent = {k: f"{100 * figures[k]:.1f} %" if figures[k] else "peak of this device unknown" for k in ("mfu", "hfu")}
    memory = f"{figures['memory_gb']:.1f} GB" if figures["memory_gb"] else "not counted on a CPU"
    parts = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in figures["seconds_by_part"].items())
    lines = [
        ("layers, checkpointing", f"{measured} of {layers}, {figures['checkpointing']}"),
        ("step", f"{figures['step_s']:.3f} s, {figures['samples_a_step']:.0f} samples"),
        ("tokens/s, samples/s", f"{figures['tokens_per_s']:,.0f}, {figures['samples_per_s']:.2f}"),
        ("  at full depth", f"{figures['full_depth']['samples_per_s']:.2f} samples/s, {figures['full_depth']['is']}"),
        ("MFU, HFU", f"{percent['mfu']}, {percent['hfu']} ({figures['tflop_per_s']:.3g} TFLOP/s)"),
        ("memory, estimate", f"{memory}, {figures['estimated_memory_gb']:.1f} GB"),
        ("seconds by part", parts),
    ]
    if "projection" in figures:
        hours = figures["projection"]["hours_an_epoch"]
        told = f"{hours[0]:.2f} to {hours[1]:.2f} h an epoch, all or no communication hidden"
        lines.append((f"projected to {RANKS} GPUs", told))
    if "against_stock" in figures:
        stock = figures["against_stock"]
        lines.append(("against padded stock", f"{stock['ratio']:.2f} x, losses {list(stock['loss'].values())}"))
    return lines
