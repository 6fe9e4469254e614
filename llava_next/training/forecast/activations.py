"""What a forward leaves in memory for its backward, tensor by tensor.

Counted from what autograd saves in transformers' layers (norms in fp32, gated MLP, rotary embedding), with unique
storages counted once. Vicuna-7B in bf16 keeps 5.97 MB (5.7 MiB) a token without checkpointing, 3.2 MB under `selective`
and 0.26 MB under `full`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from transformers import PretrainedConfig

from llava_next.model.forward.head import CHUNK
from llava_next.model.forward.kinds import language_kind, rotary_parameters, tower_kind
from llava_next.model.forward.lora import Lora
from llava_next.model.forward.modeling import used_layers
from llava_next.training.forecast.flops import (
    Checkpointing,
    adapted_matrices,
    by_stack,
    decoder_weights,
    head_dim,
    tile_tokens,
)
from llava_next.training.recipe.optim import Rates


@dataclass(frozen=True)
class Compute:
    """How a rank computes.

    Args:
        nbytes: of an activation: 2 for bf16, 4 for fp32.
        fused: one attention kernel for all segments (varlen, flash); false: one SDPA call a segment, whose outputs are
            copied together once more.
    """

    nbytes: int = 2
    fused: bool = True


class LayerBytes(NamedTuple):
    """Bytes a token of one layer: what each checkpointing policy keeps, and what its backward needs besides."""

    none: float
    selective: float
    full: float
    backward: float

    def kept(self, policy: str) -> float:
        """Bytes a token that stay from forward to backward."""
        return getattr(self, policy)

    def at_work(self, policy: str) -> float:
        """Bytes a token besides while the layer goes backward: what is computed again, and gradients."""
        return self.none - self.kept(policy) + self.backward


@dataclass(frozen=True)
class Activations:
    """Bytes of a micro-batch's activations.

    Args:
        kept: from forward to backward, all layers together.
        llm_layer, vision_layer: besides, while such a layer goes backward. What the language model kept is free by the
            time the tower's turn comes, so `llm_kept` does not weigh there.
        head: logits and their gradients of one chunk of targets, while the head is at work.
    """

    kept: float
    llm_kept: float
    llm_layer: float
    vision_layer: float
    head: float


def activations(
    config: PretrainedConfig,
    rates: Rates,
    policy: Checkpointing,
    tokens: int,
    tiles: int,
    targets: int,
    compute: Compute,
) -> Activations:
    """Activations of one micro-batch.

    Args:
        config: of the whole model.
        rates: what is trained; None freezes a module. A frozen matrix does not keep its input.
        tokens, tiles, targets: T, N and K of the micro-batch.
    """
    text, vision = config.text_config, config.vision_config
    b, hidden, llm_trains = compute.nbytes, text.hidden_size, rates.in_full("llm")
    decoder = decoder_layer(text, llm_trains, compute, rates.lora)
    policies, tower_policy = by_stack(policy, text.num_hidden_layers)
    # the norm before the head is in no layer; under fp32 its input is the last layer's output, else a copy
    llm = tokens * sum(count * decoder.kept(name) for name, count in policies.items())
    llm += tokens * (4 * hidden + b * hidden * llm_trains)
    llm += tokens * 2 * b * head_dim(text) * len(rotary_parameters(text))  # cosine and sine of rotary embeddings
    llm += targets * b * hidden * llm_trains
    patches, tile_length = tile_tokens(vision)
    images = min(tokens, tiles * patches) * b * hidden + tiles * patches * b * (
        hidden + (hidden + vision.hidden_size) * (rates.projector is not None)
    )
    encoder = encoder_layer(vision, compute)
    used, length = used_layers(vision.num_hidden_layers, config.vision_feature_layer), tiles * tile_length
    tower = work = 0.0
    if rates.vision is not None:  # else it runs without gradient
        pixels = vision.num_channels * vision.image_size**2 * tiles
        first_norm = length * vision.hidden_size * tower_kind(vision).has_cls
        tower = length * used * encoder.kept(tower_policy) + b * (pixels + first_norm)
        work = length * encoder.at_work(tower_policy)
    # bf16 logits, their fp32 copy and log-probabilities; in backward log-probabilities and two gradients: 12 at most
    head = 12.0 * min(targets, CHUNK) * text.vocab_size
    # the last layer is the first to go backward, when all is kept yet
    last = next(name for name in reversed(policies) if policies[name])
    return Activations(llm + images + tower, llm, tokens * decoder.at_work(last), work, head)


def decoder_layer(text: PretrainedConfig, trains: bool, compute: Compute, lora: Lora | None = None) -> LayerBytes:
    """A decoder layer, bytes a token.

    RMSNorms keep their input in fp32 and, when they train, the normalised input; attention keeps queries, keys, values,
    output and the fp32 logarithm of the sums; the MLP gate, its activation and up; matrices that train keep their
    inputs. Where one matrix makes queries, keys and values, all that it makes stays with the values. Adapters keep
    their inputs, with dropout each its own and which of them it left out, and what A makes of them; the row norms of
    DoRA are not counted.
    """
    b, hidden, inner, width = compute.nbytes, text.hidden_size, text.intermediate_size, decoder_weights(text)[2]
    kind, key_width, sums = language_kind(text), head_dim(text) * text.num_key_value_heads, 4 * text.num_attention_heads
    normed = kind.norms_before + kind.norms_after
    norms = normed * hidden * (4 + trains * (kind.norm_bytes or b)) + trains * 2 * b * hidden
    norms += kind.head_norms * (width + key_width) * (4 + trains * (kind.norm_bytes or b))
    norms += kind.fused * b * (width + key_width)
    attention = b * (2 * width + 2 * key_width + width * (trains and not compute.fused)) + sums
    mlp = b * inner * (3 + trains)
    products = b * (3 * hidden + 2 * width + 2 * key_width + 2 * inner) + sums
    backward = b * (2 * inner + 3 * hidden)
    if matrices := adapted_matrices(text, lora):
        low = b * lora.r * len(matrices)
        # without dropout matrices with the same input share it: two norms' outputs, attention's output, up times gate
        mlp += low + (sum((b + 1) * i for i, _ in matrices) if lora.dropout else b * (2 * hidden + width + inner))
        products += low + b * sum(outputs for _, outputs in matrices)
        backward += 12 * inner * (lora.dropout > 0)  # random bits in the making
    return LayerBytes(norms + attention + mlp, products, b * hidden, backward)


def encoder_layer(vision: PretrainedConfig, compute: Compute) -> LayerBytes:
    """A CLIP or SigLIP layer that trains, bytes a token.

    Two LayerNorms keep input and output; attention queries, keys, values and output; the MLP its inner layer before and
    after the activation, and CLIP's approximation of GELU a sigmoid besides.
    """
    b, hidden, inner = compute.nbytes, vision.hidden_size, vision.intermediate_size
    statistics = 4 * vision.num_attention_heads
    copies = 3 if vision.hidden_act == "quick_gelu" else 2
    everything = b * (8 * hidden + copies * inner) + statistics + 2 * 8
    return LayerBytes(everything, b * (7 * hidden + inner) + statistics, b * hidden, b * (copies * inner + 2 * hidden))
