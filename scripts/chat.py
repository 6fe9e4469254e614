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

import torch
from jsonargparse import ArgumentParser
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

from conversation import Chat, one_line
from llava_next.data.format.pictures import open_rgb
from llava_next.paths import folder_or_name, local_path

COMMANDS = "/image FILE adds a picture to the next question, /reset starts anew, /quit ends"


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
