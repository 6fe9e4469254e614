"""One chat: questions, pictures and answers, with stock transformers only."""

from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event, Thread
from typing import NamedTuple

import torch
from PIL import Image
from transformers import BatchFeature, TextIteratorStreamer


class Prompt(NamedTuple):
    """A question with all that goes before it, as the model gets it."""

    messages: list[dict]
    pictures: list[Image.Image]
    inputs: BatchFeature

    @property
    def ids(self) -> list[int]:
        """Tokens of the prompt; a picture is a run of its placeholder's."""
        return self.inputs["input_ids"][0].tolist()


@dataclass
class Chat:
    """A conversation with a model.

    Args:
        system: system message; None: the chat template's own, empty: none.
        is_cut: the last answer has `max_new_tokens`, and no end.
    """

    model: torch.nn.Module
    processor: object
    max_new_tokens: int = 512
    temperature: float = 0.0
    system: str | None = None
    messages: list[dict] = field(default_factory=list)
    pictures: list[Image.Image] = field(default_factory=list)
    is_cut: bool = False

    def __post_init__(self):
        self.reset()
        if self.system is not None:
            self._check_system()

    def _check_system(self) -> None:
        """Raises ValueError when the model has no place for the system message."""
        if self.image_token in self.system:
            raise ValueError(f"--system: {self.image_token} stands for a picture, and none goes with it")
        try:
            self.processor.apply_chat_template([*self.messages, {"role": "user", "content": "?"}])
        except Exception as error:
            raise ValueError(f"--system: the model's chat template does not take it: {one_line(error)}") from error

    def reset(self) -> None:
        """Forgets everything but the system message."""
        self.messages, self.pictures = [], []
        if self.system is not None:
            self.messages.append({"role": "system", "content": [{"type": "text", "text": self.system}]})

    def ask(self, question: str, pictures: list[Image.Image], show=print) -> str:
        """The answer to a question, which both become part of the conversation. Ctrl-C ends the answer, not the chat.

        Args:
            question: may have an `<image>` where each picture stands; without any, the pictures come first.
            pictures: shown with this question.
            show: called with each piece of the answer as it is generated.

        Raises:
            ValueError: it cannot be asked like this; the conversation is as before.
            RuntimeError: processor or model failed; the conversation is as before.
        """
        return self.answer(self.prompt(question, pictures), show)

    def prompt(self, question: str, pictures: list[Image.Image]) -> Prompt:
        """What `ask` would ask. Raises as that does."""
        messages = [*self.messages, {"role": "user", "content": self._parts(question, len(pictures))}]
        seen = [*self.pictures, *pictures]
        return Prompt(messages, seen, self._inputs(messages, seen))

    def answer(self, prompt: Prompt, show=print, stop: Event | None = None) -> str:
        """The answer to a prompt, as `ask` gives it; ends early once `stop` is set. Raises RuntimeError."""
        answer, self.is_cut = "", False
        try:
            for piece in self._generate(prompt.inputs, stop or Event()):
                answer += piece
                show(piece)
        except KeyboardInterrupt:
            show(" (stopped)")
        if answer.strip():
            self.messages = [*prompt.messages, self._said(answer)]
            self.pictures = prompt.pictures
        return answer.strip()

    def recall(self, question: str, pictures: list[Image.Image], answer: str) -> None:
        """Puts a question and its answer of before behind the conversation. Raises ValueError as `ask` does."""
        asked = {"role": "user", "content": self._parts(question, len(pictures))}
        self.messages = [*self.messages, asked, self._said(answer)]
        self.pictures = [*self.pictures, *pictures]

    def _said(self, answer: str) -> dict:
        # a model can spell the placeholder, which no processor could tell from a picture's
        said = answer.strip().replace(self.image_token, self.image_token.replace(">", " >"))
        return {"role": "assistant", "content": [{"type": "text", "text": said}]}

    def marks_in(self, question: str) -> list[str]:
        """Special tokens that a question spells: the model reads them as its own marks, not as characters."""
        known = set(self.processor.tokenizer.all_special_tokens) - {self.image_token}
        return sorted(token for token in known if token and token in question)

    @property
    def image_token(self) -> str:
        """What stands for a picture in a text."""
        return getattr(self.processor, "image_token", "<image>")

    def _parts(self, question: str, count: int) -> list[dict]:
        texts = question.split(self.image_token)
        if len(texts) == 1:
            return [*({"type": "image"} for _ in range(count)), {"type": "text", "text": question}]
        if len(texts) - 1 != count:
            raise ValueError(
                f"{self.image_token} stands for a picture: the text has {len(texts) - 1}, and {count} picture(s) go "
                "with it. Add pictures, or spell the word in another way"
            )
        parts = [{"type": "text", "text": texts[0]}]
        for text in texts[1:]:
            parts += [{"type": "image"}, {"type": "text", "text": text}]
        return [part for part in parts if part.get("text") != ""]

    def _inputs(self, messages: list[dict], pictures: list[Image.Image]) -> BatchFeature:
        try:
            text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
            inputs = self.processor(images=pictures or None, text=text, return_tensors="pt")
        except Exception as error:  # of the chat template, the tokenizer or the image processor
            raise RuntimeError(f"the model's processor cannot take this: {one_line(error)}") from error
        length, most = inputs["input_ids"].shape[1], self.model.config.get_text_config().max_position_embeddings
        if length >= most:
            raise ValueError(
                f"the conversation is {length:,} tokens long with this, the model takes {most:,}: start anew"
            )
        return inputs.to(self.model.device, self.model.dtype)

    def _generate(self, inputs: BatchFeature, stop: Event):
        """Pieces of the answer. Generation runs in a thread, which ends with this; its error is raised here."""
        length = inputs["input_ids"].shape[1]
        most = min(self.max_new_tokens, self.model.config.get_text_config().max_position_embeddings - length)
        options = {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failures, made, left = [], [], Event()

        def run() -> None:
            try:
                with stoppable(self.model, stop, left):
                    made.append(self.model.generate(**inputs, **options, max_new_tokens=most, streamer=streamer))
            except Exception as error:
                if not isinstance(error, Stopped):
                    failures.append(error)
                streamer.end()  # what it holds back is shown

        thread = Thread(target=run, daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:
            left.set()
            thread.join()
        if failures:
            raise RuntimeError(f"the model could not answer: {one_line(failures[0])}") from failures[0]
        self.is_cut = bool(made) and self._is_cut(made[0][0, length:].tolist(), most)

    def _is_cut(self, new: list[int], most: int) -> bool:
        ends = self.model.generation_config.eos_token_id
        return len(new) >= most and new[-1] not in (ends if isinstance(ends, list) else [ends])


class Stopped(Exception):
    """Nobody waits for the answer any more."""


@contextmanager
def stoppable(model: torch.nn.Module, *stops: Event):
    """Has a forward raise `Stopped` before its next layer once one of the events is set: that of a long prompt may take
    minutes, in which there is no token to stop at."""

    def look(*_) -> None:
        if any(stop.is_set() for stop in stops):
            raise Stopped

    stacks = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    hooks = [layer.register_forward_pre_hook(look) for stack in stacks for layer in stack]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def start(model: torch.nn.Module, processor: object, system: str | None = None, note=print, **options) -> Chat:
    """A conversation, without the system message where the model has no place for one, which `note` is told.

    Args:
        options: `max_new_tokens` and `temperature` of `Chat`.
    """
    try:
        return Chat(model, processor, system=system, **options)
    except ValueError as error:
        note(f"{error}; going on without it")
        return Chat(model, processor, **options)


def one_line(error: Exception) -> str:
    """An error's message without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__
