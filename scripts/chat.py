"""Chats with a trained model in the terminal, with stock transformers only.

    python scripts/chat.py --model runs/finetune/model --image photo.jpg
    python scripts/chat.py --model runs/finetune/model --image a.png b.png --prompt "What has changed?"

Follow-up questions see the whole conversation. `/image FILE` adds a picture to the next question, `/reset` starts anew
with the first pictures, `/quit` ends. `--prompt` asks one question and ends. The model folder is loaded as anybody else
would load it, nothing of this project runs it.
"""

import sys
from dataclasses import dataclass, field
from threading import Thread

import torch
from jsonargparse import ArgumentParser
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, TextIteratorStreamer
from transformers.utils import logging

from llava_next.data.format.pictures import open_rgb
from llava_next.paths import folder_or_name, local_path


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

    def reset(self) -> None:
        """Forgets everything but the system message."""
        self.messages, self.pictures = [], []
        if self.system is not None:
            self.messages.append({"role": "system", "content": [{"type": "text", "text": self.system}]})

    def ask(self, question: str, pictures: list[Image.Image], show=print) -> str:
        """The answer to a question, which both become part of the conversation.

        Args:
            pictures: shown with this question.
            show: called with each piece of the answer as it is generated.

        Raises:
            RuntimeError: the model failed; the conversation is as before.
        """
        content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": question}]
        messages = [*self.messages, {"role": "user", "content": content}]
        seen = [*self.pictures, *pictures]
        answer = ""
        for piece in self._generate(messages, seen):
            show(piece)
            answer += piece
        reply = {"role": "assistant", "content": [{"type": "text", "text": answer.strip()}]}
        self.messages, self.pictures = [*messages, reply], seen
        return answer.strip()

    def _generate(self, messages: list[dict], pictures: list[Image.Image]):
        """Pieces of the answer. Generation runs in a thread; its error is raised here."""
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = self.processor(images=pictures or None, text=text, return_tensors="pt")
        inputs = inputs.to(self.model.device, self.model.dtype)
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        sampling = {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}
        failures = []

        def run() -> None:
            try:
                self.model.generate(**inputs, **sampling, max_new_tokens=self.max_new_tokens, streamer=streamer)
            except Exception as error:
                failures.append(error)
                streamer.end()

        thread = Thread(target=run, daemon=True)
        thread.start()
        yield from streamer
        thread.join()
        if failures:
            raise RuntimeError(f"the model could not answer: {failures[0]}") from failures[0]


def load(folder: str) -> tuple[torch.nn.Module, object]:
    """Model and processor of a folder or hub repository, on the GPU if there is one."""
    logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").to(device).eval()
    return model, AutoProcessor.from_pretrained(folder)


def open_picture(path: str) -> Image.Image:
    """An RGB picture with the pixels that training sees: an EXIF orientation is not applied, as it is not there.

    Raises:
        ValueError: no such file, or not a picture.
    """
    file = local_path(path)
    if not file.is_file():
        raise ValueError(f"{path}: {'a folder, not a file' if file.is_dir() else 'No such file or directory'}")
    try:
        return open_rgb(file)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def write(piece: str) -> None:
    print(piece, end="", flush=True)


def converse(chat: Chat, first: list[Image.Image]) -> None:
    """Questions and answers until the end of the input."""
    waiting = list(first)
    while True:
        try:
            question = input("you: ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if question in ("/quit", "/exit"):
            return
        if question == "/reset":
            chat.reset()
            waiting = list(first)
        elif question.startswith("/image "):
            try:
                waiting.append(open_picture(question.removeprefix("/image ").strip()))
            except ValueError as error:
                print(f"error: {error}")
        elif question:
            write("model: ")
            try:
                chat.ask(question, waiting, write)
                waiting = []
            except RuntimeError as error:
                write(f"error: {error}")
            print()


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=folder_or_name, required=True, help="model folder or hub repository")
    parser.add_argument("--image", nargs="+", default=[], help="pictures shown with the first question")
    parser.add_argument("--prompt", help="one question; without it, questions are read from the terminal")
    parser.add_argument("--system", help="system message instead of the template's; '' leaves it out")
    parser.add_argument("--max_new_tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy, the same answer every time")
    args = parser.parse_args()
    try:
        pictures = [open_picture(path) for path in args.image]
        model, processor = load(args.model)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    chat = Chat(model, processor, args.max_new_tokens, args.temperature, args.system)
    if args.prompt is None:
        converse(chat, pictures)
    else:
        chat.ask(args.prompt, pictures, write)
        print()


if __name__ == "__main__":
    main()
