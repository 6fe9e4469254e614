"""Answers that were given already, kept in a folder: what stops a run costs the batch at work, no more.

An answer is found again by all that made it: model, backend, packages, task, prompt, pixels and length. A model that
has changed, or a picture under an old name, finds none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image


class Answers:
    """The answers of one model in a folder; each process appends to a file of its own and reads all files.

    Args:
        made_by: whatever else answers depend on, the same in every process: model, backend, packages.
    """

    def __init__(self, folder: Path, made_by: dict, process: int = 0):
        self.made_by, self.process, self.folder = made_by, process, folder
        self.known: dict[str, str] = {}
        for path in sorted(folder.glob("*.jsonl")) if folder.is_dir() else ():
            for line in path.read_bytes().splitlines():
                try:
                    entry = json.loads(line)
                    self.known[entry["key"]] = entry["answer"]
                except (ValueError, TypeError, KeyError):
                    continue  # cut off when its process was killed: asked again

    def key(self, task: str, prompt: str, pictures: Sequence[Image.Image], most: int) -> str:
        """What an answer is found by."""
        digest = hashlib.sha256(json.dumps([self.made_by, task, prompt, most], sort_keys=True).encode())
        for picture in pictures:
            digest.update(f"{picture.mode} {picture.size}".encode())
            digest.update(picture.tobytes())
        return digest.hexdigest()

    def add(self, entries: dict[str, str]) -> None:
        """Keeps answers by their keys, on disk too."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / f"{self.process}.jsonl", "ab") as file:
            # a line that a kill cut off must not swallow the next one
            lines = [json.dumps({"key": key, "answer": answer}) for key, answer in entries.items()]
            file.write(("\n" + "\n".join(lines) + "\n").encode())
        self.known |= entries
