"""The model that lmms-eval asks: its `llava_hf`, in batches, and with an error where that would answer with nothing."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from jinja2 import TemplateError
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.api.registry import register_model
from lmms_eval.models.simple.llava_hf import LlavaHf
from PIL import Image

from evaluation.answers import Answers
from evaluation.engines import Engine
from llava_next.anyres import to_rgb
from llava_next.model.folders.check import ModelFolder
from llava_next.tokenise import IMAGE_TOKEN

CHAT = "llava_next_chat"  # column of a task's documents: the chat to render, as JSON, in place of context and pictures
MOST_TOKENS = 1024  # of an answer where the task says nothing, as in llava_hf


class SampleError(Exception):
    """A sample that the model could not answer; the message names it."""


@dataclass
class Asked:
    """One request, made ready.

    Attributes:
        prompt: rendered; most: tokens of the answer; length: tokens of the prompt, about.
    """

    place: int
    key: str
    prompt: str
    most: int
    length: int


@register_model("llava_next_trainer")
class LlavaNext(LlavaHf):
    """Answers in batches of like length, padded on the left; scores choices one by one as `llava_hf` does.

    Args:
        engine: of the model folder.
        answers: found there instead of asked, and put there.
        folder: with its config and AnyRes.
    """

    def __init__(
        self, engine: Engine, accelerator: Accelerator, answers: Answers, folder: ModelFolder, batch_size: int
    ):
        lmms.__init__(self)  # llava_hf's own loads a model
        self.engine, self.accelerator, self.answers, self.folder = engine, accelerator, answers, folder
        self.batch_size_per_gpu, self._device = batch_size, accelerator.device
        self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        self._image_processor, self._tokenizer = engine.processor, engine.processor.tokenizer
        self.chat_template = None

    @property
    def model(self):
        return self.engine.model

    @property
    def config(self):
        return self.folder.config

    def generate_until(self, requests: list[Instance]) -> list[str]:
        asked = [self._prepare(place, request) for place, request in enumerate(requests)]
        new = [one for one in asked if one.key not in self.answers.known]
        if new and len(new) < len(asked) and self.rank == 0:
            print(f"{len(asked) - len(new)} of {len(asked)} answers are there already", file=sys.stderr)
        done, started = 0, time.monotonic()
        for batch in self._batches(new):
            self.answers.add(self._ask(batch, requests))
            done += len(batch)
            if self.rank == 0:
                left = (time.monotonic() - started) / done * (len(new) - done)
                print(f"asked {done}/{len(new)}, about {left:.0f} s left", file=sys.stderr, flush=True)
        return [self.answers.known[one.key] for one in asked]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        scored = []
        for request in requests:
            try:
                scored += super().loglikelihood([request])
            except Exception as error:
                raise SampleError(_about(request, error)) from error
        return scored

    def _batches(self, asked: list[Asked]) -> Iterator[list[Asked]]:
        """Of requests for the same number of tokens, the longest first: what memory cannot hold is known at once."""
        left = sorted(asked, key=lambda one: (one.most, -one.length, one.place))
        while left:
            fitting = [one for one in left[: self.batch_size_per_gpu] if one.most == left[0].most]
            yield fitting
            left = left[len(fitting) :]

    def _ask(self, batch: list[Asked], requests: list[Instance]) -> dict[str, str]:
        """Answers by their keys. Raises SampleError."""
        try:
            pictures = [self._pictures(requests[one.place]) for one in batch]
            found = self.engine.answer([one.prompt for one in batch], pictures, batch[0].most)
        except Exception as error:
            if len(batch) == 1:
                raise SampleError(_about(requests[batch[0].place], error)) from error
            print(f"a batch of {len(batch)} could not be asked ({type(error).__name__}): one by one", file=sys.stderr)
            torch.cuda.empty_cache()
            found = [answer for one in batch for answer in self._ask([one], requests).values()]
        return {one.key: answer for one, answer in zip(batch, found, strict=True)}

    def _prepare(self, place: int, request: Instance) -> Asked:
        """Raises SampleError."""
        context, options, *_, task, _ = request.args
        try:
            pictures = self._pictures(request)
            prompt = self._prompt(context, len(pictures), self._document(request))
        except (ValueError, TemplateError, OSError) as error:
            raise SampleError(_about(request, error)) from error
        most = int(options.get("max_new_tokens", MOST_TOKENS))
        length = len(self.tok_encode(prompt)) + sum(
            self.folder.anyres.num_tokens(*picture.size) for picture in pictures
        )
        return Asked(place, self.answers.key(task, prompt, pictures, most), prompt, most, length)

    def _document(self, request: Instance) -> dict:
        *_, number, task, split = request.args
        return self.task_dict[task][split][number]

    def _pictures(self, request: Instance) -> list[Image.Image]:
        """As 8-bit RGB, as in training. Raises ValueError: a video or a sound."""
        to_visual = request.args[2]
        visuals = (to_visual(self._document(request)) if to_visual else None) or []
        if strange := [type(visual).__name__ for visual in visuals if not isinstance(visual, Image.Image)]:
            raise ValueError(f"it shows a {strange[0]}, this model takes pictures only")
        return [to_rgb(visual) for visual in visuals]

    def _prompt(self, context: str, count: int, document: dict) -> str:
        """Rendered by the saved chat template; pictures that a context does not place come first, as in `llava_hf`.

        Raises:
            ValueError: another number of placeholders than of pictures.
        """
        if CHAT in document:
            messages = json.loads(document[CHAT])
        else:
            if count and IMAGE_TOKEN not in context:
                context = f"{' '.join([IMAGE_TOKEN] * count)}\n{context}"
            messages = [{"role": "user", "content": context}]
        prompt = self.engine.processor.apply_chat_template(messages, add_generation_prompt=True)
        if prompt.count(IMAGE_TOKEN) != count:
            raise ValueError(f"its prompt shows {prompt.count(IMAGE_TOKEN)} of {count} pictures")
        return prompt


def _about(request: Instance, error: Exception) -> str:
    """An error with the task and the sample that it came from."""
    *_, number, task, split = request.args
    said = " ".join(str(error).split()) or type(error).__name__
    return f"{task}, sample {number} of {split}: {type(error).__name__}: {said}"
