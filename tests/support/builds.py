"""Small inputs for build_shards.py, and ways to run it."""

import contextlib
import hashlib
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

import build_shards as tool
from llava_next.anyres import AnyRes
from llava_next.data.format.index import read_dataset
from llava_next.data.format.shards import read_sample
from llava_next.data.storage.client import Storage

TOOL = Path(tool.__file__)

GEOMETRY = ["--tile_size", "32", "--patch_size", "8", "--pinpoints", "32x64,64x32,64x64"]
SMALL = AnyRes(32, 8, [(32, 64), (64, 32), (64, 64)])


class Result(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def arguments_for(inputs: Path, out: Path, *more, geometry=GEOMETRY) -> list[str]:
    paths = ["--json", inputs / "train.json", "--images", inputs / "images", "--out", out]
    return [str(word) for word in (*paths, *geometry, "--workers", 0, "--shard_samples", 16, *more)]


def run(inputs: Path, out: Path, *more, geometry=GEOMETRY) -> Result:
    """Runs the tool's main function here, to save the imports of a process of its own."""
    return tool_result(*arguments_for(inputs, out, *more, geometry=geometry))


def tool_result(*arguments) -> Result:
    """The tool with these arguments alone."""
    return call(tool.main, *arguments)


def call(main: Callable[[list[str]], None], *arguments) -> Result:
    """A tool's main function, with what a shell would see of it."""
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            main([str(word) for word in arguments])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
            if isinstance(end.code, str):  # which the interpreter would print
                print(end.code, file=stderr)
    return Result(code, stdout.getvalue(), stderr.getvalue())


def run_process(inputs: Path, out: Path, *more) -> Result:
    """Runs the tool as a user does."""
    command = [sys.executable, str(TOOL), *arguments_for(inputs, out, *more)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return Result(done.returncode, done.stdout, done.stderr)


def turns(question: str = "<image>\nWhat?", answer: str = "This.") -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def record(number: int, image, **changes) -> dict:
    return {"id": f"s{number}", "image": image, "conversations": turns()} | changes


def make_inputs(folder: Path, count: int = 40) -> list[dict]:
    """`count` records, with noise pictures in two folders, some pairs of pictures and some texts without one."""
    rng, records = np.random.default_rng(0), []
    for number in range(count):
        height, width = rng.integers(10, 100, 2)
        name = f"{('coco', 'vg')[number % 2]}/{number}.png"
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(folder / "images" / name)
        records.append(record(number, name))
    if count > 20:
        records[10] |= {"image": ["coco/0.png", "vg/1.png"], "conversations": turns("<image> or <image>?")}
        records[11] = {"id": 11, "conversations": turns("no picture, so no placeholder")}
    write_json(folder, records)
    return records


def write_json(folder: Path, records: list[dict]) -> None:
    (folder / "train.json").write_text(json.dumps(records))


def checksums(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def samples(folder: Path) -> dict:
    """Every stored sample of a data set, by its id."""
    info, index = read_dataset(folder)
    storage, found = Storage(folder), {}
    for row in range(len(index)):
        where = index.locate(row)
        sample = read_sample(storage.read_range(info.shards[where.shard].name, where.offset, where.nbytes), where.key)
        found[sample.id] = sample
    return found
