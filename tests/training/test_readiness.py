"""What a run would end by late is refused at the start: no room, no place for the result, its own result as a start."""

import shutil
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest

from llava_next.training import readiness
from llava_next.training.checkpoints.recovery import Resume
from llava_next.training.readiness import check_places, check_ready, check_room
from llava_next.training.recipe.config import CheckpointConfig, RunConfig
from llava_next.training.scores import write_job
from llava_next.training.setup import Parts
from support.tiny import tiny_config

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def given(tmp_path):
    """Configuration, parts, plan and resume of a run of 10 steps from the start."""
    config = RunConfig(model=str(tmp_path / "base"), run_dir=str(tmp_path / "run"))
    plan = SimpleNamespace(total_steps=10)
    return config, Parts(tiny_config(), None, None, ""), plan, Resume(tmp_path / "run/checkpoints")


@pytest.mark.parametrize(
    ("every", "export_every", "checkpoints", "results"),
    [(0, 0, 1, 1), (5, 0, 2, 1), (1, 0, 2, 1), (0, 4, 1, 3)],
    ids=["one at the end", "two", "three at a time while one is written", "exports on the way"],
)
def test_disk_must_hold_what_the_run_is_certain_to_write(given, monkeypatch, every, export_every, checkpoints, results):
    config, parts, *_ = given
    config.checkpoint = CheckpointConfig(every=every, export_every=export_every)
    model = readiness.empty_model(parts)
    readiness.freeze(model, config.optim.rates)
    sizes = readiness.units(model).whole
    checkpoint, result = 12 * sizes.trainable, 2 * sizes.parameters
    assert checkpoint > 3 * result
    if every == export_every == 0:  # goes on beside one of four
        write_job(Path(config.run_dir), 1, {"passing": True, "outcome": None})
        (Path(config.run_dir) / "model-step-1").mkdir()
    scored = {(0, 0): (2, "cpu", 3), (5, 0): (3, None, 2), (0, 4): (4, None, 0)}
    config.evaluate.every, config.evaluate.devices, more = scored.get((every, export_every), (0, None, 0))
    results += more  # exports that are there at once for their scores alone
    need = checkpoints * checkpoint + results * result
    if every == 1:
        need = 3 * checkpoint  # more than the two that stay and the result
    for free in (need, need - 1):
        monkeypatch.setattr(readiness.shutil, "disk_usage", lambda path, free=free: Usage(0, 0, free))
        if free == need:
            check_room(*given)
        else:
            with pytest.raises(ValueError, match=r"run_dir: .* free, and this run needs .* Make room there"):
                check_room(*given)


def test_places_that_cannot_be_written_to_are_refused_before_anything_is_read(given, tmp_path):
    config = given[0]
    check_places(config)
    (tmp_path / "file").touch()
    config.checkpoint.dir = str(tmp_path / "file/kept")
    with pytest.raises(ValueError, match=r"checkpoint.dir: .*file is no folder; give another place"):
        check_places(config)
    config.run_dir = str(tmp_path / "file")
    with pytest.raises(ValueError, match=r"run_dir: .*file is no folder; give another place"):
        check_places(config)


def test_result_that_would_replace_the_start_model_is_refused(given, tmp_path):
    config = given[0]
    config.model = str(tmp_path / "run/../run/model")
    with pytest.raises(ValueError, match="is the place of this run's own result"):
        check_ready(*given)
    config.model = str(tmp_path / "base")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/model").write_text("")
    with pytest.raises(ValueError, match="which is no plain folder; move it away"):
        check_ready(*given)
    shutil.rmtree(tmp_path / "run")
