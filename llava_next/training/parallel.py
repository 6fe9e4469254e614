"""Accelerator and FSDP2: what the file given to `accelerate launch` says, made to hold for this model.

The YAML stays in charge of sharding, wrapping, checkpointing and precision; added here is only what it cannot know:
the layer classes of the model at hand, fp32 gradient reduction, and the CPU.
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

LAUNCH = "accelerate launch --config_file accelerate_configs/{config}.yaml scripts/finetune.py"

# gloo for small tensors on the host (counts, flags, sizes): the control plane never waits for the GPU
BACKENDS = "cpu:gloo,cuda:nccl"


def build_accelerator() -> Accelerator:
    """The Accelerator of a run: FSDP2 on GPUs by NCCL, on CPUs by gloo, also with a single process.

    Raises:
        ValueError: when the script was started without `accelerate launch` or its file does not ask for FSDP2.
    """
    require_fsdp2_launch()
    plugin = FullyShardedDataParallelPlugin()
    if os.environ.get("ACCELERATE_MIXED_PRECISION", "no") == "bf16":
        # Accelerate's own choice for bf16 reduces gradients and returns outputs in bf16.
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=None, cast_forward_inputs=False
        )
    on_cpu = not torch.cuda.is_available()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and not dist.is_initialized():
        # FSDP2 needs a process group even when it shards over one process.
        dist.init_process_group("gloo" if on_cpu else BACKENDS, store=dist.HashStore(), rank=0, world_size=1)
    handlers = [] if on_cpu else [InitProcessGroupKwargs(backend=BACKENDS)]
    accelerator = Accelerator(cpu=on_cpu, fsdp_plugin=plugin, kwargs_handlers=handlers)
    if accelerator.distributed_type != DistributedType.FSDP:
        _force_fsdp(plugin)
    return accelerator


def require_fsdp2_launch() -> None:
    """Raises ValueError unless `accelerate launch` with an FSDP2 file started this process."""
    config = "h100x8_fsdp" if torch.cuda.is_available() else "cpu2_fsdp"
    hint = f"Start with: {LAUNCH.format(config=config)}"
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        raise ValueError(f"this process was not started by `accelerate launch` with an FSDP configuration. {hint}")
    if os.environ.get("FSDP_VERSION") != "2":
        raise ValueError(
            f"the accelerate configuration asks for FSDP version {os.environ.get('FSDP_VERSION', '1')}; "
            f"set `fsdp_version: 2`. {hint}"
        )


def _force_fsdp(plugin: FullyShardedDataParallelPlugin) -> None:
    # Accelerate drops FSDP silently on CPUs and with a single process, although everything in it works there. Its
    # two shared states decide which path `prepare`, clipping and checkpoints take.
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin


def shard(accelerator: Accelerator, model: nn.Module, optimizer_of) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Shards the model by FSDP2 and builds its optimizer.

    Args:
        model: as loaded, `requires_grad` set; with `fsdp_cpu_ram_efficient_loading` all ranks but the first hold it
            on the meta device.
        optimizer_of: called with the model, returns its optimizer (before sharding, as Accelerate wants it).

    Returns:
        The sharded model and the optimizer over its shards.
    """
    plugin = accelerator.state.fsdp_plugin
    if plugin.auto_wrap_policy is not None and not plugin.transformer_cls_names_to_wrap:
        plugin.transformer_cls_names_to_wrap = layer_classes(model)
    if accelerator.mixed_precision != "no":
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    if any(p.is_meta for p in model.parameters()):
        # Accelerate maps parameters to their shards by address, and all meta tensors share one. Memory that is never
        # written costs an address and no RAM; rank 0's values arrive in `prepare`.
        buffers = {name: b for name, b in model.named_buffers() if not b.is_meta}
        model.to_empty(device="cpu")
        model.tie_weights()  # an embedding that is also the head came apart
        for name, buffer in model.named_buffers():
            if name in buffers:
                buffer.data = buffers[name].data
    return accelerator.prepare(model, optimizer_of(model))


def layer_classes(model: nn.Module) -> list[str]:
    """Class names of the repeated layers: one FSDP unit each."""
    lists = (model.vision_tower.encoder.layers, model.model.language_model.layers)
    return sorted({type(layers[0]).__name__ for layers in lists})


def finish(accelerator: Accelerator) -> None:
    """Ends this process with exit status 0, all ranks together, when nothing is left to do. Does not return.

    The interpreter's teardown is skipped: threads of torch's communication are still alive then and once in some 60
    launches aborted the process ("terminate called without an active exception"), so that a launcher reported a
    finished run as failed.
    """
    accelerator.wait_for_everyone()
    accelerator.end_training()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def agree(values: torch.Tensor) -> torch.Tensor:
    """Sums a small host tensor over all ranks, in place. The step's one control message; gloo, no device wait."""
    dist.all_reduce(values)
    return values
