"""Checkpoints by name: what the hub's cache holds is taken without network; of what it lacks, what to fetch is said."""

from pathlib import Path

import huggingface_hub
import pytest

from llava_next.data.inputs.text_lengths import TextLength
from llava_next.model.folders.compose import llm_part, load_tokenizer
from llava_next.model.folders.sources import CheckpointWeights
from llava_next.repositories import resolve_folder
from talking.models import geometry, load


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """What puts files of a repository into the hub's cache, which is the only place to look."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def put(name: str, **files: str) -> Path:
        repository = tmp_path / f"models--{name.replace('/', '--')}"
        folder = repository / "snapshots" / ("0" * 40)
        folder.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs/main").write_text(folder.name)
        for file, text in files.items():
            (folder / file.replace("__", ".")).write_text(text)
        return folder

    return put


def test_what_is_cached_needs_no_network(cached, monkeypatch):
    for kind in ("model__safetensors", "pytorch_model__bin"):
        folder = cached(f"org/{kind}", config__json="{}", **{kind: ""})
        assert [resolve_folder(f"org/{kind}", need) for need in ("config", "tokenizer", "weights")] == [folder] * 3
    folder = cached("org/partial", config__json="{}", model__safetensors="")  # the hub has a file that nobody needs

    def incomplete(*_, **__):
        error = OSError("1 file is missing (notes.json)")
        error.snapshot_path = str(folder)
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", incomplete)
    assert resolve_folder("org/partial") == folder


def test_of_what_is_not_cached_it_is_said_what_to_fetch(cached):
    with pytest.raises(ValueError, match=r"org/none .* HF_HUB_OFFLINE is set: .* run `hf download org/none`"):
        resolve_folder("org/none")
    folder = cached("org/config", config__json="{}")
    with pytest.raises(ValueError, match=r"org/config: its weights are not in the hub's cache .*`hf download org/c"):
        resolve_folder("org/config")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    (folder / "model-2.safetensors").touch()
    with pytest.raises(ValueError, match=r"1 files that are not there: model-1\.safetensors; .*`hf download org/c"):
        CheckpointWeights(resolve_folder("org/config"))
    with pytest.raises(ValueError, match=r"(?s)no tokenizer could be loaded .*`hf download org/config`"):
        load_tokenizer("org/config")


@pytest.mark.parametrize("take", [llm_part, load_tokenizer, load, geometry, lambda name: TextLength(f"{name}:qwen")])
def test_every_taker_of_a_hub_name_says_it(cached, take):
    with pytest.raises(ValueError, match="`hf download org/none`"):
        take("org/none")
