"""Composing: published architectures, vocabularies of real tokenizers, memory, and what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModel, AutoTokenizer, LlavaNextForConditionalGeneration

import compose as script
from llava_next.data.inputs.text_lengths import TextLength
from llava_next.data.loading.batch import pack
from llava_next.data.loading.encode import check_vocabulary
from llava_next.model.folders import compose as composing
from llava_next.model.folders.compose import (
    compose,
    compose_config,
    llm_part,
    load_tokenizer,
    random_part,
    source_of_keys,
    vision_part,
)
from llava_next.model.folders.dry import (
    LLMS,
    OTHER_LLMS,
    OTHER_TOWERS,
    TOWERS,
    architecture,
    corpus_texts,
    scaled,
    train_tokenizer,
)
from llava_next.model.folders.export import file_key, write_config, write_weights
from llava_next.model.forward.kinds import rotary_types, windows
from llava_next.model.forward.modeling import run_tower
from llava_next.own_template import template_for
from llava_next.templates import OWN, get_template
from llava_next.tokenise import DATA_TOKENS, data_tokens, fingerprint
from llava_next.training.checkpoints.same_run import tokenizer_fingerprint
from support import real_tokenizers
from support.kinds import ON_REQUEST
from support.template_setups import with_template
from support.tiny import pack_tiny, random_samples

CLIP, SIGLIP = TOWERS
VICUNA, LLAMA3, QWEN2, MISTRAL = LLMS
TEMPLATE = {VICUNA: "vicuna_v1", LLAMA3: "llama_3", QWEN2: "qwen", MISTRAL: "mistral"}
TOKENIZER = {
    VICUNA: real_tokenizers.vicuna,
    LLAMA3: real_tokenizers.llama3,
    QWEN2: real_tokenizers.qwen2,
    MISTRAL: real_tokenizers.mistral,
}


def small_tokenizer(llm: str):
    return train_tokenizer(corpus_texts([], TEMPLATE[llm]), 512, TEMPLATE[llm])


def random_checkpoint(folder, name: str, dtype=torch.bfloat16, **changes):
    """A shrunk published model as a checkpoint folder: what a hub download of it would be."""
    config = scaled(architecture(name), "tiny")
    for key, value in {**({"vocab_size": 320} if name in LLMS else {}), **changes}.items():
        setattr(config, key, value)
    weights = random_part(config, seed=1).weights
    folder.mkdir(parents=True)
    write_weights(((key, weights.get(key).to(dtype)) for key in weights.names()), folder, 60_000)
    (folder / "config.json").write_text(config.to_json_string(use_diff=False))
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return random_checkpoint(root / "clip", CLIP), random_checkpoint(root / "vicuna", VICUNA)


@pytest.fixture
def unchecked(monkeypatch):
    """Composing without the checks at its end, for tests of weights alone."""
    monkeypatch.setattr(composing, "check_folder", lambda folder: [])


def refused(vision, llm, out, message: str, template: str = "vicuna_v1", tokenizer=None) -> None:
    with pytest.raises(ValueError, match=message):
        compose(vision_part(str(vision)), llm_part(str(llm)), tokenizer or small_tokenizer(VICUNA), template, out)
    assert not out.exists(), "something was written before the error"


# ---- architectures -----------------------------------------------------------------------------------------------


SMALLER = (1711.4, 3075.1, 7298.6, 7298.0, 3836.0, 999.9)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        *((CLIP, 303.5), (SIGLIP, 428.2), (VICUNA, 6738.4), (LLAMA3, 8030.3), (QWEN2, 7615.6), (MISTRAL, 7241.7)),
        *zip(OTHER_TOWERS, (92.9, 428.2, 427.9, 428.8, 631.4, 630.8, 630.8), strict=True),
        *zip(OTHER_LLMS, (8030.3, 1235.8, 7248.0, 12247.8, 7615.6, 8190.7, *SMALLER), strict=True),
    ],
    ids=str,
)
def test_architectures_have_the_published_number_of_parameters(name, millions):
    weights = random_part(architecture(name), seed=0).weights
    assert sum(shape.numel() for shape in weights.shapes.values()) / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize("scale", ["tiny", "small"])
@pytest.mark.parametrize("name", [*TOWERS, *LLMS])
def test_scaled_architectures_keep_what_makes_them_behave(name, scale):
    full, small = architecture(name), scaled(architecture(name), scale)
    kept = (
        *("image_size", "patch_size", "hidden_act", "layer_norm_eps", "rms_norm_eps", "rope_parameters", "vocab_size"),
        *("tie_word_embeddings", "sliding_window", "use_sliding_window", "max_position_embeddings", "model_type"),
    )
    for key in kept:
        assert getattr(small, key, None) == getattr(full, key, None), key
    if name in LLMS:
        heads = [(c.num_attention_heads, c.num_key_value_heads) for c in (full, small)]
        assert heads[0][0] * heads[1][1] == heads[1][0] * heads[0][1] and heads[1][1] >= 2
        assert small.rope_parameters["rope_theta"] == LLMS[name][1]["rope_theta"]
    ratios = [c.intermediate_size / c.hidden_size for c in (full, small)]
    assert ratios[1] == pytest.approx(ratios[0], rel=0.05)
    names, small_names = (random_part(c, seed=0).weights.shapes for c in (full, small))
    kinds = [{".".join(p for p in n.split(".") if not p.isdigit()) for n in part} for part in (names, small_names)]
    assert kinds[0] == kinds[1] and len(small_names) < len(names) / 3
    assert small.hidden_size <= {"tiny": 112, "small": 896}[scale]


def test_scaled_architectures_of_other_kinds_keep_what_differs_by_head_and_layer():
    nemo, gemma, phi, smollm = (
        scaled(architecture(name), "tiny")
        for name in (
            *("mistralai/Mistral-Nemo-Instruct-2407", "google/gemma-3-1b-it", "microsoft/Phi-4-mini-instruct"),
            "HuggingFaceTB/SmolLM3-3B",
        )
    )
    # hidden sizes that are not heads times their size: 5120 / 4096 and 1152 / 1024
    assert (nemo.hidden_size, nemo.num_attention_heads * nemo.head_dim) == (80, 64)
    assert (gemma.hidden_size, gemma.num_attention_heads * gemma.head_dim) == (144, 128)
    assert gemma.query_pre_attn_scalar == gemma.head_dim and windows(gemma) == [512, None]
    assert rotary_types(gemma) == ["sliding_attention", "full_attention"] and rotary_types(nemo) == [None, None]
    assert len(phi.rope_parameters["long_factor"]) == int(phi.hidden_size // phi.num_attention_heads * 0.75) // 2 == 3
    assert smollm.no_rope_layers == [1, 0]
    published = architecture("microsoft/Phi-4-mini-instruct").rope_parameters["long_factor"]
    assert len(published) == 48 and published[12] == pytest.approx(3.826451687, rel=1e-8)
    assert published[30] == pytest.approx(28.64115884, rel=1e-8)


@pytest.mark.parametrize("name", OTHER_TOWERS)
def test_other_towers_give_stock_features_of_any_layer(name):
    """Of 224 to 512 px, patches of 14 and 16, three activations; a sole tile."""
    config = scaled(architecture(name), "tiny")
    torch.manual_seed(0)
    tower, pixels = AutoModel.from_config(config).eval(), torch.randn(1, 3, config.image_size, config.image_size)
    with torch.no_grad():
        expected = tower(pixels, output_hidden_states=True).hidden_states
        for layer in (-2, -1, 1):
            found = run_tower(getattr(tower, "vision_model", tower), pixels, layer)
            torch.testing.assert_close(found, expected[layer], rtol=1e-5, atol=1e-5)
    patches = (config.image_size // config.patch_size) ** 2
    assert found.shape[1] == patches + ("clip" in config.model_type)


def test_qwen2_has_biases_on_queries_keys_and_values_only():
    shapes = random_part(architecture(QWEN2), seed=0).weights.shapes
    biases = {name.split(".", 3)[3] for name in shapes if name.endswith("bias")}
    assert biases == {f"self_attn.{p}_proj.bias" for p in "qkv"}


# ---- folders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vision", TOWERS)
@pytest.mark.parametrize("llm", LLMS)
def test_random_init_makes_a_folder_that_stock_transformers_loads(vision, llm, tmp_path, monkeypatch, capsys):
    options = ["--random_init", "--scale", "tiny", "--vision", vision, "--llm", llm, "--template", TEMPLATE[llm]]
    monkeypatch.setattr("sys.argv", ["compose.py", *options, "--out", str(tmp_path / "model")])
    script.main()
    assert TEMPLATE[llm] in capsys.readouterr().out
    model, info = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    config, tokenizer = model.config, AutoTokenizer.from_pretrained(tmp_path / "model")
    has_cls = "clip" in vision
    assert config.image_seq_length == (576 if has_cls else 729)
    assert config.vision_feature_select_strategy == ("default" if has_cls else "full")
    assert config.vision_feature_layer == -2
    processor = json.loads((tmp_path / "model" / "processor_config.json").read_text())
    assert processor["num_additional_image_tokens"] == int(has_cls) and processor["patch_size"] == 14
    assert config.image_token_id == tokenizer.convert_tokens_to_ids("<image>")
    assert config.text_config.vocab_size % 64 == 0 and len(tokenizer) <= config.text_config.vocab_size
    check_vocabulary(tokenizer, config.text_config.vocab_size)
    assert f"| language model | {llm}, tiny (random weights) | none |" in (tmp_path / "model/README.md").read_text()


def test_thin_model_has_the_special_ids_of_its_small_tokenizer(tmp_path, monkeypatch):
    """Also where the published padding token lies beyond the small vocabulary."""
    names = ["--vision", CLIP, "--llm", "allenai/OLMo-2-1124-7B-Instruct", "--template", "olmo_2"]
    options = ["--random_init", "--scale", "tiny", *names, "--out", str(tmp_path / "model")]
    monkeypatch.setattr("sys.argv", ["compose.py", *options])
    script.main()
    config = AutoConfig.from_pretrained(tmp_path / "model").text_config
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(config, name) == getattr(tokenizer, name) < config.vocab_size


def test_tower_of_another_size_and_layer_makes_a_folder_whose_pinpoints_are_scaled(tmp_path, monkeypatch):
    """SigLIP 2 of 256 px in 16 px patches with SmolLM2: the folder's own checks hold the stock processor to it."""
    names = ["--vision", "google/siglip2-so400m-patch16-256", "--llm", "HuggingFaceTB/SmolLM2-1.7B-Instruct"]
    options = ["--random_init", "--scale", "tiny", *names, "--template", "qwen", "--vision_feature_layer", "-1"]
    monkeypatch.setattr("sys.argv", ["compose.py", *options, "--out", str(tmp_path / "model")])
    script.main()
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["image_grid_pinpoints"] == [[512, 256], [256, 512], [512, 512], [256, 768], [768, 256]]
    assert (config["vision_feature_layer"], config["image_seq_length"]) == (-1, 256)
    assert config["tie_word_embeddings"] and config["text_config"]["rope_theta"] == 130000.0


@pytest.mark.skipif(len(ON_REQUEST) == 1, reason="a second for each; set LLAVA_NEXT_ALL_KINDS=1 to run")
@pytest.mark.parametrize("llm", [*LLMS, *OTHER_LLMS])
def test_every_key_of_a_full_architecture_has_a_source_and_a_place_in_the_export(llm, tmp_path):
    """On meta, with the largest tower: what would be composed, what the export's keys and config.json would be."""
    tokenizer = small_tokenizer(QWEN2)
    get_template("qwen").prepare_tokenizer(tokenizer)
    vision, text = (random_part(architecture(name), seed=0) for name in ("apple/DFN5B-CLIP-ViT-H-14-378", llm))
    config = compose_config(vision.config, text.config, tokenizer)
    sources = source_of_keys(config, vision, text)
    new = {key for key, (part, *_) in sources.items() if part is None}
    assert len(new) == 5 and len(sources) == len(vision.weights.shapes) + len(text.weights.shapes) + 5
    assert ("language_model.lm_head.weight" in sources) != text.config.tie_word_embeddings
    write_config(config, tmp_path, torch.bfloat16)
    with torch.device("meta"):
        stock = LlavaNextForConditionalGeneration(AutoConfig.from_pretrained(tmp_path))
    shapes = {file_key(name): p.shape for name, p in stock.named_parameters()}
    assert shapes == {key: shape for key, (_, _, shape) in sources.items()}
    rope = stock.config.text_config.rope_parameters
    assert rope == rope | text.config.rope_parameters


def test_composed_folder_keeps_the_tokens_that_data_may_contain(checkpoints, tmp_path, monkeypatch, capsys):
    """Of two that a tokenizer has besides, one is declared; the note names the other, an undeclared list names both."""
    clip, llm = checkpoints
    tokenizer = small_tokenizer(VICUNA)
    tokenizer.add_tokens(["<loc_1>", "<loc_2>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    options = ["--vision", str(clip), "--llm", str(llm), "--tokenizer", str(tmp_path / "tokenizer")]
    monkeypatch.setattr("sys.argv", ["compose.py", *options, "--out", str(tmp_path / "m"), "--data_tokens", "<loc_1>"])
    script.main()
    assert "special tokens <loc_2>: data that spells them" in capsys.readouterr().out
    template, loaded = get_template("vicuna_v1"), AutoTokenizer.from_pretrained(tmp_path / "m")
    assert data_tokens(loaded) == ("<loc_1>",) and template.undeclared_tokens(loaded) == ["<loc_2>"]
    turns = [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "<loc_1> <loc_2>"}]
    image_id = loaded.convert_tokens_to_ids("<image>")
    ids, labels = template.encode(turns, loaded, image_id, [])
    one, two = loaded.convert_tokens_to_ids(["<loc_1>", "<loc_2>"])
    assert list(labels).count(one) == 1 and two not in ids
    length = TextLength(f"{tmp_path / 'm'}:vicuna_v1")
    assert length.count(turns, []) == (len(ids), list(labels != -100).index(True))
    assert length.fingerprint == fingerprint(loaded, "vicuna_v1")
    before = tokenizer_fingerprint(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps(config | {DATA_TOKENS: []}))
    assert tokenizer_fingerprint(tmp_path / "m") != before


def test_a_model_is_composed_with_the_chat_template_that_its_tokenizer_brings(checkpoints, tmp_path):
    parts = vision_part(str(checkpoints[0])), llm_part(str(checkpoints[1]))
    out = compose(*parts, with_template("gemma_3"), OWN, tmp_path / "out")  # which passes every check of a folder
    loaded = AutoTokenizer.from_pretrained(out)
    template = template_for(OWN, loaded)
    assert template.jinja == loaded.chat_template == (out / "chat_template.jinja").read_text()
    assert loaded.eos_token == template.stop == "<end_of_turn>"
    refused(*checkpoints, tmp_path / "none", "template own: the tokenizer brings no chat template", OWN)


def test_a_model_whose_chats_differ_is_not_composed_and_the_tokens_are_named(checkpoints, tmp_path):
    """Line breaks that join: two tokens before an answer, one at the end of a prompt."""
    tokenizer = small_tokenizer(LLAMA3)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = train_like(tokenizer, ["\n\n"] * 9)
    message = r"fails: chats: .*as a prompt.*from token \d+ on \['ĊĊ'\] where training has \['Ċ', 'Ċ'\]"
    refused(*checkpoints, tmp_path / "out", message, "llama_3", tokenizer)


def train_like(tokenizer, texts: list[str]):
    return tokenizer.train_new_from_iterator(texts, len(tokenizer))


def test_no_id_lies_outside_the_vocabulary_while_composing(checkpoints, tmp_path, caplog):
    clip, llm = checkpoints
    config = compose_config(vision_part(str(clip)).config, llm_part(str(llm)).config, prepared(LLAMA3))
    assert config.text_config.pad_token_id < config.text_config.vocab_size
    assert "within the vocabulary" not in caplog.text


def prepared(llm: str):
    tokenizer = small_tokenizer(llm)
    get_template(TEMPLATE[llm]).prepare_tokenizer(tokenizer)
    return tokenizer


# recipe: id of <image>, pad token and id, rows, end token
PUBLISHED = {
    VICUNA: (32000, "<unk>", 0, 32064, 2),
    LLAMA3: (128256, "<pad>", 128257, 128320, 128009),
    QWEN2: (151646, "<|endoftext|>", 151643, 152064, 151645),
    MISTRAL: (32000, "<pad>", 32001, 32064, 2),
}


@pytest.mark.parametrize(("llm", "vision"), [(VICUNA, CLIP), (LLAMA3, SIGLIP), (QWEN2, CLIP), (MISTRAL, SIGLIP)])
def test_vocabulary_of_real_tokenizers_is_that_of_the_recipe(unchecked, llm, vision, tmp_path):
    image_id, pad, pad_id, rows, eos_id = PUBLISHED[llm]
    parts = [random_part(scaled(architecture(name), "tiny"), seed=0) for name in (vision, llm)]
    compose(*parts, TOKENIZER[llm](), TEMPLATE[llm], tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert config["image_token_index"] == tokenizer.convert_tokens_to_ids("<image>") == image_id
    assert (tokenizer.pad_token, tokenizer.pad_token_id, config["pad_token_id"]) == (pad, pad_id, pad_id)
    assert config["text_config"]["vocab_size"] == rows and config["eos_token_id"] == tokenizer.eos_token_id == eos_id
    old_rows = parts[1].config.vocab_size
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        for key in ("model.embed_tokens.weight", "lm_head.weight"):
            weight = file.get_tensor(f"language_model.{key}")
            assert weight.shape[0] == rows
            source = parts[1].weights.get(key)
            assert torch.equal(weight[:old_rows], source.to(torch.bfloat16))
            if rows > old_rows:
                torch.testing.assert_close(weight[-1].float(), source.mean(dim=0), rtol=0.01, atol=1e-4)
                assert torch.equal(weight[image_id], weight[-1])


@pytest.mark.parametrize("tied", [False, True])
def test_checkpoint_folders_become_the_same_tensors_in_one_model(unchecked, tmp_path, tied):
    own_code = {"AutoConfig": "configuration_own.Own"}  # beside a known kind it is not needed, and not kept
    clip, llama = random_checkpoint(tmp_path / "clip", CLIP), random_checkpoint(
        tmp_path / "llm", LLAMA3, tie_word_embeddings=tied, auto_map=own_code
    )  # fmt: skip
    assert len(list(llama.glob("*.safetensors"))) > 1
    out = compose(vision_part(str(clip)), llm_part(str(llama)), small_tokenizer(LLAMA3), "llama_3", tmp_path / "out")
    ours = load_file(out / "model.safetensors")
    assert "auto_map" in (llama / "config.json").read_text() and "auto_map" not in (out / "config.json").read_text()
    assert ("language_model.lm_head.weight" in ours) != tied
    seen = 0
    for folder, key_of in (
        (clip, lambda n: f"vision_tower.vision_model.{n.removeprefix('vision_model.')}"),
        (llama, lambda n: f"language_model.{n}"),
    ):
        for name, tensor in (item for file in folder.glob("*.safetensors") for item in load_file(file).items()):
            assert torch.equal(ours[key_of(name)][: len(tensor)], tensor), name
            seen += 1
    assert seen == len(ours) - 5  # two projector layers with biases and the newline
    model, info = LlavaNextForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (model.lm_head.weight is model.model.language_model.embed_tokens.weight) == tied


def test_pytorch_files_give_the_same_model_as_safetensors(unchecked, checkpoints, tmp_path):
    clip, vicuna = checkpoints
    old = tmp_path / "old"
    old.mkdir()
    shutil.copyfile(vicuna / "config.json", old / "config.json")
    weight_map = {}
    for number, file in enumerate(sorted(vicuna.glob("*.safetensors"))):
        tensors = load_file(file)
        name = f"pytorch_model-{number}.bin"
        torch.save({**tensors, f"layers.{number}.rotary_emb.inv_freq": torch.ones(4)}, old / name)  # as Vicuna's
        weight_map.update(dict.fromkeys(tensors, name))
    (old / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    new, ours = (
        compose(vision_part(str(clip)), llm_part(str(llm)), small_tokenizer(VICUNA), "vicuna_v1", tmp_path / out)
        for llm, out in ((vicuna, "new"), (old, "ours"))
    )
    expected, weights = load_file(new / "model.safetensors"), load_file(ours / "model.safetensors")
    assert set(weights) == set(expected) and all(torch.equal(weights[key], expected[key]) for key in expected)
    (old / "pytorch_model-1.bin").write_bytes(b"PK cut off")
    refused(clip, old, tmp_path / "out", "pytorch_model-1.bin cannot be read")


def test_new_weights_depend_on_the_seed_alone(unchecked, tmp_path):
    parts = [random_part(scaled(architecture(name), "tiny"), seed=0) for name in (CLIP, VICUNA)]
    weights = [
        load_file(
            compose(*parts, small_tokenizer(VICUNA), "vicuna_v1", tmp_path / str(i), seed=s) / "model.safetensors"
        )
        for i, s in enumerate((0, 0, 1))
    ]
    different = {key for key, tensor in weights[0].items() if not torch.equal(tensor, weights[2][key])}
    assert all(torch.equal(tensor, weights[1][key]) for key, tensor in weights[0].items())
    assert different == {
        "image_newline",
        *(f"multi_modal_projector.linear_{i}.{p}" for i in "12" for p in ("weight", "bias")),
    }


# ---- bad input ---------------------------------------------------------------------------------------------------


def copy_of(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / folder.name)


def edit_json(path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_parts_of_another_kind_are_refused(checkpoints, tmp_path):
    clip, vicuna = checkpoints
    out = tmp_path / "out"
    refused(vicuna, vicuna, out, "vicuna: vision towers are clip_vision_model, siglip_vision_model, not 'llama'")
    refused(
        clip, clip, out, "clip: language models are llama, mistral, qwen2, .*, not 'clip_vision_model': another kind"
    )
    strange = copy_of(vicuna, tmp_path)
    edit_json(strange / "config.json", model_type="mamba9")
    refused(clip, strange, out, "vicuna: config.json is of the kind 'mamba9', which this transformers does not know")
    (strange / "config.json").write_text('{"model_type": ')
    refused(clip, strange, out, r"vicuna/config.json is damaged \(Expecting value: line 1 column 16")
    (strange / "config.json").unlink()
    refused(clip, strange, out, "vicuna has no config.json: give the folder of a transformers checkpoint")
    refused(clip, tmp_path / "nothing", out, "neither a folder nor a hub repository")


OTHER_MODELS = {
    "experts": ({"model_type": "mixtral"}, "'mixtral' is a mixture of 8 experts; that would need the routers' loss"),
    "experts_of_qwen": ({"model_type": "qwen3_moe"}, "'qwen3_moe' is a mixture of 128 experts; .* Take a dense one"),
    "multimodal": ({"model_type": "gemma3"}, "'gemma3' is a multimodal checkpoint, .* save that by itself"),
    "own_code": (
        {"model_type": "chatty", "auto_map": {"AutoConfig": "configuration_chatty.Chatty"}},
        "of the kind 'chatty', which needs the code that came with it .*; such code is never run",
    ),
    "no_entry": ({"model_type": "gpt2"}, "not 'gpt2': another kind needs an entry in .*kinds.py and tests"),
    "soft_caps": ({"final_logit_softcapping": 30.0}, "'llama' with final_logit_softcapping 30.0: stock LLaVA-NeXT"),
    "dropout": ({"attention_dropout": 0.1}, "attention_dropout 0.1: dropout would differ .* set it to 0"),
    "quantised": ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config: its weights are quantised"),
    "dynamic_rope": (
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
        "rope_type 'dynamic': its frequencies depend on what was computed before",
    ),
}


@pytest.mark.parametrize(("changes", "message"), OTHER_MODELS.values(), ids=OTHER_MODELS)
def test_language_models_that_stock_would_not_train_alike_are_refused_with_what_they_are(
    checkpoints, tmp_path, changes, message
):
    clip, vicuna = checkpoints
    other = copy_of(vicuna, tmp_path)
    if "model_type" in changes:
        (other / "config.json").write_text("{}")
    edit_json(other / "config.json", **changes)
    refused(clip, other, tmp_path / "out", message)
    with pytest.raises(ValueError, match=message):  # its architecture with random weights
        architecture(str(other), of_llm=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "siglip2_vision_model"},
            "is SigLIP 2 NaFlex, whose patches lie in any shape: take one of fixed",
        ),
        (
            {"model_type": "dinov2_with_registers"},
            "is a tower with registers, tokens that are no patches; vision towers",
        ),
        ({"model_type": "clip_vision_model", "image_size": [224, 336]}, "image_size is .*: tiles and patches must be"),
        ({"model_type": "vit"}, "vision towers are clip_vision_model, siglip_vision_model, not 'vit'"),
    ],
)
def test_towers_without_a_square_of_patches_are_refused_with_what_they_are(checkpoints, tmp_path, changes, message):
    other = copy_of(checkpoints[0], tmp_path)
    (other / "config.json").write_text(json.dumps(changes))
    refused(other, checkpoints[1], tmp_path / "out", message)


def test_tower_that_was_given_other_pictures_is_refused(checkpoints, tmp_path):
    other = copy_of(checkpoints[0], tmp_path)
    (other / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}')
    refused(other, checkpoints[1], tmp_path / "out", r"image_mean is \[0.5, .* this one would see others than it was")
    (other / "preprocessor_config.json").write_text('{"image_mean": [0.48145466, 0.4578275, 0.40821073]}')
    vision_part(str(other))


def test_layer_that_the_tower_does_not_have_is_refused(checkpoints, tmp_path):
    parts = vision_part(str(checkpoints[0])), llm_part(str(checkpoints[1])), small_tokenizer(VICUNA)
    with pytest.raises(ValueError, match="vision_feature_layer -5 does not exist in a tower of 3 layers"):
        compose(*parts, "vicuna_v1", tmp_path / "out", feature_layer=-5)


def test_slow_tokenizer_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    with pytest.raises(ValueError, match=r"ByT5Tokenizer is a slow tokenizer, .* give a folder with a tokenizer.json"):
        load_tokenizer(str(tmp_path))


def test_tokenizer_without_the_templates_special_tokens_is_refused(checkpoints, tmp_path):
    message = r"lacks the special token\(s\) <\|start_header_id\|>, <\|end_header_id\|>, <\|eot_id\|>"
    refused(*checkpoints, tmp_path / "out", message, template="llama_3")
    with pytest.raises(ValueError, match="vicuna: no tokenizer could be loaded"):
        load_tokenizer(str(checkpoints[1]))


def test_missing_shard_file_is_named(checkpoints, tmp_path):
    clip, vicuna = checkpoints
    broken = copy_of(vicuna, tmp_path)
    victim = sorted(broken.glob("*.safetensors"))[1]
    victim.unlink()
    refused(clip, broken, tmp_path / "out", f"index.json names 1 files that are not there: {victim.name}; fetch the")


def test_cut_off_shard_file_is_named(checkpoints, tmp_path):
    clip, vicuna = checkpoints
    broken = copy_of(vicuna, tmp_path)
    victim = sorted(broken.glob("*.safetensors"))[0]
    victim.write_bytes(victim.read_bytes()[:-100])
    refused(clip, broken, tmp_path / "out", f"{victim.name} cannot be read .*; fetch the checkpoint again")
    (broken / "model.safetensors.index.json").unlink()
    refused(clip, broken, tmp_path / "out", "no model.safetensors, no pytorch_model.bin and no index of either")


def test_checkpoint_that_lacks_weights_is_named(checkpoints, tmp_path):
    clip, vicuna = checkpoints
    text_only = copy_of(clip, tmp_path)
    for file in text_only.glob("*.safetensors*"):
        file.unlink()
    save_file({"text_model.embeddings.token_embedding.weight": torch.zeros(8, 8)}, text_only / "model.safetensors")
    message = r"clip lacks 5\d of the 5\d weights of a clip_vision_model model, e.g. vision_tower."
    refused(text_only, vicuna, tmp_path / "out", message)
    headless = copy_of(vicuna, tmp_path)
    index = headless / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    file_of_head = weight_map["lm_head.weight"]
    edit_json(index, weight_map={k: f for k, f in weight_map.items() if k != "lm_head.weight"})
    refused(
        clip, headless, tmp_path / "out", r"vicuna lacks 1 of the \d+ weights of a llama model, e.g. language_model"
    )
    other = next(f for f in weight_map.values() if f != file_of_head)
    edit_json(index, weight_map={**weight_map, "lm_head.weight": other})
    refused(clip, headless, tmp_path / "out", f"1 tensors are not in the files .* lm_head.weight in {other}")


def test_weights_of_another_size_than_the_config_are_refused(checkpoints, tmp_path):
    clip, vicuna = checkpoints
    wrong = copy_of(vicuna, tmp_path)
    edit_json(wrong / "config.json", intermediate_size=256)
    refused(clip, wrong, tmp_path / "out", r"gate_proj.weight is \(176, 64\), but its config.json asks for \(256, 64\)")


def test_folder_that_is_not_empty_is_kept(checkpoints, tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    clip, vicuna = (vision_part(str(checkpoints[0])), llm_part(str(checkpoints[1])))
    with pytest.raises(ValueError, match="is not empty; give a new folder or remove it"):
        compose(clip, vicuna, small_tokenizer(VICUNA), "vicuna_v1", tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["precious.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vision", CLIP], "give --vision and --llm, or --demo"),
        (["--vision", CLIP, "--llm", VICUNA, "--scale", "tiny"], "--scale tiny needs --random_init"),
        (["--vision", CLIP, "--llm", "gpt2", "--random_init"], "gpt2: known architectures are openai/clip-vit-large"),
        (["--vision", VICUNA, "--llm", VICUNA, "--random_init"], "vision towers are"),
        (["--vision", CLIP, "--llm", CLIP, "--random_init"], "language models are"),
        (["--vision", CLIP, "--llm", VICUNA, "--random_init", "--template", "alpaca"], "no template 'alpaca'"),
    ],
)
def test_command_line_mistakes_end_in_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["compose.py", *arguments, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        script.main()
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_token_ids_beyond_the_embedding_are_refused():
    tokenizer = small_tokenizer(VICUNA)
    check_vocabulary(tokenizer, len(tokenizer))
    tokenizer.add_tokens(["<late>"])
    with pytest.raises(ValueError, match=f"token '<late>' of the tokenizer has id {len(tokenizer) - 1}, but the"):
        check_vocabulary(tokenizer, len(tokenizer) - 1)


def test_features_that_do_not_match_the_placeholders_are_refused():
    example = random_samples(0, 1, images=(2,))[0][0]
    pack_tiny([example])
    whole = example.feature_index
    example.feature_index = whole[:-3]
    with pytest.raises(ValueError, match=rf"sample 0: {len(whole) - 3} image features for {len(whole)} image tokens"):
        pack_tiny([example])
    example.feature_index = np.where(whole == whole.max(), 10**6, whole)
    with pytest.raises(ValueError, match=r"sample 0: image features up to row 1000000 .* cut for another tower"):
        pack_tiny([example])
    example.feature_index, example.image_positions = whole, example.image_positions + len(example.input_ids)
    with pytest.raises(ValueError, match=f"it has {len(example.input_ids)} tokens"):
        pack([example], 28, 16)
