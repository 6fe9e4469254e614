"""The file given to `accelerate launch`: what it may ask for, and why the rest is refused.

Accelerate hands its YAML to the processes as environment variables. Every key of it has the effect that it names or is
an error before the model loads: a setting that is silently ignored would be believed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from accelerate import FullyShardedDataParallelPlugin
from torch import nn

LAUNCH = "accelerate launch --config_file accelerate_configs/{config}.yaml scripts/finetune.py"


class Restriction(NamedTuple):
    """A key whose other values cannot work here, or would do nothing."""

    variable: str  # environment variable that carries the key
    key: str  # as written in the YAML
    allowed: tuple[str, ...]  # lower case; unset, empty and `none` are always allowed
    reason: str


RESTRICTIONS = (
    Restriction(
        *("ACCELERATE_MIXED_PRECISION", "mixed_precision", ("no", "bf16")),
        'fp16 needs loss scaling, which is not here, and fp8 is --float8 true; set bf16, or "no" on a CPU',
    ),
    Restriction(
        *("ACCELERATE_DYNAMO_BACKEND", "dynamo_config.dynamo_backend", ("no",)),
        "it would compile the whole model anew for other lengths; leave dynamo_config out and give the script "
        "--compile_layers true, which compiles each layer once for all",
    ),
    Restriction(
        *("FSDP_AUTO_WRAP_POLICY", "fsdp_auto_wrap_policy", ("transformer_based_wrap", "no_wrap")),
        "by size it would wrap modules whose forward the packed forward never calls, so their weights would stay "
        "sharded; set TRANSFORMER_BASED_WRAP (or NO_WRAP: a single unit)",
    ),
    Restriction(
        *("FSDP_STATE_DICT_TYPE", "fsdp_state_dict_type", ("sharded_state_dict",)),
        "checkpoints are always sharded, the resulting model/ is always whole; set SHARDED_STATE_DICT",
    ),
    Restriction(
        *("FSDP_SHARDING_STRATEGY", "fsdp_sharding_strategy", ("full_shard",)),
        "FSDP2 does not read it; set fsdp_reshard_after_forward, and for several nodes parallelism_config",
    ),
    Restriction(
        *("FSDP_FORWARD_PREFETCH", "fsdp_forward_prefetch", ("false",)),
        "FSDP2 does not read it: it prefetches by itself; leave it out",
    ),
    Restriction(
        *("FSDP_BACKWARD_PREFETCH", "fsdp_backward_prefetch", ("no_prefetch",)),
        "FSDP2 does not read it: it prefetches by itself; leave it out",
    ),
    Restriction(
        *("FSDP_USE_ORIG_PARAMS", "fsdp_use_orig_params", ("true",)),
        "FSDP2 always uses the original parameters; leave it out",
    ),
    Restriction(
        *("FSDP_SYNC_MODULE_STATES", "fsdp_sync_module_states", ("true",)),
        "FSDP2 does not read it; leave it out",
    ),
    Restriction(
        *("FSDP_IGNORED_MODULES", "fsdp_ignored_modules", ()),
        "every module is sharded: gradients of one left out would not be averaged over the ranks; leave it out",
    ),
    *(
        Restriction(
            *(f"PARALLELISM_CONFIG_{name}_SIZE", f"parallelism_config_{name.lower()}_size", ("1",)),
            "only replicating (dp_replicate) and sharding (dp_shard) are implemented; set 1",
        )
        for name in ("TP", "CP", "SP")
    ),
)


def hsdp_sizes() -> tuple[int, int] | None:
    """(dp_replicate_size, dp_shard_size) of the launch file's parallelism_config; None when it has none."""
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() != "true":
        return None
    return tuple(int(os.environ.get(f"PARALLELISM_CONFIG_DP_{name}_SIZE", "1")) for name in ("REPLICATE", "SHARD"))


def checkpointing_policy(wanted: str | int) -> str | int:
    """`none`, or `wanted` (the run's `activation_checkpointing`) where the launch file allows checkpointing."""
    return wanted if os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", "false").lower() == "true" else "none"


def check_launch(model_of: Callable[[], nn.Module] | None = None) -> None:
    """Refuses to go on unless `accelerate launch` started this process with FSDP2 settings that work here.

    Args:
        model_of: makes the model, on the meta device; called only when the file names layer classes.

    Raises:
        ValueError: naming the key of the file and what to set.
    """
    config = "h100x8_fsdp" if torch.cuda.is_available() else "cpu2_fsdp"
    hint = f"Start with: {LAUNCH.format(config=config)}"
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        raise ValueError(f"this process was not started by `accelerate launch` with an FSDP configuration. {hint}")
    if os.environ.get("FSDP_VERSION") != "2":
        raise ValueError(
            f"the accelerate configuration asks for FSDP version {os.environ.get('FSDP_VERSION', '1')}; "
            f"set `fsdp_version: 2`. {hint}"
        )
    for variable, key, allowed, reason in RESTRICTIONS:
        value = os.environ.get(variable, "")
        if value.lower() not in ("", "none", *allowed):
            raise ValueError(f"accelerate configuration, {key}: {value}: {reason}")
    try:
        FullyShardedDataParallelPlugin()
    except ValueError as error:  # Accelerate's own word on values it cannot read, without a traceback
        raise ValueError(f"accelerate configuration, fsdp_config: {error}") from error
    if not torch.cuda.is_available() and os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        raise ValueError(
            "accelerate configuration, fsdp_offload_params: true: there is no GPU here whose memory it would spare; "
            "set false"
        )
    if sizes := hsdp_sizes():
        check_hsdp(*sizes, world=int(os.environ.get("WORLD_SIZE", "1")))
    if model_of is not None and os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP"):
        check_layer_classes(model_of())


def check_hsdp(replicate: int, shard: int, world: int) -> None:
    """Raises ValueError unless `replicate` copies of the model over `shard` processes each are `world` processes."""
    where = "accelerate configuration, parallelism_config"
    if replicate * shard != world:
        raise ValueError(
            f"{where}: dp_replicate_size {replicate} x dp_shard_size {shard} is not the {world} processes of this "
            "launch; set dp_shard_size to the GPUs of a node and dp_replicate_size to the number of nodes"
        )
    if shard == 1:
        raise ValueError(
            f"{where}: dp_shard_size 1 shards nothing, and FSDP2 needs something to shard over; "
            "leave parallelism_config out, or set dp_shard_size to the GPUs of a node"
        )


def check_layer_classes(model: nn.Module) -> None:
    """Refuses `fsdp_transformer_layer_cls_to_wrap` names that are not units of this model.

    Args:
        model: may be on the meta device.

    Raises:
        ValueError: a class that no layer is or holds. Those around the layers are no units: the packed forward calls
            the layers itself, and FSDP2 gathers a unit's weights only when the unit is called.
    """
    stacks = layer_stacks(model)
    inside = {type(module).__name__ for layers in stacks for module in layers[0].modules()}
    for name in filter(None, os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "").split(",")):
        if name not in inside:
            raise ValueError(
                f"accelerate configuration, fsdp_transformer_layer_cls_to_wrap: {name} is no layer of this model; its "
                f"layers are {', '.join(layer_classes(model))}, which are taken when the key is left out"
            )


def layer_stacks(model: nn.Module) -> tuple[nn.ModuleList, nn.ModuleList]:
    """The repeated layers: of the vision tower and of the language model."""
    return model.vision_tower.encoder.layers, model.model.language_model.layers


def layer_classes(model: nn.Module) -> list[str]:
    """Class names of the repeated layers: one FSDP unit each."""
    return sorted({type(layers[0]).__name__ for layers in layer_stacks(model)})
