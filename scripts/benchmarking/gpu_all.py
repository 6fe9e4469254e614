"""All that is wanted of a GPU, by one command within a time limit: whether it is right, then how fast it is.

A part that fails or takes too long costs its own figures only: its line says how it ended, with the last words of an
error. What there was no time for is named at the end.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from benchmarking.cards import ROOT, add_out, table, write_card
from benchmarking.truth import PARTS


@dataclass(frozen=True)
class Job:
    """A benchmark and the seconds that it may take; it is not begun when fewer are left than `least`."""

    name: str
    arguments: tuple[str, ...]
    most: float
    least: float = 40.0

    @property
    def truth(self) -> bool:
        """Whether it checks and does not measure."""
        return self.arguments[0] == "truth"


STEP, SHORT = ("step", "--steps", "6", "--warmup", "2"), ("--steps", "3", "--warmup", "2")
# First whether it is right. Then by worth: the step and what is left of it, what would speed it up, whether that holds
# its loss, other models.
JOBS = (
    *(Job(f"truth: {part}", ("truth", part), most=60, least=25) for part in PARTS),
    Job("vicuna-7b", (*STEP, "--profile", "{out}/profile-vicuna-7b"), 110),
    Job("compile", (*STEP, "--compile"), 130),
    Job("float8", (*STEP, "--compile", "--float8"), 130),
    Job("levers", ("ablate", "--samples", "4", "--warmup", "1", "--seconds", "140"), 200, least=90),
    Job("llama3-8b", (*STEP, "--model", "llama3-8b"), 100),
    Job("float8 losses", ("float8", "--samples", "2", "--steps", "24"), 90),
    Job("stage 1", ("step", *SHORT, "--stage", "1"), 100),
    Job("qwen2-7b", ("step", *SHORT, "--model", "qwen2-7b"), 100),
    Job("siglip-384", ("step", *SHORT, "--tower", "siglip-384"), 100),
    Job("mistral-7b", ("step", *SHORT, "--model", "mistral-7b"), 100),
)


def add_arguments(parser) -> None:
    """Options of `benchmark.py gpu-all`."""
    parser.add_argument("--limit", type=float, default=570, help="seconds for everything")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--jobs", nargs="+", choices=[job.name for job in JOBS], default=[job.name for job in JOBS])
    about = "for every job that measures, as one string: '--steps 2 --shortened 8'"
    parser.add_argument("--options", default="", help=about)
    add_out(parser, Path("cards"))  # and for traces, which are large


def run(args) -> None:
    """Runs the jobs one after the other and says how each ended."""
    deadline, ended = time.monotonic() + args.limit, {}
    for job in (job for job in JOBS if job.name in args.jobs):
        begin = time.monotonic()
        left, status = deadline - begin, "not begun: no time left"
        if left >= min(job.least, args.limit):
            print(f"== {job.name}", flush=True)
            # a job's own limit is for a GPU: a CPU, on which the command is tried, may take as long as there is time
            status = run_job(job, args, min(job.most, left) if args.device == "cuda" else left)
        ended[job.name] = {"ended": status, "seconds": time.monotonic() - begin}
        write_card(f"gpu-all-{args.device}", ended, args.out)  # now: the machine may be taken away before the end
    rows = ((name, found["ended"], f"{found['seconds']:.0f}") for name, found in ended.items())
    print(table(("job", "ended", "seconds"), rows), flush=True)


def command_of(job: Job, args) -> list[str]:
    """The job's command line."""
    arguments = [argument.format(out=args.out) for argument in job.arguments]
    own = ["--device", args.device, "--out", str(args.out), *([] if job.truth else args.options.split())]
    return [sys.executable, str(ROOT / "scripts" / "benchmark.py"), *arguments, *own]


def run_job(job: Job, args, seconds: float) -> str:
    """How a job ended: what was found, or `done`; its error; that it was stopped. All that it started ends with it."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command_of(job, args), stderr=errors)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
            # ranks have sessions of their own, and one left over would hold the GPU's memory
            for started in [*psutil.Process(process.pid).children(recursive=True), process]:
                with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile
                    started.kill()
            process.wait()
        errors.seek(0)
        said = errors.read().strip()
    if said:
        print(said[-4000:], file=sys.stderr, flush=True)
    if status is None:
        return f"stopped after {seconds:.0f} s"
    if status:
        return f"exit status {status}: {said.splitlines()[-1] if said else 'no word of why'}"
    if not job.truth:
        return "done"
    card = args.out / f"{'-'.join(job.arguments)}-{args.device}.json"
    return json.loads(card.read_text())["figures"]["found"]
