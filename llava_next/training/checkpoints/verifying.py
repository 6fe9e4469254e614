"""Every byte of a checkpoint compared with what was written, before a run continues from it.

The ranks share the files, each read once and in pieces, so a run's checkpoint passes at the speed of its storage; what
was read is in the machine's memory when the tensors are loaded a moment later.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from llava_next.training.checkpoints.recovery import CheckpointError, Resume, find_resume
from llava_next.training.devices.agreement import agree
from llava_next.training.recipe.config import RunConfig

PIECE = 16 * 2**20  # bytes of a read


def verified(
    config: RunConfig, resume: Resume, replan: Callable[[dict], list[str]], say: Callable[[str], None]
) -> Resume:
    """The newest checkpoint whose bytes are those of its manifest; damaged ones are passed over. A collective.

    Args:
        resume: as found by the sizes of its files. One that is at a URL only is compared when it is downloaded.
        replan: continues the plan from another checkpoint's state and says what differs; see `Mixture.resume`.
        say: called with what a person should know.

    Raises:
        CheckpointError: on all ranks: none is whole, or the one before is of another plan.
    """
    while resume.path and not resume.remote:
        names = sorted(resume.manifest["files"])
        flags = torch.zeros(len(names))
        for number in range(dist.get_rank(), len(names), dist.get_world_size()):
            expected = resume.manifest["files"][names[number]]["crc32"]
            flags[number] = checksum(resume.path / names[number]) != expected
        agree(flags)
        if not flags.any():
            break
        wrong = ", ".join(name for name, flag in zip(names, flags.tolist(), strict=True) if flag)
        say(f"note       {resume.path.name}: the bytes of {wrong} are not those that were written")
        try:
            resume = find_resume(config, [*resume.damaged, resume.path])
            resume.notes += replan(resume.state)
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        for note in resume.notes:
            say(f"note       {note}")
    return resume


def checksum(path: Path) -> int | None:
    """CRC-32 of a file, read in pieces; None when it cannot be read to its end."""
    crc = 0
    try:
        with open(path, "rb", buffering=0) as file:
            while part := file.read(PIECE):
                crc = zlib.crc32(part, crc)
    except OSError:
        return None
    return crc
