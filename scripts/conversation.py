"""A conversation with a model, for scripts/chat.py: stock transformers only.

Whatever is asked, the conversation is as before when there is no answer, and can go on.
"""

from dataclasses import dataclass, field
from threading import Event, Thread

import torch
from PIL import Image
from transformers import TextIteratorStreamer


@dataclass
class Chat:
    """A conversation with a model.

    Args:
        system: system message; None: the chat template's own, empty: none.
    """

    model: torch.nn.Module
    processor: object
    max_new_tokens: int = 512
    temperature: float = 0.0
    system: str | None = None
    messages: list[dict] = field(default_factory=list)
    pictures: list[Image.Image] = field(default_factory=list)

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
        content = self._parts(question, len(pictures))
        messages, seen = [*self.messages, {"role": "user", "content": content}], [*self.pictures, *pictures]
        inputs = self._inputs(messages, seen)
        answer = ""
        try:
            for piece in self._generate(inputs):
                answer += piece
                show(piece)
        except KeyboardInterrupt:
            show(" (stopped)")
        # a model can spell the placeholder, which no processor could tell from a picture's
        said = answer.strip().replace(self.image_token, self.image_token.replace(">", " >"))
        if said:
            self.messages = [*messages, {"role": "assistant", "content": [{"type": "text", "text": said}]}]
            self.pictures = seen
        return answer.strip()

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
                "with it. Add pictures by /image FILE (--image), or spell the word in another way"
            )
        parts = [{"type": "text", "text": texts[0]}]
        for text in texts[1:]:
            parts += [{"type": "image"}, {"type": "text", "text": text}]
        return [part for part in parts if part.get("text") != ""]

    def _inputs(self, messages: list[dict], pictures: list[Image.Image]):
        try:
            text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
            inputs = self.processor(images=pictures or None, text=text, return_tensors="pt")
        except Exception as error:  # of the chat template, the tokenizer or the image processor
            raise RuntimeError(f"the model's processor cannot take this: {one_line(error)}") from error
        length, most = inputs["input_ids"].shape[1], self.model.config.get_text_config().max_position_embeddings
        if length >= most:
            raise ValueError(
                f"the conversation is {length:,} tokens long with this, the model takes {most:,}: /reset starts anew"
            )
        return inputs.to(self.model.device, self.model.dtype)

    def _generate(self, inputs):
        """Pieces of the answer. Generation runs in a thread, which ends with this; its error is raised here."""
        most = self.model.config.get_text_config().max_position_embeddings - inputs["input_ids"].shape[1]
        options = {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}
        options["max_new_tokens"] = min(self.max_new_tokens, most)
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failures, stop = [], Event()

        def asked(ids: torch.Tensor, *_, **__) -> torch.Tensor:
            return torch.full((len(ids),), stop.is_set(), device=ids.device)

        def run() -> None:
            try:
                self.model.generate(**inputs, **options, streamer=streamer, stopping_criteria=[asked])
            except Exception as error:
                failures.append(error)
                streamer.end()

        thread = Thread(target=run, daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:
            stop.set()
            thread.join()
        if failures:
            raise RuntimeError(f"the model could not answer: {one_line(failures[0])}") from failures[0]


def one_line(error: Exception) -> str:
    """An error's message without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__
