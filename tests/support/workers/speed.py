"""Run under `accelerate launch`: steps of a model made faster and of a plain one, and what the first leaves on disk.

Usage: speed.py MODEL_FOLDER OUT_FOLDER compiled|float8
The fast model takes three steps, is saved as checkpoint and exported, and takes a fourth. A plain model takes four
steps from the start, another one the fourth from the checkpoint. Selective checkpointing in all of them.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from llava_next.model.folders.export import save_model
from llava_next.model.forward.modeling import LlavaNextForConditionalGeneration
from llava_next.training.checkpoints.saving import Checkpoints, state_tensors
from llava_next.training.devices import parallel
from llava_next.training.devices.float8 import use_float8
from llava_next.training.recipe.config import CheckpointConfig
from llava_next.training.recipe.optim import Rates, build_optimizer, freeze
from support.tracing import find_torchao, micro_batch, use_dense_attention


def build(accelerator, folder: Path, fast: str = ""):
    """A sharded model in training mode, and its optimizer."""
    model = LlavaNextForConditionalGeneration.from_pretrained(folder)
    use_dense_attention(model, pytest.MonkeyPatch())
    rates = Rates(*[1e-2] * 4)
    freeze(model, rates)
    if fast == "float8":
        find_torchao()
        use_float8(model, emulate=True)
    optimizer_of = partial(build_optimizer, rates=rates, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    model, optimizer = parallel.shard(accelerator, model, optimizer_of, "selective", compiled=fast == "compiled")
    return model.train(), optimizer.optimizer


def train(accelerator, model, optimizer, steps: range) -> list[float]:
    """This rank's loss of each step; rank 1 has no picture in the first."""
    losses = []
    for step in steps:
        images = (0,) if step == 0 and accelerator.process_index else (1, 2)
        loss = model(**micro_batch(10 * step + accelerator.process_index, 3, images)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main(folder: Path, out: Path, fast: str) -> None:
    torch.set_num_threads(1)
    os.environ["FSDP_ACTIVATION_CHECKPOINTING"] = "true"
    # the compiler behind changes nothing in what is traced, and costs seconds a graph
    parallel.compile_layers = partial(parallel.compile_layers, backend="eager")
    accelerator = parallel.build_accelerator()
    model, optimizer = build(accelerator, folder, fast)
    result = {"fast": train(accelerator, model, optimizer, range(3))}
    checkpoints = Checkpoints(out / "checkpoints", model, optimizer, CheckpointConfig(asynchronous=False))
    checkpoints.save(3, {})
    save_model(model, out / "model", dtype=torch.float32, is_main_process=accelerator.is_main_process)
    result["fast"] += train(accelerator, model, optimizer, range(3, 4))
    result["graphs"], result["breaks"] = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    names = {n: str(t.dtype) for n, t in state_tensors(model, optimizer).items()}

    plain, optimizer = build(accelerator, folder)
    result["plain"] = train(accelerator, plain, optimizer, range(4))
    result["same_names"] = names == {n: str(t.dtype) for n, t in state_tensors(plain, optimizer).items()}

    resumed, optimizer = build(accelerator, folder)
    checkpoints = Checkpoints(out / "checkpoints", resumed, optimizer, CheckpointConfig())
    accelerator.wait_for_everyone()
    checkpoints.load(out / "checkpoints" / "step-00000003")
    result["resumed"] = train(accelerator, resumed, optimizer, range(3, 4))
    (out / f"rank{accelerator.process_index}.json").write_text(json.dumps(result))
    parallel.finish(accelerator)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
