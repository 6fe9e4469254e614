"""A row for every kind of language model beside the published pairings: what its tests take for one."""

import os

from transformers import LlavaNextConfig

from llava_next.model.folders.dry import architecture
from support.tiny import pairing_config

CLIP, SIGLIP = "openai/clip-vit-large-patch14-336", "google/siglip-so400m-patch14-384"
# name -> (published model, tower, changes that let tiny samples feel what is special about it)
KINDS = {
    "llama3.1": ("meta-llama/Llama-3.1-8B-Instruct", CLIP, {}),
    "llama3.2": ("meta-llama/Llama-3.2-1B-Instruct", SIGLIP, {}),
    "mistral_v0.1": ("mistralai/Mistral-7B-Instruct-v0.3", CLIP, {"sliding_window": 24}),
    "nemo": ("mistralai/Mistral-Nemo-Instruct-2407", CLIP, {}),
    "qwen3": ("Qwen/Qwen3-8B", SIGLIP, {}),
    "smollm2": ("HuggingFaceTB/SmolLM2-1.7B-Instruct", SIGLIP, {}),
    "smollm3": ("HuggingFaceTB/SmolLM3-3B", CLIP, {}),
    "olmo2": ("allenai/OLMo-2-1124-7B-Instruct", CLIP, {}),
    "olmo3": ("allenai/Olmo-3-7B-Instruct", SIGLIP, {"sliding_window": 24}),
    "phi4_mini": ("microsoft/Phi-4-mini-instruct", SIGLIP, {"original_max_position_embeddings": 100}),
    "gemma3": ("google/gemma-3-1b-it", SIGLIP, {"sliding_window": 24}),
}
# what takes longer is tried with one row, or with all on request
ON_REQUEST = tuple(KINDS) if os.environ.get("LLAVA_NEXT_ALL_KINDS") else ("gemma3",)
# of these, one for each thing that the forward or the forecast must know of
DISTINCT = ("nemo", "qwen3", "smollm3", "olmo2", "phi4_mini", "gemma3")


def kind_config(name: str, **changes) -> LlavaNextConfig:
    """The whole model of a row at scale `tiny`, tied as published."""
    llm, tower, own = KINDS[name]
    return pairing_config(tower, llm, architecture(llm).tie_word_embeddings, **own | changes)
