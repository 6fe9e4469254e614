"""Checkpoints: whole or not there, bit-exact to resume, readable at any world size, and never in the way."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from llava_next.training.checkpoints.recovery import complete_checkpoints, read_manifest
from support.faults import S3Server
from support.launching import forked, wait_for_all
from support.runs import losses
from support.tracing import find_torchao


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Trains the small model of workers/checkpoints.py: `train(folder, world=2, steps=7, every=3, ...)`."""
    folder = tmp_path_factory.mktemp("train")
    asked, answered = folder / "asked", folder / "answered"
    for pipe in (asked, answered):
        os.mkfifo(pipe)
    worker = forked("tests/support/workers/checkpoints.py", said=answered, hears=asked)
    with asked.open("w") as jobs, answered.open() as answers:

        def run(folder: Path, **job) -> dict:
            job = {"world": 2, "steps": 7, "every": 3, "folder": str(folder), **job}
            print(json.dumps(job), file=jobs, flush=True)
            return json.loads(answers.readline())

        yield run
    assert wait_for_all([worker], 30) == 0


def finished(answer: dict) -> dict:
    """Rank 0's answer of a run that came to its end; all ranks hold the same weights."""
    assert all("digest" in rank for rank in answer["ranks"]), answer
    assert len({rank["digest"] for rank in answer["ranks"]}) == 1
    return answer["ranks"][0]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_resume_is_bit_exact_and_random_numbers_go_on(train, tmp_path, world):
    whole = finished(train(tmp_path / "whole", world=world))
    finished(train(tmp_path / "parts", world=world, steps=4))
    resumed = finished(train(tmp_path / "parts", world=world))
    assert (resumed["begun"], resumed["digest"]) == (3, whole["digest"])
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    # drawn once before the checkpoint at step 3 and once after it was loaded
    torch.manual_seed(0)
    for sizes in ((32, 32), (32, 5), (5, 1)):
        torch.nn.Linear(*sizes)
    assert (whole["random"], resumed["random"]) == (torch.rand(1).item(), torch.rand(1).item())


def test_other_world_sizes_continue_the_same_losses(train, tmp_path):
    finished(train(tmp_path / "whole", steps=12))
    for world, steps in ((2, 3), (4, 6), (1, 9), (2, 12)):
        answer = finished(train(tmp_path / "parts", world=world, steps=steps))
        assert answer["begun"] == steps - 3
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


def test_8_bit_moments_and_bf16_weights_go_on_bit_exactly_and_on_another_number_of_ranks(train, tmp_path):
    """Two copies of the model on two ranks each: rounding depends neither on the process nor on its copy."""
    find_torchao()
    pytest.importorskip("torchao", reason="torchao is neither installed nor where LLAVA_NEXT_TORCHAO says")
    job = {"low_memory": True, "width": 64}
    copies = {**job, "world": 4, "replicate": 2}
    whole = finished(train(tmp_path / "whole", steps=6, **copies))
    finished(train(tmp_path / "parts", steps=4, **copies))
    resumed = finished(train(tmp_path / "parts", steps=6, **copies))
    assert (resumed["begun"], resumed["digest"]) == (3, whole["digest"])
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    loaded = finished(train(tmp_path / "parts", steps=6, world=2, **job))
    assert (loaded["begun"], loaded["digest"]) == (6, whole["digest"])


def test_twenty_kills_at_random_moments_lose_nothing(train, tmp_path):
    generator, kills, left = random.Random(0), 0, []
    for world, limit in ((1, 7), (2, 14), (4, 20)):
        job = {"world": world, "steps": 16, "every": 1, "width": 256, "pause": 0.01}
        whole = finished(train(tmp_path / f"whole-{world}", **job))
        attempt = 0
        while kills < limit:
            folder = tmp_path / f"killed-{world}-{attempt}"
            while kills < limit:
                answer = train(folder, kill_after=generator.uniform(0, 0.2), **job)
                if not answer["killed"]:
                    break
                kills += 1
                left += answer["left"]
                complete = complete_checkpoints(folder / "checkpoints")
                assert all(read_manifest(path) for path in complete)
            if answer["killed"]:
                answer = train(folder, **job)
            assert finished(answer)["digest"] == whole["digest"]
            assert losses(folder) == losses(tmp_path / f"whole-{world}")
            attempt += 1
    assert any(name.endswith(".tmp") for name in left), "no kill met a save; the test tests too little"


def test_background_checkpoint_holds_the_state_of_its_step(train, tmp_path):
    """Training goes on, in the same memory, while it is written: what is in it equals that of a run that waits."""
    for name, asynchronous in (("background", True), ("waiting", False)):
        job = {"steps": 6, "every": 2, "keep_last": 9, "fault": "slow"}
        finished(train(tmp_path / name, asynchronous=asynchronous, **job))
    pairs = zip(*(complete_checkpoints(tmp_path / n / "checkpoints") for n in ("background", "waiting")), strict=True)
    states = [(tensors_of(ours), tensors_of(theirs)) for ours, theirs in pairs]
    assert len(states) == 3 and len(states[0][0]) == 2 * (4 * 3 + 1) + 4  # each of 2 ranks; `step` once
    for ours, theirs in states:
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    first, second = (state["model.0.weight@0,0"] for state, _ in states[:2])
    assert not torch.equal(first, second)


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """All pieces in a checkpoint but the random numbers of python and numpy, which differ from process to process."""
    pieces = {}
    for file in path.glob("rank-*.safetensors"):
        pieces |= load_file(file)
    return {name: t for name, t in pieces.items() if not name.startswith("rng.") or ".torch" in name}


def test_files_are_json_and_safetensors_of_what_is_trained(train, tmp_path):
    finished(train(tmp_path / "run", steps=3))
    (path,) = complete_checkpoints(tmp_path / "run/checkpoints")
    names = sorted(p.name for p in path.iterdir())
    assert names == ["manifest.json", "rank-00000.safetensors", "rank-00001.safetensors", "tensors.json"]
    described = json.loads((path / "tensors.json").read_text())
    trained = [f"{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")]
    expected = [f"model.{n}" for n in trained]
    expected += [f"optimizer.{n}.{key}" for n in trained for key in ("step", "exp_avg", "exp_avg_sq")]
    expected += [f"rng.{rank}.{kind}" for rank in (0, 1) for kind in ("torch", "python", "numpy")]
    assert sorted(described) == sorted(expected)
    # 2 ranks hold rows 0-2 and 3-4 of 5
    assert described["model.2.weight"]["pieces"] == [[[0, 0], [3, 32], 0], [[3, 0], [2, 32], 1]]
    with safe_open(path / "rank-00001.safetensors", framework="pt") as file:
        assert file.get_tensor("model.2.weight@3,0").shape == (2, 32)


def test_keep_last_and_keep_every_say_which_checkpoints_stay(train, tmp_path):
    finished(train(tmp_path / "run", steps=9, every=1, keep_last=2, keep_every=4))
    kept = [path.name for path in complete_checkpoints(tmp_path / "run/checkpoints")]
    assert kept == ["step-00000004", "step-00000008", "step-00000009"]


def test_run_folder_that_nodes_do_not_share_ends_the_run_on_all_ranks_before_it_begins(train, tmp_path):
    answer = train(tmp_path / "run", fault="apart", world=4)
    for rank, said in enumerate(answer["ranks"]):
        folder = tmp_path / "run" / f"node-{rank // 2}" / "checkpoints"
        assert f"{folder} is not one folder for all ranks: 2 of 4, the first is rank 2, do not see" in said["error"]
        assert "Give a run_dir (or checkpoint.dir) on storage that all nodes share" in said["error"]
        assert not (folder.exists() and list(folder.iterdir()))
    answer = train(tmp_path / "other", fault="apart", world=2)  # one node
    assert all("digest" in said for said in answer["ranks"])
    left = {path.name for path in (tmp_path / "other/node-0/checkpoints").iterdir()}
    assert left == {"step-00000003", "step-00000006"}


@pytest.mark.parametrize("asynchronous", [True, False])
def test_full_disk_ends_the_run_on_all_ranks_and_the_last_checkpoint_is_usable(train, tmp_path, asynchronous):
    job = {"steps": 9, "every": 2, "pause": 0.02}
    answer = train(tmp_path / "run", fault="full:6", asynchronous=asynchronous, **job)
    for rank in answer["ranks"]:
        assert "step-00000006 could not be written (rank 1: [Errno 28] No space left on device" in rank["error"]
        assert "step-00000004 is complete and will be continued from. Make room there" in rank["error"]
    assert answer["left"] == ["step-00000002", "step-00000004"]  # what was half-written takes no room
    assert finished(train(tmp_path / "run", **job))["begun"] == 4
    finished(train(tmp_path / "whole", **job))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


@pytest.mark.parametrize("world", [1, 2])
def test_flipped_byte_takes_the_run_back_to_the_checkpoint_before(train, tmp_path, world):
    whole = finished(train(tmp_path / "run", world=world))
    newest = complete_checkpoints(tmp_path / "run/checkpoints")[-1]
    assert newest.name == "step-00000006"
    file = newest / f"rank-{world - 1:05d}.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) * 3 // 5] ^= 0x40
    file.write_bytes(data)
    resumed = finished(train(tmp_path / "run", world=3 - world))
    assert (
        resumed["begun"] == 3
        and resumed["digest"] != ""
        and resumed["said"][:2]
        == [
            f"note       step-00000006: the bytes of {file.name} are not those that were written",
            f"note       {newest} is damaged, going back to step-00000003",
        ]
    )
    names = {path.name for path in (tmp_path / "run/checkpoints").iterdir()}
    assert names == {"step-00000003", "step-00000006", "step-00000006.damaged"}
    assert finished(train(tmp_path / "run", world=world))["begun"] == 6 and whole["begun"] == 0


def test_damage_of_the_only_checkpoint_ends_the_run_on_all_ranks(train, tmp_path):
    finished(train(tmp_path / "run", steps=3))
    (path,) = complete_checkpoints(tmp_path / "run/checkpoints")
    text = (path / "tensors.json").read_text()
    (path / "tensors.json").write_text(text.replace("float32", "float23", 1))
    for rank in train(tmp_path / "run")["ranks"]:
        assert "no checkpoint in" in rank["error"] and "is whole (step-00000003); restore their files" in rank["error"]


def test_full_disk_at_the_export_is_said_on_all_ranks_and_leaves_nothing(train, tmp_path):
    answer = train(tmp_path / "run", steps=3, export="full")
    for rank in answer["ranks"]:
        assert f"model {tmp_path}/run/model could not be written ([Errno 28] No space left" in rank["error"]
        assert "step-00000003 is complete and will be continued from. Make room there" in rank["error"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["base", "checkpoints", "metrics.jsonl"]


def test_read_only_folder_ends_the_run_on_all_ranks_and_says_what_to_do(train):
    folder = Path("/tmp") / f"read-only-{os.getpid()}"  # pytest's own folders are closed to other users
    try:
        answer = train(folder, steps=9, every=2, pause=0.02, fault="read-only")
        for rank in answer["ranks"]:
            assert "step-00000004 could not be written (rank " in rank["error"] and "Permission denied" in rank["error"]
            assert "step-00000002 is complete" in rank["error"] and "Make it writable, or give" in rank["error"]
        os.chmod(folder / "checkpoints", 0o755)
        assert finished(train(folder, steps=9, every=2))["begun"] == 2
    finally:
        shutil.rmtree(folder)


def test_copies_at_a_url_continue_the_run_on_another_machine(train, tmp_path):
    with S3Server(bucket="checkpoints") as server:
        job = {"dir": f"{server.url}/run", "environment": server.environment, "every": 2}
        answer = finished(train(tmp_path / "here", steps=8, **job))
        assert not [line for line in answer["said"] if "warning" in line]
        puts = [path for method, path, status in server.requests if method in ("PUT", "POST") and "step-0" in path]
        finished(train(tmp_path / "whole", steps=11, every=2))
        resumed = finished(train(tmp_path / "there", steps=11, **job))
    assert resumed["begun"] == 8
    later = [json.loads(line)["loss"] for line in (tmp_path / "there/metrics.jsonl").read_text().splitlines()]
    assert losses(tmp_path / "here") + later == losses(tmp_path / "whole")
    for step in (2, 4, 6, 8):  # the manifest comes last
        assert "manifest.json" in [path for path in puts if f"step-{step:08d}" in path][-1]


def test_copies_that_fail_are_told_and_do_not_end_the_run(train, tmp_path):
    with S3Server(bucket="checkpoints") as server:
        job = {"dir": f"{server.url}/run", "environment": server.environment}
        server.refusal = "ExpiredToken"
        answer = train(tmp_path / "refused", steps=3, **job)
        assert "ExpiredToken" in answer["ranks"][0]["error"]  # found out before the first step
