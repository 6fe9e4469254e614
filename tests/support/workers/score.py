"""Runs scripts/evaluate.py with several command lines in one process, and the metrics of own questions on cases.

    python score.py ORDERS.json OUT.json

ORDERS: `runs` (lists of arguments) and `metrics` (metric, answer, right answers, choices). OUT: `runs` (status, stdout,
stderr of each) and `metrics` (a score each).
"""

import contextlib
import io
import json
import runpy
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[3] / "scripts"


def run(arguments: list[str]) -> dict:
    out, err, status = io.StringIO(), io.StringIO(), 0
    sys.argv = ["evaluate.py", *arguments]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(str(SCRIPTS / "evaluate.py"), run_name="__main__")
        except SystemExit as end:
            status = int(end.code is not None and end.code != 0)
            print(end.code, file=sys.stderr)
    return {"status": status, "stdout": out.getvalue(), "stderr": err.getvalue()}


def score(metric: str, answer: str, answers: list[str], choices: dict[str, str]) -> float:
    from evaluation.metrics import METRICS
    from evaluation.questions import Question

    question = Question([], [], "?", None, answers[0], answers=tuple(answers), choices=choices)
    return METRICS[metric].score(answer, question)


if __name__ == "__main__":
    sys.path.insert(0, str(SCRIPTS))
    orders = json.loads(Path(sys.argv[1]).read_text())
    results = sys.argv[2]
    done = {"runs": [run(arguments) for arguments in orders["runs"]]}
    done["metrics"] = [score(*case) for case in orders["metrics"]]
    Path(results).write_text(json.dumps(done))
