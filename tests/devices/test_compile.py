"""Compiled layers: the same results, a bounded number of graphs, and nothing of it in checkpoints and exports."""

import json
import os

import pytest
import torch
from torch._dynamo.utils import counters

from llava_next.model.forward.attention import attention_names
from llava_next.model.forward.lora import Lora, add_adapters, quantise_under
from llava_next.model.forward.modeling import LlavaNextForConditionalGeneration
from llava_next.model.forward.nf4 import check_kernels
from llava_next.training.banner import speed_lines
from llava_next.training.devices.parallel import RECOMPILE_LIMIT, apply_checkpointing, compile_layers
from llava_next.training.recipe.config import RunConfig
from llava_next.training.recipe.optim import AdaptedRates, Rates, freeze
from support.exports import assert_stock_export
from support.launching import launch
from support.tiny import WIDE, tiny_config, tiny_pair
from support.tracing import micro_batch, use_dense_attention


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> tuple[int, int]:
    """Graphs that were made so far, and places where one had to stop."""
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


@pytest.mark.parametrize(
    ("rates", "lora"),
    [
        pytest.param(Rates(), None, id="all_trains"),
        pytest.param(Rates(llm=None, vision=None), None, id="frozen_but_for_the_projector"),
        pytest.param(Rates(vision=None), Lora(r=4, dropout=0.1), id="lora"),
        pytest.param(
            AdaptedRates(vision=None, quantize="nf4"),
            Lora(r=4, dropout=0.1),
            id="lora_over_4_bits",
            marks=pytest.mark.skipif(not os.environ.get("LLAVA_NEXT_COMPILED_NF4"), reason="LLAVA_NEXT_COMPILED_NF4=1"),
        ),
    ],
)
def test_a_run_of_any_lengths_makes_at_most_12_graphs_and_no_break(monkeypatch, rates, lora):
    """Lengths, text-only and empty micro-batches, validation: each kind once. Backward is part of its graph."""
    torch.manual_seed(0)
    models = [
        LlavaNextForConditionalGeneration(tiny_config(**(WIDE if rates.quantize else {}))).train() for _ in range(2)
    ]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        use_dense_attention(model, monkeypatch)
        if rates.quantize:
            check_kernels(torch.device("cpu"), torch.float32)  # as every run does before
            quantise_under(model, lora, torch.float32)
        if lora:
            add_adapters(model, lora, seed=0)
        freeze(model, rates)
    apply_checkpointing(models[0], "selective")
    compile_layers(models[0], backend="eager")
    # several tiles, one tile, one token; the decoder's first layer, whose input is a view, is a graph of its own
    kinds = [(0, 2, (1, 2)), (1, 1, (0,)), (2, 0, (0,))]
    for number, kind in enumerate([*kinds, (3, 4), (4, 1, (0,)), (5, 3, (1,)), (6, 0), (7, 5)]):
        ours, plain = (model(**micro_batch(*kind)).loss for model in models)
        ours.backward()
        plain.backward()
        assert ours.item() == pytest.approx(plain.item(), rel=1e-6)
        if number == len(kinds) - 1:
            warm = graphs()
    assert graphs() == warm == (6, 0)
    for ours, plain in zip(*(m.parameters() for m in models), strict=True):
        if plain.grad is not None:
            torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-5, atol=1e-6)
    if rates.llm is None:  # validation knows no difference
        return
    with torch.no_grad():
        models[0].eval()
        for kind in [*kinds, (3, 4), (4, 1, (0,)), (6, 0)]:
            models[0](**micro_batch(*kind))
    assert graphs() == (12, 0) and 12 < RECOMPILE_LIMIT <= torch._dynamo.config.recompile_limit


def test_the_kernel_of_gpus_is_traced_without_a_break():
    """On the meta device, in bf16: torch's variable-length attention, under selective checkpointing."""
    with torch.device("meta"):
        model = LlavaNextForConditionalGeneration(tiny_config()).bfloat16()
        model.set_attn_implementation(attention_names("varlen"))
        apply_checkpointing(model, "selective")
        compile_layers(model, backend="eager")
        borders = torch.zeros(4, dtype=torch.int32)
        for length in (40, 56, 97):
            embeds = torch.zeros(length, 48, dtype=torch.bfloat16, requires_grad=True)
            model.decode_segments(embeds, torch.zeros(length, dtype=torch.int64), borders, length)
    assert graphs() == (2, 0)


def test_a_compiled_checkpoint_continues_uncompiled_and_the_export_has_stock_names(tmp_path):
    """Under FSDP2 with selective checkpointing, neither of which is in the way of the compiler."""
    _, stock = tiny_pair(tmp_path / "base")
    launch("tests/support/workers/speed.py", tmp_path / "base", tmp_path, "compiled", processes=1)
    result = json.loads((tmp_path / "rank0.json").read_text())
    assert (result["graphs"], result["breaks"]) == (3, 0)
    assert result["same_names"] and result["fast"] == pytest.approx(result["plain"], rel=1e-6)
    assert result["resumed"] == pytest.approx(result["fast"][3:], rel=1e-6)
    assert_stock_export(tmp_path / "model", tmp_path / "base", stock)


def test_the_plan_says_what_makes_the_run_faster():
    assert speed_lines(RunConfig()) == []
    heads = [[line.split()[0] for line in speed_lines(RunConfig(compile_layers=c, float8=True))] for c in (True, False)]
    assert heads == [["compile", "float8"], ["float8", "its"]]
    assert all(
        len(line) <= 100 for c in (True, False) for line in speed_lines(RunConfig(compile_layers=c, float8=True))
    )
