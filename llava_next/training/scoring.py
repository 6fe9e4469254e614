"""The model scored while it trains, by scripts/evaluate.py: whatever happens to that, the run goes on.

After a step that is due the model lies in `model-step-N/` and a job in `scores/step-N/`. Jobs are done in their order,
one at a time: on devices of their own while training goes on, else on the run's, while it waits. The scores go to the
journal, and `best/` gets the model if none before was better. A job without an outcome is done when the run goes on.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist

from llava_next.model.folders.card import add_scores
from llava_next.model.folders.export import made_aside
from llava_next.training.devices.agreement import agree
from llava_next.training.recipe.config import RunConfig
from llava_next.training.recipe.evaluate import EvaluateConfig
from llava_next.training.scores import (
    BEST,
    JOB,
    SCORES,
    folder_of,
    in_the_way,
    jobs_of,
    keep_best,
    link_files,
    put_back_best,
    read_best,
    read_scores,
    remove_exports,
    write_job,
)
from llava_next.training.watch.beside import Beside, own_environment
from llava_next.training.watch.journal import Journal
from llava_next.training.watch.metrics import duration

POLL = 0.5  # seconds between looks at an evaluation that is waited for
TELL = 60.0  # seconds between lines about it
WAITING = 2  # exports that may wait for their turn: each takes the room of a model
LOG = "log.txt"


class ScoringError(ValueError):
    """What is to be scored cannot be."""


def scoring_lines(config: RunConfig) -> list[str]:
    """The plan of the scorings, for people; nothing without any."""
    evaluate = config.evaluate
    if not evaluate.every:
        return []
    records = f"{evaluate.json} by {evaluate.metric or 'exact answers'}" if evaluate.json else ""
    where = "on this run's devices, which then waits"
    if evaluate.gpus is not None:
        where = f"on {'GPU ' + ', '.join(evaluate.gpus) if evaluate.gpus else 'the CPU'} while it trains"
    what = ", ".join([*evaluate.task_names, *([records] if records else [])])
    limit = f", {evaluate.limit:,} questions of each" if evaluate.limit else ""
    best = f"best/ keeps the best by {evaluate.best or 'the first score'}"
    text = f"every {evaluate.every:,} steps and at the end, {where}: {what}{limit}; {best}"
    indents = {"initial_indent": "scores     ", "subsequent_indent": " " * 11}
    return textwrap.wrap(text, 100, **indents, break_long_words=False, break_on_hyphens=False)


def commands(config: RunConfig, script: Path, model: Path, out: Path, *more: str) -> list[list[str]]:
    """Command lines of scripts/evaluate.py that score a model folder.

    Args:
        script: where that one lies.
        more: further words.
    """
    evaluate = config.evaluate
    gpus = own_gpus() if evaluate.gpus is None else evaluate.gpus
    words = ["--model", model, "--out", out, "--limit", evaluate.limit, "--device", "cuda" if gpus else "cpu"]
    words += ["--keep_template", str(config.data.keep_template).lower(), *shlex.split(evaluate.options), *more]
    alone = [sys.executable, script]
    launched = alone
    if len(gpus) > 1 and not more:  # lmms-eval's part uses several
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", len(gpus)]
        launched = [sys.executable, *launcher, script]
    found = []
    if evaluate.task_names:
        found.append([*launched, "--tasks", ",".join(evaluate.task_names), *words])
    if evaluate.json:
        images = ["--images", evaluate.images] if evaluate.images else []
        metric = ["--metric", evaluate.metric] if evaluate.metric else []
        found.append([*(launched if metric else alone), "--json", evaluate.json, *images, *metric, *words])
    return [[str(word) for word in command] for command in found]


def own_gpus() -> list[str]:
    """GPUs that the ranks on this machine use, by the names that CUDA_VISIBLE_DEVICES has for them."""
    count = torch.cuda.device_count()
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else map(str, range(count))
    return [*names][: min(count, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))]


def environment(evaluate: EvaluateConfig, script: Path) -> dict[str, str]:
    """Variables of an evaluation: its devices, and this code of all that there may be on the machine."""
    paths = [str(script.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    gpus = own_gpus() if evaluate.gpus is None else evaluate.gpus
    return own_environment({"PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ",".join(gpus)})


def check_scoring(config: RunConfig, script: Path) -> list[str]:
    """Names of the scores that the run will have; asks scripts/evaluate.py whether it can make them. A collective.

    Raises:
        ScoringError: on all ranks: why it cannot, or there is none that `evaluate.best` names.
    """
    evaluate = config.evaluate
    if not evaluate.every:
        return []
    answer = [[], ""]
    with tempfile.TemporaryDirectory() as folder:
        log, process = Path(folder) / LOG, None
        if dist.get_rank() == 0 and not (wrong := _refusal(config)):
            print("scores     looking whether they can be made (scripts/evaluate.py --check_only)", flush=True)
            words = commands(config, script, Path(config.model), Path(config.run_dir) / SCORES, "--check_only", "true")
            process = Beside(words, log, environment(evaluate, script))
        elif dist.get_rank() == 0:
            answer[1] = wrong
        wait_for(lambda: process is None or process.poll() is not None)
        if process is not None:
            answer = read_check(log.read_text(errors="replace"), process.poll(), evaluate.best)
    dist.broadcast_object_list(answer, device=torch.device("cpu"))
    names, wrong = answer
    if wrong:
        raise ScoringError(wrong)
    return names


def _refusal(config: RunConfig) -> str:
    """What can be said against the scorings on this machine before scripts/evaluate.py is asked."""
    if taken := set(own_gpus()) & set(config.evaluate.gpus or ()):
        return f"evaluate.devices: the run uses {', '.join(sorted(taken))} itself: give others, or null"
    found = in_the_way(Path(config.run_dir))
    return found and f"evaluate: {found}, or give another run_dir"


def read_check(said: str, status: int, best: str | None) -> list:
    """Names of scores, and what is wrong, by what `evaluate.py --check_only` printed."""
    lines = [line for line in said.splitlines() if line.strip()]
    if status:
        told = [line for line in lines if "error: " in line] or lines or [f"exit status {status}"]
        why = told[-1].partition("error: ")[2] or told[-1]
        where = " in evaluate.options" if why.endswith("--data DATA") else ""
        return [[], f"evaluate: scripts/evaluate.py: {why}{where}"]
    names = [name for line in lines if line.startswith('["') for name in json.loads(line)]
    if not names:
        return [names, f"evaluate: scripts/evaluate.py names no score: {lines[-1:]}"]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        return [
            names,
            f"evaluate: two scores are called {twice[0]}: name the records' by evaluate.options '--name NAME'",
        ]
    if best is not None and best not in names:
        return [names, f"evaluate.best: {best!r} is no score of this run; they are {', '.join(names)}"]
    return [names, ""]


def wait_for(
    done: Callable[[], bool], asked: Callable[[], bool] = lambda: False, meanwhile: Callable[[], None] = lambda: None
) -> bool:
    """Returns True when `done` is true on all ranks; False when a rank was asked to stop before. A collective.

    It is many short ones between the hosts: nothing waits long enough to be given up.

    Args:
        meanwhile: called between looks.
    """
    while True:
        left, stops = agree(torch.tensor([float(not done()), float(asked())])).tolist()
        if stops or not left:
            return not stops
        meanwhile()
        time.sleep(POLL)


class Scoring:
    """The jobs of a run. Rank 0 has them; the other ranks only wait with it.

    Args:
        names: of the scores that `check_scoring` found.
        script: scripts/evaluate.py.
    """

    def __init__(self, config: RunConfig, names: Sequence[str], script: Path, journal: Journal, main: bool = True):
        self.config, self.script, self.journal, self.main = config, script, journal, main
        self.run_dir, self.names, self.best = Path(config.run_dir), set(names), config.evaluate.best or names[0]
        self.beside = config.evaluate.gpus is not None
        self._process: Beside | None = None
        self._began = self._told = 0.0
        self._queue: list[int] = []  # steps; the first one's job is running if any is
        if main:
            put_back_best(self.run_dir)
            for step, job in jobs_of(self.run_dir).items():
                if job["outcome"] != "done" and (self.run_dir / f"model-step-{step}").exists():
                    self._queue.append(step)
            self._tidy()

    @property
    def full(self) -> bool:
        """Whether another export would have to wait behind too many. Of rank 0."""
        return len(self._queue) > WAITING

    def leave_out(self, step: int) -> None:
        """Notes that a step is not scored, because jobs take longer than the steps between them."""
        if self.main:
            behind = f"{WAITING} exports wait behind one already: scoring takes longer than evaluate.every steps"
            self.journal.scored(step, {}, f"not scored, {behind}")

    def submit(self, step: int, passing: bool) -> None:
        """Adds a job for `model-step-N`, unless there was one.

        Args:
            passing: the export is for this alone, and goes when it is no longer needed.
        """
        if not self.main or step in jobs_of(self.run_dir):
            return
        with self._harmless(step):
            write_job(self.run_dir, step, {"passing": passing, "outcome": None})
            self._queue.append(step)
        if passing and step not in self._queue:  # no job to be removed with
            with suppress(OSError):
                remove_exports(self.run_dir, step)
        self.poll()

    def score_result(self, step: int, asked: Callable[[], bool]) -> bool:
        """Scores `model/`, as it is after a step, and puts that into its card; what waits comes before. One whose
        scores lack a name that the run has by now is scored again. Returns as `wait` does. A collective."""
        if self.main and self._lacks_scores(step):
            with self._harmless(step), made_aside(self.run_dir / f"model-step-{step}") as aside:
                link_files(self.run_dir / "model", aside)
            with suppress(OSError):
                (folder_of(self.run_dir, step) / JOB).unlink(missing_ok=True)
            self.submit(step, passing=True)
        is_done = self.wait(asked)
        if self.main and (scores := read_scores(folder_of(self.run_dir, step) / "scores.json")):
            self._tell_cards("", scores)
        return is_done

    def _lacks_scores(self, step: int) -> bool:
        """Whether there was no job of a step, or it was done when the run had other scores."""
        job = jobs_of(self.run_dir).get(step)
        scores = read_scores(folder_of(self.run_dir, step) / "scores.json")
        return job is None or (job["outcome"] == "done" and not scores.keys() >= self.names)

    def poll(self) -> None:
        """Begins, ends and tells what there is to; takes no time."""
        while self._queue:
            step = self._queue[0]
            if self._process is None:
                with self._harmless(step):
                    self._begin(step)
            if self._process is not None:
                status = self._process.poll()
                if status is None and time.monotonic() - self._began < 3600 * self.config.evaluate.max_hours:
                    return
                self._process.end()
                self._process = None
                with self._harmless(step):
                    self._finish(step, status)
            self._queue.pop(0)
            self._tidy()

    def wait(self, asked: Callable[[], bool], meanwhile: Callable[[], None] = lambda: None) -> bool:
        """Returns True when all jobs are done; False, with the running one ended, when a rank was asked to stop before.
        A collective.

        Args:
            asked: whether this rank was asked to stop.
            meanwhile: called between looks.
        """

        def done() -> bool:
            self.poll()
            return not self._queue

        def tell() -> None:
            meanwhile()
            if self._queue and time.monotonic() - self._told > TELL:
                self._tell()

        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._told = time.monotonic()
        if not done():
            self.journal.say(f"waiting for the scores of step {', '.join(map(str, self._queue))}")
        if wait_for(done, asked, tell):
            return True
        self.close()
        return False

    def close(self) -> None:
        """Ends the running job, which has no outcome then."""
        if self._process is not None:
            self._process.end()
            self._process = None

    def _tell(self) -> None:
        """Says what is waited for, and what it said last."""
        self._told, step = time.monotonic(), self._queue[0]
        more = f", {len(self._queue) - 1} wait behind it" if self._queue[1:] else ""
        said = last_line(folder_of(self.run_dir, step) / LOG) or "it has said nothing yet"
        self.journal.say(f"scoring step {step} for {duration(self._told - self._began)}{more}: {said}")

    def _begin(self, step: int) -> None:
        folder, model = folder_of(self.run_dir, step), self.run_dir / f"model-step-{step}"
        (folder / "scores.json").unlink(missing_ok=True)  # perhaps not whole, or of other packages: made again
        self._began = time.monotonic()
        words = commands(self.config, self.script, model, folder)
        self._process = Beside(words, folder / LOG, environment(self.config.evaluate, self.script))

    def _finish(self, step: int, status: int | None) -> None:
        """Takes the scores of a job that has ended, or was after `max_hours` (status None)."""
        folder, failed = folder_of(self.run_dir, step), ""
        scores = read_scores(folder / "scores.json")
        if status != 0 or not scores:
            reason = f"not done in {self.config.evaluate.max_hours:g} hours"
            if status is not None:
                reason = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
            said = last_line(folder / LOG) or "it said nothing"
            failed = f"scoring failed ({reason}): {said}; all of it in {folder / LOG}"
        self.journal.scored(step, scores, failed)
        if scores:
            self._tell_cards(f"-step-{step}", scores)
            if keep_best(self.run_dir, step, self.best, scores):
                self.journal.say(f"step {step}: the best so far by {self.best}, kept in {self.run_dir / BEST}")
        job = jobs_of(self.run_dir)[step]
        write_job(self.run_dir, step, {**job, "outcome": failed or "done"})

    def _tell_cards(self, ending: str, scores: dict[str, dict]) -> None:
        """Puts scores into the cards of a model and of the adapter that it is merged of, if any."""
        for folder in (self.run_dir / f"{kind}{ending}" for kind in ("model", "adapter")):
            try:
                if folder.exists():
                    add_scores(folder, scores)
            except Exception as error:  # a card costs no scores
                self.journal.say(f"warning: the card of {folder.name} gets no scores ({error})")

    def _tidy(self) -> None:
        """Removes exports that were made for their scores alone: not those of the best, of jobs to be done, and of the
        last one when it failed, which a person may want to try."""
        jobs = jobs_of(self.run_dir)
        kept = {read_best(self.run_dir).get("step"), *self._queue}
        kept |= {step for step in list(jobs)[-1:] if jobs[step]["outcome"] != "done"}
        for step, job in jobs.items():
            if job["passing"] and step not in kept:
                try:
                    remove_exports(self.run_dir, step)
                except OSError as error:
                    self.journal.say(f"warning: what was exported after step {step} cannot be removed ({error})")

    @contextmanager
    def _harmless(self, step: int) -> Iterator[None]:
        """An error in it ends no run: it is told, and the outcome of the job."""
        try:
            yield
        except Exception as error:
            failed = f"{type(error).__name__}: {error}"
            self.journal.say(f"warning: step {step} has no scores ({failed})")
            with suppress(Exception):
                write_job(self.run_dir, step, {**jobs_of(self.run_dir)[step], "outcome": failed})


def last_line(path: Path) -> str:
    """What a log says last, at most 200 characters; progress bars write over their line."""
    with suppress(OSError):
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            lines = file.read().decode(errors="replace").replace("\r", "\n").splitlines()
        return next((line.strip()[-200:] for line in reversed(lines) if line.strip()), "")
    return ""
