"""scripts/finetune.py with a stub in the place of scripts/evaluate.py. Takes the arguments of finetune.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3] / "scripts"))
import finetune
from llava_next.training import scoring

scoring.POLL = 0.05
finetune.EVALUATE = Path(__file__).with_name("stub_evaluate.py")
finetune.main(finetune.RECIPES / "vicuna-7b" / "finetune.yaml")
