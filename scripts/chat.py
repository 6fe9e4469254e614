"""Chats with a trained model in the terminal or on a page, with stock transformers only.

    python scripts/chat.py --model runs/finetune/model --image photo.jpg
    python scripts/chat.py --model runs/finetune/model --image a.png b.png --prompt "What has changed?"
    python scripts/chat.py --model runs/finetune --web

Follow-up questions see the whole conversation. `/image FILE` adds a picture to the next question, `/reset` starts anew
with the first pictures, `/quit` ends. `--prompt` asks one question and ends. `--web` serves a page on this machine
alone, on which every finished model, adapter and `model-step-N` of the run can be chosen, also while it goes on. The
model folder is loaded as anybody else would load it, nothing of this project runs it.
"""

import math
import sys
import unicodedata
from pathlib import Path

from jsonargparse import ArgumentParser
from PIL import Image

from llava_next.data.format.pictures import open_rgb
from llava_next.paths import folder_or_name, local_path
from llava_next.versions import install
from talking.conversation import Chat, one_line, start
from talking.models import choices, load

COMMANDS = "/image FILE adds a picture to the next question, /reset starts anew, /quit ends"


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
        write(f"error: {error} ({COMMANDS})")
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
    parser.add_argument("--model", type=folder_or_name, required=True, help="model, adapter or run folder, or hub name")
    parser.add_argument("--image", nargs="+", default=[], help="pictures shown with the first question")
    parser.add_argument("--prompt", help="one question; without it, questions are read from the terminal")
    parser.add_argument("--system", help="system message instead of the template's; '' leaves it out")
    parser.add_argument("--max_new_tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy, the same answer every time")
    parser.add_argument("--web", action="store_true", help="a page instead of the terminal (extra `web`)")
    parser.add_argument("--host", default="127.0.0.1", help="of the page: an address that others reach, if they may")
    parser.add_argument("--port", type=int, default=7860, help="of the page; 0: any free one")
    args = parser.parse_args()
    if args.max_new_tokens < 1 or not 0 <= args.temperature < math.inf:
        parser.error("--max_new_tokens is at least 1, --temperature 0 or more")
    if args.prompt is not None and not args.prompt.strip():
        parser.error("--prompt is empty: give a question, or leave it out to be asked for them")
    if args.web and (args.image or args.prompt is not None):
        parser.error("--web: pictures and questions are given on the page, not by --image and --prompt")
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):  # neither typed bytes nor an answer end the chat by an encoding error
            stream.reconfigure(errors="replace")
    try:
        if args.web:
            talk_on_page(args)
        else:
            talk_in_terminal(args)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:  # a damaged folder or picture can make the libraries raise anything
        sys.exit(f"error: {one_line(error)}")


def talk_in_terminal(args) -> None:
    """One answer, or a conversation."""
    pictures = [open_picture(path) for path in args.image]
    model, processor = load(choices(args.model)[0].where)
    options = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature}
    chat = start(model, processor, args.system, lambda text: print(f"note: {text}", file=sys.stderr), **options)
    if args.prompt is None:
        converse(chat, pictures)
    else:
        chat.ask(args.prompt, pictures, write)
        print()


def talk_on_page(args) -> None:
    """Serves the page until Ctrl-C, with the first model loaded."""
    sys.path.append(str(Path(__file__).parents[1] / "data_tools"))  # its drawings of tiles and tokens
    try:
        from talking.server import listen, serve
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn"):
            raise
        raise ValueError(f"--web needs {error.name}: {install('web')}") from error
    from talking.answering import Answerer

    answerer = Answerer(args.model, args.system)
    first = choices(args.model)[0]
    with listen(args.host, args.port) as listener:
        answerer.load(first)
        options = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature}
        serve(answerer, options, args.host, listener)


if __name__ == "__main__":
    main()
