"""Folders that training starts from: what stock transformers saved is taken, what would be lost is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from llava_next.model.folders.check import check_folder
from llava_next.model.folders.compose import compose, llm_part, random_part
from llava_next.model.folders.export import save_model
from llava_next.model.folders.starting import EMBEDDING, HEAD, check_weights, make_companions, must_be_anew
from llava_next.model.forward.modeling import LlavaNextForConditionalGeneration
from support import real_tokenizers
from support.exports import PINPOINTS, TOWERS, llm_config


@pytest.fixture(scope="module")
def composed(tmp_path_factory):
    """Folder of a tied and of an untied model; not to be changed."""
    root = tmp_path_factory.mktemp("composed")
    for name in ("tied", "untied"):
        llm = llm_config("llama")
        llm.tie_word_embeddings = name == "tied"
        parts = random_part(TOWERS["clip"], 0), random_part(llm, 1)
        compose(*parts, real_tokenizers.vicuna(), "vicuna_v1", root / name, PINPOINTS, dtype=torch.float32)
    return root


@pytest.fixture(scope="module")
def resaved(composed, tmp_path_factory):
    """The untied model as stock `save_pretrained` writes it, which lacks files that this project's exports have."""
    folder = tmp_path_factory.mktemp("resaved") / "model"
    AutoModelForImageTextToText.from_pretrained(composed / "untied").save_pretrained(folder)
    AutoProcessor.from_pretrained(composed / "untied").save_pretrained(folder)
    assert {finding.check for finding in check_folder(folder) if not finding.ok} >= {"processor", "tokenizer"}
    return folder


def model_of(folder):
    return AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_result_of_a_folder_saved_by_stock_transformers_is_whole(resaved, tmp_path):
    check_weights(resaved)
    made = must_be_anew(resaved, *model_of(resaved))
    assert {"processor", "tokenizer", "chat template"} <= set(made)
    make_companions(resaved, tmp_path / "companions", *model_of(resaved), anew=True)
    save_model(LlavaNextForConditionalGeneration.from_pretrained(resaved), tmp_path / "model", tmp_path / "companions")
    assert [finding for finding in check_folder(tmp_path / "model") if not finding.ok] == []


def test_companions_of_a_composed_folder_are_copied_byte_for_byte(composed, tmp_path):
    assert must_be_anew(composed / "tied", *model_of(composed / "tied")) == []
    make_companions(composed / "tied", tmp_path / "out", *model_of(composed / "tied"))
    names = {path.name for path in (tmp_path / "out").iterdir()} - {"config.json"}
    assert {"tokenizer.json", "preprocessor_config.json", "chat_template.json", "generation_config.json"} <= names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (composed / "tied" / name).read_bytes()


def test_what_cannot_be_made_is_refused_and_named(resaved, tmp_path):
    folder = shutil.copytree(resaved, tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    with pytest.raises(ValueError, match=r"terminator: the tokenizer has a chat template that no training used"):
        must_be_anew(folder, *model_of(folder))
    excused = ("chat template", "chats", "terminator")
    assert "processor" in must_be_anew(folder, *model_of(folder), excused=excused, keep_template=True)


def test_weights_that_are_missing_or_of_another_model_are_refused(composed, resaved, tmp_path):
    check_weights(composed / "untied")
    folder = shutil.copytree(resaved, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    gone = next(key for key in weights if key.endswith("linear_2.weight"))
    save_file({key: w for key, w in weights.items() if key != gone}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks 1 of the \d+ weights .* multi_modal_projector\.linear_2\.weight"):
        check_weights(folder)
    save_file({**weights, gone: weights[gone][:-1].clone()}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"linear_2\.weight is \(47, 48\), config\.json asks for \(48, 48\)"):
        check_weights(folder)


@pytest.mark.parametrize("equal", [True, False], ids=["equal", "of its own"])
def test_head_of_a_model_that_says_tied_is_compared_with_the_embedding(composed, tmp_path, equal):
    folder = shutil.copytree(composed / "tied", tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights[HEAD] = weights[EMBEDDING].clone()
    if not equal:
        weights[HEAD][-1, -1] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    if equal:
        check_weights(folder)
    else:
        with pytest.raises(ValueError, match=r"says tie_word_embeddings: true, but language_model\.lm_head\.weight"):
            check_weights(folder)


@pytest.mark.parametrize("equal", [True, False], ids=["equal", "of its own"])
def test_language_model_that_says_tied_is_composed_with_its_own_head(composed, tmp_path, equal):
    config = AutoConfig.from_pretrained(composed / "tied").text_config
    weights = load_file(composed / "tied/model.safetensors")
    own = {k.removeprefix("language_model."): w for k, w in weights.items() if k.startswith("language_model.")}
    own["lm_head.weight"] = own["model.embed_tokens.weight"] + (0 if equal else 1)
    save_file(own, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**config.to_dict(), "tie_word_embeddings": True}))
    part = llm_part(str(tmp_path))
    assert part.config.tie_word_embeddings == equal
    assert [equal or "lm_head.weight in its files is not model.embed_tokens.weight" in note for note in part.notes] == (
        [] if equal else [True]
    )
