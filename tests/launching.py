"""Starts worker scripts the way users start a run: `accelerate launch` with FSDP2, real processes, gloo."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def launch(
    script: str | Path, *args, processes: int = 2, timeout: int = 180, check: bool = True, config: str | None = None
):
    """Runs `accelerate launch script args` with `processes` CPU processes; returns the finished process.

    Args:
        script: path below the repository.
        config: accelerate configuration; default: the one that ships for two CPU processes.
    """
    command, environment = command_and_environment(script, *args, processes=processes, config=config)
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    if check and done.returncode:
        raise AssertionError(f"exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return done


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
