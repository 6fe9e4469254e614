"""Which checkpoint a run continues from: the newest whole one of the same run, its logs and copies put in order."""

import json
import os
import shlex
import shutil
import sys
import threading
import zlib
from dataclasses import asdict
from pathlib import Path

import pytest

from llava_next.data.storage.client import Storage
from llava_next.model.forward.lora import Lora
from llava_next.training.checkpoints.mirror import Mirror
from llava_next.training.checkpoints.recovery import (
    FORMAT,
    Resume,
    appears,
    checkpoint_to_resume,
    complete_checkpoints,
    drop_later_lines,
    find_resume,
    read_manifest,
    remove_checkpoint,
    resume_command,
    state_checksum,
)
from llava_next.training.checkpoints.same_run import FREE, PLAN, run_facts
from llava_next.training.recipe.config import CheckpointConfig, OptimConfig, RunConfig, Source
from llava_next.training.recipe.optim import Rates
from llava_next.training.watch.metrics import flat


def make_checkpoint(folder: Path, step: int, **state) -> Path:
    """A complete checkpoint as far as its manifest goes."""
    path = folder / f"step-{step:08d}"
    path.mkdir(parents=True)
    (path / "rank-00000.safetensors").write_bytes(bytes(1000 + step))
    files = {"rank-00000.safetensors": {"bytes": 1000 + step, "crc32": zlib.crc32(bytes(1000 + step))}}
    state = {"step": step, "counters": {}, **state}
    manifest = {"format": FORMAT, "step": step, "state": state, "state_crc32": state_checksum(state), "files": files}
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def run_config(folder: Path, **options) -> RunConfig:
    """Of a run in `folder/run` whose model is `folder/base`."""
    base = folder / "base"
    base.mkdir(exist_ok=True)
    (base / "config.json").write_text("{}")
    (base / "model.safetensors").write_bytes(bytes(100_000))
    data = {"model": str(base), "run_dir": str(folder / "run"), **options}
    config = RunConfig(**data)
    config.data.sources = [Source("shards")]
    return config


@pytest.mark.parametrize("damage", ["missing", "short", "manifest", "a digit of the manifest"])
def test_auto_goes_back_to_the_checkpoint_before_a_damaged_one(tmp_path, damage):
    config = run_config(tmp_path)
    folder = tmp_path / "run/checkpoints"
    older, newest = (make_checkpoint(folder, step, **run_facts(config)) for step in (3, 6))
    if damage == "missing":
        (newest / "rank-00000.safetensors").unlink()
    elif damage == "short":
        os.truncate(newest / "rank-00000.safetensors", 999)
    elif damage == "manifest":
        os.truncate(newest / "manifest.json", 40)
    else:
        text = (newest / "manifest.json").read_text()
        (newest / "manifest.json").write_text(text.replace('"batch_size": 128', '"batch_size": 928'))
    resume = find_resume(config)
    assert resume.path == older and resume.notes == [f"{newest} is damaged, going back to step-00000003"]
    resume.put_in_order(tmp_path / "run")
    # set aside: it must not be counted among those that are kept
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000003", "step-00000006.damaged"]
    os.truncate(older / "rank-00000.safetensors", 1)
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole \(step-00000003\)"):
        find_resume(config)


def test_start_removes_what_was_half_written_and_puts_back_what_was_half_replaced(tmp_path):
    folder = tmp_path / "checkpoints"
    make_checkpoint(folder, 3)
    make_checkpoint(folder, 6).rename(folder / "step-00000006.tmp")
    make_checkpoint(folder, 5).rename(folder / "step-00000005.old")
    path = checkpoint_to_resume(folder, "auto")
    assert path == folder / "step-00000005"
    Resume(folder, path=path, manifest=read_manifest(path)).put_in_order(tmp_path)
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000003", "step-00000005"]


def test_file_that_a_network_file_system_shows_late_is_waited_for(tmp_path):
    late = threading.Timer(0.2, (tmp_path / "late").touch)
    late.start()
    assert appears(tmp_path / "late", 30) and not appears(tmp_path / "never", 0.1)
    late.join()


def test_kill_during_removal_leaves_nothing_that_looks_like_a_checkpoint(tmp_path, monkeypatch):
    path = make_checkpoint(tmp_path, 3)
    monkeypatch.setattr(shutil, "rmtree", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        remove_checkpoint(path)
    assert complete_checkpoints(tmp_path) == []


def test_logs_lose_later_steps_and_a_line_that_was_cut_short(tmp_path):
    log = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": step / 7}) + "\n" for step in (1, 2, 3, 4)]
    log.write_text("".join(lines) + '{"step": 5, "lo')
    drop_later_lines(log, 3)
    assert log.read_text() == "".join(lines[:3])
    before = log.stat().st_mtime_ns
    drop_later_lines(log, 3)
    assert log.stat().st_mtime_ns == before


def test_checkpoint_of_another_stage_is_refused_and_the_difference_named(tmp_path):
    stage1 = run_config(tmp_path, optim=OptimConfig(rates=Rates(None, 1e-3, None, 1e-3)))
    make_checkpoint(tmp_path / "run/checkpoints", 3, **run_facts(stage1))
    assert find_resume(stage1).state["step"] == 3
    with pytest.raises(ValueError, match="checkpoint of another stage") as refused:
        find_resume(run_config(tmp_path))
    assert "made with projector at 0.001, newline at 0.001 and llm, vision frozen" in str(refused.value)
    assert "this run has llm at 2e-05" in str(refused.value)


def test_every_changed_key_that_changes_what_is_learned_is_noted_and_no_other(tmp_path, monkeypatch):
    make_checkpoint(tmp_path / "run/checkpoints", 3, **run_facts(run_config(tmp_path)))
    changed = run_config(tmp_path, optim=OptimConfig(rates=Rates(llm=3e-5), weight_decay=0.1), float8=True)
    changed.data.max_length = 2048
    # how fast, where and what is told: no word
    changed.data.token_budget, changed.data.num_workers, changed.log_every, changed.max_steps = 9000, 1, 1, 5
    changed.checkpoint.every, changed.data.validation = 3, [Source("held_out")]
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    (tmp_path / "base/tokenizer.json").write_text("{}")
    assert find_resume(changed).notes == [
        "data.max_length was 4096 until step 3 and is 2048 from here",
        "float8 was False until step 3 and is True from here",
        "launch file's mixed_precision was no until step 3 and is bf16 from here",
        "optim.rates.llm was 2e-05 until step 3 and is 3e-05 from here",
        "optim.weight_decay was 0.0 until step 3 and is 0.1 from here",
        f"the tokenizer of {tmp_path / 'base'} is another one than until step 3",
    ]


def test_every_key_of_the_configuration_is_either_free_or_of_the_plan_or_noted():
    """A key that is renamed must not fall out of the lists without a word."""
    keys = {name.replace("/", ".") for name in flat(asdict(RunConfig(lora=Lora())))}
    keys |= {"data.sources", "data.validation", "log_with", "profile.steps"}
    for key in (*FREE, *PLAN):
        assert any(name == key or name.startswith(f"{key}.") for name in keys), key


@pytest.mark.parametrize("changed", ["config.json", "model.safetensors"])
def test_model_folder_that_changed_since_the_checkpoint_is_refused(tmp_path, changed):
    config = run_config(tmp_path)
    make_checkpoint(tmp_path / "run/checkpoints", 3, **run_facts(config))
    assert find_resume(config).path is not None
    path = tmp_path / "base" / changed
    path.write_bytes(b"[]" + path.read_bytes()[2:])  # of the same size
    with pytest.raises(ValueError, match=r"is not what .* was started from"):
        find_resume(config)


def test_path_is_refused_where_later_checkpoints_would_be_mistaken_for_the_runs(tmp_path):
    folder = tmp_path / "checkpoints"
    older, _ = make_checkpoint(folder, 3), make_checkpoint(folder, 6)
    with pytest.raises(ValueError, match="is older than step-00000006"):
        checkpoint_to_resume(folder, str(older))
    assert checkpoint_to_resume(tmp_path / "other", str(older)) == older


@pytest.mark.parametrize("url", ["http://host/x", "hf://datasets/x", "ftp://host/x"])
def test_url_that_cannot_be_written_is_refused(tmp_path, url):
    with pytest.raises(ValueError, match=r"checkpoint\.dir: .*s3://, gs://, az://"):
        find_resume(run_config(tmp_path, checkpoint=CheckpointConfig(dir=url)))


def test_resume_command_is_the_launchers_with_auto(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scripts/finetune.py", "--run_dir", "a run", "--checkpoint.resume", "never"])
    config = RunConfig(checkpoint=CheckpointConfig(resume="never"))
    assert shlex.split(resume_command(config))[-7:] == [*sys.argv, "--checkpoint.resume", "auto"][-7:]
    assert "'a run'" in resume_command(config)


@pytest.fixture
def mirror(tmp_path):
    """Copies of checkpoints 3 and 6, the newest with its manifest."""
    mirror = Mirror(Storage(tmp_path / "remote"))
    for step in (3, 6):
        path = make_checkpoint(tmp_path / "local", step)
        for name in ("rank-00000.safetensors", "manifest.json"):
            mirror.upload(path, name)
    return mirror


def test_half_an_upload_is_no_checkpoint(mirror, tmp_path):
    assert mirror.newest()[0] == "step-00000006"
    (tmp_path / "remote/step-00000006/rank-00000.safetensors").unlink()
    assert mirror.newest()[0] == "step-00000003"
    (tmp_path / "remote/step-00000003/manifest.json").unlink()
    assert mirror.newest() is None


def test_download_checks_every_byte_and_keeps_to_its_folder(mirror, tmp_path):
    name, manifest = mirror.newest()
    mirror.download(tmp_path / "new" / name, manifest)
    assert read_manifest(tmp_path / "new" / name) == manifest
    data = bytearray(1006)
    data[500] = 1
    (tmp_path / "remote" / name / "rank-00000.safetensors").write_bytes(data)
    mirror = Mirror(Storage(tmp_path / "remote"))  # on another day: the one above knows the file as it was
    with pytest.raises(ValueError, match=r"step-00000006/rank-00000\.safetensors is damaged"):
        mirror.download(tmp_path / "again" / name, manifest)
    assert complete_checkpoints(tmp_path / "again") == []
    facts = manifest["files"].pop("rank-00000.safetensors")
    with pytest.raises(ValueError, match="is no file name"):
        mirror.download(tmp_path / "again" / name, {**manifest, "files": {"../../evil": facts}})


def test_removal_of_a_copy_takes_its_manifest_first(mirror, tmp_path, monkeypatch):
    deleted, delete = [], Storage.delete
    monkeypatch.setattr(Storage, "delete", lambda self, name: (deleted.append(name), delete(self, name)))
    mirror.remove("step-00000003")
    assert deleted[0] == "step-00000003/manifest.json" and len(deleted) == 2
    assert mirror.complete() == ["step-00000006"]
