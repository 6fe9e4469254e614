"""Whether a step is right on the device at hand, at small size: each part is a process of its own, with its own card.

Every part compares with transformers' own model one sample at a time, or with a run on the CPU, and ends with an error
beyond a stated bound. What cannot be compared here, a kernel that is not installed, is said in the part's line.
"""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import LlavaNextForConditionalGeneration as StockLlavaNext

from benchmarking import truth_run
from benchmarking.cards import add_out, write_card
from llava_next.model.folders.dry import LLMS, TOWERS
from llava_next.model.forward.attention import KERNEL_NAMES, attention_names, choose_attention, segment_attention
from llava_next.model.forward.fused import choose_fused, fuse_layers
from llava_next.model.forward.modeling import LlavaNextForConditionalGeneration
from llava_next.training.devices.agreement import slot_weights
from support.published import CLIP, LLAMA3
from support.tiny import geometry, pack_tiny, pairing_config, random_samples, stock_loss

FLOAT32 = 1e-4  # of the loss, and of every gradient's norm
FUSED = 1e-5
# bfloat16 rounds to 3 digits, stock transformers' step in it too: against the float32 result our loss and all gradients
# together may be off by twice as much as that, and by so much more where both are close. A single one, the sum over all
# tokens for a bias, may be off by much through rounding alone; a gradient that is wrong is off by its own size.
TIMES, SLACK, SINGLE = 2.0, 0.01, 0.5

Step = tuple[torch.Tensor, dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Distance:
    """How far a step is from another one: relative distance of the loss, of all gradients together, and one by one."""

    loss: float
    together: float
    gradients: dict[str, float]

    @property
    def worst(self) -> tuple[float, str]:
        """The largest of all, and what it is of."""
        return max([(self.loss, "loss"), *((value, name) for name, value in self.gradients.items())])


def distance(step: Step, reference: Step) -> Distance:
    """Of a step from its reference.

    Some gradients are zero but for rounding, so none counts as smaller than a thousandth of all together.
    """
    (loss, found), (expected, wanted) = step, reference
    if missing := set(wanted) ^ set(found):
        raise AssertionError(f"a gradient is on one side only: {', '.join(sorted(missing)[:3])}")
    least = 1e-3 * torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    apart = {name: (found[name] - gradient).norm() for name, gradient in wanted.items()}
    together = torch.stack(list(apart.values())).norm() / (1000 * least)
    alone = {name: (value / wanted[name].norm().clamp_min(least)).item() for name, value in apart.items()}
    return Distance(abs(loss / expected - 1).item(), together.item(), alone)


def in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model with parameters as FSDP2 gathers them; buffers (rotary frequencies) stay float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def step_of(model: nn.Module, loss: Callable[[], torch.Tensor]) -> Step:
    """Loss and gradients in float32, those that are more than zero."""
    model.zero_grad()
    value = loss()
    value.backward()
    found = {name: p.grad.float().clone() for name, p in model.named_parameters() if p.grad is not None}
    return value.detach().float(), {name: gradient for name, gradient in found.items() if gradient.abs().max() > 0}


class Case:
    """A tiny model of a pairing on a device, ours and the stock one with the same weights, and samples."""

    def __init__(self, pairing: tuple[str, str], device: torch.device, dtype: torch.dtype = torch.float32):
        torch.manual_seed(0)
        config = pairing_config(*pairing)
        self.name, self.device, anyres = " + ".join(part.split("/")[1] for part in pairing), device, geometry(config)
        self.stock = StockLlavaNext(copy.deepcopy(config)).to(device).train()
        self.ours = LlavaNextForConditionalGeneration(config).to(device).train()
        self.ours.load_state_dict(self.stock.state_dict())
        for model in (self.stock, self.ours):
            in_dtype(model, dtype)
        self.samples = random_samples(0, 6, images=(0, 1, 2), anyres=anyres)
        batch = pack_tiny([example for example, _ in self.samples], anyres)
        self.weights = slot_weights(torch.tensor(batch.supervised, dtype=torch.float64), "token")
        self.inputs = batch.weighted(self.weights).model_inputs(device)

    def packed(self, kernel: str) -> Step:
        """Our step."""
        self.ours.set_attn_implementation(attention_names(kernel))
        return step_of(self.ours, lambda: self.ours(**self.inputs, num_sources=2).loss)

    def one_by_one(self) -> Step:
        """The stock step."""
        self.stock.set_attn_implementation("sdpa")
        return step_of(self.stock, lambda: stock_loss(self.stock, self.samples, self.weights.to(self.device)))


def check_float32(device: torch.device) -> str:
    """All pairings in float32 against the stock model."""
    worst = (0.0, "", "")
    for pairing in itertools.product(TOWERS, LLMS):
        case = Case(pairing, device)
        worst = max(worst, (*distance(case.packed("sdpa"), case.one_by_one()).worst, case.name))
    return within(worst, FLOAT32)


def within(worst: tuple[float, str, str], bound: float) -> str:
    """The line of a comparison. Raises AssertionError beyond the bound."""
    value, what, case = worst
    line = f"loss and gradients off by {value:.1e} at most ({what} of {case}), bound {bound:g}"
    if not value <= bound:  # not a number is beyond it too
        raise AssertionError(line)
    return line


def check_bfloat16(device: torch.device) -> str:
    """All pairings in bfloat16, each kernel that runs here, against the float32 result and what stock is off by."""
    kernels, missing = kernels_of(device)
    worst = dict.fromkeys(kernels, (0.0, 0.0, ""))
    for pairing in itertools.product(TOWERS, LLMS):
        reference = Case(pairing, device).one_by_one()
        case = Case(pairing, device, torch.bfloat16)
        theirs = distance(case.one_by_one(), reference)
        for kernel in kernels:
            choose_attention(kernel, device)
            worst[kernel] = max(worst[kernel], excess(distance(case.packed(kernel), reference), theirs, case.name))
    return lines_of_kernels(worst, missing)


def kernels_of(device: torch.device) -> tuple[list[str], list[str]]:
    """Kernels that run here in bfloat16, and why the others do not."""
    kernels, missing = [], []
    for kernel in KERNEL_NAMES:
        try:
            choose_attention(kernel, device)
            kernels.append(kernel)
        except ValueError as error:
            missing.append(str(error).removeprefix("attn_implementation: ").split("; ")[0])
    return kernels, missing


def excess(ours: Distance, theirs: Distance, case: str) -> tuple[float, float, str]:
    """Of what is furthest beyond its bound: its distance over the bound, the distance, and what it is of."""
    pairs = (("loss", ours.loss, theirs.loss), ("all gradients", ours.together, theirs.together))
    found = [(value / (TIMES * stock + SLACK), value, f"{name} of {case}") for name, value, stock in pairs]
    found += [(value / SINGLE, value, f"{name} of {case}") for name, value in ours.gradients.items()]
    return max(found)


def lines_of_kernels(worst: dict[str, tuple[float, float, str]], missing: Iterable[str]) -> str:
    """The line of a comparison of kernels. Raises AssertionError when one is beyond its bound."""
    told = [
        f"{kernel}: {value:.1e} ({what}), {100 * share:.0f} % of its bound"
        for kernel, (share, value, what) in worst.items()
    ]
    line = f"{'; '.join(told)}; bound {TIMES:g} times stock's own distance + {SLACK:g}, {SINGLE:g} for one gradient"
    if bad := [kernel for kernel, (share, *_) in worst.items() if not share <= 1]:
        raise AssertionError(f"{', '.join(bad)} beyond the bound: {line}")
    return "; ".join([line, *missing])


def check_kernels(device: torch.device) -> str:
    """Attention alone at true sizes: heads of 128, grouped and not; segments from 1 token on; a window."""
    kernels, missing = kernels_of(device)
    lengths, window = ([1, 1500, 129, 2048, 7], 1024) if device.type == "cuda" else ([1, 30, 65, 7], 24)
    borders = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    worst = dict.fromkeys(kernels, (0.0, 0.0, ""))
    for heads, key_heads, seen in ((32, 32, None), (32, 8, None), (28, 4, None), (32, 8, window)):
        torch.manual_seed(0)
        shapes = [(1, count, sum(lengths), 128) for count in (heads, key_heads, key_heads)]
        values = [torch.randn(shape, device=device) for shape in shapes]
        options = {"cu_seq_lens_q": borders, "max_length_q": max(lengths), "sliding_window": seen}
        case = f"{heads} heads on {key_heads}{f', window {seen}' if seen else ''}"
        reference = attend(values, "sdpa", torch.float32, options)
        theirs = distance(attend(values, "sdpa", torch.bfloat16, options), reference)
        for kernel in kernels:
            choose_attention(kernel, device)
            try:
                found = distance(attend(values, kernel, torch.bfloat16, options), reference)
            except ValueError as error:  # no windows in this release
                missing.append(f"{case}: {error}")
                continue
            worst[kernel] = max(worst[kernel], excess(found, theirs, case))
    return lines_of_kernels(worst, missing)


def attend(values: list[torch.Tensor], kernel: str, dtype: torch.dtype, options: dict) -> Step:
    """Attention of queries, keys and values, with output and gradients in the place of a model's."""
    inputs = [value.to(dtype, copy=True).requires_grad_() for value in values]
    output, _ = segment_attention(None, *inputs, None, kernel=kernel, **options)
    generator = torch.Generator(output.device).manual_seed(1)
    output.backward(torch.randn(output.shape, device=output.device, generator=generator).to(dtype))
    named = zip(("queries", "keys", "values"), inputs, strict=True)
    gradients = {"output": output.detach().float()} | {name: x.grad.float() for name, x in named}
    return output.detach().float().pow(2).sum(), gradients


def check_fused(device: torch.device) -> str:
    """Liger's kernels in float32 against stock layers, all language models."""
    kernels, reason = choose_fused("auto", device)
    worst = (0.0, "", "")
    for llm in LLMS if kernels else ():
        case = Case((CLIP, llm), device)
        plain = case.packed("sdpa")
        left = fuse_layers(case.ours.model.language_model, kernels)
        if left:
            raise AssertionError(f"{case.name}: not replaced: {left}")
        worst = max(worst, (*distance(case.packed("sdpa"), plain).worst, case.name))
    return within(worst, FUSED) if kernels else f"nothing compared: {reason}"


def check_waits(device: torch.device) -> str:
    """Forward and backward by the kernel that a run takes read nothing back from the device."""
    if device.type != "cuda":
        return "nothing compared: only a GPU has something to wait for"
    kernel, _ = choose_attention("auto", device)
    case = Case((CLIP, LLAMA3), device, torch.bfloat16)
    case.packed(kernel)  # once before: libraries start
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = case.ours(**case.inputs, num_sources=2).loss
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return f"forward and backward by {kernel} never wait for the device"


PARTS: dict[str, Callable[[torch.device], str]] = {
    "float32": check_float32,
    "bfloat16": check_bfloat16,
    "kernels": check_kernels,
    "fused": check_fused,
    "waits": check_waits,
    "run": truth_run.check_run,
    "resume": truth_run.check_resume,
}


def add_arguments(parser) -> None:
    """Options of `benchmark.py truth`."""
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    add_out(parser)


def run(args) -> None:
    """Checks one part and writes its card. An error's last line says what is beyond its bound."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.device(args.device)
    line = PARTS[args.part](device)
    print(line, flush=True)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    write_card(f"truth-{args.part}-{args.device}", {"device": where, "found": line}, args.out)
