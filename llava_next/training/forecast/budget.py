"""Memory of a rank before the run, by part.

Everything follows from shapes (see `activations.py`) and from how FSDP2 moves weights: a layer's are gathered one layer
ahead, its gradients are reduced in fp32 while the layer before is already at work. Held against measured peaks by
tests/forecast/test_budget.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig

from llava_next.model.forward.lora import is_adapter
from llava_next.training.devices.launch import layer_stacks
from llava_next.training.forecast.activations import Compute, activations
from llava_next.training.forecast.flops import Checkpointing, adapted_matrices
from llava_next.training.recipe.low_memory import block_length
from llava_next.training.recipe.optim import Rates

# cheapest recomputation first
POLICIES: tuple[Checkpointing, ...] = ("none", "selective", "full")
# Of a GPU: CUDA's context and libraries, attention's and matrix products' workspace; NCCL's buffers when there are
# several. An assumption, as is the share that the allocator loses to fragments.
CONTEXT_BYTES, NCCL_BYTES = 1.0e9, 1.0e9
FRAGMENTS = 0.05


@dataclass(frozen=True)
class Unit:
    """Parameters that FSDP2 gathers together."""

    trainable: int
    frozen: int

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.trainable + self.frozen


@dataclass(frozen=True)
class Units:
    """How Accelerate cuts the model: a unit a layer; the input embedding; final norm and head; the rest, as root.

    Head and root keep their gathered weights until they were used in backward, whatever `reshard` says.

    Args:
        coded: trained parameters whose moments can be in 8 bits; scales: of one such moment.
        adapters: parameters of adapters, which are merged into the others in a result.
    """

    llm_layer: Unit
    vision_layer: Unit
    embedding: Unit
    head: Unit
    root: Unit
    whole: Unit
    coded: int = 0
    scales: int = 0
    adapters: int = 0

    def trained_bytes(self, optimizer: str = "adamw", master: str = "fp32") -> tuple[int, int]:
        """Bytes of trained parameters and of their moments, over all ranks; what a checkpoint holds.

        Args:
            optimizer, master: `OptimConfig.name` and `OptimConfig.master`.
        """
        moments = 8 * self.whole.trainable
        if optimizer == "adamw8bit":
            moments += (2 - 8) * self.coded + 8 * self.scales
        return (2 if master == "bf16" else 4) * self.whole.trainable, moments

    def disk_bytes(self, optimizer: str = "adamw", master: str = "fp32") -> tuple[int, int, int]:
        """Bytes of a checkpoint, of the result's weights in bf16, and of its adapter's in float32; of a model whose
        matrices are whole."""
        checkpoint = sum(self.trained_bytes(optimizer, master))
        return checkpoint, 2 * (self.whole.parameters - self.adapters), 4 * self.adapters


def units(model: nn.Module) -> Units:
    """Counts a model's parameters by unit.

    Args:
        model: may be on the meta device; `requires_grad` says what is trained.
    """

    def unit(*modules: nn.Module) -> Unit:
        counts = [0, 0]
        for parameter in {id(p): p for module in modules for p in module.parameters()}.values():
            counts[not parameter.requires_grad] += parameter.numel()
        return Unit(*counts)

    vision_layers, llm_layers = layer_stacks(model)
    embedding, head = model.get_input_embeddings(), (model.model.language_model.norm, model.lm_head)
    tied = embedding.weight is model.lm_head.weight
    whole = unit(model)
    trained = {id(p): p for p in model.parameters() if p.requires_grad}.values()
    coded = [(p.numel(), block) for p in trained if (block := block_length(p.shape))]
    adapters = sum(p.numel() for name, p in model.named_parameters() if is_adapter(name))
    apart = [*map(unit, (*vision_layers, *llm_layers)), unit(*head), *([] if tied else [unit(embedding)])]
    root = Unit(*(getattr(whole, n) - sum(getattr(u, n) for u in apart) for n in ("trainable", "frozen")))
    return Units(
        *(unit(llm_layers[0]), unit(vision_layers[0]), Unit(0, 0) if tied else unit(embedding), unit(*head)),
        *(root, whole, sum(n for n, _ in coded), sum(n // block for n, block in coded), adapters),
    )


@dataclass(frozen=True)
class Layout:
    """How the work lies on the ranks.

    Args:
        shard: ranks that share one copy of weights, gradients and optimizer state (HSDP: those of a node).
        compute: precision and attention of the forward.
        reshard: gathered weights are freed after a layer's forward; else all stay for a whole step.
        on_gpu: counts CUDA's and NCCL's own memory.
        offload: weights, gradients and optimizer state wait in host memory.
        replicate: copies of the model (HSDP: one a node).
        optimizer, master: `OptimConfig.name` and `OptimConfig.master`.
    """

    shard: int
    compute: Compute
    reshard: bool = True
    on_gpu: bool = True
    offload: bool = False
    replicate: int = 1
    optimizer: str = "adamw"
    master: str = "fp32"


@dataclass(frozen=True)
class Estimate:
    """Bytes of one rank at the peak of a training step, by part.

    Args:
        weights: sharded: the master's type where trained, frozen ones as loaded; gradients: sharded, fp32; optimizer:
            sharded, its moments.
        gathered: weights in full: head and root, the layer at work and the next one, or all when nothing is freed.
        activations: kept from forward to backward.
        working: what the busiest moment of the backward needs besides: a layer's recomputed activations and gradients,
            or the head's logits; and gradients on their way to be reduced.
        workspace: CUDA's, NCCL's, fragments.
    """

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    logits: float
    working: float
    workspace: float

    @property
    def states(self) -> float:
        """Weights, gradients and optimizer state: there whatever a micro-batch holds."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        """Bytes at the peak. The head's logits are gone by the time the first layer goes backward."""
        return self.states + self.gathered + self.workspace + self.activations + max(self.logits, self.working)


def estimate(
    config: PretrainedConfig,
    counts: Units,
    rates: Rates,
    policy: Checkpointing,
    layout: Layout,
    tokens: int,
    tiles: int,
    targets: int | None = None,
) -> Estimate:
    """Memory of a rank for micro-batches of `tokens` tokens, `tiles` tiles and `targets` supervised positions.

    Args:
        config: of the whole model; counts: its `units`; rates: what is trained.
        targets: default: as many as tokens, which is one whole chunk of logits in any real run.
    """
    b, shard = layout.compute.nbytes, layout.shard
    active = activations(config, rates, policy, tokens, tiles, tokens if targets is None else targets, layout.compute)
    whole, layer, head = counts.whole, counts.llm_layer, counts.head
    masters, moments = counts.trained_bytes(layout.optimizer, layout.master)
    on_device = 0 if layout.offload else 1 / shard
    weights, gradients = on_device * (masters + b * whole.frozen), on_device * 4 * whole.trainable
    optimizer = on_device * moments
    if layout.reshard:
        # the layer at work, and the next one on its way from the other ranks
        gathered = b * (head.parameters + counts.root.parameters + (1 + (shard > 1)) * layer.parameters)
    else:
        gathered = b * whole.parameters
    # The head's gradient in full: as computed, and a chunk's. Then its fp32 copy for the reduction stays until the
    # first layer's own gradients follow; a single rank in fp32 has nothing to reduce or to convert.
    logits = active.head + 2 * b * head.trainable
    reducing = 4 * max(head.trainable, layer.trainable) if shard > 1 or b < 4 else 0
    # a matrix in 4 bits is made whole for each product with it
    matrices = adapted_matrices(config.text_config, rates.lora) if rates.quantize else []
    whole_matrix = b * max((inputs * outputs for inputs, outputs in matrices), default=0)
    llm_work = active.llm_layer + reducing + b * layer.trainable + whole_matrix
    vision_work = active.vision_layer - active.llm_kept + 4 * counts.embedding.trainable
    workspace = CONTEXT_BYTES + (NCCL_BYTES if shard > 1 else 0) if layout.on_gpu else 0.0
    states = weights + gradients + optimizer + gathered
    if layout.on_gpu:
        workspace += FRAGMENTS * (states + active.kept)
    return Estimate(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        gathered=gathered,
        activations=active.kept,
        logits=logits,
        working=max(llm_work, vision_work),
        workspace=workspace,
    )
