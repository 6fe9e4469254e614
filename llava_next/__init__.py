"""A LLaVA-NeXT (LLaVA-1.6) trainer on Accelerate and FSDP2. README.md beside this file is its tour."""

import logging

__version__ = "0.1.0"

__all__ = ["LlavaNextForConditionalGeneration", "__version__"]

# Where torchao is installed transformers imports it, and torch 2.13 tells torchao's authors of it, in every process.
logging.getLogger("torch.utils._pytree").addFilter(
    lambda record: "register_constant() on Enum subclasses is deprecated" not in record.getMessage()
)


def __getattr__(name: str):
    # The data tools import this package in every worker process and never need the model: torch stays unloaded there.
    if name == "LlavaNextForConditionalGeneration":
        from llava_next.model.forward.modeling import LlavaNextForConditionalGeneration

        return LlavaNextForConditionalGeneration
    raise AttributeError(f"module 'llava_next' has no attribute {name!r}")
