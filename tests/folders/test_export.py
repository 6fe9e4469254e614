"""Exported folders: names, loading, vLLM's name map, safe replacement, and the check that proves a folder."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

import check_export
from llava_next.model.folders import export
from llava_next.model.folders.check import check_folder
from llava_next.model.folders.companions import portable_tokenizer_config
from llava_next.model.folders.export import INDEX_NAME, full_tensors, save_model
from llava_next.model.forward.modeling import LlavaNextForConditionalGeneration
from llava_next.templates import get_template
from support.exports import LLMS, PAIRINGS, TOWERS, compose_pairing, export_pairing, llm_config
from support.tiny import tiny_config

DEMO = ("clip", "llama")


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> Callable[[tuple[str, str]], Path]:
    """Pairing -> bf16 export in several files; made when first asked for. Tests that change it take a copy."""
    root = tmp_path_factory.mktemp("exports")

    def of(pairing: tuple[str, str]) -> Path:
        folder = root / "-".join(pairing)
        if not folder.exists():
            base = compose_pairing(root / "base" / folder.name, *pairing)
            export_pairing(base, folder, torch.bfloat16)
            shutil.rmtree(base)
        return folder

    return of


@pytest.fixture
def copy(exports, tmp_path) -> Path:
    """A folder to damage."""
    return Path(shutil.copytree(exports(DEMO), tmp_path / "model"))


def keys_of(folder: Path) -> set[str]:
    return set(json.loads((folder / INDEX_NAME).read_text())["weight_map"])


def failed(folder: Path) -> dict[str, str]:
    """Name -> text of the checks that failed."""
    return {finding.check: finding.text for finding in check_folder(folder) if not finding.ok}


def edit(path: Path, change: Callable[[dict], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


# ---- layout and loading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairing", PAIRINGS, ids="-".join)
def test_export_loads_in_stock_classes_with_every_key_and_equal_logits(exports, pairing):
    folder = exports(pairing)
    model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert model.dtype == torch.bfloat16 and type(model).__module__.startswith("transformers.")
    ours = LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
    pixels = np.random.default_rng(0).integers(0, 256, (42, 90, 3), dtype=np.uint8)
    inputs = AutoProcessor.from_pretrained(folder)(
        images=Image.fromarray(pixels), text="<image>\nWhat is it?", return_tensors="pt"
    )
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with torch.no_grad():
        logits = model(**inputs).logits
        assert logits.std() > 0.1 and torch.equal(logits, ours(**inputs).logits)


@pytest.mark.parametrize("pairing", PAIRINGS, ids="-".join)
def test_check_finds_every_export_sound(exports, pairing):
    assert failed(exports(pairing)) == {}


@pytest.mark.parametrize("pairing", PAIRINGS, ids="-".join)
def test_vllm_name_map_leaves_the_keys_as_vllm_names_its_parameters(exports, pairing):
    keys = keys_of(exports(pairing))

    def to_vllm(key: str) -> str:
        key = re.sub(r"^model\.language_model\.", "language_model.model.", key)
        return re.sub(r"^lm_head\.", "language_model.lm_head.", key)

    assert {to_vllm(key) for key in keys} == keys
    # vLLM builds the language model of text_config and names its parameters as transformers' own causal LM does
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(llm_config(pairing[1]))
    due = {f"language_model.{name}" for name, _ in llm.named_parameters()}  # a tied head comes once
    assert {key for key in keys if key.startswith("language_model.")} == due
    projector = {f"multi_modal_projector.linear_{i}.{part}" for i in (1, 2) for part in ("weight", "bias")}
    rest = keys - due - projector - {"image_newline"}
    assert projector < keys and "image_newline" in keys
    assert rest and all(key.startswith("vision_tower.vision_model.") for key in rest)
    layers = {key.split(".")[4] for key in rest if ".encoder.layers." in key}
    assert layers == {str(i) for i in range(TOWERS[pairing[0]].num_hidden_layers)}


@pytest.mark.parametrize("llm", LLMS)
def test_config_states_the_rotary_base_and_dtype_in_old_and_new_words(exports, llm):
    config = json.loads((exports(("clip", llm)) / "config.json").read_text())
    text = config["text_config"]
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"] == LLMS[llm][4]
    assert text["rope_scaling"] is None
    assert text["tie_word_embeddings"] == config["tie_word_embeddings"] == ("tied" in llm)
    assert {part[name] for part in (config, text) for name in ("dtype", "torch_dtype")} == {"bfloat16"}


def test_scaled_rotary_embeddings_are_stated_for_old_releases(tmp_path):
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 512
    config = tiny_config(rope_parameters={**scaling, "rope_theta": 500000.0})
    export.write_config(config, tmp_path, torch.bfloat16)
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert text["rope_theta"] == 500000.0 and text["rope_scaling"] == scaling


def test_tokenizer_config_has_no_word_that_transformers_4_trips_over(exports, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(exports(DEMO))
    tokenizer.add_special_tokens({"extra_special_tokens": [AddedToken("<box>", special=True)]})
    tokenizer.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert written["extra_special_tokens"] == ["<box>"] and "backend" in written
    config = portable_tokenizer_config(written, get_template("vicuna_v1"))
    assert config["additional_special_tokens"] == ["<box>"] and config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"extra_special_tokens", "backend"} & set(config)
    assert config["model_input_names"] == ["input_ids", "attention_mask"]
    assert config["clean_up_tokenization_spaces"] is False


# ---- writing ---------------------------------------------------------------------------------------------------------


def test_files_are_as_readable_as_the_umask_allows(tmp_path):
    model = LlavaNextForConditionalGeneration(tiny_config())
    for umask, mode in ((0o022, 0o644), (0o027, 0o640)):
        before = os.umask(umask)
        try:
            folder = save_model(model, tmp_path / f"{umask:o}", max_file_bytes=100_000)
        finally:
            os.umask(before)
        modes = {path.stat().st_mode & 0o777 for path in folder.iterdir()}
        assert len(list(folder.glob("*.safetensors"))) == 2 and modes == {mode}


def test_files_stay_under_the_size_limit_and_the_index_names_them_all(tmp_path):
    model = LlavaNextForConditionalGeneration(tiny_config())
    folder = save_model(model, tmp_path / "model", dtype=torch.float32, max_file_bytes=40_000)
    index = json.loads((folder / INDEX_NAME).read_text())
    files = {file: load_file(folder / file) for file in set(index["weight_map"].values())}
    assert len(files) > 5 and all(
        sum(t.nbytes for t in tensors.values()) <= 40_000 or len(tensors) == 1 for tensors in files.values()
    )
    assert index["weight_map"] == {key: file for file, tensors in files.items() for key in tensors}
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())


def test_failed_export_leaves_the_old_folder_and_waits_for_the_other_ranks(tmp_path, monkeypatch):
    model = LlavaNextForConditionalGeneration(tiny_config())
    folder = save_model(model, tmp_path / "model")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    gathered = []

    def counting(m, unquantised):
        for name, tensor in full_tensors(m, unquantised):
            gathered.append(name)
            yield name, tensor

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "full_tensors", counting)
    monkeypatch.setattr(export.SafetensorsWriter, "add", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_model(model, folder)
    assert len(gathered) == len(list(model.parameters()))  # every gather ran: nobody waits in a collective
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_kill_between_the_two_renames_loses_no_model(tmp_path, monkeypatch):
    model = LlavaNextForConditionalGeneration(tiny_config())
    folder = save_model(model, tmp_path / "model")
    replace = os.replace

    def killed(source, target):
        if Path(target) == folder:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        save_model(model, folder)
    assert not folder.exists() and (tmp_path / "model.old/config.json").exists()
    assert (tmp_path / "model.tmp/config.json").exists()
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(export, "write_weights", lambda *_: (_ for _ in ()).throw(OSError("disk")))
        save_model(model, folder)
    assert (folder / "config.json").exists()  # put back before anything was tried
    save_model(model, folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


# ---- the check finds damage ------------------------------------------------------------------------------------------


def rewrite_weights(folder: Path, change: Callable[[dict], object], key: str) -> None:
    """Changes the file that holds `key`."""
    file = folder / json.loads((folder / INDEX_NAME).read_text())["weight_map"][key]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


HEAD = "language_model.lm_head.weight"
NEW_PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]


def edit_all_templates(folder: Path) -> None:
    for name in ("tokenizer_config.json", "chat_template.json"):
        edit(folder / name, lambda c: c.update(chat_template=c["chat_template"].replace("USER: ", "HUMAN: ")))
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("USER: ", "HUMAN: "))


DAMAGE = {
    "missing_key": (
        lambda f: rewrite_weights(f, lambda t: t.pop(HEAD), HEAD),
        {"keys": rf"1 missing \['{HEAD}'\]"},
    ),
    "other_layout": (
        lambda f: rewrite_weights(f, lambda t: t.update({"lm_head.weight": t.pop(HEAD)}), HEAD),
        {"keys": r"1 missing .* and 1 unexpected \['lm_head.weight'\]"},
    ),
    "missing_file": (
        lambda f: next(f.glob("model-00002-*")).unlink(),
        {"keys": "model-00002-of-.* is missing", "shapes": "is missing", "dtypes": "is missing"},
    ),
    "truncated_file": (
        lambda f: os.truncate(next(f.glob("model-00002-*")), 5000),
        {"keys": "SafetensorError", "shapes": "", "dtypes": ""},
    ),
    "wrong_shape": (
        lambda f: rewrite_weights(f, lambda t: t.update(image_newline=torch.zeros(47).bfloat16()), "image_newline"),
        {"shapes": r"image_newline is \(47,\), config.json asks for \(48,\)"},
    ),
    "wrong_dtype": (
        lambda f: edit(f / "config.json", lambda c: c.update(torch_dtype="float32")),
        {"config": r"\['bfloat16', 'float32'\]", "dtypes": "is BF16, config.json states float32"},
    ),
    "one_tensor_in_float32": (
        lambda f: rewrite_weights(f, lambda t: t.update(image_newline=torch.zeros(48)), "image_newline"),
        {"dtypes": "image_newline is F32, config.json states bfloat16"},
    ),
    "no_rope_theta": (
        lambda f: edit(f / "config.json", lambda c: c["text_config"].pop("rope_theta")),
        {"config": "rope_theta is None, rope_parameters say 10000.0"},
    ),
    "other_pinpoints": (
        lambda f: edit(f / "preprocessor_config.json", lambda c: c.update(image_grid_pinpoints=NEW_PINPOINTS)),
        {"processor": r"preprocessor_config.json: image_grid_pinpoints is \[\[28, 56\]"},
    ),
    "other_strategy": (
        lambda f: edit(f / "processor_config.json", lambda c: c.update(vision_feature_select_strategy="full")),
        {
            "processor": "vision_feature_select_strategy is full, the model's config needs default",
            "chats": "",
            "image tokens": "the processor writes 71 image tokens for 640 x 480 pixels, the model makes 70",
        },
    ),
    "no_image_processor": (
        lambda f: (f / "preprocessor_config.json").unlink(),
        {"processor": "preprocessor_config.json is missing"},
    ),
    "missing_template_file": (
        lambda f: (f / "chat_template.jinja").unlink(),
        {"chat template": "chat_template.jinja: has no chat template"},
    ),
    "changed_template": (edit_all_templates, {"chat template": "a chat template that no training used"}),
    "template_changed_for_old_releases": (
        lambda f: edit(f / "chat_template.json", lambda c: c.update(chat_template="{{ messages }}")),
        {"chat template": "chat_template.json: has another chat template than vicuna_v1"},
    ),
    "wrong_image_token": (
        lambda f: edit(f / "config.json", lambda c: c.update(image_token_index=31999)),
        {"tokenizer": "image_token_index is 31999, but <image> is 32000"},
    ),
    "wrong_terminator": (
        lambda f: edit(f / "generation_config.json", lambda c: c.update(eos_token_id=1)),
        {"terminator": r"eos_token_id is 1, template vicuna_v1 ends answers with </s> \(2\)"},
    ),
    "sampling": (
        lambda f: edit(f / "generation_config.json", lambda c: c.update(do_sample=True)),
        {"terminator": "do_sample is true"},
    ),
    "tokenizer_larger_than_the_model": (
        lambda f: add_tokens(f, 70),
        {"tokenizer": "ids up to 32070, the model 32064 rows"},
    ),
    "tokenizer_of_transformers_5": (
        lambda f: edit(f / "tokenizer_config.json", lambda c: c.update(tokenizer_class="TokenizersBackend")),
        {"tokenizer": "transformers 4 cannot read"},
    ),
    "token_types_for_old_releases": (
        lambda f: edit(f / "tokenizer_config.json", lambda c: c.pop("model_input_names")),
        {"tokenizer": "transformers 4 would give the model token_type_ids"},
    ),
    "other_sequence_length": (
        lambda f: edit(f / "config.json", lambda c: c.update(image_seq_length=576)),
        {"processor": "image_seq_length is 576, a tile has 16 features"},
    ),
    "other_model": (
        lambda f: (f / "config.json").write_text('{"model_type": "llama"}'),
        {"keys": "describes a 'llama'"},
    ),
}


def add_tokens(folder: Path, count: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<new {i}>" for i in range(count)])
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("damage", DAMAGE)
def test_check_names_the_damage(copy, damage):
    inflict, expected = DAMAGE[damage]
    inflict(copy)
    found = failed(copy)
    for check, text in expected.items():
        assert check in found and re.search(text, found[check]), found


def test_script_prints_a_line_for_each_check_and_its_exit_code_tells(copy, capsys):
    with pytest.raises(SystemExit) as ended:
        check_export.main([str(copy)])
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0 and len(lines) == 11
    assert all(line.startswith("ok ") for line in lines[:-1]) and lines[-1] == f"{copy}: sound"
    (copy / "generation_config.json").unlink()
    with pytest.raises(SystemExit) as ended:
        check_export.main([str(copy)])
    out = capsys.readouterr().out
    assert ended.value.code == 1 and re.search(r"FAILED  terminator    .*generation_config.json is missing: ", out)
    assert out.endswith(f"{copy}: 1 of 10 checks FAILED\n")
    with pytest.raises(SystemExit, match="nowhere is no folder"):
        check_export.main([str(copy / "nowhere")])
