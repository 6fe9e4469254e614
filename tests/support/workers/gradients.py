"""Run under `accelerate launch`: loss and all gradients of one step, dealt unevenly to the ranks.

Usage: gradients.py JOBS, a JSON list of [MODEL_FOLDER, OUT_FILE, FROZEN_MODULES, CHECKPOINTING], and
where adapters train [..., LORA (an object), QUANTIZE]. With [..., OPTIMIZER, MASTER] after these (or null twice) the
weights after three updates by these gradients are in the result as well.
The result also says what FSDP made of the launch file: units, layers that hold whole weights after a forward,
checkpointed layers, and in how many pieces a weight lies.
Rank 0 gets a text-only sample and an empty micro-batch; the images are on the others (with one rank: all on it).
"""

import json
import sys

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from llava_next.model.folders.export import full_tensors
from llava_next.model.forward.lora import Lora
from llava_next.model.forward.modeling import LlavaNextForConditionalGeneration
from llava_next.training.devices.agreement import agree_on_step, slot_weights
from llava_next.training.devices.launch import layer_stacks
from llava_next.training.devices.parallel import build_accelerator, finish, shard
from llava_next.training.recipe.optim import Rates, build_optimizer, freeze
from support.tiny import geometry, pack_tiny, random_samples, with_adapters
from support.tracing import find_torchao


def samples_of(anyres):
    """Five samples with images and a text-only one, in slots 0 to 5."""
    samples = [*random_samples(1, 5, images=(1, 2), anyres=anyres), *random_samples(2, 1, images=(0,), anyres=anyres)]
    for slot, (example, _) in enumerate(samples):
        example.slot = slot
    return samples


def micro_batches(rank: int, world: int, anyres):
    """Two micro-batches for this rank; text only and nothing on rank 0, all images elsewhere."""
    examples = [e for e, _ in samples_of(anyres)]
    if world == 1:
        parts = (examples[:3], examples[3:])
    elif rank == 0:
        parts = (examples[5:], [])
    else:
        mine = [e for i, e in enumerate(examples[:5]) if i % (world - 1) == rank - 1]
        parts = (mine[:2], mine[2:])
    return [pack_tiny(part, anyres) for part in parts]


def shape_of(model) -> dict[str, torch.Tensor]:
    """What sharding, resharding and checkpointing did to the model, as counts; call it between forward and backward."""
    layers = [layer for stack in layer_stacks(model) for layer in stack]
    shape = {
        "units": sum(isinstance(module, FSDPModule) for module in model.modules()),
        "gathered": sum(not isinstance(next(layer.parameters()), DTensor) for layer in layers),
        "checkpointed": sum(hasattr(layer, "recomputes") for layer in layers),
    }
    return {name: torch.tensor(value) for name, value in shape.items()}


def main(jobs: list[list]) -> None:
    torch.set_num_threads(1)
    accelerator = build_accelerator()
    plugin = accelerator.state.fsdp_plugin
    given = plugin.transformer_cls_names_to_wrap
    for job in jobs:
        plugin.transformer_cls_names_to_wrap = given  # else that of the first model
        one_step(accelerator, *job)
        accelerator.free_memory()
    finish(accelerator)


def one_step(
    accelerator,
    folder: str,
    out: str,
    frozen: list[str],
    checkpointing: str | int,
    lora: dict | None = None,
    quantize: str | None = None,
    update_by: str = "",
    master: str = "fp32",
) -> None:
    dtype = torch.float32 if accelerator.mixed_precision == "no" else torch.bfloat16
    model = LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    rates = Rates(**{name: None if name in frozen else 1e-3 for name in ("llm", "projector", "vision", "newline")})
    if lora:
        model = with_adapters(model, Lora(**lora), quantize)
    else:
        freeze(model, rates)
    if update_by == "adamw8bit":
        find_torchao()
    model, optimizer = shard(
        accelerator,
        model,
        lambda m: build_optimizer(m, rates, (0.9, 0.999), 1e-8, 0.0, update_by or "adamw"),
        checkpointing,
        master=master,
    )
    micros = micro_batches(accelerator.process_index, accelerator.num_processes, geometry(model.config))
    counts = agree_on_step(micros, 6, stop=False)
    weights = slot_weights(counts.supervised, "token")
    total = torch.zeros(())
    for batch in micros:
        loss = model(**batch.weighted(weights).model_inputs(accelerator.device), num_sources=2).loss
        result = shape_of(model)
        if not accelerator.state.fsdp_plugin.reshard_after_forward:  # as the training loop keeps them for a step
            model.set_reshard_after_backward(batch is micros[-1])
        (loss * accelerator.num_processes).backward()
        total += loss.detach()
    dist.all_reduce(total)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
    result |= {"loss": total, "grad_norm": norm.full_tensor(), "mesh": torch.tensor(norm.device_mesh.shape)}
    for name, tensor in full_tensors(model):
        result[f"weight/{name}"] = tensor.contiguous().clone()  # updates come
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            result[f"grad/{name}"] = parameter.grad.full_tensor()
    if update_by:
        for _ in range(3):
            optimizer.step()
        result |= {f"updated/{name}": tensor.clone() for name, tensor in full_tensors(model)}
    if accelerator.is_main_process:
        save_file(result, out)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
