"""A model for VLMEvalKit, for folders that this project has written. Stands alone: copy it wherever VLMEvalKit runs.

VLMEvalKit's own `LLaVA_Next` decodes prompt and answer together and cuts the text at a template's header, for LLaMA3 at
a place where the rendered system prompt puts the question. This one cuts the ids where the prompt ends, so it holds for
every template, and keeps the folder's dtype and the pixels of training. Questions are put as `LLaVA_Next` puts them.

    import vlmevalkit                                              # this file
    vlmevalkit.register("my-llava", "runs/finetune/model")         # then: run.py --model my-llava --data MMBench_DEV_EN

in VLMEvalKit's `run.py`, before its `main()`.
"""

from __future__ import annotations

from functools import partial

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from vlmeval.vlm import LLaVA_Next


class LlavaNextFolder(LLaVA_Next):
    """Greedy answers of a model folder, through its own chat template.

    Args:
        model_path: model folder.
        device: None: a GPU if there is one.
    """

    def __init__(self, model_path: str, max_new_tokens: int = 512, device: str | None = None):
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model_path, self.max_new_tokens = str(model_path), max_new_tokens
        self.processor = AutoProcessor.from_pretrained(model_path, backend="pil")
        self.model = AutoModelForImageTextToText.from_pretrained(model_path, dtype="auto").to(device).eval()

    @torch.inference_mode()
    def generate_inner(self, message: list[dict], dataset: str | None = None) -> str:
        """The answer to one message: parts with `type` text or image and `value`, a text or a file."""
        content, pictures = [], []
        for part in message:
            if part["type"] == "text":
                content.append({"type": "text", "text": part["value"]})
            else:
                content.append({"type": "image"})
                with Image.open(part["value"]) as picture:
                    pictures.append(picture.convert("RGB"))
        prompt = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = self.processor(text=prompt, images=pictures or None, return_tensors="pt")
        inputs = inputs.to(self.model.device, self.model.dtype)
        output = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        answer = output[0, inputs["input_ids"].shape[1] :]
        return self.processor.decode(answer, skip_special_tokens=True).strip()


def register(name: str, folder: str, **options) -> None:
    """Makes a folder known to VLMEvalKit under a name."""
    from vlmeval.config import supported_VLM

    supported_VLM[name] = partial(LlavaNextFolder, model_path=folder, **options)
