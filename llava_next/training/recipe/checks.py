"""What of a configuration cannot work, found before anything is loaded."""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import TYPE_CHECKING

from huggingface_hub.utils import validate_repo_id

from llava_next.model.forward.lora import check_lora
from llava_next.model.forward.nf4 import check_nf4
from llava_next.training.devices.float8 import check_float8
from llava_next.training.recipe.evaluate import check_evaluate
from llava_next.training.recipe.low_memory import check_torchao
from llava_next.versions import install

if TYPE_CHECKING:
    from llava_next.training.recipe.config import OptimConfig, RunConfig


def require(condition: bool, key: str, message: str) -> None:
    """Raises ValueError naming a key when a condition does not hold."""
    if not condition:
        raise ValueError(f"{key}: {message}")


def check_run(config: RunConfig, dry_run: bool = False) -> None:
    """Raises ValueError naming the first key whose value cannot work."""
    data, optim = config.data, config.optim
    require(bool(config.model), "model", "missing; give the folder made by scripts/compose.py or by stage 1")
    if not dry_run:
        require(bool(config.run_dir), "run_dir", "missing; give the folder for config, metrics, checkpoints and result")
        assumed = [s.path for s in data.sources + data.validation if s.path.startswith("profile:")]
        require(not assumed, "data.sources", f"{assumed} can be planned with (--dry_run), not trained on; give folders")
    require(bool(data.sources), "data.sources", "missing; give one or more data set folders")
    for key in ("batch_size", "epochs", "max_length", "token_budget", "tile_budget"):
        value = getattr(data, key)
        require(value == "auto" or value > 0, f"data.{key}", f"must be positive, not {value}")
    require(
        data.token_budget == "auto" or data.token_budget >= data.max_length,
        "data.token_budget",
        f"{data.token_budget} is smaller than data.max_length {data.max_length}: a sample would not fit a micro-batch; "
        "give auto, at least as many, or lower data.max_length",
    )
    for key in ("num_workers", "validation_every"):
        require(getattr(data, key) >= 0, f"data.{key}", f"must be 0 or more, not {getattr(data, key)}")
    for key in ("reads_in_flight", "cache_gb", "stall_seconds"):
        require(getattr(data, key) > 0, f"data.{key}", f"must be positive, not {getattr(data, key)}")
    for key, least in (("every", 0), ("keep_last", 1), ("keep_every", 0)):
        value = getattr(config.checkpoint, key)
        require(value >= least, f"checkpoint.{key}", f"must be {least} or more, not {value}")
    check_evaluate(config.evaluate, dry_run)
    check_optim(optim)
    if config.float8:
        check_float8(llm_trains=optim.rates.llm is not None)
    elsewhere = config.fused_elsewhere
    require(
        config.fused_layers is not True or elsewhere is None,
        "fused_layers",
        f"its kernels do not pay beside {elsewhere}, which has its own; set it to auto or false",
    )
    if optim.name == "adamw8bit" and not dry_run:  # a plan does without it
        check_torchao()
    if config.lora:
        check_lora(config.lora)
        check_adapted(config)
    if config.quantize:
        check_quantized(config)
    for name in config.log_with:
        require(find_spec(name) is not None, "log_with", f"{name} is not installed; `{install('track')}`")
    if config.push_to_hub is not None:
        check_repository(config.push_to_hub)
    require(config.push_to_hub is not None or not config.push_public, "push_public", "says nothing without push_to_hub")
    require(config.max_steps is None or config.max_steps > 0, "max_steps", f"must be positive, not {config.max_steps}")
    require(data.max_length > 1, "data.max_length", "must be at least 2 tokens")
    steps = config.profile.steps
    require(all(step > 0 for step in steps), "profile.steps", f"steps are counted from 1, not {steps}")
    require(all(s.repeat > 0 for s in data.sources), "data.sources", "repeat must be positive")


def check_optim(optim: OptimConfig) -> None:
    """Refuses values with which no update works. Raises ValueError."""
    for name, rate in vars(optim.rates).items():
        require(rate is None or rate >= 0, f"optim.rates.{name}", f"must be 0 or more, or null to freeze, not {rate}")
    require(all(0 <= beta < 1 for beta in optim.betas), "optim.betas", f"must be in [0, 1), not {list(optim.betas)}")
    for key in ("eps", "weight_decay"):
        require(getattr(optim, key) >= 0, f"optim.{key}", f"must be 0 or more, not {getattr(optim, key)}")
    limit, skipped = optim.max_grad_norm, optim.max_skipped_steps
    require(limit is None or limit > 0, "optim.max_grad_norm", f"must be positive, or null for none, not {limit}")
    require(skipped > 0, "optim.max_skipped_steps", f"must be positive, not {skipped}")
    require(0 <= optim.warmup_ratio < 1, "optim.warmup_ratio", f"must be in [0, 1), not {optim.warmup_ratio}")


def check_repository(name: str) -> None:
    """Refuses what is no `ORG/NAME` of the hub. Raises ValueError."""
    try:
        validate_repo_id(name)
        if name.count("/") != 1:
            raise ValueError("it has no owner or more than one")
    except ValueError as error:
        raise ValueError(f"push_to_hub: {name!r} is no repository's name; give ORG/NAME ({error})") from None


def check_adapted(config: RunConfig) -> None:
    """Refuses rates that do not go with LoRA: language model and tower train by adapters or not at all. ValueError."""
    modules = config.lora.modules
    for name in ("llm", "vision", "projector"):
        rate = getattr(config.optim.rates, name)
        if rate is None and name in modules:
            raise ValueError(f"optim.rates.{name}: null, but lora.targets names it; give its adapters a rate (2e-4)")
        if rate is not None and name not in modules and name != "projector":
            raise ValueError(
                f"optim.rates.{name}: {rate:g}, but under lora it trains by adapters or not at all: set null, or add "
                f"{name} to lora.targets"
            )
    if config.compiled and config.lora.dora:
        raise ValueError("compile_layers: peft's layers for lora.dora cannot be compiled; set one of them to false")
    if config.float8:
        raise ValueError("float8: the matrices that it multiplies faster are frozen under lora; set it to false")


def check_quantized(config: RunConfig) -> None:
    """Refuses 4-bit matrices that nothing trains beside, or that cannot be made here. Raises ValueError."""
    if config.lora is None or "llm" not in config.lora.modules:
        raise ValueError(
            f"quantize: {config.quantize} keeps frozen matrices under adapters in 4 bits, and the language model has "
            "none: what trains in full needs all its bits; add lora (--lora.r 128), or leave quantize out"
        )
    check_nf4()


def in_short(message: str) -> str:
    """What the parser says of a value of several types, in one line: `lora.r: expected int, not 1.5`."""
    outer = re.match(r'Parser key "([\w.]+)":\n', message)
    if not outer or "Union subtypes" not in message:
        return message
    key = outer[1]
    if inner := re.search(r'\n +Parser key "([\w.]+)":\n +Expected an? (.+?)\. Got value: (.*)', message):
        key, expected, value = f"{key}.{inner[1]}", [inner[2]], inner[3]
    elif unknown := re.search(r"Option '(.+?)' is not accepted", message):
        return f"{key}.{unknown[1]}: no such key"
    else:
        expected = re.findall(r"- Expected an? (.+?)(?:\. Got value: .*)?$", message, re.MULTILINE)
        value = (re.findall(r"Given value: (.*)", message) or [""])[-1]
        if not expected:
            return message
        if "dot import path" in str(expected):  # a section, whose keys are values
            return f"{key}: {value} is no value for it; give its keys, as --{key}.KEY VALUE, or null"
    types = [re.sub(r"<class '(.+)'>", r"\1", e).removeprefix("typing.").replace("NoneType", "null") for e in expected]
    cure = f"; write '[{value}]'" if expected == ["<class 'list'>"] and value else ""
    return f"{key}: expected {' or '.join(types)}, not {value or 'nothing'}{cure}"
