"""One real training step: packed forward, backward, clip, AdamW under FSDP2 at world size 1, at full width.

Where a GPU cannot hold all layers with weights, gradients and Adam's moments, the depth is cut to what fits; MFU and
HFU are then those of the shallower model, and full-depth times follow from them by FLOPs. A step is what a rank of
eight has: an eighth of the recipe's samples.

The projection to a node of eight is arithmetic and marked as such. FSDP2 gathers every layer's weights twice a
micro-batch (forward and backward) in bf16 and reduces its gradients in fp32; how much of that hides behind computation
is not known from one GPU, so both ends are given: all of it, and none.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import mean, median

import torch
from torch._dynamo.utils import counters
from transformers import LlavaNextForConditionalGeneration as StockLlavaNext

from benchmarking.ablate import measure
from benchmarking.cards import table, write_card
from benchmarking.samples import PADDED_BATCH, STAGES, model_config, supervised
from benchmarking.training import RANKS, How, Work, add_work_arguments, begin, card_name, empty_units, run_steps
from llava_next.model.forward.attention import attention_names, choose_attention
from llava_next.model.forward.modeling import LlavaNextForConditionalGeneration
from llava_next.paths import output_folder
from llava_next.training.devices.agreement import slot_weights
from llava_next.training.devices.hardware import peak_flops
from llava_next.training.devices.parallel import finish
from llava_next.training.forecast.activations import Compute
from llava_next.training.forecast.budget import Layout, Unit, estimate
from llava_next.training.forecast.flops import flops_model
from llava_next.training.forecast.speed import communication_bytes
from support.tiny import geometry, pixel_batch

# Assumptions: bytes/s at which a rank receives in a collective (NVLink of an H100: 450e9 by data sheet, some three
# quarters of it in NCCL's tests); mean cost of a rank over that of the slowest, see `benchmark.py deal`.
BANDWIDTH, BALANCE = 340e9, 0.985


def add_arguments(parser) -> None:
    """Options of `benchmark.py step`."""
    add_work_arguments(parser)
    parser.add_argument("--steps", type=int, default=8, help="measured")
    parser.add_argument("--compile", action="store_true", help="each layer by torch.compile")
    parser.add_argument("--fused", choices=["auto", "true", "false"], default="auto", help="Liger's kernels")
    parser.add_argument("--float8", action="store_true", help="float8 linears in the decoder layers, by torchao")
    parser.add_argument(
        "--profile", type=output_folder, help="folder for a trace of one more step, its operators on the card"
    )


def run(args) -> None:
    """Measures a step and writes its card."""
    work, config, policy, accelerator = begin(args)
    fused, profile = {"true": True, "false": False}.get(args.fused, args.fused), args.profile is not None
    how = How(policy, compiled=args.compile, float8=args.float8, fused=fused)
    steps = [work.step(config, number)[1] for number in range(args.warmup + args.steps + profile)]
    with tempfile.TemporaryDirectory() as scratch:
        run_dir = args.profile or Path(scratch)
        run_dir.mkdir(parents=True, exist_ok=True)
        records, operators = run_steps(accelerator, config, how, work, work.rates, steps, run_dir, profile)
    figures = figures_of(records[args.warmup :][: args.steps], work, config, how, steps, args)
    if operators:
        figures["operators"] = operators
    if args.device == "cpu":
        figures["against_stock"] = against_stock(work, config, min(args.steps, 5))
    print(table(("what", "measured"), lines_of(figures)), flush=True)
    rows = ((o["name"], f"{100 * o['share']:.1f} %", f"{o['seconds']:.4f}", o["calls"]) for o in operators)
    print(table(("operator", "share", "seconds", "calls"), rows), flush=True)
    extra = [name for name in ("compile", "float8") if getattr(args, name)]
    write_card(card_name("step", work, args.device, extra), figures, args.out)
    finish(accelerator)


def figures_of(records: list[dict], work: Work, config, how: How, steps: list, args) -> dict:
    """What the card says of a run."""
    policy = how.policy
    counted = ("step_s", "samples", "micro_batches", "tokens", "squared_lengths", "tiles", "supervised", "chunked")
    seconds, samples, micro_batches, *amounts = (mean(record[name] for record in records) for name in counted)
    part = {
        name: mean(record[f"{name}_s"] for record in records)
        for name in ("vision", "llm", "head", "rest", "forward", "backward", "optimizer")
    }
    on_gpu, tokens = args.device == "cuda", amounts[0]
    spent, hardware = flops_model(config, work.rates, policy).step_flops(*amounts)
    peak = peak_flops(torch.cuda.get_device_name()) if on_gpu else None
    full, _ = flops_model(work.config(), work.rates, policy).step_flops(*amounts)
    longer = full.total / spent.total
    figures = {
        "layers": [config.text_config.num_hidden_layers, work.config().text_config.num_hidden_layers],
        "checkpointing": policy,
        "compiled_graphs": counters["stats"]["unique_graphs"],  # few, whatever the lengths; 0 without --compile
        "attention": choose_attention("auto", args.device, torch.bfloat16 if on_gpu else torch.float32)[0],
        "fused": how.kernels(args.device)[1],
        "float8": args.float8,  # MFU and HFU are of the bf16 peak all the same
        "samples_a_step": samples,
        "micro_batches": micro_batches,
        "tokens_a_step": tokens,
        "step_s": seconds,
        "steps_s": [record["step_s"] for record in records],  # one by one: a step that compiles stands out
        "tokens_per_s": tokens / seconds,
        "samples_per_s": samples / seconds,
        "tflop_per_s": spent.total / seconds / 1e12,
        "hardware_tflop_per_s": hardware.total / seconds / 1e12,
        "mfu": peak and spent.total / seconds / peak,
        "hfu": peak and hardware.total / seconds / peak,
        "tflop_a_sample": full.total / samples / 1e12,
        "full_depth": {
            "is": "measured at full depth" if longer == 1 else "scaled by FLOPs from the layers that were measured",
            "samples_per_s": samples / seconds / longer,
            "tokens_per_s": tokens / seconds / longer,
        },
        "seconds_by_part": {
            **{f"{name}_forward": part[name] for name in ("vision", "llm", "head")},
            "rest_of_forward": part["forward"] + part["rest"],
            "backward": part["backward"],
            "optimizer": part["optimizer"],
            "between": seconds - sum(part.values()),  # data, agreement, the host behind the device
        },
        "losses": [record["loss"] for record in records],
        "memory_gb": records[-1]["memory_gb"] if on_gpu else None,
        "estimated_memory_gb": estimated(work, config, policy, steps, on_gpu) / 1e9,
    }
    if on_gpu:
        whole = empty_units(work.config(), work.rates).whole
        cut = empty_units(model_config(work.model, work.tower, work.scale, figures["layers"][0]), work.rates).whole
        update = part["optimizer"] * whole.trainable / max(cut.trainable, 1)
        figures["projection"] = project((seconds - part["optimizer"]) * longer, update, micro_batches, whole)
        epoch = STAGES[work.stage].samples / (samples * RANKS) / 3600
        ends = (figures["projection"][f"step_s_{much}_hidden"] for much in ("all", "none"))
        figures["projection"]["hours_an_epoch"] = [epoch * end for end in ends]
    return figures


def estimated(work: Work, config, policy: str, steps: list, on_gpu: bool) -> float:
    """Bytes that `budget` expects at the peak of the largest micro-batch, without CUDA's own and fragments."""
    layout = Layout(shard=1, compute=Compute() if on_gpu else Compute(4, fused=False), on_gpu=on_gpu)
    counts, totals = empty_units(config, work.rates), []
    for batch in (batch for step in steps for batch in step):
        sizes = (len(batch.input_ids), len(batch.tiles), len(batch.target_ids))
        found = estimate(config, counts, work.rates, policy, layout, *sizes)
        totals.append(found.total - found.workspace)
    return max(totals)


def project(compute_s: float, optimizer_s: float, micro_batches: float, weights: Unit) -> dict:
    """Seconds of a step on a node.

    Args:
        compute_s: forward and backward of a rank's share of the step at full depth.
        optimizer_s: the update on one GPU with everything on it, at full depth; a rank updates its share.
        micro_batches: of the step.
        weights: of the whole model at full depth, gathered and reduced in each.
    """
    compute, communication = compute_s / BALANCE, micro_batches * communication_bytes(weights, RANKS) / BANDWIDTH
    update = optimizer_s / RANKS
    return {
        "is": "a projection from one GPU, not a measurement",
        "gpus": RANKS,
        "bandwidth_gb_s": BANDWIDTH / 1e9,
        "balance": BALANCE,
        "communication_s": communication,
        "step_s_all_hidden": max(compute, communication) + update,
        "step_s_none_hidden": compute + communication + update,
    }


def against_stock(work: Work, config, repeats: int) -> dict:
    """Seconds of forward and backward of a step, ours and padded through transformers' own, and the loss of both.

    In turns, in one process, float32 on the CPU, so that whatever else the machine does meets both.
    """
    torch.manual_seed(0)
    stock, ours = StockLlavaNext(config).train(), LlavaNextForConditionalGeneration(config).train()
    ours.load_state_dict(stock.state_dict())
    kernel, _ = choose_attention("auto", "cpu", torch.float32)
    ours.set_attn_implementation(attention_names(kernel))
    samples, micros = work.step(config)
    tokens = supervised(samples)
    micros = [batch.weighted(slot_weights(tokens, "token")) for batch in micros]
    groups = [slice(i, i + PADDED_BATCH) for i in range(0, len(samples), PADDED_BATCH)]
    padded = [pixel_batch(*zip(*samples[group], strict=True), geometry(config), config) for group in groups]
    shared = [(inputs, tokens[group].sum() / tokens.sum()) for inputs, group in zip(padded, groups, strict=True)]
    turns = []
    for _ in range(repeats + 1):  # the first warms up
        packed = measure(ours, micros, torch.device("cpu"), 1)
        other = measure(stock, shared, torch.device("cpu"), 1, loss=lambda batch: stock(**batch[0]).loss * batch[1])
        turns.append((packed.seconds[0], other.seconds[0]))
    return {
        "tokens": sum(len(example.input_ids) for example, _ in samples),
        "padded_tokens": sum(inputs["input_ids"].numel() for inputs in padded),
        "packed_s": median(ours for ours, _ in turns[1:]),
        "padded_s": median(theirs for _, theirs in turns[1:]),
        "ratio": median(theirs / ours for ours, theirs in turns[1:]),
        "loss": {"packed": packed.loss, "padded": other.loss},
    }


def lines_of(figures: dict) -> list[tuple[str, str]]:
    """The figures for people."""
    measured, layers = figures["layers"]
    percent = (f"{100 * figures[k]:.1f} %" if figures[k] else "peak of this device unknown" for k in ("mfu", "hfu"))
    memory = f"{figures['memory_gb']:.1f} GB" if figures["memory_gb"] else "not counted on a CPU"
    parts = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in figures["seconds_by_part"].items())
    lines = [
        ("layers, checkpointing", f"{measured} of {layers}, {figures['checkpointing']}"),
        ("step", f"{figures['step_s']:.3f} s, {figures['samples_a_step']:.0f} samples"),
        ("tokens/s, samples/s", f"{figures['tokens_per_s']:,.0f}, {figures['samples_per_s']:.2f}"),
        ("  at full depth", f"{figures['full_depth']['samples_per_s']:.2f} samples/s, {figures['full_depth']['is']}"),
        ("MFU, HFU", f"{', '.join(percent)} ({figures['tflop_per_s']:.3g} TFLOP/s)"),
        ("memory, estimate", f"{memory}, {figures['estimated_memory_gb']:.1f} GB"),
        ("seconds by part", parts),
    ]
    if "projection" in figures:
        hours = "{:.2f} to {:.2f} h an epoch".format(*figures["projection"]["hours_an_epoch"])
        lines.append((f"projected to {RANKS} GPUs", f"{hours}, all or no communication hidden"))
    if "against_stock" in figures:
        stock = figures["against_stock"]
        lines.append(("against padded stock", f"{stock['ratio']:.2f} x, losses {list(stock['loss'].values())}"))
    return lines
