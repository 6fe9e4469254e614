"""Which checkpoint a run continues from, and how its folder is put in order before it does.

A folder `step-00000500` with a manifest is a checkpoint; one that a kill left half-written has another name and is
removed at the next start. `auto` takes the newest that is whole. What a run needs to be the same run (which parts are
trained, which model it started from, which samples are next) stands in the manifest and is compared before the model
loads.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from llava_next.data.storage.client import CLOUD_SCHEMES, Storage, written_aside
from llava_next.paths import local_path
from llava_next.training.checkpoints.mirror import MANIFEST, Mirror
from llava_next.training.checkpoints.same_run import check_same_run
from llava_next.training.devices.agreement import agree
from llava_next.training.recipe.config import RunConfig

FORMAT = 3
LOGS = ("metrics", "validation", "changes")
LEFTOVERS = (".tmp", ".old")  # of a save and of a removal that a kill cut short
SHOW_SECONDS = 15.0  # that a network file system may take to show a new file to all nodes


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the message says what, where and what to do."""


def checkpoint_name(step: int) -> str:
    """`step-00000500`"""
    return f"step-{step:08d}"


def checkpoint_step(path: Path) -> int:
    """500 of `step-00000500`"""
    return int(path.name.removeprefix("step-"))


def complete_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints in a folder, oldest first."""
    return sorted(p.parent for p in folder.glob(f"step-*/{MANIFEST}") if not p.parent.suffix)


def read_manifest(path: Path) -> dict:
    """The manifest of a checkpoint, its files' sizes checked against it.

    Raises:
        ValueError: not a complete checkpoint of this format.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path} is not a complete checkpoint: no {MANIFEST}") from None
    except ValueError:
        raise ValueError(f"{path / MANIFEST} is damaged; resume from another checkpoint") from None
    check_format(manifest, str(path))
    if manifest.get("state_crc32") != state_checksum(manifest["state"]):
        raise ValueError(f"{path / MANIFEST} is damaged (a byte changed); resume from another checkpoint")
    for name, facts in manifest["files"].items():
        file = path / name
        if not file.exists() or file.stat().st_size != facts["bytes"]:
            raise ValueError(
                f"{file} is missing or not {facts['bytes']} bytes; the checkpoint is damaged, resume from another"
            )
    return manifest


def state_checksum(state: dict) -> int:
    """CRC-32 of a manifest's state, the same before it is written and after it is read."""
    return zlib.crc32(json.dumps(state, sort_keys=True).encode())


def remove_checkpoint(path: Path) -> None:
    """Removes a checkpoint; a kill in between leaves nothing that looks like one."""
    aside = path.with_name(path.name + ".tmp")
    os.replace(path, aside)
    shutil.rmtree(aside)


def check_format(manifest: dict, where: str) -> None:
    """Raises ValueError when another release wrote the manifest."""
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise ValueError(
            f"{where}: checkpoint format {found}, this release reads {FORMAT}; continue "
            "with the release that wrote it, or start anew in another run_dir"
        )


@dataclass
class Resume:
    """Where a run begins: after a checkpoint, or at step 0.

    Args:
        folder: where checkpoints are written.
        mirror: their copies at a URL, if there are.
        path: the checkpoint; None for a fresh start.
        remote: it is only at the URL yet.
        manifest: of the checkpoint.
        damaged: newer checkpoints of the run that are not whole.
        notes: what a person should know, one a line.
    """

    folder: Path
    mirror: Mirror | None = None
    path: Path | None = None
    remote: bool = False
    manifest: dict = field(default_factory=lambda: {"state": {"step": 0, "counters": {}}})
    damaged: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def state(self) -> dict:
        """What the checkpoint says of the run: `step`, `counters`, the plan's state."""
        return self.manifest["state"]

    def prepare(self, run_dir: Path, make: Callable[[], object] = lambda: None) -> None:
        """Lets rank 0 `put_in_order` when all ranks have chosen; they go on when all see that it is done. A collective.

        Args:
            make: called on rank 0 after that, makes the run folder's other files.

        Raises:
            CheckpointError: on all ranks: the folder or the URL cannot be written, a download is damaged, or the
                folder is another one for some ranks.
        """
        failed, word = torch.zeros(1), torch.tensor(secrets.randbits(60))
        dist.broadcast(word, 0)
        # a name that was never looked for: no cache of a network file system can hold that it is missing
        mark = self.folder / f".written-by-rank-0-{word.item():x}"
        dist.barrier()
        try:
            if dist.get_rank() == 0:
                self.put_in_order(run_dir)
                make()
                mark.touch()
        except (OSError, ValueError) as error:
            failed += 1
            raise CheckpointError(
                f"{self.folder} cannot be put in order: {error}. See that it can be written, or give another place"
            ) from error
        finally:
            agree(failed)
        if failed:
            raise CheckpointError(f"rank 0 cannot put {self.folder} in order; its own message says why")
        self.check_shared(mark)

    def check_shared(self, mark: Path) -> None:
        """Refuses a folder that ranks have for themselves: their parts of a checkpoint would lie apart. A collective.

        Args:
            mark: file in the folder that rank 0 has just written, and that it removes.

        Raises:
            CheckpointError: on all ranks.
        """
        blind = torch.zeros(dist.get_world_size())
        blind[dist.get_rank()] = not appears(mark, SHOW_SECONDS)
        agree(blind)
        if dist.get_rank() == 0:
            with suppress(OSError):
                mark.unlink()
        if blind.any():
            raise CheckpointError(
                f"{self.folder} is not one folder for all ranks: {int(blind.sum())} of {len(blind)}, the first is rank "
                f"{int(blind.argmax())}, do not see what rank 0 wrote there. Give a run_dir (or checkpoint.dir) on "
                "storage that all nodes share"
            )

    def put_in_order(self, run_dir: Path) -> None:
        """Downloads the checkpoint if it is at the URL only, sets damaged ones aside, removes half-written ones, and
        drops what the logs say of steps that will be done again.

        Raises:
            OSError, ValueError: something cannot be written, or a download is not what its manifest says.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.damaged:
            shutil.rmtree(path.with_suffix(".damaged"), ignore_errors=True)
            os.replace(path, path.with_suffix(".damaged"))
        for path in self.folder.glob("step-*"):
            if path.suffix in LEFTOVERS:
                shutil.rmtree(path)
        if self.mirror:
            self.mirror.check_writable()
        if self.remote:
            self.mirror.download(self.path, self.manifest)
        for log in (*(run_dir / f"{name}.jsonl" for name in LOGS), *run_dir.glob("skipped*.jsonl")):
            drop_later_lines(log, self.state["step"])


def find_resume(config: RunConfig, damaged: Sequence[Path] = ()) -> Resume:
    """The checkpoint that `checkpoint.resume` means, compared with the run's configuration.

    Args:
        damaged: checkpoints known to be damaged, which are passed over.

    Raises:
        ValueError: `never` with checkpoints present, a path without a complete checkpoint, or a checkpoint of another
            stage or model.
        StorageError: `checkpoint.dir` is a URL that cannot be read.
    """
    folder, mirror = checkpoint_places(config)
    resume = Resume(folder, mirror, damaged=[*damaged])
    wanted = config.checkpoint.resume
    found = checkpoint_to_resume(folder, wanted, resume.damaged)
    newest = mirror.newest() if mirror and wanted in ("auto", "never") else None
    if newest and wanted == "never":
        raise ValueError(
            f"checkpoint.resume: never, but {mirror.label} holds {newest[0]}; choose another checkpoint.dir"
        )
    if newest and (found is None or folder / newest[0] > found):
        check_format(newest[1], f"{mirror.label}/{newest[0]}")
        resume.path, resume.manifest, resume.remote = folder / newest[0], newest[1], True
    elif found:
        resume.path, resume.manifest = found, read_manifest(found)
    elif resume.damaged:
        raise ValueError(
            f"no checkpoint in {folder} is whole ({', '.join(p.name for p in resume.damaged)}); restore their "
            "files, or move these folders away to start anew"
        )
    if resume.path:
        resume.notes += [f"{p} is damaged, going back to {resume.path.name}" for p in resume.damaged]
        resume.notes += check_same_run(config, resume.state, resume.path)
    return resume


def checkpoint_places(config: RunConfig) -> tuple[Path, Mirror | None]:
    """The folder that checkpoints are written to, and their copies when `checkpoint.dir` is a URL."""
    place = config.checkpoint.dir
    default = Path(config.run_dir) / "checkpoints"
    scheme = urlsplit(place).scheme if place and "://" in place else ""
    if scheme in CLOUD_SCHEMES:
        return default, Mirror(Storage(place))
    if scheme not in ("", "file"):
        raise ValueError(
            f"checkpoint.dir: {place}: checkpoints are copied to {', '.join(f'{s}://' for s in CLOUD_SCHEMES)} or "
            "written to a local folder"
        )
    return local_path(place) if place else default, None


def checkpoint_to_resume(folder: Path, resume: str, damaged: list[Path] | None = None) -> Path | None:
    """The local checkpoint that `checkpoint.resume` means; None for a fresh start.

    Args:
        folder: the run's checkpoint folder.
        resume: `auto`, `never` or a path.
        damaged: checkpoints that are passed over; takes the newer ones that `auto` had to pass over besides.

    Raises:
        ValueError: `never` with checkpoints present, or a path without a complete checkpoint.
    """
    put_back(folder)
    found = complete_checkpoints(folder)
    damaged = [] if damaged is None else damaged
    if resume == "auto":
        for path in reversed([path for path in found if path not in damaged]):
            try:
                read_manifest(path)
                return path
            except ValueError:
                damaged.append(path)
        return None
    if resume == "never":
        if found:
            raise ValueError(f"checkpoint.resume: never, but {folder} holds {found[-1].name}; choose another run_dir")
        return None
    path = Path(resume)
    if path in damaged:
        raise ValueError(f"checkpoint.resume: {path} is damaged; give another, or auto to take the newest whole one")
    read_manifest(path)
    later = [p for p in found if checkpoint_step(p) > checkpoint_step(path.resolve())]
    if later:
        # they would be mistaken for this run's at the next start
        raise ValueError(
            f"checkpoint.resume: {path} is older than {later[-1].name} in {folder}; move the later ones away, choose "
            "another run_dir, or continue with auto"
        )
    return path


def appears(path: Path, seconds: float) -> bool:
    """Whether there is a file, or will be in `seconds`."""
    deadline = time.monotonic() + seconds
    while not os.path.exists(path):  # which raises nothing, whatever the file system answers
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def put_back(folder: Path) -> None:
    """Undoes a replacement that was cut short between its two renames. Any number of processes may do so at once."""
    for old in folder.glob("step-*.old"):
        if not old.with_suffix("").exists():
            with suppress(OSError):
                os.replace(old, old.with_suffix(""))


def drop_later_lines(path: Path, step: int) -> None:
    """Drops a log's lines of later steps, and a last line that a kill cut short: they will be written again."""
    if not path.exists():
        return
    lines, kept = path.read_bytes().splitlines(keepends=True), []
    for line in lines:
        with suppress(ValueError):
            if line.endswith(b"\n") and json.loads(line)["step"] <= step:
                kept.append(line)
    if len(kept) < len(lines):
        with written_aside(path) as temporary:
            temporary.write_bytes(b"".join(kept))


def resume_command(config: RunConfig) -> str:
    """The command line that continues this run, as it can be pasted into a shell."""
    words = [sys.argv[0], *sys.argv[1:]]
    with suppress(OSError):  # how the launcher was called: its own options belong to the command
        parent = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
        launcher = next((i for i, word in enumerate(parent) if "accelerate" in word), None)
        if launcher is not None and sys.argv[0] in parent:
            words = parent[launcher:]
            words[:1] = ["accelerate", "launch"] if "commands" in words[0] else ["accelerate"]
    if config.checkpoint.resume != "auto":
        words += ["--checkpoint.resume", "auto"]
    return shlex.join(words)
