"""A LLaVA-NeXT (LLaVA-1.6) trainer on Accelerate and FSDP2. README.md beside this file is its tour."""

__version__ = "0.1.0"

__all__ = ["LlavaNextForConditionalGeneration", "__version__"]


def __getattr__(name: str):
    # The data tools import this package in every worker process and never need the model: torch stays unloaded there.
    if name == "LlavaNextForConditionalGeneration":
        from llava_next.model.forward.modeling import LlavaNextForConditionalGeneration

        return LlavaNextForConditionalGeneration
    raise AttributeError(f"module 'llava_next' has no attribute {name!r}")
