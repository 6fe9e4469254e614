"""What a step costs in floating-point operations.

Two numbers, as in the PaLM paper (appendix B). *Model* FLOPs are what the mathematics needs; over the device's peak
they give the MFU. *Hardware* FLOPs add what activation checkpointing computes twice, and give the HFU. A multiply-add
counts as 2. Only matrix products are counted: norms, activations, rotary and the optimizer are below 1 %. What flash
attention recomputes inside of its backward is not counted in either number.

A module that trains costs three forwards: its own, the gradient of its weights, the gradient of its inputs. Frozen
parts cost less: the tower runs without gradient (one), a language model behind a training projector hands gradients
through (two), and so do matrices with adapters, whose own small products are counted for the language model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

from transformers import PretrainedConfig

from llava_next.data.plan.dealing import CostModel
from llava_next.model.forward.kinds import language_kind, tower_kind, windows
from llava_next.model.forward.lora import Lora
from llava_next.model.forward.modeling import used_layers
from llava_next.training.recipe.optim import Rates

# a number: so many of the language model's layers, from the first, as `full`; its others and the tower as `selective`
Checkpointing = Literal["none", "selective", "full"] | int

# share of a layer's products that is computed again; selective keeps the outputs of all of them
RECOMPUTED: dict[str, float] = {"none": 0.0, "selective": 0.0, "full": 1.0}
# tokens of a window up to which samples are taken to be longer than it (see `flops_model`)
SHORT_WINDOW = 2048


def by_stack(policy: Checkpointing, layers: int) -> tuple[dict[str, int], str]:
    """How many of the language model's layers follow which of the three policies, and which the tower's follow.

    Args:
        layers: of the language model.
    """
    if isinstance(policy, int):
        return {"full": policy, "selective": layers - policy}, "selective"
    return {policy: layers}, policy


@dataclass(frozen=True)
class Flops:
    """Floating-point operations by part. The projector counts as vision, the LM head apart from the decoder layers."""

    vision: float
    llm: float
    head: float

    @property
    def total(self) -> float:
        """Sum over the parts."""
        return self.vision + self.llm + self.head


class Work(NamedTuple):
    """FLOPs of one unit of work (a token, a tile, ...): forward and backward, and the part computed again."""

    model: float
    again: float


@dataclass(frozen=True)
class FlopsModel:
    """FLOPs per unit of work of a model that trains under given rates and checkpointing; see `flops_model`.

    Args:
        per_token: the decoder layers' weights.
        per_square: attention, per token of a segment squared; half of the square under the causal mask.
        per_tile: vision tower up to the layer that is used, with its attention, and the projector.
        per_target: LM head; `again` applies to micro-batches whose head runs in several chunks.
    """

    per_token: Work
    per_square: Work
    per_tile: Work
    per_target: Work

    def step_flops(
        self, tokens: float, squared_lengths: float, tiles: float, supervised: float, chunked: float = 0
    ) -> tuple[Flops, Flops]:
        """Model and hardware FLOPs of a step, or of any part of one.

        Args:
            tokens: in all segments, image tokens included.
            squared_lengths: sum over segments of length squared.
            tiles: real ones; the zero tile of a batch without images is overhead, not work.
            supervised: target positions.
            chunked: of these, positions in micro-batches with more than one chunk of targets (`chunked_targets`).
        """
        amounts = ((self.per_token, tokens), (self.per_square, squared_lengths))
        model = Flops(
            vision=self.per_tile.model * tiles,
            llm=sum(work.model * amount for work, amount in amounts),
            head=self.per_target.model * supervised,
        )
        hardware = Flops(
            vision=model.vision + self.per_tile.again * tiles,
            llm=model.llm + sum(work.again * amount for work, amount in amounts),
            head=model.head + self.per_target.again * chunked,
        )
        return model, hardware


def flops_model(config: PretrainedConfig, rates: Rates, checkpointing: Checkpointing = "none") -> FlopsModel:
    """Counts a LLaVA-NeXT model's FLOPs.

    In a layer with a short window every token counts as one that sees a whole window: by up to 4 % of a layer too much
    where samples are no longer than that. A longer window counts as none.

    Args:
        config: of the whole model.
        rates: what is trained; None freezes a module.
        checkpointing: which layers' activations are recomputed in backward. A tower that is frozen runs without
            gradient, so nothing of it is computed again.
    """
    text = config.text_config
    weights, last, width = decoder_weights(text)
    passes, adapters = 2 + rates.in_full("llm"), 6.0 * decoder_adapters(text, rates.lora)
    layers = text.num_hidden_layers
    decoder, tower = by_stack(checkpointing, layers)
    share = sum(RECOMPUTED[policy] * count for policy, count in decoder.items()) / layers
    # scores and values: 2 products of 2 x width each, half under the mask; their gradients go to both inputs
    short = [window for window in windows(text) if window is not None and window <= SHORT_WINDOW]
    square, seen = 2.0 * width * (layers - len(short)), 4.0 * width * sum(short)
    if language_kind(text).norms_after:  # whose norm needs the last matrix' output
        last = 0
    return FlopsModel(
        per_token=Work(
            (2.0 * weights * passes + adapters) * layers + 3 * seen,
            ((2.0 * (weights - last) + adapters / 3) * layers + seen) * share,
        ),
        per_square=Work(3 * square, square * share),
        per_tile=_tile_work(config, rates, RECOMPUTED[tower]),
        per_target=Work(2.0 * text.hidden_size * text.vocab_size * passes, 2.0 * text.hidden_size * text.vocab_size),
    )


def _tile_work(config: PretrainedConfig, rates: Rates, share: float) -> Work:
    """One tile through patch embedding, tower and projector."""
    vision, hidden = config.vision_config, config.text_config.hidden_size
    weights, last = encoder_weights(vision)
    patches, tokens = tile_tokens(vision)
    layers = used_layers(vision.num_hidden_layers, config.vision_feature_layer)
    tower_trains, projector_trains = rates.vision is not None, rates.projector is not None
    tower_in_full, projector_in_full = rates.in_full("vision"), rates.in_full("projector")
    attention = 4.0 * tokens * tokens * vision.hidden_size * layers  # full: every token sees every token
    linear = 2.0 * tokens * weights * layers
    embedding = 2.0 * patches * vision.hidden_size * vision.num_channels * vision.patch_size**2
    # pixels need no gradient, so the embedding has its weights' only
    tower = linear + attention + embedding
    if tower_trains:
        tower += (1 + tower_in_full) * linear + 2 * attention + tower_in_full * embedding
    again = share * (linear - 2.0 * tokens * last * layers + attention) if tower_trains else 0.0
    first, second = 2.0 * patches * vision.hidden_size * hidden, 2.0 * patches * hidden * hidden
    # a gradient goes on to an input only when something before it trains
    first *= 1 + projector_in_full + tower_trains
    second *= 1 + projector_in_full + (projector_trains or tower_trains)
    return Work(tower + first + second, again)


def decoder_weights(text: PretrainedConfig) -> tuple[int, int, int]:
    """Of a decoder layer: weights of its matrices, those of the last one, and the width of all query heads together.

    The last matrix is not computed again under checkpointing where its output is not needed to go backward.
    """
    sizes = [inputs * outputs for inputs, outputs in decoder_matrices(text).values()]
    return sum(sizes), sizes[-1], text.num_attention_heads * head_dim(text)


def head_dim(text: PretrainedConfig) -> int:
    """Features of an attention head of the language model."""
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def decoder_matrices(text: PretrainedConfig) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of each matrix of a decoder layer, by its name in there."""
    hidden, inner = text.hidden_size, text.intermediate_size
    width, keys = (heads * head_dim(text) for heads in (text.num_attention_heads, text.num_key_value_heads))
    if language_kind(text).fused:
        attention, mlp = {"qkv_proj": (hidden, width + 2 * keys)}, {"gate_up_proj": (hidden, 2 * inner)}
    else:
        attention = {"q_proj": (hidden, width), "k_proj": (hidden, keys), "v_proj": (hidden, keys)}
        mlp = {"gate_proj": (hidden, inner), "up_proj": (hidden, inner)}
    attention["o_proj"], mlp["down_proj"] = (width, hidden), (inner, hidden)
    named = {f"self_attn.{name}": sides for name, sides in attention.items()}
    return named | {f"mlp.{name}": sides for name, sides in mlp.items()}


def adapted_matrices(text: PretrainedConfig, lora: Lora | None) -> list[tuple[int, int]]:
    """Inputs and outputs of the matrices of a decoder layer that have adapters, taking all layers for alike."""
    if lora is None:
        return []
    patterns = [re.sub(r"layers\.\d+", "layers.*", f"{t}.*" if t == "llm" else t) for t in lora.targets]
    named = decoder_matrices(text).items()
    return [sides for name, sides in named if any(fnmatchcase(f"llm.layers.0.{name}", p) for p in patterns)]


def decoder_adapters(text: PretrainedConfig, lora: Lora | None) -> int:
    """Weights of a decoder layer's adapters."""
    return sum(lora.r * (inputs + outputs) for inputs, outputs in adapted_matrices(text, lora))


def encoder_weights(vision: PretrainedConfig) -> tuple[int, int]:
    """Of a vision layer: weights of its matrices, and those of the last one."""
    last = vision.hidden_size * vision.intermediate_size
    return 4 * vision.hidden_size**2 + 2 * last, last


def tile_tokens(vision: PretrainedConfig) -> tuple[int, int]:
    """Patches of a tile and the tokens that the tower makes of it: 576 and 577 for CLIP-L/336 (CLS), 729 twice."""
    patches = (vision.image_size // vision.patch_size) ** 2
    return patches, patches + tower_kind(vision).has_cls


def cost_model(config: PretrainedConfig, rates: Rates, checkpointing: Checkpointing = "none") -> CostModel:
    """What `deal` balances, for the model at hand. The head is left out: targets are not known before reading."""
    flops = flops_model(config, rates, checkpointing)
    return CostModel(*(round(sum(work)) for work in (flops.per_token, flops.per_square, flops.per_tile)))
