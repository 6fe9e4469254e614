"""Float8 linears: which are swapped, how far losses move, and nothing of it in checkpoints and exports.

Tests of the products themselves need torchao, installed or in the folder that scripts/test.sh makes for it. None needs
a GPU.
"""

import json
import logging
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from llava_next import versions
from llava_next.model.forward.modeling import LlavaNextForConditionalGeneration
from llava_next.training.devices import float8
from llava_next.training.devices.float8 import check_device, use_float8
from llava_next.training.devices.launch import layer_stacks
from llava_next.training.devices.parallel import apply_checkpointing, compile_layers
from llava_next.training.recipe.checks import check_run
from llava_next.training.recipe.config import RunConfig, Source
from llava_next.training.recipe.optim import Rates, freeze
from support.exports import assert_stock_export
from support.launching import launch
from support.tiny import tiny_config, tiny_pair
from support.tracing import find_torchao, micro_batch, use_dense_attention


@pytest.fixture
def torchao():
    find_torchao()
    return pytest.importorskip("torchao", reason="torchao is neither installed nor where LLAVA_NEXT_TORCHAO says")


def model_of(rates=None, seed=0, **text) -> LlavaNextForConditionalGeneration:
    torch.manual_seed(seed)
    model = LlavaNextForConditionalGeneration(tiny_config(**text)).train()
    model.set_attn_implementation({"text_config": "segment_loop", "vision_config": "sdpa"})
    freeze(model, rates or Rates())
    return model


def step(model, mode=None, **batch) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients; backward runs under `mode`."""
    model.zero_grad()
    loss = model(**(batch or micro_batch(1, 4))).loss
    with mode or nullcontext():
        loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_only_the_decoder_layers_linears_are_swapped_and_their_parameters_stay(torchao):
    model = model_of()
    before, linears = dict(model.named_parameters()), {n for n, m in model.named_modules() if type(m) is nn.Linear}
    assert use_float8(model, emulate=True) == 10
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(after[name] is p for name, p in before.items())
    swapped = linears - {n for n, m in model.named_modules() if type(m) is nn.Linear}
    # keys and values are 24 wide, no multiple of 16
    names = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert swapped == {f"model.language_model.layers.{i}.{name}" for i in (0, 1) for name in names}


@pytest.mark.parametrize("kind", [(1, 4), (2, 1, (0,)), (3, 0)], ids=["images", "text", "empty"])
def test_products_of_any_number_of_tokens_equal_their_emulation(torchao, monkeypatch, kind):
    """torch's own scaled product takes inner sides of 16 only: gradients of weights sum over padded tokens."""
    monkeypatch.setattr(float8, "check_device", lambda device: None)
    outcomes, plain = [], step(model_of(), **micro_batch(*kind))
    for emulate in (True, False):
        model = model_of()
        use_float8(model, emulate)
        outcomes.append(step(model, **micro_batch(*kind)))
    (emulated, expected), (real, ours) = outcomes
    assert real == pytest.approx(emulated, rel=1e-5) and real == pytest.approx(plain[0], rel=0.02, abs=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        if plain[1][name].norm() > 1e-4:
            assert torch.cosine_similarity(gradient.flatten(), plain[1][name].flatten(), dim=0) > 0.9, name


class CountProducts(TorchDispatchMode):
    """Counts matrix products, in float8 or not."""

    products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += func.name() in ("aten::mm", "aten::addmm")
        return func(*args, **(kwargs or {}))


def test_selective_checkpointing_recomputes_no_float8_product(torchao):
    outcomes = {}
    for policy in ("none", "selective", "full"):
        model, counted = model_of(), CountProducts()
        use_float8(model, emulate=True)
        apply_checkpointing(model, policy)
        loss, gradients = step(model, counted)
        outcomes[policy] = loss, gradients, counted.products
    loss, expected, plain = outcomes["none"]
    for policy in ("selective", "full"):
        assert outcomes[policy][0] == loss
        assert all(torch.equal(gradient, outcomes[policy][1][name]) for name, gradient in expected.items())
    # under `full` the decoder layers' last product as well: torchao keeps its operands only once it is computed
    assert [outcomes[policy][2] - plain for policy in ("selective", "full")] == [0, 2 * 7 + 2 * 5]


def test_compiled_float8_layers_make_no_more_graphs_and_the_same_losses(torchao, monkeypatch):
    torch._dynamo.reset()
    counters.clear()
    models = [model_of(), model_of()]
    for model in models:
        use_dense_attention(model, monkeypatch)
        use_float8(model, emulate=True)
    compile_layers(models[0], backend="eager")
    for kind in ((0, 2, (1, 2)), (1, 3, (1,)), (2, 5)):
        ours, plain = (step(model, **micro_batch(*kind)) for model in models)
        assert ours[0] == pytest.approx(plain[0], rel=1e-6)
    assert (counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())) == (3, 0)


def test_what_is_no_number_stays_none_in_float8(torchao):
    """The loop skips an update by its loss and gradient norm: rounding must not hide what it looks for."""
    for value in (float("nan"), float("inf")):
        model = model_of()
        use_float8(model, emulate=True)
        layer_stacks(model)[1][1].mlp.up_proj.weight.data[3, 5] = value
        loss, gradients = step(model)
        assert not torch.tensor(loss).isfinite()
        assert not torch.stack([g.norm() for g in gradients.values()]).norm().isfinite()


def test_two_ranks_in_float8_checkpoint_and_export_as_without_it(torchao, tmp_path):
    """FSDP2 with selective checkpointing: losses of four steps within 2 %, resumed without float8 within 1 %."""
    _, stock = tiny_pair(tmp_path / "base")
    launch("tests/support/workers/speed.py", tmp_path / "base", tmp_path, "float8")
    for rank in (0, 1):
        result = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert result["same_names"] and result["fast"] != result["plain"]
        assert result["fast"] == pytest.approx(result["plain"], rel=0.02)
        assert result["resumed"] == pytest.approx(result["fast"][3:], rel=0.01)
    assert_stock_export(tmp_path / "model", tmp_path / "base", stock)


def run_config(**changes) -> RunConfig:
    config = RunConfig(model="m", run_dir="r", float8=True, **changes)
    config.data.sources = [Source("d")]
    return config


def test_float8_without_torchao_is_refused_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(versions, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^float8: torchao is not installed; `pip install -c .*\[float8\]'`"):
        check_run(run_config())


def test_only_what_torch_says_to_torchao_of_its_enums_is_kept_from_users(caplog):
    log = logging.getLogger("torch.utils._pytree")
    log.warning("%s ... Calling register_constant() on Enum subclasses is deprecated and", "KernelPreference")
    log.warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]


def test_float8_of_a_frozen_language_model_is_refused(monkeypatch):
    monkeypatch.setattr(versions, "find_spec", lambda name: True)
    config = run_config()
    config.optim.rates.llm = None
    with pytest.raises(ValueError, match=r"^float8: the language model is frozen \(optim.rates.llm: null\)"):
        check_run(config)
    with pytest.raises(ValueError, match="frozen"):
        use_float8(model_of(Rates(llm=None)), emulate=True)


def test_float8_needs_a_gpu_that_has_it(monkeypatch):
    with pytest.raises(ValueError, match=r"^float8: needs a GPU of compute capability 8.9 or newer, there is none"):
        check_device(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match=r"^float8: needs .* NVIDIA A100-SXM4-80GB has 8.0; set it to false"):
        check_device(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    check_device(torch.device("cuda"))


def test_a_model_without_a_fitting_matrix_is_refused(torchao):
    model = model_of(hidden_size=40, intermediate_size=88)
    with pytest.raises(ValueError, match="no linear layer of the language model has both sides a multiple of 16"):
        use_float8(model, emulate=True)
