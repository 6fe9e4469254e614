"""Loads adapters on their bases with whatever transformers and peft run it, stock classes only.

Usage: load_adapter.py OUT_FILE FOLDER..., each with `adapter/`, the merged `model/` and `inputs.pt`. Writes a list of
what was found, as JSON. Must run with transformers 4.45 and later, so it imports nothing of this project.
"""

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import LlavaNextForConditionalGeneration


def among(tensor: torch.Tensor, others: list[torch.Tensor]) -> bool:
    return any(other.shape == tensor.shape and torch.equal(other, tensor) for other in others)


@torch.no_grad()
def found_of(folder: Path) -> dict:
    base = json.loads((folder / "adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    stock, info = LlavaNextForConditionalGeneration.from_pretrained(base, output_loading_info=True)
    merged = LlavaNextForConditionalGeneration.from_pretrained(folder / "model").eval()
    plain = [n for n, _ in stock.named_parameters() if "embed_tokens" in n or "newline" in n]
    same = all(torch.equal(stock.get_parameter(n), merged.get_parameter(n)) for n in plain)
    model = PeftModel.from_pretrained(stock, str(folder / "adapter")).eval()
    filled = [p for name, p in model.named_parameters() if ".lora_" in name]
    with safe_open(folder / "adapter/adapter_model.safetensors", "pt") as file:
        tensors = [file.get_tensor(key) for key in file.keys()]  # noqa: SIM118 - not a dict
    inputs = torch.load(folder / "inputs.pt")
    ours, theirs = model(**inputs).logits, merged(**inputs).logits
    with model.disable_adapter():
        off = model(**inputs).logits
    return {
        "lost": [key for key, names in info.items() if names],
        "base": same,
        "placed": all(among(tensor, filled) for tensor in tensors) and all(among(p, tensors) for p in filled),
        "differs": (ours - theirs).abs().max().item(),
        "off": (ours - off).abs().max().item(),
    }


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps([found_of(Path(folder)) for folder in sys.argv[2:]]))
