"""Adapters in the packed forward: equal to stock peft on stock transformers, one sample at a time."""

import json
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors import safe_open
from transformers import LlavaNextForConditionalGeneration as StockLlavaNext

from llava_next import versions
from llava_next.model.folders import adapters
from llava_next.model.folders.adapters import (
    AdapterFolder,
    check_of_base,
    check_start,
    layer_and_kind,
    load_adapter,
    missing_base,
    save_adapter,
)
from llava_next.model.folders.export import save_model
from llava_next.model.folders.merging import merge_adapter, with_adapter
from llava_next.model.forward.lora import (
    DropoutKeys,
    Lora,
    SampleDropout,
    adapter_layers,
    add_adapters,
    is_adapter,
    linear_layers,
    short_name,
)
from llava_next.model.forward.modeling import LlavaNextForConditionalGeneration
from llava_next.training.devices.agreement import slot_weights
from llava_next.training.devices.parallel import apply_checkpointing
from llava_next.training.forecast.flops import decoder_matrices
from llava_next.training.recipe.config import parse_run
from llava_next.training.recipe.optim import Rates, freeze, module_of
from support.kinds import DISTINCT, ON_REQUEST, kind_config
from support.tiny import (
    geometry,
    gradients,
    pack_tiny,
    packed_logits,
    pairing_config,
    random_samples,
    stock_logits,
    stock_loss,
    tiny_config,
    tiny_pair,
)

close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
LLAMA = ("openai/clip-vit-large-patch14-336", "lmsys/vicuna-7b-v1.5")
QWEN2 = ("google/siglip-so400m-patch14-384", "Qwen/Qwen2-7B-Instruct")
EVERYWHERE = Lora(r=4, alpha=8, dropout=0.0, targets=["llm", "vision", "projector"])
DORA = Lora(r=3, alpha=6, dropout=0.0, targets=["llm", "vision.*_proj"], rank_scaling="rslora", dora=True)


class Adapted(NamedTuple):
    """A model with random adapters, and its folders as a run writes them."""

    model: LlavaNextForConditionalGeneration
    start: Path
    adapter: Path
    lora: Lora
    rates: Rates


def move_randomly(model) -> None:
    """What training would have changed is no longer what it began as: B is not zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)


MODELS = {"llama_lora": (LLAMA, EVERYWHERE), "qwen2_dora": (QWEN2, DORA)}
if len(ON_REQUEST) > 1:
    MODELS |= {name: (name, EVERYWHERE) for name in DISTINCT}


@pytest.fixture(scope="module", params=MODELS)
def adapted(request, tmp_path_factory) -> Adapted:
    """Llama + CLIP with LoRA in everything, Qwen2 + SigLIP with DoRA and the projector in full; on request others."""
    pairing, lora = MODELS[request.param]
    folder, rates = tmp_path_factory.mktemp("lora"), Rates()
    config = kind_config(pairing) if isinstance(pairing, str) else pairing_config(*pairing)
    model, _ = tiny_pair(folder / "start", config=config)
    add_adapters(model, lora, seed=3)
    freeze(model, rates)
    move_randomly(model)
    save_adapter(model, folder / "adapter", lora, folder / "start", folder)
    return Adapted(model, folder / "start", folder / "adapter", lora, rates)


def samples_of(config, seed: int = 0) -> list:
    return random_samples(seed, 5, images=(0, 1, 2), anyres=geometry(config))


def run(model, samples, parts: int = 1) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Packed loss and gradients of a step in so many micro-batches."""
    supervised = torch.tensor([(e.labels[1:] != -100).sum() for e, _ in samples], dtype=torch.float64)
    weights, total = slot_weights(supervised, "token"), torch.zeros(())
    model.zero_grad()
    for part in range(parts):
        batch = pack_tiny([e for e, _ in samples[part::parts]], geometry(model.config)).weighted(weights)
        loss = model(**batch.model_inputs(torch.device("cpu")), num_sources=2).loss
        loss.backward()
        total += loss.detach()
    return total, gradients(model)


def through_peft(adapted: Adapted):
    """The written adapter on the written base by stock peft and stock transformers."""
    from peft import PeftModel  # after bitsandbytes, see `nf4.bitsandbytes`

    base = json.loads((adapted.adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    stock, info = StockLlavaNext.from_pretrained(base, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return PeftModel.from_pretrained(stock, adapted.adapter, is_trainable=True)


def test_packed_step_equals_stock_peft_one_by_one_and_every_tensor_of_the_file_is_in_its_place(adapted):
    peft = through_peft(adapted)
    theirs = {n.removeprefix("base_model.model."): p for n, p in peft.named_parameters() if is_adapter(n)}
    ours = {n: p for n, p in adapted.model.named_parameters() if is_adapter(n)}
    assert ours.keys() == theirs.keys() and len(ours) == (2 + adapted.lora.dora) * len(adapter_layers(adapted.model))
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in ours.items())
    samples = samples_of(adapted.model.config)
    loss, found = run(adapted.model, samples)
    supervised = torch.tensor([(e.labels[1:] != -100).sum() for e, _ in samples], dtype=torch.float64)
    expected = stock_loss(peft, samples, slot_weights(supervised, "token"))
    expected.backward()
    close(loss, expected.detach())
    adapters = {name for name in found if is_adapter(name)}
    assert adapters == ours.keys() and {module_of(n) for n in adapters} == adapted.lora.modules
    for name in adapters:
        close(found[name], theirs[name].grad, msg=lambda m, n=name: f"{n}: {m}")
    in_full = {module_of(name) for name in found.keys() - adapters}
    assert in_full == ({"newline"} if "projector" in adapted.lora.modules else {"newline", "projector"})


def test_merged_equals_unmerged_and_merging_later_gives_the_same_bytes(adapted, tmp_path):
    save_model(adapted.model, tmp_path / "model", dtype=torch.float32)
    base = json.loads((adapted.adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    merge_adapter(Path(base), adapted.adapter, tmp_path / "later", dtype=torch.float32)
    files = [tmp_path / name / "model.safetensors" for name in ("model", "later")]
    with safe_open(files[0], "pt") as one, safe_open(files[1], "pt") as two:
        assert set(one.keys()) == set(two.keys())
        assert all(torch.equal(one.get_tensor(k), two.get_tensor(k)) for k in one.keys())  # noqa: SIM118
    merged, peft = StockLlavaNext.from_pretrained(tmp_path / "model"), through_peft(adapted)
    in_memory = with_adapter(StockLlavaNext.from_pretrained(base), adapted.adapter)
    assert all(torch.equal(tensor, merged.get_parameter(name)) for name, tensor in in_memory.named_parameters())
    with torch.no_grad():
        for example, sizes in samples_of(adapted.model.config, seed=2)[:3]:
            expected = stock_logits(merged, example, sizes)
            close(packed_logits(adapted.model, pack_tiny([example], geometry(adapted.model.config))), expected)
            close(stock_logits(peft, example, sizes), expected)


def test_switched_off_adapters_are_the_base_exactly_and_new_ones_change_nothing(adapted):
    model = LlavaNextForConditionalGeneration.from_pretrained(adapted.start)
    samples = samples_of(model.config, seed=4)
    base, _ = run(model, samples)
    add_adapters(model, adapted.lora, seed=5)
    freeze(model, adapted.rates)
    close(run(model, samples)[0], base)  # B is zero
    load_adapter(model, adapted.adapter)
    assert (run(model, samples)[0] - base).abs() > 1e-3
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            layer.enable_adapters(False)
        batch = pack_tiny([e for e, _ in samples], geometry(model.config)).model_inputs(torch.device("cpu"))
        off = model(**batch, num_sources=2).loss
        plain = LlavaNextForConditionalGeneration.from_pretrained(adapted.start)
        assert torch.equal(off, plain(**batch, num_sources=2).loss)


def test_training_starts_from_an_adapter_of_the_same_form_and_base_only(adapted):
    model = LlavaNextForConditionalGeneration.from_pretrained(adapted.start)
    base = Path(json.loads((adapted.adapter / "adapter_config.json").read_text())["base_model_name_or_path"])
    lora = Lora(**{**vars(adapted.lora), "start": str(adapted.adapter)})
    add_adapters(model, lora, seed=9)
    layers = list(adapter_layers(model))
    check_start(lora, base, layers)
    load_adapter(model, adapted.adapter)
    theirs = dict(adapted.model.named_parameters())
    assert all(torch.equal(p, theirs[n]) for n, p in model.named_parameters() if is_adapter(n))
    with pytest.raises(ValueError, match="was not trained on"):
        check_start(lora, adapted.start if base != adapted.start else adapted.adapter.parent, layers)
    with pytest.raises(ValueError, match=r"lora.r: 1, but"):
        check_start(Lora(**{**vars(lora), "r": 1}), base, layers)
    with pytest.raises(ValueError, match=r"lora.targets: not those of"):
        check_start(lora, base, layers[1:])


def test_a_base_that_moved_or_changed_is_told_with_what_to_do(tmp_path, monkeypatch):
    run = tmp_path.resolve() / "run"
    (run / "base-step-2").mkdir(parents=True)
    adapter = AdapterFolder(run / "adapter-step-2", Lora(), {}, tmp_path / "old", "theirs")
    assert "was it moved? Write where it is now into adapter_config.json" in missing_base(adapter)
    (run / "base-step-2/config.json").touch()
    assert f"Write {run}/base-step-2, which is beside it, into adapter_config.json" in missing_base(adapter)
    monkeypatch.setattr(adapters, "model_fingerprint", lambda folder: "another")
    with pytest.raises(ValueError, match=r"model: .* as it is now .*; bring back its files as they were"):
        check_of_base(adapter, adapter.base, "model")
    with pytest.raises(ValueError, match=r"; give the one that its adapter_config.json names: .*/old$"):
        check_of_base(adapter, run, "model")


def test_the_file_follows_the_rules_that_vllm_has_for_adapters(adapted):
    """No module trained in full, one rank, no bias, and only matrices A and B, under names that it maps."""
    config = json.loads((adapted.adapter / "adapter_config.json").read_text())
    assert config["modules_to_save"] is None and config["bias"] == "none" and config["r"] == adapted.lora.r
    with safe_open(adapted.adapter / "adapter_model.safetensors", "pt") as file:
        keys = list(file.keys())
    kinds = {key.rpartition(".lora_")[2] for key in keys}
    assert kinds == {"A.weight", "B.weight", *(["magnitude_vector"] if adapted.lora.dora else [])}
    roots = ("language_model.model.layers.", "vision_tower.vision_model.encoder.layers.", "multi_modal_projector.")
    roots += ("model.multi_modal_projector.",)  # the same tensors, for releases from 4.52 on
    assert all(key.removeprefix("base_model.model.").startswith(roots) for key in keys)
    assert {layer_and_kind(key)[0] for key in keys} == set(adapter_layers(adapted.model))


@pytest.mark.parametrize("name", DISTINCT)
def test_targets_of_other_kinds_are_the_matrices_that_the_forecast_counts(name):
    config = kind_config(name)
    with torch.device("meta"):
        layers = linear_layers(LlavaNextForConditionalGeneration(config))
    found = {short_name(name): layer.weight.shape[::-1] for name, layer in layers.items()}
    due = {
        f"llm.layers.{at}.{name}": sides
        for name, sides in decoder_matrices(config.text_config).items()
        for at in (0, 1)
    }
    assert {name: sides for name, sides in found.items() if name.startswith("llm")} == due


# ---- dropout ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dropping():
    """A model with dropout in adapters of all kinds."""
    torch.manual_seed(0)
    model = LlavaNextForConditionalGeneration(tiny_config())
    model.set_attn_implementation({"text_config": "segment_loop", "vision_config": "sdpa"})
    add_adapters(model, Lora(**{**vars(EVERYWHERE), "dropout": 0.3}), seed=1)
    freeze(model, Rates())
    move_randomly(model)
    return model.train()


def test_dropout_depends_on_seed_and_sample_not_on_what_is_packed_together(dropping):
    samples = samples_of(dropping.config)
    loss, expected = run(dropping, samples)
    again, ours = run(dropping, samples, parts=3)
    close(again, loss)
    for name, gradient in expected.items():
        close(ours[name], gradient, msg=lambda m, n=name: f"{n}: {m}")
    for layer in adapter_layers(dropping).values():
        layer.lora_dropout["default"].seed += 1
    assert (run(dropping, samples)[0] - loss).abs() > 1e-4
    for layer in adapter_layers(dropping).values():
        layer.lora_dropout["default"].seed -= 1
    dropping.eval()
    silent, _ = run(dropping, samples)
    dropping.train()
    assert (silent - loss).abs() > 1e-4


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_recomputed_activations_drop_the_same_bits(dropping, policy):
    samples, layers = samples_of(dropping.config), [*dropping.model.language_model.layers]
    layers += dropping.vision_tower.encoder.layers
    kinds = [type(layer) for layer in layers]
    loss, expected = run(dropping, samples)
    apply_checkpointing(dropping, policy)
    try:
        again, ours = run(dropping, samples)
    finally:
        for layer, kind in zip(layers, kinds, strict=True):
            layer.__class__ = kind
    assert torch.equal(again, loss) and ours.keys() == expected.keys()
    assert all(torch.equal(gradient, ours[name]) for name, gradient in expected.items())


def test_dropout_leaves_out_its_share_in_every_step_row_and_layer_anew():
    keys = DropoutKeys()
    dropout = SampleDropout(0.25, "one", keys, by_tile=False)
    ones, seen = torch.ones(1, 400, 1000), []
    example = random_samples(0, 1, images=(0,))[0][0]
    example.input_ids = example.labels = example.input_ids.repeat(400)[:400]
    for step in (0, 1):
        keys.tokens = pack_tiny([example], step=step).token_keys
        seen.append(dropout(ones) == 0)
    seen.append(SampleDropout(0.25, "two", keys, by_tile=False)(ones) == 0)
    for one in seen:  # a standard deviation of a mean of 400,000 is 0.0007, of a row 0.014, of a column 0.022
        assert one.float().mean().item() == pytest.approx(0.25, abs=0.004)
        assert (one.float().mean(2) - 0.25).abs().max() < 0.08 and (one.float().mean(1) - 0.25).abs().max() < 0.12
    both = [(seen[0] & seen[1]).float().mean(), (seen[1] & seen[2]).float().mean()]
    both += [(seen[0][:, 1:] & seen[0][:, :-1]).float().mean(), (seen[0][..., 1:] & seen[0][..., :-1]).float().mean()]
    assert torch.stack(both).numpy() == pytest.approx(0.0625, abs=0.003)  # independent of each other
    assert dropout(ones).max() == 1 / 0.75


# ---- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--lora.targets", "[q_proj]"], "begins with none of llm, vision, projector; try 'llm.*.q_proj'"),
        (["--lora.targets", "[lmm.*.q_proj]"], "begins with none of llm, vision, projector; try 'llm.*.q_proj'"),
        (["--lora.targets", "[lmm]"], "try 'llm'"),
        (["--lora.targets", "[lm_head]", "--quantize", "nf4"], "head and embeddings get no adapters"),
        (["--lora.targets", "[]"], "names no layer"),
        (["--lora.r", "0"], "lora.r: must be positive"),
        (["--lora.r", "1.5"], "lora.r: expected int, not 1.5\n"),
        (["--lora.targets", "llm,vision"], "lora.targets: expected list, not llm,vision; write '[llm,vision]'"),
        (["--lora.targts", "[llm]"], "lora.targts: no such key"),
        (["--lora", "true"], "lora: true is no value for it; give its keys, as --lora.KEY VALUE, or null"),
        (["--lora.start", "s3://bucket/a"], "lora.start: s3://bucket/... is a URL"),
        (["--quantize", "int8"], "quantize: expected Literal['nf4'] or null, not int8"),
        (["--lora.dropout", "1"], "lora.dropout: must be in [0, 1)"),
        (["--lora.r", "8"], "optim.rates.vision: 2e-06, but under lora"),
        (["--lora.r", "8", "--optim.rates.llm", "null"], "optim.rates.llm: null, but lora.targets names it"),
        (["--lora.r", "8", "--optim.rates.vision", "null", "--float8", "true"], "float8"),
        (
            ["--lora.dora", "true", "--optim.rates.vision", "null", "--compile_layers", "true"],
            "compile_layers: peft's layers for lora.dora cannot be compiled",
        ),
    ],
)
def test_lora_that_cannot_work_is_refused(options, expected):
    with pytest.raises(ValueError) as refused:
        parse_run(["--model", "m", "--run_dir", "r", "--data.sources", "s", *options])
    assert expected in str(refused.value)


def test_missing_and_old_peft_are_refused(monkeypatch):
    given = ["--model", "m", "--run_dir", "r", "--data.sources", "s", "--optim.rates.vision", "null", "--lora.r", "8"]
    monkeypatch.setattr(versions, "version", lambda name: "0.13.2")
    with pytest.raises(ValueError, match=r"peft 0.13.2 is older than 0.18; `pip install -c .*\[lora\]'`"):
        parse_run(given)
    monkeypatch.setattr(versions, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"peft is not installed; `pip install -c .*\[lora\]'`"):
        parse_run(given)


def test_unknown_layers_and_too_large_ranks_name_what_there_is():
    with torch.device("meta"):
        model = LlavaNextForConditionalGeneration(tiny_config())
    with pytest.raises(ValueError, match=r"'llm.\*.qkv' is no layer .* there are llm.layers.\*.mlp.down_proj, "):
        add_adapters(model, Lora(targets=["llm.*.qkv"]), 0)
    with pytest.raises(ValueError, match=r"lora.r: 25 is more than .* llm.layers.0.self_attn.k_proj .* \(24 x 48\)"):
        add_adapters(model, Lora(r=25), 0)
    # the head and what no forward reads are no targets
    layers = {short_name(name) for name in linear_layers(model)}
    assert len(layers) == 2 * 7 + 2 * 6 + 2 and not any("vision.layers.2" in name for name in layers)
