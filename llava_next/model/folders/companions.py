"""The files of a model folder beside weights and config.json: tokenizer, processor, chat template, generation config.

Written so that transformers 4.45 to 5.x, vLLM and evaluation kits read them alike.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from transformers import LlavaNextConfig, PreTrainedTokenizerBase

from llava_next.model.forward.kinds import tower_kind
from llava_next.templates import IMAGE_TOKEN

# Everything beside weights and config that belongs to a model folder; copied from the folder training started with.
COMPANION_FILES = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "tokenizer.model", "vocab.json", "merges.txt"),
    *("processor_config.json", "preprocessor_config.json", "chat_template.jinja", "chat_template.json"),
)


def write_companions(
    config: LlavaNextConfig, tokenizer: PreTrainedTokenizerBase, chat_template: str, out: Path
) -> None:
    """Writes tokenizer, processor, chat template and generation config so that transformers 4.45 to 5.x read them."""

    def write_json(name: str, value: dict) -> None:
        (out / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    tokenizer.save_pretrained(out)
    tokenizer_config = json.loads((out / "tokenizer_config.json").read_text())
    write_json("tokenizer_config.json", portable_tokenizer_config(tokenizer_config, chat_template))
    (out / "chat_template.jinja").write_text(chat_template)
    write_json("chat_template.json", {"chat_template": chat_template})
    write_json("preprocessor_config.json", image_processor_config(config))
    write_json("processor_config.json", processor_config(config))
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json("generation_config.json", {"do_sample": False, **ids})


def portable_tokenizer_config(written: dict, chat_template: str) -> dict:
    """tokenizer_config.json as transformers 5 writes it, in the words that 4.45 and later understand alike."""
    config = {key: value for key, value in written.items() if key not in ("backend", "is_local", "local_files_only")}
    # 4.49 to 4.57 take the new name for a mapping and fail on a list; 5.x knows both names
    extra = config.pop("extra_special_tokens", None)
    if isinstance(extra, list):
        config["additional_special_tokens"] = extra
    return config | {
        "tokenizer_class": "PreTrainedTokenizerFast",  # transformers 5 writes a name that 4.x refuses
        "processor_class": "LlavaNextProcessor",
        "chat_template": chat_template,
        # the class's own names in 4.x include token_type_ids, which no model here takes
        "model_input_names": ["input_ids", "attention_mask"],
        # True in 4.x where nothing is said: " ," is then decoded as ","
        "clean_up_tokenization_spaces": False,
    }


def processor_config(config: LlavaNextConfig) -> dict:
    """processor_config.json: how many image tokens a picture is."""
    return {
        "processor_class": "LlavaNextProcessor",
        "image_token": IMAGE_TOKEN,
        "patch_size": config.vision_config.patch_size,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "num_additional_image_tokens": int(config.vision_feature_select_strategy == "default"),
    }


def image_processor_config(config: LlavaNextConfig) -> dict:
    """preprocessor_config.json: the tower's size and normalisation, and the model's pinpoints."""
    size = config.vision_config.image_size
    kind = tower_kind(config.vision_config)
    return {
        "image_processor_type": "LlavaNextImageProcessor",
        "processor_class": "LlavaNextProcessor",
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
        "image_grid_pinpoints": [list(pair) for pair in config.image_grid_pinpoints],
        "image_mean": list(kind.mean),
        "image_std": list(kind.std),
        "resample": 3,
        "rescale_factor": 1 / 255,
        "do_resize": True,
        "do_center_crop": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_pad": True,
        "do_convert_rgb": True,
    }


def copy_companions(source: str | Path, folder: Path) -> None:
    """Copies tokenizer, processor, template and generation files from one model folder to another."""
    for name in COMPANION_FILES:
        path = Path(source) / name
        if path.exists():
            shutil.copyfile(path, folder / name)
