"""Test-wide settings: one torch thread (two processes share two cores), no network, no progress bars; fixtures."""

# ruff: noqa: E402  what holds for imports comes before them
import gc
import os

gc.disable()  # a sixth of the time that imports take
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import torch.distributed as dist

from support import kernels
from support.builds import make_inputs, run

torch.set_num_threads(1)
LONG = ("training", "devices", "checkpoints", "forecast")  # folders


def pytest_collection_modifyitems(items):
    """What takes long comes first: no process waits for a run of another one at the end."""
    items.sort(key=lambda item: item.path.parent.name not in LONG)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop():
    """What was imported stays: collections during the tests need not look at a million objects each time."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """40 samples for build_shards.py; not to be changed."""
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


@pytest.fixture(scope="session")
def built(inputs, tmp_path_factory):
    """Their data set; not to be changed."""
    out = tmp_path_factory.mktemp("built") / "set"
    result = run(inputs, out)
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture
def one_process():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def liger(monkeypatch):
    """Stand-ins for Liger's kernels; the names of those that were called."""
    return kernels.stand_in(monkeypatch)
