"""Norms, SwiGLU and rotary embedding of the language model by Liger's kernels: one for each, in place of several.

Modules keep their names and parameters, only their class changes, to a subclass with another forward: checkpoints and
exports know nothing of it. What is not of an exactly known class stays as it is: norms, in particular, differ between
kinds of models by an offset or by where they round.
"""

from __future__ import annotations

import importlib
import types
from collections import Counter
from collections.abc import Callable, Iterable
from importlib.util import find_spec

import torch
from torch import nn
from transformers.activations import ACT2FN

from llava_next.versions import install

# Kinds whose norm is weight * (x / rms(x)), rounded before the product; whose MLP is down(act(gate(x)) * up(x)); and
# whose rotary embedding turns both halves of whole heads.
KINDS = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
FUNCTIONS = {"norm": "LigerRMSNormFunction", "swiglu": "LigerSiLUMulFunction", "rope": "LigerRopeFunction"}
CLASSES = {"norm": "RMSNorm", "swiglu": "MLP", "rope": "Attention"}  # by the ends of their names
ROTATE = "apply_rotary_pos_emb"  # what attention calls

Kernels = dict[str, Callable]


def choose_fused(wanted: bool | str, device: torch.device, elsewhere: str | None = None) -> tuple[Kernels, str]:
    """Liger's kernels when they are to be used, and the reason, for the run's plan.

    Args:
        wanted: `auto`: where they run; true insists on them.
        device: where the model runs.
        elsewhere: an option of the run under which they do not pay, by name; None: there is none.

    Returns:
        (kernels as `fuse_layers` takes them, empty when they are not used; the reason).

    Raises:
        ValueError: insisted on, and they cannot be used; the message says what would help.
    """
    if not wanted:
        return {}, "off, as asked for"
    obstacle = f"{elsewhere} has its own" if elsewhere else None
    if device.type != "cuda":
        obstacle = obstacle or f"they are for CUDA, the device is {device.type}"
    if not obstacle and find_spec("liger_kernel") is None:
        obstacle = f"liger-kernel is not installed; `{install('fused')}`"
    if not obstacle:
        try:
            return load_kernels(), "norm, SwiGLU and rotary embedding by Liger's kernels"
        except (ImportError, AttributeError) as error:  # no triton, or a release that names them otherwise
            obstacle = f"liger-kernel does not load ({error})"
    if wanted is True:
        raise ValueError(f"fused_layers: Liger's kernels cannot be used: {obstacle}; set it to auto or false")
    return {}, f"no kernels of Liger's: {obstacle}"


def load_kernels() -> Kernels:
    """`apply` of Liger's autograd functions by operation. Raises ImportError, AttributeError."""
    operations = importlib.import_module("liger_kernel.ops")
    return {operation: getattr(operations, name).apply for operation, name in FUNCTIONS.items()}


def fuse_layers(decoder: nn.Module, kernels: Kernels, operations: Iterable[str] = tuple(FUNCTIONS)) -> dict[str, int]:
    """Has the language model's modules compute by `kernels`, in place. Comes before sharding and checkpointing.

    Args:
        decoder: the language model; kernels: see `choose_fused`.
        operations: of `FUNCTIONS`, which to replace.

    Returns:
        Number of modules that stay as they are, by class, of those that norm, gate or rotate.
    """
    made: dict[type[nn.Module], type[nn.Module]] = {}
    left: Counter[str] = Counter()
    for module in decoder.modules():
        kind = type(module)
        operation = next((o for o in operations if kind.__name__.endswith(CLASSES[o])), None)
        if operation and is_known(module, operation):
            if kind not in made:
                forward = FORWARDS[operation](kind, kernels[operation])
                made[kind] = type(kind.__name__, (kind,), {"forward": forward})
            module.__class__ = made[kind]
        elif operation:
            left[kind.__name__] += 1
    return dict(left)


def is_known(module: nn.Module, operation: str) -> bool:
    """Whether the module is of a class that Liger's kernel for `operation` is right for."""
    kind, end = type(module), CLASSES[operation]
    known = {f"transformers.models.{name}.modeling_{name}.{title}{end}" for name, title in KINDS.items()}
    if f"{kind.__module__}.{kind.__qualname__}" not in known:
        return False
    if operation == "swiglu":
        return type(module.act_fn) is type(ACT2FN["silu"])
    return operation != "rope" or ROTATE in kind.forward.__code__.co_names


def _norm(kind: type[nn.Module], kernel: Callable) -> Callable:
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # rounded as Llama does, and not in place: a gradient may be the residual stream's as well
        return kernel(hidden_states, self.weight, self.variance_epsilon, 0.0, "llama", False)

    return forward


def _swiglu(kind: type[nn.Module], kernel: Callable) -> Callable:
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(kernel(self.gate_proj(x), self.up_proj(x)))

    return forward


def _rope(kind: type[nn.Module], kernel: Callable) -> Callable:
    def rotate(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor):
        # the kernel writes into what it gets, which selective checkpointing keeps: it would be rotated a second time
        return kernel(query.clone(), key.clone(), cos, sin)

    # the stock forward, with another function under the name that it calls: for this model's attention alone
    stock = kind.forward
    own = types.FunctionType(
        stock.__code__, {**stock.__globals__, ROTATE: rotate}, stock.__name__, stock.__defaults__, stock.__closure__
    )
    own.__kwdefaults__ = stock.__kwdefaults__
    return own


FORWARDS = {"norm": _norm, "swiglu": _swiglu, "rope": _rope}
