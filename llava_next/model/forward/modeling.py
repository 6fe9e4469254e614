"""LLaVA-NeXT with a packed forward.

`LlavaNextForConditionalGeneration` is transformers' class with the same parameters, keys and config. It adds one
forward path: a flat sequence of segments (fields: `llava_next.data.loading.batch.PackedBatch`) in which image features
are placed by precomputed indices, attention runs by segment, and the head sees supervised positions only.
Called without the packed fields it is the stock model.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import LlavaNextForConditionalGeneration as StockLlavaNext
from transformers.utils import ModelOutput

from llava_next.model.forward.attention import SEGMENT_ATTENTION, SEGMENT_NAMES
from llava_next.model.forward.head import LossHead
from llava_next.model.forward.kinds import rotary_parameters, rotary_types, tower_kind


@dataclass
class PackedOutput(ModelOutput):
    """What the packed forward returns.

    Args:
        loss: float32 scalar, sum over targets of weight * negative log-likelihood. Not divided by anything.
        source_loss: float32 `[num_sources]`, unweighted negative log-likelihood summed by source, without gradient.
        source_tokens: float32 `[num_sources]`, number of targets with a weight above 0 by source.
    """

    loss: torch.Tensor | None = None
    source_loss: torch.Tensor | None = None
    source_tokens: torch.Tensor | None = None


class LlavaNextForConditionalGeneration(StockLlavaNext):
    """transformers' LLaVA-NeXT plus the packed forward. Same parameters, keys, config and `architectures` name."""

    def __init__(self, config):
        super().__init__(config)
        # Same weight, same key, another forward: the loss must be computed inside the head (see head.py).
        self.lm_head.__class__ = LossHead

    @classmethod
    def is_custom_code(cls) -> bool:
        # transformers skips its key conversion for classes defined outside of it; a published checkpoint would then
        # load with a random lm_head.
        return False

    @classmethod
    def from_pretrained(cls, path, *args, **kwargs):
        """Like transformers', with segment attention in the language model and SDPA in the vision tower by default."""
        kwargs.setdefault("attn_implementation", {"text_config": SEGMENT_ATTENTION, "vision_config": "sdpa"})
        return super().from_pretrained(path, *args, **kwargs)

    def forward(self, input_ids=None, cu_seqlens: torch.Tensor | None = None, **kwargs):
        """The packed forward when `cu_seqlens` is given, transformers' forward otherwise.

        The packed fields are those of `llava_next.data.loading.batch.PackedBatch`; see `packed_forward`.
        """
        if cu_seqlens is None:
            return super().forward(input_ids=input_ids, **kwargs)
        return self.packed_forward(input_ids, cu_seqlens, **kwargs)

    def packed_forward(
        self,
        input_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        position_ids: torch.Tensor,
        max_seqlen: int,
        tiles: torch.Tensor,
        feature_index: torch.Tensor,
        image_positions: torch.Tensor,
        target_positions: torch.Tensor,
        target_ids: torch.Tensor,
        target_weights: torch.Tensor,
        target_source: torch.Tensor,
        token_keys: torch.Tensor | None = None,
        tile_keys: torch.Tensor | None = None,
        num_sources: int = 1,
    ) -> PackedOutput:
        """Loss of a packed micro-batch of T tokens, N tiles, M image positions, K targets and G segments.

        Args:
            input_ids: int64 `[T]`; `position_ids` int64 `[T]`, restarting in each segment.
            cu_seqlens: int32 `[G+1]`; `max_seqlen` the longest segment (Python int).
            tiles: uint8 `[N, S, S, 3]`, N >= 1 (a batch without images carries one zero tile).
            feature_index: int64 `[M]` into the rows [newline, tile 0 patch 0, ...]; `image_positions` int64 `[M]`.
            target_positions, target_ids: int64 `[K]`, K >= 1; `target_weights` float32 `[K]`; `target_source` `[K]`.
            token_keys, tile_keys: int32 `[T]` and `[N]`, for the dropout of adapters (see lora.py).

        Returns:
            `PackedOutput`; nothing in it has been read back from the device.
        """
        if hasattr(self, "dropout_keys"):
            self.dropout_keys.tokens, self.dropout_keys.tiles = token_keys, tile_keys
        embeds = self.model.language_model.embed_tokens(input_ids)
        features = self.image_features(tiles)
        # With no image position this is a gather and a copy of nothing: tower and projector stay in the graph with
        # zero gradients, so every rank runs the same collectives (FSDP2 would hang otherwise).
        embeds = embeds.index_copy(0, image_positions, features.index_select(0, feature_index).to(embeds.dtype))
        hidden = self.decode_segments(embeds, position_ids, cu_seqlens, max_seqlen)
        nll = self.lm_head(hidden.index_select(0, target_positions), target_ids)
        source_loss, source_tokens = torch.zeros(2, num_sources, dtype=torch.float32, device=nll.device)
        counted = (target_weights > 0).float()
        return PackedOutput(
            loss=(nll * target_weights).sum(),
            source_loss=source_loss.index_add(0, target_source, nll.detach() * counted),
            source_tokens=source_tokens.index_add(0, target_source, counted),
        )

    def image_features(self, tiles: torch.Tensor) -> torch.Tensor:
        """Rows that `feature_index` points into.

        Args:
            tiles: uint8 `[N, S, S, 3]`.

        Returns:
            `[1 + N * patches, hidden_size]`: the newline embedding, then every tile's patches row by row.
        """
        kind, tower = tower_kind(self.config.vision_config), self.vision_tower
        frozen = not any(p.requires_grad for p in tower.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            patches = run_tower(tower, normalise(tiles, kind.mean, kind.std), self.config.vision_feature_layer)
            if self.config.vision_feature_select_strategy == "default":
                patches = patches[:, 1:]
        patches = self.model.multi_modal_projector(patches)
        newline = self.model.image_newline.to(patches.dtype)
        return torch.cat([newline[None], patches.flatten(0, 1)])

    @property
    def vision_tower(self) -> nn.Module:
        """The module that holds embeddings and encoder, wherever this transformers release keeps it."""
        tower = self.model.vision_tower
        return getattr(tower, "vision_model", tower)

    def decode_segments(
        self, embeds: torch.Tensor, position_ids: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int
    ) -> torch.Tensor:
        """Runs the language model's layers over a flat sequence.

        The layers are called one by one because the stock loop builds a T x T mask first, which segment attention
        does not need.

        Args:
            embeds: `[T, hidden_size]`; the other arguments as in `packed_forward`.

        Returns:
            Final hidden states `[T, hidden_size]`.
        """
        llm = self.model.language_model
        if llm.config._attn_implementation not in SEGMENT_NAMES:
            # any other attention would let packed samples see each other, without an error
            raise ValueError(
                f"the packed forward needs segment attention, the language model has "
                f"{llm.config._attn_implementation!r}; load it with from_pretrained, or call "
                "set_attn_implementation(attention_names('sdpa'))"
            )
        hidden = embeds[None]
        position_ids = position_ids[None]
        rotary = rotary_embeddings(llm, hidden, position_ids, cu_seqlens)
        for layer, kind in zip(llm.layers, rotary_types(llm.config), strict=True):
            hidden = layer(
                hidden,
                attention_mask=None,
                position_ids=position_ids,
                position_embeddings=rotary[kind],
                use_cache=False,
                cu_seq_lens_q=cu_seqlens,
                cu_seq_lens_k=cu_seqlens,
                max_length_q=max_seqlen,
                max_length_k=max_seqlen,
            )
        return llm.norm(hidden)[0]


def rotary_embeddings(
    llm: nn.Module, hidden: torch.Tensor, position_ids: torch.Tensor, cu_seqlens: torch.Tensor
) -> dict[str | None, tuple[torch.Tensor, torch.Tensor]]:
    """Cosine and sine `[1, T, rotary_dim]` of every token, by type of layer (see `rotary_parameters`).

    Longrope has other frequencies for samples longer than the model was first trained with. Stock transformers asks the
    longest sample of a batch; here every segment has those that it has alone.
    """
    found = {}
    for kind, parameters in rotary_parameters(llm.config).items():
        of_kind = () if kind is None else (kind,)
        found[kind] = llm.rotary_emb(hidden, position_ids, *of_kind)
        if parameters["rope_type"] == "longrope":
            lengths = cu_seqlens.diff()
            is_long = lengths > parameters["original_max_position_embeddings"]
            is_long = torch.repeat_interleave(is_long, lengths, output_size=hidden.shape[1])[None]
            short = llm.rotary_emb(hidden, position_ids * ~is_long, *of_kind)
            found[kind] = tuple(torch.where(is_long[..., None], *both) for both in zip(found[kind], short, strict=True))
    return found


def normalise(tiles: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """uint8 `[N, S, S, 3]` to float32 `[N, 3, S, S]`, scaled to 0..1 and normalised per channel."""
    # Python scalars instead of tensors: nothing is copied to the device.
    channels = [(tiles[..., c].float() / 255.0 - m) / s for c, (m, s) in enumerate(zip(mean, std, strict=True))]
    return torch.stack(channels, dim=1)


def run_tower(tower: nn.Module, pixels: torch.Tensor, feature_layer: int) -> torch.Tensor:
    """Hidden states of one layer, without computing the layers after it.

    Args:
        tower: a CLIP or SigLIP vision transformer.
        pixels: float `[N, 3, S, S]`.
        feature_layer: as in the config; -2 is the output of the last layer but one.

    Returns:
        `[N, tokens, vision_hidden_size]`, the CLS token included where the tower has one.
    """
    layers = tower.encoder.layers
    hidden = tower.embeddings(pixels)
    if hasattr(tower, "pre_layrnorm"):
        hidden = tower.pre_layrnorm(hidden)
    for layer in layers[: used_layers(len(layers), feature_layer)]:
        hidden = layer(hidden, attention_mask=None)
    return hidden


def used_layers(num_layers: int, feature_layer: int) -> int:
    """How many encoder layers run before the features are taken: 23 of 24 for CLIP-L with layer -2.

    `hidden_states` has `num_layers + 1` entries, the first being the embeddings.

    Raises:
        ValueError: no such layer, or a list of layers.
    """
    if not isinstance(feature_layer, int):
        raise ValueError(f"vision_feature_layer {feature_layer}: features of several layers are not supported; use one")
    used = feature_layer if feature_layer >= 0 else num_layers + 1 + feature_layer
    if not 0 <= used <= num_layers:
        raise ValueError(f"vision_feature_layer {feature_layer} does not exist in a tower of {num_layers} layers")
    return used


def unused_parameters(model: LlavaNextForConditionalGeneration) -> set[str]:
    """Names of parameters that no forward ever reads: they stay frozen, out of the optimizer, and in the file.

    These are the vision layers after the feature layer, the tower's final norm and SigLIP's pooling head.
    """
    tower = model.vision_tower
    layers = tower.encoder.layers
    dead = list(layers[used_layers(len(layers), model.config.vision_feature_layer) :])
    dead += [getattr(tower, name) for name in ("post_layernorm", "head") if hasattr(tower, name)]
    dead_ids = {id(p) for module in dead for p in module.parameters()}
    return {name for name, p in model.named_parameters() if id(p) in dead_ids}
