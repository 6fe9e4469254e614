"""scripts/finetune.py on a device whose memory ends in the forward of a chosen micro-batch.

python out_of_memory.py N [the arguments of finetune.py], micro-batches of the run being counted from 1
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[3] / "scripts"))
import finetune
from llava_next.model.forward.modeling import LlavaNextForConditionalGeneration

left = int(sys.argv.pop(1))
original = LlavaNextForConditionalGeneration.forward


def forward(self, *args, **kwargs):
    global left
    left -= 1
    if not left:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nand a page of advice")
    return original(self, *args, **kwargs)


LlavaNextForConditionalGeneration.forward = forward
finetune.main(finetune.RECIPES / "vicuna-7b" / "finetune.yaml")
