"""What is asked: lmms-eval's tasks by name, from local data where there are some, and a user's own questions as one."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import datasets
from datasets.exceptions import DatasetsError
from lmms_eval.api.task import ConfigurableTask
from lmms_eval.tasks import TaskManager, get_task_dict
from tenacity import RetryError, stop_after_attempt

from evaluation.metrics import Metric
from evaluation.model import CHAT
from evaluation.published import RULED, needs_judge
from evaluation.questions import Question

PROMPTS_OF = "llava_hf"  # whose prompts a task takes where it has several
NAMES_SHOWN = 5
JUDGE_KEYS = ("OPENAI_API_KEY", "AZURE_API_KEY")


class Tasks(TaskManager):
    """lmms-eval's tasks, their data from a folder where it has them.

    Args:
        data: folder with data sets as they lie on the hub, `DATA/ORG/NAME/...`; None: the hub and its cache only.
        own: folder with more tasks, as YAML files of lmms-eval.
    """

    def __init__(self, data: Path | None = None, own: Path | None = None):
        super().__init__("ERROR", include_path=None if own is None else f"{own}/", model_name=PROMPTS_OF)
        self.data = data
        # once: the hub's client tries again by itself where that can help
        ConfigurableTask.download.retry.stop = stop_after_attempt(1)
        if data is not None:
            # tasks load data sets by themselves too (GQA its pictures): one place that all calls go through
            datasets.load_dataset = partial(_load_dataset, datasets.load_dataset, data)

    def leaves(self, names: Sequence[str]) -> list[str]:
        """The tasks of these names, groups taken apart. Raises ValueError: a name that there is not, with near ones."""
        found: list[str] = []
        for name in names:
            if name not in self.task_index:
                near = difflib.get_close_matches(name, self.all_tasks, NAMES_SHOWN, 0.5)
                raise ValueError(
                    f"--tasks: {name!r} is no task of lmms-eval"
                    + (f"; the nearest names are {', '.join(near)}" if near else "")
                )
            parts = [name]
            if not (self._name_is_task(name) or self._name_is_python_task(name)):
                parts = self.task_index[name]["task"]
                parts = self._get_config(name)["task"] if parts == -1 else parts
                parts = self.leaves([part if isinstance(part, str) else part["task"] for part in parts])
            found += [part for part in parts if part not in found]
        return found

    def load(self, name: str) -> ConfigurableTask:
        """A task with its data.

        Raises:
            ValueError: the data are not here and cannot be reached; says what to fetch and where to put it.
        """
        path = self._get_config(name).get("dataset_path")
        try:
            task = get_task_dict([name], self)[name]
        except (RetryError, OSError, DatasetsError) as error:
            if path is None:
                raise ValueError(f"--tasks: {name} cannot be loaded: {_cause(error)}") from error
            place = self.data or "DATA"
            raise ValueError(
                f"--tasks: {name} needs the data set {path}: it is not here and cannot be fetched ({_cause(error)}). "
                f"Where there is a network: hf download {path} --repo-type dataset --local-dir {place}/{path}; then "
                f"give --data {place}"
            ) from error
        check_judge(name, list(task.aggregation()))
        return task


def check_judge(name: str, metrics: Sequence[str]) -> None:
    """Refuses a task that asks a judge nobody has a key for: it would guess. Raises ValueError."""
    if needs_judge(name, metrics) and not any(os.environ.get(key) for key in JUDGE_KEYS):
        raise ValueError(
            f"--tasks: {name} has answers read by a judge at OpenAI, and without a key guesses what rules cannot read: "
            f"set {' or '.join(JUDGE_KEYS)}, or take a task that needs none (mmbench_en{RULED} for MMBench)"
        )


def _load_dataset(load, data: Path, path: str, *args, **kwargs):
    """`datasets.load_dataset` of a folder in `data`, where it has the data set."""
    if (data / path).is_dir():
        path = str(data / path)
        kwargs.pop("token", None)  # nobody is asked
    return load(path, *args, **kwargs)


def _cause(error: BaseException) -> str:
    """What went wrong at last, in one line."""
    if isinstance(error, RetryError):
        error = error.last_attempt.exception() or error
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


class OwnQuestions(ConfigurableTask):
    """A user's questions as a task of lmms-eval: prompts and pixels of training, one metric."""

    def __init__(self, name: str, questions: Sequence[Question], metric: Metric, most: int):
        self._questions = questions
        config = {
            "task": name,
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": lambda doc: doc["question"],
            "doc_to_target": lambda doc: doc["target"],
            "doc_to_visual": lambda doc: questions[doc["row"]].pictures(),
            "process_results": lambda doc, results: {metric.name: metric.score(results[0], questions[doc["row"]])},
            "metric_list": [{"metric": metric.name, "aggregation": "mean", "higher_is_better": True}],
            "generation_kwargs": {"max_new_tokens": most, "do_sample": False},
        }
        super().__init__(config=config)

    def download(self, dataset_kwargs: dict | None = None) -> None:
        documents = [
            {
                "row": row,
                "id": question.id,
                "question": question.shown,
                "target": question.right,
                CHAT: json.dumps(question.messages()),
            }
            for row, question in enumerate(self._questions)
        ]
        self.dataset = datasets.DatasetDict({"test": datasets.Dataset.from_list(documents)})
        self.dataset_no_image = self.dataset
