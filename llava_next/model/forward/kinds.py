"""What must be known of a kind of vision tower or language model: one entry each, by transformers' `model_type`.

The packed forward calls the stock layers of any language model that stock LLaVA-NeXT takes. What differs between kinds
lies in their configs (head sizes, windows, scaled rotary embeddings, layers without one) and is read from there; what
no config says stands here. A kind without an entry is refused, and so is a config with something in it that the packed
forward, or stock LLaVA-NeXT itself, would leave out.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig

# rotary embeddings whose frequencies are set by the config, or by the length of the sample at hand (longrope)
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")
DROPOUTS = ("attention_dropout", "resid_pdrop", "embd_pdrop")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
OTHER_INPUTS = ("vision_config", "audio_config", "thinker_config")  # beside a language model of a checkpoint


@dataclass(frozen=True)
class LanguageKind:
    """A kind of decoder-only language model.

    Args:
        about: models of this kind.
        since: transformers release from which on it computes what is computed here.
        norms_before: norms of a layer whose outputs go into its matrices.
        norms_after: norms of what a block adds to the residual stream.
        head_norms: queries and keys are normalised.
        fused: one matrix makes queries, keys and values, one makes gate and up.
        norm_weight: of a norm that changes nothing.
        norm_bytes: an element of what is multiplied by a norm's weight; None: as activations.
        old_rope: keys of `rope_scaling` that releases before 5 insist on; empty: all of `rope_parameters`.
    """

    about: str
    since: str = "4.45"
    norms_before: int = 2
    norms_after: int = 0
    head_norms: bool = False
    fused: bool = False
    norm_weight: float = 1.0
    norm_bytes: int | None = None
    old_rope: tuple[str, ...] = ()


LANGUAGE_KINDS = {
    "llama": LanguageKind("Vicuna, Llama 2 to 3.2, SmolLM2"),
    "mistral": LanguageKind("Mistral 7B, Nemo"),
    "qwen2": LanguageKind("Qwen2, Qwen2.5"),
    "qwen3": LanguageKind("Qwen3", since="4.51", head_norms=True),
    "smollm3": LanguageKind("SmolLM3", since="4.53"),
    "olmo2": LanguageKind("OLMo 2", since="4.47", norms_before=0, norms_after=2, head_norms=True, norm_bytes=4),
    "olmo3": LanguageKind("OLMo 3", since="4.57", norms_before=0, norms_after=2, head_norms=True, norm_bytes=4),
    "phi3": LanguageKind(
        "Phi-4-mini", since="4.50", fused=True, old_rope=("type", "short_factor", "long_factor")
    ),
    "gemma3_text": LanguageKind(
        "Gemma 3 270M, 1B", since="4.50", norms_after=2, head_norms=True, norm_weight=0.0, norm_bytes=4
    ),
}  # fmt: skip


@dataclass(frozen=True)
class TowerKind:
    """A kind of vision tower.

    Args:
        about: models of this kind.
        has_cls: its first token is no patch; LLaVA-NeXT drops it (`vision_feature_select_strategy: default`).
        mean, std: of the tiles' normalisation, as in the processors published with them.
    """

    about: str
    has_cls: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


TOWER_KINDS = {
    "clip_vision_model": TowerKind(
        "CLIP, DFN, MetaCLIP", True, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    ),
    "siglip_vision_model": TowerKind("SigLIP, SigLIP 2 of fixed resolution", False, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
# what else may be handed over for a tower, and what it is
REFUSED_TOWERS = {
    "siglip2_vision_model": "SigLIP 2 NaFlex, whose patches lie in any shape: take one of fixed resolution, such as "
    "google/siglip2-so400m-patch14-384",
    "dinov2_with_registers": "a tower with registers, tokens that are no patches",
    "dinov3_vit": "a tower with registers, tokens that are no patches",
}


def language_kind(config: PretrainedConfig) -> LanguageKind:
    """The entry of a language model that `check_language_model` accepts."""
    return LANGUAGE_KINDS[config.model_type]


def tower_kind(config: PretrainedConfig) -> TowerKind:
    """The entry of a vision tower that `check_tower` accepts."""
    return TOWER_KINDS[config.model_type]


def check_language_model(config: PretrainedConfig, name: str) -> None:
    """Refuses a language model that would not be trained as stock LLaVA-NeXT computes it, or not as it was made.

    Args:
        config: of the language model.
        name: what the message calls it.

    Raises:
        ValueError: saying what it is, and what would be needed.
    """
    kind = config.model_type
    experts = next((number for key in EXPERTS if (number := getattr(config, key, None))), 0)
    if any(hasattr(config, key) for key in OTHER_INPUTS):
        raise ValueError(
            f"{name}: {kind!r} is a multimodal checkpoint, with a language model among its parts; save that by itself "
            f"(model.language_model, its head, its config and tokenizer) and give the folder. {_known()}"
        )
    if experts:
        raise ValueError(
            f"{name}: {kind!r} is a mixture of {experts} experts; that would need the routers' loss, and a memory and "
            f"time model of experts. Take a dense one: {_known()}"
        )
    if kind not in LANGUAGE_KINDS:
        raise ValueError(
            f"{name}: {_known()}, not {kind!r}: another kind needs an entry in llava_next/model/forward/kinds.py and "
            "tests that hold it to stock transformers"
        )
    if faults := _faults(config):
        raise ValueError(f"{name}: {kind!r} with {'; '.join(faults)}")


def _known() -> str:
    return f"language models are {', '.join(LANGUAGE_KINDS)}"


def _faults(config: PretrainedConfig) -> list[str]:
    """What is in a config of a known kind that would be left out or computed otherwise."""
    faults = [
        f"{key} {value}: dropout would differ with what is packed together; set it to 0 in config.json"
        for key in DROPOUTS
        if (value := getattr(config, key, 0))
    ]
    faults += [
        f"{key} {value}: stock LLaVA-NeXT and its attention cap nothing; only a model without soft caps can be trained"
        for key in ("final_logit_softcapping", "attn_logit_softcapping")
        if (value := getattr(config, key, None)) is not None
    ]
    if getattr(config, "use_bidirectional_attention", False):
        faults.append("use_bidirectional_attention: it embeds and does not generate; take the causal model")
    if getattr(config, "quantization_config", None):
        faults.append("quantization_config: its weights are quantised; take the checkpoint in bfloat16")
    for kind, rope in rotary_parameters(config).items():
        if rope["rope_type"] not in ROPE_TYPES:
            faults.append(
                f"rope_type {rope['rope_type']!r}{f' in its {kind} layers' if kind else ''}: its frequencies depend on "
                f"what was computed before; these do not: {', '.join(ROPE_TYPES)}"
            )
    return faults


def check_tower(config: PretrainedConfig, name: str) -> None:
    """Refuses a vision tower whose tokens are not a square of patches, behind one CLS token at most.

    Raises:
        ValueError: saying what it is, and what would be needed.
    """
    kind = config.model_type
    if kind not in TOWER_KINDS:
        towers = f"vision towers are {', '.join(TOWER_KINDS)}"
        if what := REFUSED_TOWERS.get(kind) or (getattr(config, "num_register_tokens", 0) and "a tower with registers"):
            raise ValueError(f"{name}: {kind!r} is {what}; {towers}")
        raise ValueError(f"{name}: {towers}, not {kind!r}")
    for key in ("image_size", "patch_size"):
        if not isinstance(value := getattr(config, key), int):
            raise ValueError(f"{name}: {key} is {value}: tiles and patches must be squares; a tower of one number each")
    if dropout := config.attention_dropout:
        raise ValueError(f"{name}: attention_dropout {dropout}: tiles are computed without; set it to 0 in config.json")


def rotary_parameters(config: PretrainedConfig) -> dict[str | None, dict]:
    """Type of layer -> its rotary embedding's parameters; None: all layers share one."""
    rope = config.rope_parameters
    return {None: rope} if "rope_type" in rope else {kind: rope[kind] for kind in dict.fromkeys(config.layer_types)}


def rotary_types(config: PretrainedConfig) -> list[str | None]:
    """By layer: which of `rotary_parameters` it takes."""
    return list(config.layer_types) if None not in rotary_parameters(config) else [None] * config.num_hidden_layers


def windows(config: PretrainedConfig) -> list[int | None]:
    """By layer: how many tokens, itself among them, a token attends to; None: all before it."""
    layers, window = config.num_hidden_layers, getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    return [window if kind == "sliding_attention" else None for kind in kinds]
