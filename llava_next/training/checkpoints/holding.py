"""One run at a time in a run folder, and one at the place of its checkpoints."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from llava_next.data.storage.client import Storage
from llava_next.data.storage.errors import StorageError
from llava_next.data.storage.lease import Lease, LeaseHeld
from llava_next.training.checkpoints.recovery import Resume, find_resume
from llava_next.training.recipe.config import RunConfig
from llava_next.training.watch.stopping import STOP_FILE, give_up


def hold_run(config: RunConfig, resume: Resume, take_over: bool = False) -> None:
    """Returns on all ranks when rank 0 holds all places that the run writes to. A collective.

    Nothing is written before. Another process that takes over later ends this one.

    Args:
        resume: as found before the places were held.
        take_over: from a run that holds them.

    Raises:
        LeaseHeld: on all ranks: another run holds one of them, or has written a checkpoint since `resume` was found.
    """
    answer = [""]
    if dist.get_rank() == 0:
        try:
            for storage in places(config, resume):
                Lease(storage, "run", cure(config), on_lost=give_up).take(take_over, partial(print, flush=True))
            found = find_resume(config)
            if found.path != resume.path:
                answer = [f"{config.run_dir}: another run has just ended there; start again to continue from its end"]
        except (LeaseHeld, StorageError) as error:
            answer = [str(error)]
    dist.broadcast_object_list(answer, device=torch.device("cpu"))
    if answer[0]:
        raise LeaseHeld(answer[0])


def places(config: RunConfig, resume: Resume) -> list[Storage]:
    """The run folder, and where checkpoints go when that lies elsewhere. Local folders are made."""
    run_dir, folder = Path(config.run_dir), resume.folder
    found = [run_dir]
    if run_dir.resolve() not in folder.resolve().parents:
        found.append(folder)
    for path in found:
        path.mkdir(parents=True, exist_ok=True)
    return [*map(Storage, found), *([resume.mirror.storage] if resume.mirror else [])]


def cure(config: RunConfig) -> str:
    """What to do about another run."""
    return (
        "Two runs in one place would destroy each other's files: give another run_dir (and checkpoint.dir), or end "
        f"that one: `touch {Path(config.run_dir) / STOP_FILE}` makes it save and stop; --take_over takes the place "
        "from a run that does not answer, which then ends without saving"
    )
