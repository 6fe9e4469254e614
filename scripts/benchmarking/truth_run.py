"""Runs as users start them, 20 steps each, of a tiny model on coloured pictures that are made here.

The launch file is that of one GPU. The reference is the same command with no GPU to be seen.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from benchmarking.cards import ROOT
from llava_next.model.folders.compose import compose, random_part
from llava_next.model.folders.dry import DEMO_PINPOINTS, corpus_texts, demo_configs, train_tokenizer

SAMPLES, BATCH, EPOCHS, STEPS = 80, 8, 2, 20
TEMPLATE, SEED = "mistral", 0
CPU_BOUND, BF16_BOUND = 1e-3, 3e-2  # of a step's loss: float32 against float32, bfloat16 against float32
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "grey": (128, 128, 128)}
PATIENCE = 240.0  # seconds for a run


def make_data(folder: Path) -> dict[str, Path]:
    """A tiny model and the shards of pictures of all shapes, each of one colour: `model` and `shards`."""
    rng, records = np.random.default_rng(SEED), []
    (folder / "images").mkdir(parents=True)
    for number in range(SAMPLES):
        name = list(COLOURS)[rng.integers(len(COLOURS))]
        width, height = (int(x) for x in rng.integers(20, 150, 2))
        noise = rng.integers(-20, 21, (height, width, 3))
        pixels = np.clip(np.array(COLOURS[name]) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        said = [{"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": f"It is {name}."}]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": said})
    (folder / "train.json").write_text(json.dumps(records))
    vision, llm = demo_configs()
    tokenizer = train_tokenizer(corpus_texts(records, TEMPLATE), vocab_size=400)
    parts = (random_part(vision, SEED), random_part(llm, SEED))
    compose(*parts, tokenizer, TEMPLATE, folder / "model", DEMO_PINPOINTS, dtype=torch.float32)
    command = ["data_tools/build_shards.py", "--json", folder / "train.json", "--images", folder / "images"]
    command += ["--out", folder / "shards", "--model", folder / "model", "--workers", "0", "--codec", "webp"]
    wait(start([sys.executable, *command], folder / "shards.log"), folder / "shards.log")
    return {"model": folder / "model", "shards": folder / "shards"}


def start(command: list, log: Path, **environment: str) -> subprocess.Popen:
    """Starts a command in a session of its own; what it says goes to `log`."""
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **environment}
    variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    words = [str(word) for word in command]
    with log.open("ab") as out:
        return subprocess.Popen(words, cwd=ROOT, env=variables, stdout=out, stderr=out, start_new_session=True)


def wait(process: subprocess.Popen, log: Path) -> None:
    """Until a command has ended. Raises AssertionError with its last words when it failed or took too long."""
    try:
        status = process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        kill(process)
        status = f"none after {PATIENCE:.0f} s"
    if status != 0:
        raise AssertionError(f"exit status {status}: {log.read_text(errors='replace')[-1500:]}")


def kill(process: subprocess.Popen) -> None:
    """Ends a command's whole session at once."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def train(data: dict[str, Path], run_dir: Path, device: torch.device, *options: str, launch: tuple[str, ...] = ()):
    """Starts the training script by Accelerate's launcher with the file for one GPU.

    Args:
        options: of the script; launch: of the launcher.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", "accelerate_configs/gpu1.yaml", "--main_process_port", "0", *launch]
    command += ["scripts/finetune.py", "--config", "scripts/recipes/digits/finetune.yaml", "--run_dir", run_dir]
    command += ["--model", data["model"], "--data.sources", data["shards"], "--data.batch_size", BATCH]
    command += ["--data.epochs", EPOCHS, "--data.token_budget", "auto", "--data.tile_budget", "auto"]
    command += ["--deterministic", "true", "--log_every", "1", *options]
    hidden = {} if device.type == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    return start(command, run_dir.with_suffix(".log"), **hidden)


def finish(process: subprocess.Popen, run_dir: Path) -> list[float]:
    """Waits for a run. Returns the loss of each of its steps."""
    wait(process, run_dir.with_suffix(".log"))
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    if [record["step"] for record in records] != list(range(1, STEPS + 1)):
        raise AssertionError(f"{run_dir} has steps {[record['step'] for record in records]}, not 1 to {STEPS}")
    return [record["loss"] for record in records]


def off_by(losses: list[float], reference: list[float]) -> float:
    """The largest relative distance of a step's loss; one below 0.1 counts as 0.1."""
    return max(abs(a - b) / max(b, 0.1) for a, b in zip(losses, reference, strict=True))


def check_run(device: torch.device) -> str:
    """20 steps on the device in float32 and, as the launch file has it, bfloat16 have the losses of the CPU."""
    with tempfile.TemporaryDirectory(prefix="truth-") as scratch:
        folder = Path(scratch)
        data, exact = make_data(folder), ("--mixed_precision", "no")
        runs = {"cpu": (torch.device("cpu"), exact), "float32": (device, exact), "bfloat16": (device, ())}
        started = {name: train(data, folder / name, where, launch=launch) for name, (where, launch) in runs.items()}
        try:
            losses = {name: finish(process, folder / name) for name, process in started.items()}
        finally:
            for process in started.values():
                if process.poll() is None:
                    kill(process)
    full, half = off_by(losses["float32"], losses["cpu"]), off_by(losses["bfloat16"], losses["cpu"])
    line = (
        f"{STEPS} steps, loss {losses['cpu'][0]:.3f} to {losses['cpu'][-1]:.3f}; from the CPU's {full:.1e} in float32 "
        f"(bound {CPU_BOUND:g}), {half:.1e} in bfloat16 (bound {BF16_BOUND:g})"
    )
    if not (full <= CPU_BOUND and half <= BF16_BOUND):
        raise AssertionError(line)
    return line


def check_resume(device: torch.device) -> str:
    """Killed after its first checkpoint and started again, a run has every bit of one that was left alone."""
    with tempfile.TemporaryDirectory(prefix="truth-") as scratch:
        folder, often = Path(scratch), ("--checkpoint.every", "2")
        data = make_data(folder)
        whole = finish(train(data, folder / "whole", device, *often), folder / "whole")
        killed = train(data, folder / "killed", device, *often)
        deadline = time.monotonic() + PATIENCE
        while killed.poll() is None and not list((folder / "killed" / "checkpoints").glob("step-*")):
            if time.monotonic() > deadline:
                kill(killed)
                raise AssertionError(f"no checkpoint: {(folder / 'killed.log').read_text(errors='replace')[-1500:]}")
            time.sleep(0.005)
        if killed.poll() is not None:
            raise AssertionError("the run had ended before it was killed")
        kill(killed)
        lines = (folder / "killed" / "metrics.jsonl").read_text().count("\n")
        again = finish(train(data, folder / "killed", device, *often), folder / "killed")
        if again != whole:
            first = next(step for step, pair in enumerate(zip(again, whole, strict=True), 1) if pair[0] != pair[1])
            raise AssertionError(
                f"killed after step {lines}, the loss of step {first} is another one: {again}, {whole}"
            )
        files = sorted(path.name for path in (folder / "whole" / "model").glob("*.safetensors"))
        for name in files:
            if len({digest(folder / run / "model" / name) for run in ("whole", "killed")}) > 1:
                raise AssertionError(f"the losses are the same, the weights in {name} are not")
        answer = ask(folder / "whole" / "model", device)
    return f"killed after step {lines} of {STEPS}: every loss and weight the same bits; the export answers {answer!r}"


def digest(path: Path) -> str:
    """sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def ask(model_dir: Path, device: torch.device) -> str:
    """What stock transformers answers about a red picture with an exported model."""
    model = AutoModelForImageTextToText.from_pretrained(model_dir, dtype=torch.float32).to(device).eval()
    processor = AutoProcessor.from_pretrained(model_dir)
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which colour?"}]}
    prompt = processor.apply_chat_template([turn], add_generation_prompt=True)
    picture = Image.new("RGB", (70, 40), COLOURS["red"])
    inputs = processor(images=picture, text=prompt, return_tensors="pt", add_special_tokens=False).to(device)
    with torch.no_grad():
        answered = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return processor.decode(answered[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
