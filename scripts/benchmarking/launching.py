"""Starts a benchmark again through `accelerate launch`, as a run is started: the launch file decides on FSDP."""

from __future__ import annotations

import os
import subprocess
import sys

from benchmarking.cards import ROOT


def launched() -> bool:
    """Whether `accelerate launch` started this process."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def relaunch(device: str) -> None:
    """Runs this command under `accelerate launch` with one process, and exits as it does."""
    config = "gpu1" if device == "cuda" else "cpu2_fsdp"
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", str(ROOT / "accelerate_configs" / f"{config}.yaml")),
        *("--num_processes", "1", "--main_process_port", "0"),
        *(str(ROOT / "scripts" / "benchmark.py"), *sys.argv[1:]),
    ]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    sys.exit(subprocess.run(command, env={**os.environ, **hidden}).returncode)
