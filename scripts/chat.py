"""Chats with a trained model in the terminal, with stock transformers only.

    python scripts/chat.py --model runs/finetune/model --image photo.jpg
    python scripts/chat.py --model runs/finetune/model --image a.png b.png --prompt "What has changed?"

Follow-up questions see the whole conversation. `/image FILE` adds a picture to the next question, `/reset` starts anew
with the first pictures, `/quit` ends. `--prompt` asks one question and ends. The model folder is loaded as anybody else
would load it, nothing of this project runs it.
"""

import math
import sys
import unicodedata
from dataclasses import dataclass, field
from threading import Event, Thread

import torch
from jsonargparse import ArgumentParser
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, TextIteratorStreamer
from transformers.utils import logging

from llava_next.data.format.pictures import open_rgb
from llava_next.paths import folder_or_name, local_path

COMMANDS = "/image FILE adds a picture to the next question, /reset starts anew, /quit ends"


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


def load(folder: str) -> tuple[torch.nn.Module, object]:
    """Model and processor of a folder or hub repository, on the GPU if there is one."""
    logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").to(device).eval()
    processor = AutoProcessor.from_pretrained(folder)
    if getattr(processor, "chat_template", None) is None:
        raise ValueError(f"{folder} has no processor with a chat template: give a folder that training has written")
    return model, processor


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


def typed() -> str | None:
    """A line of input without control characters; None at its end."""
    try:
        line = input("you: ")
    except (EOFError, KeyboardInterrupt):
        print()
        return None
    # of arrow keys, pasted bytes, half a surrogate pair
    return "".join(c if unicodedata.category(c) not in ("Cc", "Cs") else " " for c in line).strip()


def converse(chat: Chat, first: list[Image.Image]) -> None:
    """Questions and answers until the end of the input."""
    waiting = list(first)
    while (line := typed()) is not None:
        command, _, rest = line.partition(" ")
        if command in ("/quit", "/exit"):
            return
        if command == "/reset":
            chat.reset()
            waiting = list(first)
        elif command == "/image":
            try:
                waiting.append(open_picture(rest.strip().strip("\"'")))
            except Exception as error:  # whatever a file makes the decoder raise
                print(f"error: {one_line(error)}")
        elif line.startswith("/") and line[1:].isalpha():
            print(f"error: {line} is no command: {COMMANDS}")
        elif line:
            waiting = answer(chat, line, waiting)


def answer(chat: Chat, question: str, waiting: list[Image.Image]) -> list[Image.Image]:
    """Prints the answer to a question, or why there is none. Returns the pictures that still wait for a question."""
    for mark in chat.marks_in(question):
        print(f"note: {mark} is a mark of the model's own and is read as such, not as characters")
    write("model: ")
    try:
        chat.ask(question, waiting, write)
        waiting = []
    except ValueError as error:
        write(f"error: {error}")
    except RuntimeError as error:
        left = f" (its {len(waiting)} picture(s) are left out from here)" if waiting else ""
        write(f"error: {error}{left}")
        waiting = []
    except KeyboardInterrupt:
        write("(stopped)")
    print()
    return waiting


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=folder_or_name, required=True, help="model folder or hub repository")
    parser.add_argument("--image", nargs="+", default=[], help="pictures shown with the first question")
    parser.add_argument("--prompt", help="one question; without it, questions are read from the terminal")
    parser.add_argument("--system", help="system message instead of the template's; '' leaves it out")
    parser.add_argument("--max_new_tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy, the same answer every time")
    args = parser.parse_args()
    if args.max_new_tokens < 1 or not 0 <= args.temperature < math.inf:
        parser.error("--max_new_tokens is at least 1, --temperature 0 or more")
    if args.prompt is not None and not args.prompt.strip():
        parser.error("--prompt is empty: give a question, or leave it out to be asked for them")
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):  # neither typed bytes nor an answer end the chat by an encoding error
            stream.reconfigure(errors="replace")
    try:
        pictures = [open_picture(path) for path in args.image]
        model, processor = load(args.model)
        chat = start(model, processor, args)
        if args.prompt is None:
            converse(chat, pictures)
        else:
            chat.ask(args.prompt, pictures, write)
            print()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:  # a damaged folder or picture can make the libraries raise anything
        sys.exit(f"error: {one_line(error)}")


def start(model: torch.nn.Module, processor: object, args) -> Chat:
    """The conversation, without the system message where the model has no place for one."""
    try:
        return Chat(model, processor, args.max_new_tokens, args.temperature, args.system)
    except ValueError as error:
        print(f"note: {error}; going on without it", file=sys.stderr)
        return Chat(model, processor, args.max_new_tokens, args.temperature)


if __name__ == "__main__":
    main()
