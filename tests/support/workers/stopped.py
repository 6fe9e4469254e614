"""scripts/finetune.py, asked to stop at a chosen moment: when the first validation or the first checkpoint begins.

python stopped.py loss|save [the arguments of finetune.py]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3] / "scripts"))
import finetune
from llava_next.training.checkpoints.saving import Checkpoints
from llava_next.training.validate import Validation
from llava_next.training.watch.stopping import StopRequest

requests = []


class Noted(StopRequest):
    def __init__(self):
        super().__init__()
        requests.append(self)


moment = sys.argv.pop(1)
kind = {"loss": Validation, "save": Checkpoints}[moment]
original = getattr(kind, moment)


def asked(*arguments):
    requests[0].ask("the test")
    return original(*arguments)


setattr(kind, moment, asked)
finetune.StopRequest = Noted
finetune.main(finetune.RECIPES / "vicuna-7b" / "finetune.yaml")
