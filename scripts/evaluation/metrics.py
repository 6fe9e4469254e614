"""Metrics of a user's own questions: what each wants of a record, and the score of an answer by lmms-eval's code."""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from dataclasses import dataclass, replace

from evaluation.questions import Question
from llava_next.data.format.tar import BadSample

ANNOTATORS = 10  # of a VQA question; an answer that three of the others gave is right
FEWEST_ANNOTATORS = 4  # with fewer, no answer could be right in full
_OPTION = re.compile(r"^\s*\(?([A-Z])[.):]\s*(\S.*?)\s*$", re.M)


@dataclass(frozen=True)
class Metric:
    """Scores one answer.

    Attributes:
        name: in scores.json.
        complete: adds `answers` and `choices` of a record to its question; raises BadSample.
        score: answer and question -> 0 to 1.
    """

    name: str
    complete: Callable[[Question, dict], Question]
    score: Callable[[str, Question], float]


def right_answers(question: Question, record: dict) -> Question:
    """Right answers: the record's list `answers`, or the one of the conversation. Raises BadSample."""
    given = record.get("answers")
    if given is None:
        given = [question.right]
    if not isinstance(given, list) or not given or not all(isinstance(text, str) for text in given):
        raise BadSample("answers is no list of texts")
    return replace(question, answers=tuple(text.strip() for text in given))


def annotators(question: Question, record: dict) -> Question:
    """Answers of several people; one answer counts as if all had given it. Raises BadSample."""
    question = right_answers(question, record)
    if len(question.answers) == 1:
        return replace(question, answers=question.answers * ANNOTATORS)
    if len(question.answers) < FEWEST_ANNOTATORS:
        raise BadSample(
            f"fewer than {FEWEST_ANNOTATORS} answers, of which none could be right in full: give one or ten"
        )
    return question


def options(question: Question, record: dict) -> Question:
    """The options: the record's `choices` (a list, or an object letter -> text), or the question's lines "A. text".

    Raises:
        BadSample: fewer than two, or the right answer is none of them.
    """
    given = record.get("choices")
    if isinstance(given, list):
        given = dict(zip(string.ascii_uppercase, map(str, given), strict=False))
    if given is None:
        given = dict(_OPTION.findall(question.text))
    if not isinstance(given, dict) or len(given) < 2:
        raise BadSample('no choices: neither a list "choices" in the record, nor lines "A. text" in the question')
    question = replace(question, answers=(question.right,), choices={str(k): str(v).strip() for k, v in given.items()})
    if chosen(question.right, question, letter_of=_alone) is None:
        raise BadSample("the right answer is none of the choices")
    return question


def exact(answer: str, question: Question) -> float:
    """1 for the same text."""
    from lmms_eval.api.metrics import exact_match_hf_evaluate

    return max(float(exact_match_hf_evaluate([answer], [right])["exact_match"]) for right in question.answers)


def vqa(answer: str, question: Question) -> float:
    """VQA accuracy: min(1, others who gave it / 3), averaged over the annotators left out in turn."""
    from lmms_eval.tasks.textvqa.utils import textvqa_process_results

    return float(
        textvqa_process_results({"answers": list(question.answers), "question_id": 0}, [answer])["exact_match"]
    )


def anls(answer: str, question: Question) -> float:
    """Average normalised Levenshtein similarity: 0 below one half."""
    from lmms_eval.api.metrics import anls

    return float(anls(references=list(question.answers), predictions=[answer])["anls"])


def relaxed(answer: str, question: Question) -> float:
    """1 for a number within 5 % of the right one, or for the same words."""
    from lmms_eval.tasks.chartqa.utils import relaxed_correctness

    return max(float(relaxed_correctness(answer, right)) for right in question.answers)


def choice(answer: str, question: Question) -> float:
    """1 when the option that an answer names is the one that the right answer names."""
    from lmms_eval.tasks._task_utils.mcq_extract import extract_mcq_answer

    right = chosen(question.right, question, letter_of=_alone)
    return float(chosen(answer, question, letter_of=extract_mcq_answer) == right)


def chosen(answer: str, question: Question, letter_of: Callable[[str, list[str]], str]) -> str | None:
    """Letter of the option that an answer names: by its whole text; then, where the question shows letters or the right
    answer is one, by its letter; then as the only option whose text stands in it. None: no option, or several.

    Args:
        letter_of: answer and letters -> the letter in it, "" for none.
    """
    said = answer.strip().strip(".").casefold()
    texts = {letter: text.strip(".").casefold() for letter, text in question.choices.items()}
    if same := [letter for letter, text in texts.items() if text == said]:
        return same[0]
    if question.right in texts or _OPTION.search(question.text):
        return letter_of(answer, list(texts)) or None
    named = [letter for letter, text in texts.items() if re.search(rf"(?<!\w){re.escape(text)}(?!\w)", said)]
    return named[0] if len(named) == 1 else None


def _alone(text: str, letters: list[str]) -> str:
    """A right answer that is a letter."""
    return text if text in letters else ""


METRICS = {
    "exact": Metric("exact_match", right_answers, exact),
    "vqa": Metric("vqa_accuracy", annotators, vqa),
    "anls": Metric("anls", right_answers, anls),
    "relaxed": Metric("relaxed_accuracy", right_answers, relaxed),
    "choices": Metric("choice_accuracy", options, choice),
}
