"""Loads model folders with whatever transformers runs it, stock classes only, and writes down what came out.

Usage: load_export.py OUT_FOLDER MODEL_FOLDER...
For each model folder NAME: `OUT/NAME.json` (loading report, ids, texts, configuration) and `OUT/NAME.pt` (logits,
pixels). Must run with transformers 4.45 and later, so it imports nothing of this project.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, LlavaNextForConditionalGeneration

# (width, height) of the pictures. Their padding is even: with an odd one, the processor of 4.49 and before pads one row
# or column too few and stretches the last tiles.
SIZES = ((90, 42), (42, 90), (56, 52), (28, 28))
QUESTION = "What is  written here ?\nThe number's digits , please."
SECOND = "And 2 + 2 ?"
NEW_TOKENS = 6


def auto_class():
    """The class that loads any image-text model: its name changed in 4.46."""
    name = "AutoModelForImageTextToText" if hasattr(transformers, "AutoModelForImageTextToText") else None
    return getattr(transformers, name or "AutoModelForVision2Seq")


def picture(number: int) -> Image.Image:
    width, height = SIZES[number]
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8))


def load(folder: Path):
    """Model in the dtype of the file, processor, and the names that the release could not place."""
    model, info = LlavaNextForConditionalGeneration.from_pretrained(
        folder, torch_dtype="auto", output_loading_info=True
    )
    report = {key: sorted(map(str, value)) for key, value in info.items()}
    return model.eval(), AutoProcessor.from_pretrained(folder), report


def cases(model, processor, texts: dict) -> dict:
    """Name -> inputs: a text without pictures, and one chat with each picture."""
    inputs = {"text": processor.tokenizer(texts["no_image"], return_tensors="pt")}
    # 4.45 wants a CLS token from every tower: its model code refuses the features of a SigLIP, whatever the files say
    if not (transformers.__version__.startswith("4.45.") and model.config.vision_feature_select_strategy == "full"):
        for number in range(len(SIZES)):
            with_picture = processor(images=picture(number), text=texts["list"], return_tensors="pt")
            with_picture["pixel_values"] = with_picture["pixel_values"].to(model.dtype)
            inputs[f"picture {number}"] = with_picture
    return inputs


def rope_theta(config) -> float:
    """The base that the rotary embedding of this release uses."""
    parameters = getattr(config, "rope_parameters", None) or {}
    parameters = parameters.get("full_attention", parameters)
    return parameters["rope_theta"] if transformers.__version__ >= "5" else config.rope_theta


def inspect(folder: Path, out: Path) -> None:
    model, processor, report = load(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    parts = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    history = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "text", "text": "Some 42."}]},
        {"role": "user", "content": [{"type": "text", "text": SECOND}]},
    ]
    strings = [{"role": "user", "content": f"<image>\n{QUESTION}"}]
    texts = {
        "list": processor.apply_chat_template(history, add_generation_prompt=True),
        "string": tokenizer.apply_chat_template(strings, tokenize=False, add_generation_prompt=True),
        "no_image": processor.apply_chat_template(history[2:], add_generation_prompt=True),
    }
    # two prompts of different length: padding goes to the left
    batch = tokenizer([texts["list"], texts["no_image"]], padding=True)
    result = {
        "version": transformers.__version__,
        "loading": report,
        "dtype": str(model.dtype),
        "auto_class": type(auto_class().from_pretrained(folder)).__name__,
        "texts": texts,
        "rope_theta": rope_theta(model.config.text_config),
        "generation_eos": model.generation_config.eos_token_id,
        "special": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
        "batch_ids": batch["input_ids"],
        "roundtrip": tokenizer.decode(tokenizer(QUESTION)["input_ids"], skip_special_tokens=True),
        "ids": {},
        "greedy": {},
        "answers": {},
    }
    tensors = {}
    for name, inputs in cases(model, processor, texts).items():
        with torch.no_grad():
            # of every position, one logit in 61: all of a 150,000-word vocabulary would fill the disk
            tensors[f"logits, {name}"] = model(**inputs).logits[..., ::61].float()
            output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :]
        if "pixel_values" in inputs:
            tensors[f"pixels, {name}"] = inputs["pixel_values"].float()
        result["ids"][name] = inputs["input_ids"][0].tolist()
        result["greedy"][name] = new.tolist()
        result["answers"][name] = processor.decode(new, skip_special_tokens=True)
    torch.save(tensors, out / f"{folder.name}.pt")
    (out / f"{folder.name}.json").write_text(json.dumps(result, indent=1))


def main(out: str, *folders: str) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    Path(out).mkdir(parents=True, exist_ok=True)
    for folder in folders:
        inspect(Path(folder), Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
