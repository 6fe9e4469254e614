"""Starts worker scripts the way users start a run: `accelerate launch` with FSDP2, real processes, gloo."""

import configparser
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from accelerate.utils.other import get_free_port

ROOT = Path(__file__).parents[2]


def launch(
    script: str | Path, *args, processes: int = 2, timeout: int = 180, check: bool = True, config: str | None = None
) -> subprocess.CompletedProcess:
    """Runs a script on `processes` CPU processes as `accelerate launch` would; returns their joint outcome.

    The command line is read and the ranks' environment made by Accelerate's own functions, in this process: its
    launcher spends most of its time with imports. `command_and_environment` is for tests of the launcher itself.

    Args:
        script: path below the repository.
        config: accelerate configuration; default: the one that ships for two CPU processes.
    """
    command, environment = command_and_environment(script, *args, processes=processes, config=config)
    port = get_free_port()
    start = _Forked if _surroundings() == _AT_FIRST else _started
    with TemporaryDirectory() as folder:
        files = [[Path(folder, f"{rank}.{kind}") for rank in range(processes)] for kind in ("out", "err")]
        ranks = []
        for rank, (out, err) in enumerate(zip(*files, strict=True)):
            variables = environment | rank_environment(command[3:], rank, processes, port)
            ranks.append(start(command[command.index(str(ROOT / script)) :], variables, out, err))
        code = wait_for_all(ranks, timeout)
        said = ["".join(file.read_text() for file in kind if file.exists()) for kind in files]
    done = subprocess.CompletedProcess(command, code, *said)
    if check and done.returncode:
        raise AssertionError(f"exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return done


def rank_environment(command: list[str], rank: int, processes: int, port: int = 0) -> dict[str, str]:
    """What the launcher sets for a rank, on one node.

    Args:
        command: what follows `accelerate launch`.
    """
    options, *_ = _validate_launch_command(launch_command_parser().parse_args(command))
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in (prepare_multi_gpu_env(options) | own | place).items()}


READ_AT_IMPORT = ("CUDA_", "HF_", "LLAVA_NEXT_", "OMP_", "PYTHON", "TORCH_", "TRANSFORMERS_")


def _surroundings() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(READ_AT_IMPORT)}


# A test that sets one of these for its launch means ranks that import anew: they are started, not forked. Others come
# and go (packages set some when they are imported) and reach forked ranks as well.
_AT_FIRST = _surroundings()


def _started(command: list[str], variables: dict[str, str], out: Path, err: Path) -> subprocess.Popen:
    with out.open("w") as stdout, err.open("w") as stderr:
        return subprocess.Popen([sys.executable, "-u", *command], env=variables, cwd=ROOT, stdout=stdout, stderr=stderr)


@functools.cache
def _preloaded() -> subprocess.Popen:
    """The process that ranks are forked from, one a session; it ends when its input does, with this process."""
    _, environment = command_and_environment("train.py")
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests/support/workers/preloaded.py")],
        **{"env": environment, "cwd": ROOT, "text": True, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE},
    )


class _Forked:
    """A rank forked from `_preloaded`, with what `wait_for_all` uses of a `subprocess.Popen`."""

    def __init__(
        self, command: list[str], variables: dict[str, str], out: Path, err: Path, into: Path | None = None
    ) -> None:
        rank = {"script": command[0], "args": command[1:], "environment": variables, "folder": str(ROOT)}
        self.pid = self._ask({"start": {**rank, "in": str(into or os.devnull), "out": str(out), "err": str(err)}})
        self.returncode: int | None = None

    @staticmethod
    def _ask(request: dict) -> int | None:
        server = _preloaded()
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._ask({"poll": self.pid})
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> None:
        while self.poll() is None:
            time.sleep(0.01)


def forked(script: str | Path, *args, said: Path, hears: Path | None = None, **variables: str) -> _Forked:
    """A script that runs as one process forked from `_preloaded`, to do more with than wait for it.

    Args:
        script: path below the repository.
        said: file for what it prints; its errors go beside it, with `.err` behind the name.
        hears: its standard input; default: none.
        variables: of its environment, besides this process's.
    """
    environment = command_and_environment(script)[1] | variables
    return _Forked([str(ROOT / script), *map(str, args)], environment, said, Path(f"{said}.err"), hears)


def wait_for_all(ranks: list[subprocess.Popen | _Forked], timeout: float) -> int:
    """0 when all ranks end with it; else the first other status, and ranks that do not end by themselves are killed."""
    deadline = time.monotonic() + timeout
    try:
        while any(rank.poll() is None for rank in ranks):
            failed = any(rank.poll() not in (None, 0) for rank in ranks)
            if failed:
                deadline = min(deadline, time.monotonic() + 30)
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return next((rank.returncode for rank in ranks if rank.returncode), 0)


def installed(folder: Path) -> str:
    """A path for PYTHONPATH by which this project counts as installed, with the entry points of setup.cfg."""
    about = configparser.ConfigParser()
    about.read(ROOT / "setup.cfg")
    made = folder / "llava_next_trainer-0.dist-info"
    made.mkdir(parents=True, exist_ok=True)
    (made / "METADATA").write_text("Metadata-Version: 2.1\nName: llava-next-trainer\nVersion: 0\n")
    groups = about["options.entry_points"].items()
    (made / "entry_points.txt").write_text("".join(f"[{group}]{points}\n" for group, points in groups))
    return f"{folder}{os.pathsep}{ROOT}"


def command_and_environment(
    script: str | Path, *args, processes: int = 2, config: str | None = None
) -> tuple[list[str], dict[str, str]]:
    """What `launch` runs, and the variables it sets, for tests that do more with the process than wait for it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", config or str(ROOT / "accelerate_configs" / "cpu2_fsdp.yaml")),
        *("--num_processes", str(processes), "--main_process_port", "0"),
        str(ROOT / script),
        *map(str, args),
    ]
    return command, environment
