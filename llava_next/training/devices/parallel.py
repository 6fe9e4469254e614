"""Accelerator and FSDP2: what the file given to `accelerate launch` says, made to hold for this model.

The YAML stays in charge of sharding, wrapping, checkpointing and precision (`launch` checks it); added here is only
what it cannot know: the layer classes of the model at hand, fp32 gradient reduction, which activations a checkpointed
layer keeps, and the CPU.
"""

from __future__ import annotations

import multiprocessing.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import NoReturn

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin, ParallelismConfig, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from llava_next.data.storage.lease import release_all
from llava_next.model.forward.attention import keep_loop_uncompiled
from llava_next.training.devices.hardware import prepare_allocator
from llava_next.training.devices.launch import check_launch, hsdp_sizes, layer_classes, layer_stacks

# gloo for small tensors on the host (counts, flags, sizes): the control plane never waits for the GPU
BACKENDS = "cpu:gloo,cuda:nccl"

# What selective checkpointing keeps: outputs of matrix products and of attention, nearly all of a layer's FLOPs.
# Everything else (norms, rotary embedding, activations, residual sums) is cheap to compute again.
KEPT = {
    *("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "aten::_scaled_mm"),
    "bitsandbytes::gemm_4bit",
    *("aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_flash_attention_for_cpu"),
    *("aten::_scaled_dot_product_efficient_attention", "aten::_scaled_dot_product_cudnn_attention"),
    *("aten::_scaled_dot_product_fused_attention_overrideable", "aten::_flash_attention_forward"),
    *("torch_attn::_varlen_attn", "flash_attn::_flash_attn_varlen_forward"),
}

MASTERS = {"fp32": torch.float32, "bf16": torch.bfloat16}

RECOMPILE_LIMIT = 32  # see `compile_layers`


def build_accelerator() -> Accelerator:
    """The Accelerator of a run: FSDP2 on GPUs by NCCL, on CPUs by gloo, also with a single process.

    With `parallelism_config` in the launch file the model is sharded over `dp_shard_size` neighbouring processes and
    replicated `dp_replicate_size` times (HSDP). Gradients are averaged over all processes either way.

    Raises:
        ValueError: see `check_launch`.
    """
    check_launch()
    prepare_allocator()
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
    sizes = hsdp_sizes()
    # else Accelerate would build the mesh before it is told that there is FSDP on this CPU
    os.environ["ACCELERATE_USE_PARALLELISM_CONFIG"] = "false"
    accelerator = Accelerator(cpu=on_cpu, fsdp_plugin=plugin, kwargs_handlers=handlers)
    if accelerator.distributed_type != DistributedType.FSDP:
        _force_fsdp(plugin)
    if sizes:
        _replicate_and_shard(accelerator, *sizes)
    return accelerator


def _force_fsdp(plugin: FullyShardedDataParallelPlugin) -> None:
    # Accelerate drops FSDP silently on CPUs and with a single process, although everything in it works there. Its
    # two shared states decide which path `prepare`, clipping and checkpoints take.
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin


def _replicate_and_shard(accelerator: Accelerator, replicate: int, shard_size: int) -> None:
    # What Accelerator.__init__ does with a parallelism_config, on GPUs as on CPUs.
    config = ParallelismConfig(dp_replicate_size=replicate, dp_shard_size=shard_size)
    AcceleratorState._shared_state["parallelism_config"] = config
    AcceleratorState._shared_state["device_mesh"] = config.get_device_mesh(accelerator.device.type)


def shard(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer_of,
    checkpointing: str | int = "full",
    compiled: bool = False,
    master: str = "fp32",
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Shards the model by FSDP2 and builds its optimizer.

    Args:
        model: as loaded, `requires_grad` set; with `fsdp_cpu_ram_efficient_loading` all ranks but the first hold it
            on the meta device.
        optimizer_of: called with the model, returns its optimizer (before sharding, as Accelerate wants it).
        checkpointing: how `fsdp_activation_checkpointing: true` is carried out, see `apply_checkpointing`.
        compiled: see `compile_layers`.
        master: what trained parameters are under mixed precision, `fp32` or `bf16`. Gradients are fp32 either way.

    Returns:
        The sharded model and the optimizer over its shards.
    """
    plugin = accelerator.state.fsdp_plugin
    if plugin.auto_wrap_policy is not None and not plugin.transformer_cls_names_to_wrap:
        plugin.transformer_cls_names_to_wrap = layer_classes(model)
    if accelerator.mixed_precision != "no":
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(MASTERS[master])
    if any(p.is_meta for p in model.parameters()):
        # Accelerate maps parameters to their shards by address, and all meta tensors share one. Memory that is never
        # written costs an address and no RAM; rank 0's values arrive in `prepare`.
        buffers = {name: b for name, b in model.named_buffers() if not b.is_meta}
        model.to_empty(device="cpu")
        model.tie_weights()  # an embedding that is also the head came apart
        for name, buffer in model.named_buffers():
            if name in buffers:
                buffer.data = buffers[name].data
    optimizer = optimizer_of(model)
    if plugin.activation_checkpointing:
        apply_checkpointing(model, checkpointing, offload=bool(plugin.activation_checkpointing_offload))
        plugin.activation_checkpointing = False  # done; Accelerate would wrap the wrapped
    if compiled:
        compile_layers(model)
    if master == "fp32":
        return accelerator.prepare(model, optimizer)
    with _parameters_as_they_are():
        model, optimizer = accelerator.prepare(model, optimizer)
    sum_gradients_in_fp32(model)
    return model, optimizer


@contextmanager
def _parameters_as_they_are() -> Iterator[None]:
    # `prepare` makes every trainable parameter fp32 unless it is told that there is no mixed precision; FSDP2's own
    # policy, which says what is computed in, is the plugin's.
    state = AcceleratorState._shared_state
    before, state["_mixed_precision"] = state["_mixed_precision"], "no"
    try:
        yield
    finally:
        state["_mixed_precision"] = before


def sum_gradients_in_fp32(model: nn.Module) -> None:
    """Keeps the gradients of a sharded model's bf16 parameters in fp32.

    FSDP2 reduces in fp32 and rounds to the parameter's type: no more than what backward computed in bf16 has lost
    already. It adds later micro-batches to the gradient that is there, whose type it leaves: so they sum up in fp32,
    and budgets and micro-batches change a result as little as under fp32 masters.
    """

    def widen(parameter: nn.Parameter) -> None:
        if parameter.grad.dtype != torch.float32:
            parameter.grad = parameter.grad.float()

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad_dtype = None  # of any type
            parameter.register_post_accumulate_grad_hook(widen)


def apply_checkpointing(model: nn.Module, policy: str | int = "full", offload: bool = False) -> None:
    """Makes every layer of tower and language model compute activations again in backward. Changes no bit of a result.

    Args:
        policy: `full` keeps a layer's input only; `selective` also the outputs of its matrix products and attention
            (`KEPT`), so that next to nothing is computed twice; `none` leaves the model as it is; a number takes `full`
            for so many of the language model's layers, from the first, and `selective` for all others.
        offload: move what is kept to host memory until backward.

    Raises:
        ValueError: an unknown policy, or a number that is not one of the layers'.
    """
    tower, decoder = layer_stacks(model)
    if policy not in ("full", "selective", "none") and not (type(policy) is int and 0 < policy < len(decoder)):
        raise ValueError(
            f"activation_checkpointing: {policy!r} is none of full, selective, none, 1 to {len(decoder) - 1} layers"
        )
    if policy == "none":
        return
    first = policy if isinstance(policy, int) else len(decoder) * (policy == "full")
    selective = {"context_fn": partial(create_selective_checkpoint_contexts, _keep)}
    for layers, full in ((tower, len(tower) * (policy == "full")), (decoder, first)):
        # one class a stack, whatever its layers keep: Accelerate takes what is of the first one's class for a unit
        kind = _recomputing(type(layers[0]), offload)
        for number, layer in enumerate(layers):
            layer.__class__, layer.recomputes = kind, {} if number < full else selective


def _recomputing(layer_class: type[nn.Module], offload: bool) -> type[nn.Module]:
    # A class and no wrapping module: names stay, and FSDP2's hooks stay outside of what is computed again, where they
    # belong: inside they would keep torch.compile, which cannot trace them, from compiling a checkpointed layer at all.
    def forward(self, *args, **kwargs):
        with save_on_cpu(pin_memory=torch.cuda.is_available()) if offload else nullcontext():
            again = super(kind, self).forward
            how = {"use_reentrant": False, "preserve_rng_state": False, **self.recomputes}
            return checkpoint(again, *args, **how, **kwargs)

    kind = type(layer_class.__name__, (layer_class,), {"forward": forward})
    return kind


def use_deterministic() -> None:
    """The same bits whenever the same is computed, on CUDA too: attention's backward and sums by index in one order."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing reads what was never written


def compile_layers(model: nn.Module, backend: str = "inductor") -> None:
    """Compiles every layer of tower and language model in place, for sequences of any length.

    Modules and parameters keep their names, so checkpoints and exports know nothing of it. All layers of a stack share
    their compiled code. Comes after `apply_checkpointing` and before sharding, so that recomputation is compiled and
    FSDP2's gathers stay outside.

    A run makes at most 12 graphs, whatever its lengths: of the language model's first layer, of its others and of the
    tower's; each for one token or tile (an empty or text-only micro-batch) and for more, with gradient and without.
    Types of layers (with a window or without, with a rotary embedding or without) have graphs of their own.
    Where attention is one SDPA call a segment (CPUs), that loop stays uncompiled, and under checkpointing the whole
    decoder layer.
    """
    keep_loop_uncompiled()
    # tower and language model share a limit; past it layers would run uncompiled, with no more than a warning
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    for layers in layer_stacks(model):
        for layer in layers:
            layer.compile(dynamic=True, backend=backend)


def _keep(context, operation, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation.name() in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def finish(accelerator: Accelerator, last: Callable[[], int] = lambda: 0) -> NoReturn:
    """Ends this process, with exit status 0, all ranks together, when nothing is left to do.

    Args:
        last: what the main process does when the others have ended, however long it takes; returns its exit status.
    """
    accelerator.wait_for_everyone()
    try:
        accelerator.end_training()
    except Exception as error:  # a tracker's: all is done and written
        print(f"warning: a tracker could not be ended ({error}); metrics.jsonl is whole", flush=True)
    end_process(last() if accelerator.is_main_process else 0)


def end_process(status: int) -> NoReturn:
    """Ends this process now; leases are given back.

    The interpreter's teardown is skipped: threads of torch's communication are still alive then and once in some 60
    launches aborted the process ("terminate called without an active exception"), so that a launcher reported a
    finished run as failed.
    """
    release_all()
    sys.stdout.flush()
    sys.stderr.flush()
    if multiprocessing.parent_process() is None:  # the folder of workers' sockets, which teardown would remove
        shutil.rmtree(multiprocessing.util.get_temp_dir(), ignore_errors=True)
    os._exit(status)
