"""Copies of a run's checkpoints at a URL, for machines whose own disk does not outlive them.

A copy is made after the checkpoint is complete on the run's own disk, its manifest last: what has no manifest is no
checkpoint. It is read back only through its manifest, every file checked by size and CRC-32.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

from llava_next.data.storage.client import Storage
from llava_next.model.folders.export import made_aside

MANIFEST = "manifest.json"
PIECE = 64 * 2**20  # bytes of a read


class Mirror:
    """Checkpoints below a URL.

    Args:
        storage: a folder of its own; two runs must not share it.
    """

    def __init__(self, storage: Storage):
        self.storage = storage

    @property
    def label(self) -> str:
        """The URL for messages."""
        return self.storage.label

    def check_writable(self) -> None:
        """Raises StorageError when objects cannot be put there."""
        self.storage.put(".writable", b"")
        self.storage.delete(".writable")

    def complete(self) -> list[str]:
        """Names of the complete checkpoints there, oldest first."""
        suffix = f"/{MANIFEST}"
        names = (name.removesuffix(suffix) for name, _ in self.storage.list("step-") if name.endswith(suffix))
        return sorted(name for name in names if "/" not in name)

    def newest(self) -> tuple[str, dict] | None:
        """Name and manifest of the newest checkpoint whose files are all there with their sizes."""
        sizes = dict(self.storage.list("step-"))
        for name in reversed(self.complete()):
            manifest = json.loads(self.storage.read_all(f"{name}/{MANIFEST}"))
            if all(sizes.get(f"{name}/{file}") == facts["bytes"] for file, facts in manifest["files"].items()):
                return name, manifest
        return None

    def upload(self, path: Path, name: str) -> None:
        """Copies one file of a checkpoint."""
        self.storage.put(f"{path.name}/{name}", path / name)

    def remove(self, name: str) -> None:
        """Removes a checkpoint, its manifest first."""
        self.storage.delete(f"{name}/{MANIFEST}")
        for file, _ in self.storage.list(f"{name}/"):
            self.storage.delete(file)

    def download(self, path: Path, manifest: dict) -> None:
        """Makes the local checkpoint `path` of the copy of that name.

        Raises:
            ValueError: a file's bytes are not those of the manifest.
        """
        with made_aside(path) as aside:
            for name, facts in manifest["files"].items():
                # a manifest is data from elsewhere: its names must not lead out of the folder
                if Path(name).name != name:
                    raise ValueError(
                        f"{self.label}/{path.name}: {name!r} in {MANIFEST} is no file name; remove this checkpoint"
                    )
                crc, whole = 0, facts["bytes"]
                with open(aside / name, "wb") as file:
                    for begin in range(0, whole, PIECE):
                        part = self.storage.read_range(f"{path.name}/{name}", begin, min(PIECE, whole - begin))
                        crc = zlib.crc32(part, crc)
                        file.write(part)
                if crc != facts["crc32"]:
                    raise ValueError(
                        f"{self.label}/{path.name}/{name} is damaged (its checksum is not the manifest's); remove this "
                        "checkpoint there, and the one before it is taken"
                    )
            (aside / MANIFEST).write_text(json.dumps(manifest, indent=2))
