"""Scores a model folder by lmms-eval: what is asked for is looked at first, then answered, then written."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import sys
from argparse import Namespace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch

from building.inputs import list_input
from evaluation.engines import Engine, load_processor, start_engine
from evaluation.metrics import METRICS
from evaluation.questions import Question, check_any_asked, read_questions
from evaluation.scores import Sample, Score, ScoreFolder, model_hash, open_scores, score_name
from llava_next.data.inputs.samples import common_reasons
from llava_next.model.folders.adapters import CONFIG, read_adapter
from llava_next.model.folders.check import ModelFolder
from llava_next.model.folders.check_adapter import check_any
from llava_next.repositories import resolve_folder
from llava_next.training.devices.parallel import finish
from llava_next.versions import install

BATCH_SIZE = 8  # prompts of 3,000 tokens each, with their keys and values, beside a 7B model in 40 GB
CHECKED = 100  # samples that are read to see whether such can be asked
TEMPLATE_CHECKS = ("chat template", "chats", "terminator")  # that a template of its own fails


def score(args: Namespace) -> None:
    """Scores as the command line asks (`scripts/evaluate.py`). Raises ValueError for what cannot be asked so."""
    folder = check_arguments(args)
    check_model(folder, args.keep_template)
    import_lmms_eval()
    with quiet():
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list

    # the first process to end waits for the others
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=24))
    on_cpu = args.device == "cpu" or not torch.cuda.is_available()  # several processes without a GPU must be told
    accelerator = Accelerator(cpu=on_cpu, kwargs_handlers=[patience])
    device = accelerator.device if accelerator.num_processes > 1 or args.device is None else torch.device(args.device)
    base = ModelFolder(read_adapter(folder).base if (folder / CONFIG).exists() else folder)
    # read by one process, known to all
    hashes = [model_hash(folder) if accelerator.is_main_process else None]
    out = open_scores(args.out, args.model, broadcast_object_list(hashes)[0], args.backend, base)
    engine = start_engine(args.backend, folder, device)
    tasks = load_tasks(args, engine, accelerator.is_main_process)
    for task in tasks:
        out.check_limit(task.config.task, args.limit)
    with out.hold() if accelerator.is_main_process else contextlib.nullcontext():
        score_tasks(args, tasks, engine, base, out, accelerator)
    if accelerator.is_main_process:
        print(f"\n{out.row()}\n{args.out / 'scores.json'}")
    if accelerator.num_processes > 1:  # one that ends while others write would have the launcher end them too
        finish(accelerator)


def load_tasks(args: Namespace, engine: Engine, is_main_process: bool) -> list:
    """lmms-eval's tasks, with their data, that the command line asks for. Raises ValueError."""
    from evaluation.tasks import OwnQuestions

    if args.tasks:
        return named_tasks(args)
    questions = own_questions(args, engine.processor, is_main_process)
    return [OwnQuestions(score_name(args), questions, METRICS[args.metric], args.max_new_tokens)]


def score_tasks(args: Namespace, tasks: list, engine: Engine, base: ModelFolder, out: ScoreFolder, accelerator) -> None:
    """Scores tasks one after the other, each written when it is done. Raises ValueError."""
    from evaluation.answers import Answers
    from evaluation.model import LlavaNext, SampleError

    made_by = {key: value for key, value in out.head.items() if key != "model"}
    answers = Answers(args.out / "answers", made_by, accelerator.process_index)
    lm = LlavaNext(engine, accelerator, answers, base, args.batch_size or BATCH_SIZE)
    for task in tasks:
        try:
            found = evaluate_task(lm, task, args.limit, args.out)
        except SampleError as error:
            raise ValueError(f"{error}. Nothing of this task is written") from error
        if accelerator.is_main_process:
            entry = out.add(found)
            print(f"{found.name}: {entry['metric']} {entry['value']:.4f} of {entry['samples']} samples", flush=True)


def check(args: Namespace) -> list[str]:
    """Names of the scores that a command line makes, looked at as far as that needs no weights.

    Args:
        args: its model may be any with the chat template of the one that is to be scored.

    Raises:
        ValueError: what cannot be asked.
    """
    folder, seen, count = check_arguments(args), os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count()
    if (args.device or "").startswith("cuda") and count < len((seen or "0").split(",")):
        raise ValueError(
            f"--device {args.device}: of the GPUs {seen or 0} (CUDA_VISIBLE_DEVICES; evaluate.devices of a run) only "
            f"{count} are there: give others, or cpu"
        )
    if args.tasks or args.metric:  # an environment where it cannot be imported is found out here
        import_lmms_eval()
    if args.tasks:
        return [task.config.task for task in named_tasks(args)]
    args.limit = min(args.limit or CHECKED, CHECKED)
    own_questions(args, load_processor(folder), True)
    return [score_name(args)]


def import_lmms_eval() -> None:
    """Imports it, without its notes. It imports a package `evaluate`: this folder's script must not be in the way."""
    scripts = str(Path(__file__).parents[1])
    sys.path[:] = [*(path for path in sys.path if path != scripts), scripts]
    with quiet():
        import evaluation.model
        import evaluation.tasks  # noqa: F401


def named_tasks(args: Namespace) -> list:
    """lmms-eval's tasks with their data. Raises ValueError."""
    with quiet():
        from evaluation.tasks import Tasks

    manager = Tasks(args.data, args.own_tasks)
    return [manager.load(name) for name in manager.leaves(args.tasks.split(","))]


def has_lmms_eval() -> bool:
    return importlib.util.find_spec("lmms_eval") is not None


def check_arguments(args: Namespace) -> Path:
    """The model folder, once all else is known to go together. Raises ValueError."""
    if args.tasks and args.metric:
        raise ValueError("--tasks and --metric: benchmarks have metrics of their own; score --json in a run of its own")
    if not args.tasks:
        score_name(args)
    if (args.tasks or args.metric) and not has_lmms_eval():
        raise ValueError(f"--tasks and --metric need lmms-eval: {install('eval')}")
    if args.out is None or args.out.suffix == ".json":
        raise ValueError("--out: give a folder for scores.json, samples and row")
    if args.data is not None and not args.data.is_dir():
        raise ValueError(f"--data {args.data} is not a folder")
    return resolve_folder(args.model)


def check_model(folder: Path, keep_template: bool) -> None:
    """Refuses a folder that scripts/check_export.py finds something wrong with. Raises ValueError."""
    findings = check_any(folder)
    failed = [finding for finding in findings if not finding.ok]
    for finding in failed:
        print(finding, file=sys.stderr)
    if keep_template:
        failed = [finding for finding in failed if finding.check not in TEMPLATE_CHECKS]
    if failed:
        raise ValueError(
            f"--model {folder} fails {len(failed)} of {len(findings)} checks, see above (scripts/check_export.py): a "
            f"score of it would mean nothing. First: {failed[0].check}: {failed[0].text}"
        )


def own_questions(args: Namespace, processor, is_main_process: bool) -> list[Question]:
    """The questions of a user's file; what is left out is said. Raises ValueError: none."""
    listing = list_input(args)
    complete = METRICS[args.metric].complete if args.metric else lambda question, record: question
    questions, left_out = read_questions(listing, args.images, processor, args.limit, complete)
    if is_main_process:
        for line in common_reasons(left_out):
            print(f"left out: {line}")
    check_any_asked(questions, left_out)
    return questions


def evaluate_task(lm, task, limit: int, out: Path) -> Score | None:
    """The score of a task on the main process, None on others."""
    from lmms_eval.evaluator import simple_evaluate

    name = task.config.task
    # what lmms-eval's aggregations look at
    options = SimpleNamespace(process_with_media=False, output_path=str(out), reasoning_tags=None)
    results = simple_evaluate(
        model=lm,
        tasks=[task],
        task_manager=object(),
        limit=limit or None,
        batch_size=lm.batch_size,
        bootstrap_iters=0,
        cli_args=options,
        process_docs_parallel=1,
    )
    return None if results is None else read_score(name, results, list(task.aggregation()))


def read_score(name: str, results: dict, order: list[str]) -> Score:
    """What lmms-eval's results say about a task.

    Args:
        order: its metrics; the main one is the published scores' or the first that is a number.

    Raises:
        ValueError: no metric is a number.
    """
    from evaluation.published import benchmark

    numbers: dict[str, float] = {}
    for key, value in results["results"][name].items():
        metric = key.partition(",")[0]
        if metric in order and not isinstance(value, bool):
            with contextlib.suppress(TypeError, ValueError):  # MathVista's is a text
                numbers.setdefault(metric, float(value))
    known = benchmark(name)
    metric = (
        known[1]["metric"]
        if known and known[1]["metric"] in numbers
        else next((m for m in order if m in numbers), None)
    )
    if metric is None:
        raise ValueError(
            f"--tasks: {name} gives no score here, only {', '.join(order)}: what it wrote for a server or a judge lies "
            "in the --out folder"
        )
    by_id = {}
    for logged in results["samples"][name]:  # once for each filter
        if metric in logged:
            by_id.setdefault(logged["doc_id"], logged)
    samples = [read_sample(by_id[number], metric) for number in sorted(by_id)]
    is_lower_better = results.get("higher_is_better", {}).get(name, {}).get(metric) is False
    return Score(name, numbers.pop(metric), metric, samples, numbers, is_lower_better)


def read_sample(logged: dict, metric: str) -> Sample:
    """A sample as lmms-eval logs it."""
    document, answer, value = logged["doc"], logged["filtered_resps"][0], logged[metric]
    names = (document.get(key) for key in ("id", "question_id", "qid", "index"))
    named = next((name for name in names if name is not None), logged["doc_id"])
    if isinstance(value, dict):
        value = value.get("score")
    return Sample(
        id=str(named),
        question=next((text for text in logged["arguments"] if isinstance(text, str)), ""),
        answer=answer if isinstance(answer, str) else json.dumps(answer, default=str),
        target=json.loads(json.dumps(logged["target"], default=str)),
        score=float(value) if isinstance(value, int | float) else None,
    )


@contextlib.contextmanager
def quiet():
    """Without the notes that packages print when they are imported."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("lmms-eval").setLevel(logging.ERROR)
        yield
