"""Every pairing of tower and language model: the packed forward against stock transformers, one sample at a time."""

import pytest
import torch
from transformers import LlavaNextForConditionalGeneration as StockLlavaNext

from llava_next.model.folders.dry import LLMS, TOWERS
from llava_next.model.folders.export import save_model
from llava_next.model.forward import attention, modeling
from llava_next.model.forward.attention import attention_names, choose_attention
from llava_next.model.forward.modeling import LlavaNextForConditionalGeneration, unused_parameters
from llava_next.training.devices.parallel import apply_checkpointing
from llava_next.training.recipe.optim import Rates, build_optimizer, freeze
from support.comparing import assert_equal_to_stock, close, in_slots, mixed_samples
from support.comparing import packed_step as run
from support.kinds import KINDS, ON_REQUEST, kind_config
from support.tiny import geometry, gradients, pack_tiny, pairing_config, stock_loss, tiny_pair

PAIRINGS = [(vision, llm, tied) for vision in TOWERS for llm in LLMS for tied in (False, True)]
UNTIED = [(vision, llm, False) for vision in TOWERS for llm in LLMS]
# each pairing once, each language model tied and untied
ONCE = [(v, llm, (list(TOWERS).index(v) + list(LLMS).index(llm)) % 2 == 1) for v in TOWERS for llm in LLMS]
POLICIES = ("full", "selective", 1)


def label(pairing) -> str:
    if isinstance(pairing, str):
        return pairing
    vision, llm, tied = pairing
    return f"{vision.split('/')[1].split('-')[0]}_{llm.split('/')[1].lower()}_{'tied' if tied else 'untied'}"


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Called with a pairing, or a row of `KINDS`: the folder of its tiny model, our and the stock model from it."""
    made = {}

    def make(pairing):
        if pairing not in made:
            folder = tmp_path_factory.mktemp("pairing") / "model"
            config = kind_config(pairing) if isinstance(pairing, str) else pairing_config(*pairing)
            made[pairing] = (folder, *tiny_pair(folder, config=config))
        return made[pairing]

    return make


@pytest.mark.parametrize("pairing", PAIRINGS, ids=label)
def test_packed_loss_logits_and_gradients_equal_stock_transformers(folder_of, pairing):
    _, model, stock = folder_of(pairing)
    assert_equal_to_stock(model, stock, mixed_samples(model.config, seed=PAIRINGS.index(pairing)))


@pytest.mark.parametrize("name", KINDS)
def test_other_kinds_equal_stock_transformers(folder_of, name):
    _, model, stock = folder_of(name)
    assert_equal_to_stock(model, stock, mixed_samples(model.config, seed=1, count=2, longest=130))


@pytest.mark.parametrize("pairing", ONCE, ids=label)
def test_changed_weights_survive_export_and_stock_from_pretrained(folder_of, pairing, tmp_path):
    folder, *_ = folder_of(pairing)
    model = LlavaNextForConditionalGeneration.from_pretrained(folder)
    samples = mixed_samples(model.config, seed=2)
    run(model, samples)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad / (parameter.grad.abs().max() + 1e-12)
    save_model(model, tmp_path / "out", dtype=torch.float32)
    stock, info = StockLlavaNext.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert (stock.lm_head.weight is stock.model.language_model.embed_tokens.weight) == pairing[2]
    assert_equal_to_stock(model, stock, samples)
    assert all(torch.equal(p, stock.get_parameter(n)) for n, p in model.named_parameters())


BY_POLICY = [(UNTIED[0], "full"), (UNTIED[6], "full"), *((name, policy) for name in ON_REQUEST for policy in POLICIES)]


@pytest.mark.parametrize(
    ("pairing", "policy"), BY_POLICY, ids=lambda value: label(value) if isinstance(value, str | tuple) else None
)
def test_activation_checkpointing_changes_no_bit(folder_of, pairing, policy):
    folder, model, _ = folder_of(pairing)
    samples = mixed_samples(model.config, seed=3, count=2, longest=130)
    loss, expected = run(model, samples)
    checkpointed = LlavaNextForConditionalGeneration.from_pretrained(folder)
    apply_checkpointing(checkpointed, policy)
    again, ours = run(checkpointed, samples)
    assert torch.equal(again, loss) and set(ours) == set(expected)
    assert all(torch.equal(gradient, ours[name]) for name, gradient in expected.items())


@pytest.mark.parametrize("pairing", ONCE, ids=label)
def test_text_only_and_empty_batches_reach_every_trained_parameter(folder_of, pairing):
    _, model, stock = folder_of(pairing)
    texts = in_slots([s for s in mixed_samples(model.config, seed=4) if not s[1]])
    loss, ours = run(model, texts)
    expected = stock_loss(stock, texts, torch.full((9,), 1 / sum((e.labels[1:] != -100).sum() for e, _ in texts)))
    assert len(texts) >= 3
    close(loss, expected.detach())
    reachable = {name for name, _ in model.named_parameters()} - unused_parameters(model)
    assert set(ours) == reachable
    vision = [g for name, g in ours.items() if "vision_tower" in name or "projector" in name]
    assert len(vision) > 30 and max(g.abs().max() for g in vision) == 0
    model.zero_grad()
    empty = pack_tiny([], geometry(model.config))
    model(**empty.model_inputs(torch.device("cpu"))).loss.backward()
    reached = gradients(model)
    assert set(reached) == reachable and max(g.abs().max() for g in reached.values()) == 0


@pytest.mark.parametrize("pairing", UNTIED[::4], ids=label)
def test_unused_parts_of_the_tower_are_the_last_layer_the_norm_and_the_pooling_head(folder_of, pairing):
    _, model, _ = folder_of(pairing)
    names = {name.removeprefix("model.vision_tower.") for name in unused_parameters(model)}
    groups = {name.split(".")[0] if "layers" not in name else name.split(".")[2] for name in names}
    assert groups == ({"2", "post_layernorm"} if "clip" in pairing[0] else {"2", "post_layernorm", "head"})
    assert len(names) == (18 if "clip" in pairing[0] else 29)  # 16 a layer, 2 a norm, 11 in the head


@pytest.mark.parametrize("pairing", UNTIED[::4], ids=label)
def test_frozen_tower_builds_no_graph_and_changes_no_other_gradient(folder_of, pairing):
    folder, model, _ = folder_of(pairing)
    samples = mixed_samples(model.config, seed=5)
    loss, expected = run(model, samples)
    frozen = LlavaNextForConditionalGeneration.from_pretrained(folder)
    freeze(frozen, Rates(vision=None))
    seen = []
    frozen.vision_tower.encoder.layers[1].register_forward_hook(lambda _m, _i, out: seen.append(out.requires_grad))
    again, ours = run(frozen, samples)
    assert seen == [False]
    assert torch.equal(again, loss)
    assert set(ours) == {name for name in expected if "vision_tower" not in name}
    assert all(torch.equal(gradient, expected[name]) for name, gradient in ours.items())


def test_tied_head_is_trained_once_and_frozen_with_the_language_model(folder_of):
    model = folder_of((*UNTIED[6][:2], True))[1]
    names = [name for name, _ in model.named_parameters()]
    assert "lm_head.weight" not in names and "model.language_model.embed_tokens.weight" in names
    try:
        freeze(model, Rates())
        optimizer = build_optimizer(model, Rates(), (0.9, 0.999), 1e-8, 0.0)
        trained = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert len(trained) == len(set(trained)) == len(names) - len(unused_parameters(model))
        assert trained.count(id(model.lm_head.weight)) == 1
        freeze(model, Rates(llm=None))
        assert not model.lm_head.weight.requires_grad
    finally:
        model.requires_grad_(True)


# ---- attention kernels -------------------------------------------------------------------------------------------


def test_attention_choice_names_its_reason():
    assert choose_attention("auto", "cpu") == (
        "sdpa", "one SDPA call a segment: variable-length kernels are for CUDA, the device is cpu"
    )  # fmt: skip
    assert choose_attention("sdpa", "cpu")[0] == "sdpa"
    for wanted in ("varlen", "flash"):
        with pytest.raises(ValueError, match=f"{wanted} cannot run here: .* device is cpu; set it to auto or sdpa"):
            choose_attention(wanted, "cpu")
    with pytest.raises(ValueError, match="'eager' is none of auto, fa3, varlen, flash, sdpa"):
        choose_attention("eager", "cpu")


def test_attention_choice_on_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert choose_attention("auto", "cuda")[0] == choose_attention("varlen", "cuda")[0] == "varlen"
    assert "not FlashAttention 3: the package flash_attn_3" in choose_attention("auto", "cuda")[1]
    with pytest.raises(ValueError, match=r"fa3 cannot run here: the package flash_attn_3 .* is not installed"):
        choose_attention("fa3", "cuda")
    assert "bfloat16 and float16" in choose_attention("auto", "cuda", torch.float32)[1]
    assert "waits for" in choose_attention("sdpa", "cuda")[1]
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="flash-attn, which is not installed; install it with `pip install flash-attn"):
        choose_attention("flash", "cuda")
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: object())
    # what is installed, but for another torch
    assert choose_attention("auto", "cuda")[0] == "varlen"
    assert "flash_attn_interface does not load (ModuleNotFoundError" in choose_attention("auto", "cuda")[1]
    assert choose_attention("flash", "cuda") == ("flash", "asked for: the flash-attn package")
    activated = []
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activated.append)
    assert choose_attention("auto", "cuda") == ("fa3", "FlashAttention 3 by torch's variable-length attention")
    assert choose_attention("fa3", "cuda")[1].endswith("attention, asked for") and activated == ["FA3", "FA3"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "not FlashAttention 3: NVIDIA A100 is no Hopper" in choose_attention("auto", "cuda")[1]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert "Tesla T4 is older than Ampere" in choose_attention("auto", "cuda")[1]


def varlen_on_cpu(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size):
    """The arithmetic that variable-length kernels promise, `[T, heads, head_dim]`, causal, key heads repeated."""
    before, behind = window_size
    assert behind == 0
    assert (cu_q is cu_k) and max_q == max_k == int(cu_q.diff().max())
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    segment = torch.bucketize(torch.arange(len(q)), cu_q[1:], right=True)
    seen = (segment[:, None] == segment[None]) & torch.ones(len(q), len(q), dtype=torch.bool).tril()
    if before >= 0:
        seen = seen.triu(-before)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


@pytest.mark.parametrize("kernel", ["varlen", "flash"])
@pytest.mark.parametrize("pairing", [UNTIED[0], UNTIED[6], "gemma3"], ids=label)
def test_variable_length_kernels_are_called_with_the_arithmetic_of_the_loop(folder_of, pairing, kernel, monkeypatch):
    folder, model, _ = folder_of(pairing)
    samples = mixed_samples(model.config, seed=6)
    expected = run(model, samples)

    def torch_varlen(*args, scale=None, window_size=(-1, -1), enable_gqa=False):
        assert enable_gqa == (args[0].shape[1] != args[1].shape[1])
        return varlen_on_cpu(*args, scale=scale, window_size=window_size)

    def flash_attn_varlen_func(*args, softmax_scale=None, causal=False, window_size=(-1, -1)):
        assert causal
        return varlen_on_cpu(*args, scale=softmax_scale, window_size=window_size)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", torch_varlen)
    fake = type("flash_attn", (), {"flash_attn_varlen_func": staticmethod(flash_attn_varlen_func)})
    monkeypatch.setitem(__import__("sys").modules, "flash_attn", fake)
    attention._varlen_options.cache_clear()
    other = LlavaNextForConditionalGeneration.from_pretrained(folder, attn_implementation=attention_names(kernel))
    loss, ours = run(other, samples)
    attention._varlen_options.cache_clear()
    close(loss, expected[0])
    for name, gradient in expected[1].items():
        close(ours[name], gradient, msg=lambda m, n=name: f"{n}: {m}")


# ---- no waiting for the device -----------------------------------------------------------------------------------


def stand_in_attention(query, key, value, cu_seqlens, max_length, scaling, window):
    """Depends on queries, keys and values and looks at nothing on the host."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    return (query * key * scaling + value).transpose(1, 2)


def run_without_data(folder, batch) -> None:
    """Forward and backward on tensors that have shapes but no values: whatever reads a value on the host raises."""
    config = LlavaNextForConditionalGeneration.config_class.from_pretrained(folder)
    with torch.device("meta"):
        model = LlavaNextForConditionalGeneration(config)
    model.set_attn_implementation(attention_names("sdpa"))
    inputs = batch.model_inputs(torch.device("meta"))
    assert all(v.is_meta for v in inputs.values() if torch.is_tensor(v)) and isinstance(inputs["max_seqlen"], int)
    output = model(**inputs, num_sources=2)
    output.loss.backward()
    assert output.loss.is_meta and model.model.image_newline.grad is not None


SYNCS = {
    "item": lambda features: features * features.sum().item(),
    "tolist": lambda features: features * len(features[:, 0].tolist()),
    "branch": lambda features: features if features.isfinite().all() else features * 0,
    "boolean mask": lambda features: features[features[:, 0] >= features[:, 0]],
    "copy to the host": lambda features: features + features.cpu().sum(),
}


@pytest.mark.parametrize("pairing", [*UNTIED, "phi4_mini", "gemma3"], ids=label)
def test_packed_forward_and_backward_read_no_tensor_on_the_host(folder_of, pairing, monkeypatch):
    folder, model, _ = folder_of(pairing)
    batch = pack_tiny([e for e, _ in mixed_samples(model.config, seed=7)], geometry(model.config))
    monkeypatch.setitem(attention._KERNELS, "sdpa", stand_in_attention)
    run_without_data(folder, batch)


@pytest.mark.parametrize("sync", SYNCS)
def test_a_host_read_in_the_forward_would_be_noticed(folder_of, sync, monkeypatch):
    folder, model, _ = folder_of(UNTIED[0])
    batch = pack_tiny([e for e, _ in mixed_samples(model.config, seed=7)], geometry(model.config))
    monkeypatch.setitem(attention._KERNELS, "sdpa", stand_in_attention)
    inner = modeling.LlavaNextForConditionalGeneration.image_features
    monkeypatch.setattr(
        modeling.LlavaNextForConditionalGeneration, "image_features", lambda self, t: SYNCS[sync](inner(self, t))
    )
    with pytest.raises((RuntimeError, NotImplementedError)):
        run_without_data(folder, batch)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_packed_step_on_a_gpu_never_waits(folder_of):
    folder, model, _ = folder_of(UNTIED[6])
    batch = pack_tiny([e for e, _ in mixed_samples(model.config, seed=8)], geometry(model.config)).pin_memory()
    model = LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).cuda()
    for mode in ("default", "error"):  # the first pass compiles and allocates
        torch.cuda.set_sync_debug_mode(mode)
        try:
            model(**batch.model_inputs(torch.device("cuda")), num_sources=2).loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
