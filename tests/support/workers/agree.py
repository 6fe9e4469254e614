"""Run under `accelerate launch`: what each of two ranks finds that are given texts, equal ones and different ones.

Usage: agree.py OUT_FOLDER. Each rank writes two outcomes: empty, or the error's message.
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist

from llava_next.training.devices.agreement import RanksDisagree, same_on_all_ranks


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    rank, outcomes = dist.get_rank(), []
    for texts in (("a", "a"), ("a", "b")):
        try:
            same_on_all_ranks("plan", "the same")
            same_on_all_ranks("configuration", texts[rank])
            outcomes.append("")
        except RanksDisagree as error:
            outcomes.append(str(error))
    (out / f"rank{rank}.json").write_text(json.dumps(outcomes))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
