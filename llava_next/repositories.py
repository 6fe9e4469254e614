"""Checkpoints by name: local folders, and repositories of the Hugging Face hub through its cache.

What is in the cache needs no network, whether HF_HUB_OFFLINE is set or there is none.
"""

import re
from pathlib import Path
from typing import Literal

from llava_next.paths import local_path

# config, tokenizer, processor, templates and indexes of weights; the README for the licence that it states
BESIDE = ("*.json", "*.model", "*.jinja", "merges.txt", "README.md")
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")  # the first that there are


def resolve_folder(name: str, need: Literal["config", "tokenizer", "weights"] = "weights") -> Path:
    """A local folder, or the local copy of a hub repository.

    Args:
        need: of a repository fetch `config.json` alone, all but the weights, or the weights too.

    Raises:
        ValueError: neither a folder nor a repository that is in the cache or can be reached; says what to fetch.
    """
    folder = local_path(name)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise ValueError(f"{name} is neither a folder nor a hub repository (owner/name): give one of them")
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        if need == "config":
            return Path(hf_hub_download(name, "config.json")).parent
        folder = Path(snapshot_download(name, allow_patterns=[*BESIDE, *WEIGHTS[: need == "weights"]]))
        if need == "weights" and not any(folder.glob(WEIGHTS[0])):
            folder = Path(snapshot_download(name, allow_patterns=WEIGHTS[1]))
    except Exception as error:  # whatever the network, the hub or a full disk make of it
        # without network: what is here may lack a file of the repository that nobody needs
        if (found := getattr(error, "snapshot_path", None)) is None:
            raise ValueError(f"{name} is not a local folder, and {_why_not_fetched(name, error)}") from error
        folder = Path(found)
    if need == "weights" and not any(found for pattern in WEIGHTS for found in folder.glob(pattern)):
        raise ValueError(f"{name}: its weights are not in the hub's cache ({folder}): {how_to_fetch(name)}")
    return folder


def _why_not_fetched(name: str, error: Exception) -> str:
    """What went wrong, and what helps."""
    from huggingface_hub.constants import HF_HUB_CACHE, is_offline_mode

    if is_offline_mode():
        return f"not in the hub's cache ({HF_HUB_CACHE}), and HF_HUB_OFFLINE is set: {how_to_fetch(name)}"
    said = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return f"could not be fetched from the hub: {said[:300]}. Check name and network, HF_TOKEN for a gated one"


def how_to_fetch(name: str) -> str:
    """What a person can do about a repository that is not here, or not all of it."""
    return (
        f"where there is a network, run `hf download {name}` (HF_TOKEN set for a gated one), and copy its cache "
        "(HF_HOME) here if that is elsewhere"
    )


def hub_name(folder: Path) -> str:
    """`ORG/NAME` of a repository in the hub's cache; empty for another folder."""
    found = re.search(r"/models--(.+?)--([^/]+)/snapshots/", f"{folder.absolute()}/")
    return f"{found[1]}/{found[2]}" if found else ""


def cure(folder: Path) -> str:
    """How a checkpoint folder that lacks files gets them."""
    name = hub_name(folder)
    return how_to_fetch(name) if name else "fetch the checkpoint again"
