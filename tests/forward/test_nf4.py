"""Matrices in 4 bits under adapters: equal to stock peft on bitsandbytes' own layers, one sample at a time."""

import json
import sys
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers import LlavaNextForConditionalGeneration as StockLlavaNext

from llava_next import versions
from llava_next.model.folders.adapters import save_adapter, tensors_of
from llava_next.model.folders.export import full_tensors, save_model
from llava_next.model.folders.merging import merge_adapter
from llava_next.model.forward import nf4
from llava_next.model.forward.lora import Lora, adapter_layers, is_adapter, quantise_under
from llava_next.model.forward.modeling import LlavaNextForConditionalGeneration
from llava_next.model.forward.nf4 import Nf4Linear, bitsandbytes, check_kernels
from llava_next.training.devices.agreement import slot_weights
from llava_next.training.devices.parallel import apply_checkpointing
from llava_next.training.recipe.config import parse_run
from support.tiny import WIDE, gradients, pack_tiny, random_samples, stock_loss, tiny_config, tiny_pair, with_adapters

close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
LORA = Lora(r=4, alpha=8, dropout=0.0)
DORA = Lora(r=3, alpha=6, dropout=0.0, targets=["llm.*.q_proj", "llm.*.down_proj"], dora=True, copy_base=True)


def quantised(start: Path, lora: Lora) -> LlavaNextForConditionalGeneration:
    """The model of a folder with its matrices in 4 bits, under adapters that are not what they began as."""
    return with_adapters(LlavaNextForConditionalGeneration.from_pretrained(start), lora, "nf4")


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """Folder of a tiny model whose matrices are whole blocks."""
    folder = tmp_path_factory.mktemp("nf4") / "start"
    tiny_pair(folder, config=tiny_config(**WIDE))
    return folder


def through_bitsandbytes(adapter: Path, others: list[str]):
    """The written adapter on its base by stock transformers, bitsandbytes and peft; `others` stay whole."""
    from peft import PeftModel, import_utils  # after bitsandbytes, see `nf4.bitsandbytes`

    for known in (import_utils.is_bnb_available, import_utils.is_bnb_4bit_available):
        known.cache_clear()
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["model.vision_tower", "model.multi_modal_projector", "lm_head", *others],
    )
    stock = StockLlavaNext.from_pretrained(base, quantization_config=how)
    return PeftModel.from_pretrained(stock, adapter, is_trainable=True).train()  # in eval mode CPUs round scales


def samples_of(seed: int = 0) -> list:
    return random_samples(seed, 5, images=(0, 1, 2))


def run(model, samples) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Packed loss and gradients of a step."""
    supervised = torch.tensor([(e.labels[1:] != -100).sum() for e, _ in samples], dtype=torch.float64)
    batch = pack_tiny([e for e, _ in samples]).weighted(slot_weights(supervised, "token"))
    model.zero_grad()
    loss = model(**batch.model_inputs(torch.device("cpu")), num_sources=2).loss
    loss.backward()
    return loss.detach(), gradients(model)


@pytest.fixture(scope="module", params=[LORA, DORA], ids=["all", "dora_in_some"])
def trained(request, start, tmp_path_factory):
    """A model in 4 bits, its adapters, and their folder."""
    folder, lora = tmp_path_factory.mktemp("nf4"), request.param
    model = quantised(start, lora)
    save_adapter(model, folder / "adapter", lora, start, start)
    return model, lora, folder / "adapter"


def test_packed_step_equals_stock_peft_on_bitsandbytes_layers_one_by_one(trained):
    model, lora, adapter = trained
    whole = [n for n, module in model.named_modules() if type(module) is nn.Linear and ".layers." in n]
    stock = through_bitsandbytes(adapter, [n for n in whole if ".lora_" not in n])
    samples = samples_of()
    loss, found = run(model, samples)
    supervised = torch.tensor([(e.labels[1:] != -100).sum() for e, _ in samples], dtype=torch.float64)
    expected = stock_loss(stock, samples, slot_weights(supervised, "token"))
    expected.backward()
    close(loss, expected.detach())
    theirs = {n.removeprefix("base_model.model."): p.grad for n, p in stock.named_parameters() if is_adapter(n)}
    ours = {name: gradient for name, gradient in found.items() if is_adapter(name)}
    assert ours.keys() == theirs.keys() and len(ours) == {False: 2 * 7 * 2, True: 3 * 2 * 2}[lora.dora]
    for name, gradient in ours.items():
        close(gradient, theirs[name], msg=lambda m, n=name: f"{n}: {m}")
    in_4_bits = {name for name, module in model.named_modules() if isinstance(module, Nf4Linear)}
    kinds = type(bitsandbytes().nn.Linear4bit(64, 64))
    assert in_4_bits == {
        n.removeprefix("base_model.model.") for n, module in stock.named_modules() if isinstance(module, kinds)
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("rows", "columns", "bias"), [(64, 128, True), (100, 320, False), (4, 64, False)])
def test_layer_equals_bitsandbytes_own_bit_for_bit(monkeypatch, dtype, rows, columns, bias):
    torch.manual_seed(0)
    monkeypatch.setattr(nf4, "PIECE", 3 * columns)  # as large matrices are quantised
    linear = nn.Linear(columns, rows, bias).to(dtype)
    ours = Nf4Linear.of(linear, dtype)
    kind = bitsandbytes().nn.Linear4bit
    theirs = kind(columns, rows, bias, dtype, compress_statistics=True, quant_type="nf4", quant_storage=dtype)
    theirs.load_state_dict(linear.state_dict())
    theirs = theirs.to("cpu")
    inputs = [torch.randn(7, columns, dtype=dtype, requires_grad=True) for _ in range(2)]
    inputs[1].data.copy_(inputs[0].data)
    for layer, x in zip((ours, theirs), inputs, strict=True):
        layer(x).square().sum().backward()
    assert torch.equal(ours(inputs[0]), theirs(inputs[1])) and torch.equal(inputs[0].grad, inputs[1].grad)
    assert torch.equal(ours(inputs[0].detach()), theirs(inputs[1])) and not ours.packed.requires_grad
    # as a rank has it that waits for the first one's weights
    waiting = Nf4Linear.of(nn.Linear(columns, rows, bias, device="meta"), dtype)
    assert [p.shape for p in waiting.parameters()] == [p.shape for p in ours.parameters()]
    assert waiting.dequantize().shape == ours.dequantize().shape == linear.weight.shape


def test_a_matrix_is_gone_before_the_next_is_quantised(start, monkeypatch):
    """So that loading takes what comes out and little more, of a file that stays mapped."""
    whole, make = [], Nf4Linear.of

    def of(linear, *how):
        assert all(matrix() is None for matrix in whole)
        whole.append(weakref.ref(linear.weight))
        return make(linear, *how)

    monkeypatch.setattr(Nf4Linear, "of", of)
    quantised(start, LORA)
    assert len(whole) == 2 * 7


def test_a_matrix_takes_4_bits_a_value_and_an_eighth_for_its_scales():
    layer = Nf4Linear(4096, 11008, torch.bfloat16)
    assert 8 * sum(p.nbytes for p in layer.parameters()) / (4096 * 11008) == pytest.approx(
        4 + 1 / 8 + 1 / 512, abs=1e-4
    )


def test_result_is_merged_into_the_matrices_as_they_were(trained, start, tmp_path):
    model, lora, adapter = trained
    save_model(model, tmp_path / "model", dtype=torch.float32, unquantised=tensors_of(start))
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    merge_adapter(Path(base), adapter, tmp_path / "later", dtype=torch.float32)
    assert (tmp_path / "model/model.safetensors").read_bytes() == (tmp_path / "later/model.safetensors").read_bytes()
    linked = Path(base, "model-model.safetensors").samefile(start / "model.safetensors")
    assert linked != lora.copy_base
    with pytest.raises(ValueError, match="is written from what it was before"):
        save_model(model, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    # other ranks gather as many tensors as the one that writes, and read none
    gathered, written = ({name for name, _ in full_tensors(model, read)} for read in (None, tensors_of(start)))
    assert written - gathered == {f"{name}.weight" for name in adapter_layers(model)}


@pytest.mark.parametrize(("policy", "products"), [("full", 2 * 7), ("selective", 0)])
def test_checkpointing_changes_no_bit_and_selective_recomputes_no_product_of_4_bits(start, policy, products):
    model, samples = quantised(start, LORA), samples_of()
    loss, expected = run(model, samples)
    apply_checkpointing(model, policy)
    with CountProducts() as counted:
        again, ours = run(model, samples)
    assert torch.equal(again, loss) and ours.keys() == expected.keys()
    assert all(torch.equal(gradient, ours[name]) for name, gradient in expected.items())
    assert counted.products == 2 * 7 + products


class CountProducts(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts products of matrices in 4 bits."""

    products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += func.name() == "bitsandbytes::gemm_4bit"
        return func(*args, **(kwargs or {}))


# ---- bad input ----------------------------------------------------------------------------------------------------

GIVEN = ["--model", "m", "--run_dir", "r", "--data.sources", "s", "--quantize", "nf4"]
ADAPTERS = ["--lora.r", "8", "--optim.rates.vision", "null"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "what trains in full needs all its bits; add lora"),
        (
            ["--lora.targets", "[vision]", "--lora.r", "8", "--optim.rates.llm", "null"],
            "the language model has none",
        ),
        ([*ADAPTERS, "--float8", "true"], "float8: "),
        ([*ADAPTERS, "--quantize", "nf3"], "nf3"),
    ],
)
def test_quantising_that_cannot_work_is_refused(options, expected):
    with pytest.raises(ValueError) as refused:
        parse_run([*GIVEN, *options])
    assert expected in str(refused.value)


def test_missing_and_old_bitsandbytes_are_refused(monkeypatch):
    monkeypatch.setattr(versions, "version", lambda name: "0.49.1")
    with pytest.raises(ValueError, match=r"bitsandbytes 0.49.1 is older than 0.50; `pip install -c .*\[qlora\]'`"):
        parse_run([*GIVEN, *ADAPTERS])
    monkeypatch.setattr(versions, "find_spec", lambda name: name != "bitsandbytes" or None)
    with pytest.raises(ValueError, match=r"bitsandbytes is not installed; `pip install -c .*\[qlora\]'`"):
        parse_run([*GIVEN, *ADAPTERS])


def test_kernels_that_are_missing_are_told_before_anything_is_loaded(monkeypatch):
    check_kernels(torch.device("cpu"), torch.float32)

    def missing(*_, **__):
        raise RuntimeError("Configured CUDA binary not found at libbitsandbytes_cuda139.so")

    monkeypatch.setattr(bitsandbytes().functional, "quantize_4bit", missing)
    with pytest.raises(ValueError, match=r"cannot compute on cpu: Configured CUDA binary not found .* leave quantize"):
        check_kernels(torch.device("cpu"), torch.float32)


def test_matrices_of_no_whole_blocks_are_refused_by_name():
    with torch.device("meta"):
        model = LlavaNextForConditionalGeneration(tiny_config())
    name = "model.language_model.layers.0.self_attn.q_proj"
    with pytest.raises(ValueError, match=rf"quantize: {name} has 48 inputs, and nf4 needs a multiple of 64"):
        quantise_under(model, LORA, torch.float32)


def test_import_leaves_nothing_behind_and_takes_nothing_from_the_hub():
    before = torch.compile
    nf4._packages.clear()
    bitsandbytes()
    assert torch.compile is before and sys.modules.get("kernels", "absent") is not None
