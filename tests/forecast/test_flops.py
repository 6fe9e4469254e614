"""FLOPs and MFU: the published arithmetic, torch's own counter on real models, the table of peaks."""

import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llava_next.data.plan.dealing import CostModel
from llava_next.model.forward import head
from llava_next.model.forward.attention import attention_names
from llava_next.model.forward.modeling import LlavaNextForConditionalGeneration
from llava_next.training.devices import agreement
from llava_next.training.devices.hardware import KINDS, PEAKS, parse_hardware, peak_flops, present_hardware
from llava_next.training.devices.parallel import apply_checkpointing
from llava_next.training.forecast.flops import cost_model, flops_model
from llava_next.training.recipe.optim import Rates, freeze
from llava_next.training.watch.journal import Journal
from llava_next.training.watch.metrics import Progress
from support.kinds import DISTINCT, kind_config
from support.published import CLIP, LLAMA3, QWEN2, SIGLIP, STAGE_1, VICUNA, full_config, profile_samples
from support.tiny import geometry, pack_tiny, pairing_config, random_samples


@pytest.mark.parametrize(("llm", "published"), [(VICUNA, 102.4), (LLAMA3, 113.3), (QWEN2, 106.2)])
def test_mean_sample_costs_what_is_published(llm, published):
    """2,340 tokens in TFLOP, everything trained. The published figures run the head on every position."""
    lengths, tiles = profile_samples(20_000, 0)
    squares = (lengths.astype(float) ** 2).mean()
    model, hardware = flops_model(full_config(llm), Rates()).step_flops(2340, squares, tiles.mean(), 2340)
    assert model.total / 1e12 == pytest.approx(published, rel=0.02)
    assert hardware == model
    if llm == VICUNA:
        assert (model.llm + model.head) / 1e12 == pytest.approx(97.0, rel=0.01)
        assert model.vision / 1e12 == pytest.approx(5.1, rel=0.02)


def test_default_costs_of_dealing_are_those_of_vicuna():
    ours, default = cost_model(full_config(VICUNA), Rates()), CostModel()
    for name in ("flops_per_token", "flops_per_token_squared", "flops_per_tile"):
        assert getattr(ours, name) == pytest.approx(getattr(default, name), rel=0.005)
    # frozen parts shift the ratio between tokens and tiles
    stage_1 = cost_model(full_config(VICUNA), STAGE_1)
    assert stage_1.flops_per_token / ours.flops_per_token == pytest.approx(2 / 3, rel=1e-6)
    assert stage_1.flops_per_tile / ours.flops_per_tile == pytest.approx(0.37, abs=0.02)
    lengths, tiles = np.array([100, 4096]), np.array([0, 5])
    assert ours.sample_cost(lengths, tiles).dtype == np.int64


TRAINED = {
    "all": Rates(),
    "stage_1": STAGE_1,
    "tower_frozen": Rates(vision=None),
    "only_the_tower": Rates(llm=None, projector=None, newline=None),
    "only_the_newline": Rates(llm=None, projector=None, vision=None),
}


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("rates", TRAINED.values(), ids=TRAINED)
@pytest.mark.parametrize(("tower", "llm"), [(CLIP, VICUNA), (SIGLIP, QWEN2), (CLIP, LLAMA3)])
def test_forward_and_backward_count_what_torch_counts(tower, llm, rates, checkpointing, monkeypatch):
    config = pairing_config(tower, llm)
    model, batch = model_and_batch(config, rates, checkpointing)
    targets = len(batch.target_ids)
    chunked = targets if checkpointing == "full" else 0
    monkeypatch.setattr(head, "CHUNK", -(-targets // 3) if chunked else targets)
    # the math kernel makes attention visible to the counter, and computes the masked half as well
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**batch.model_inputs(torch.device("cpu")), num_sources=2).loss.backward()

    squares = 2 * (batch.cu_seqlens.diff().double() ** 2).sum().item()
    flops = flops_model(config, rates, checkpointing)
    ours, hardware = flops.step_flops(len(batch.input_ids), squares, len(batch.tiles), targets, chunked)
    # torch 2.11 counts the rotary embedding's angles as a product, 2.13 does not
    assert counter.get_total_flops() == pytest.approx(hardware.total, rel=5e-5)
    assert (hardware.llm > ours.llm) == (hardware.head > ours.head) == (checkpointing == "full")
    assert (hardware.vision > ours.vision) == (checkpointing == "full" and rates.vision is not None)


@pytest.mark.parametrize("name", DISTINCT)
def test_other_kinds_count_what_torch_counts(name, monkeypatch):
    """Under full checkpointing, so that the last matrix is in it where a norm comes after; no window is felt."""
    config = kind_config(name, **({"sliding_window": 4096} if name == "gemma3" else {}))
    model, batch = model_and_batch(config, Rates(), "full")
    monkeypatch.setattr(head, "CHUNK", len(batch.target_ids))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**batch.model_inputs(torch.device("cpu")), num_sources=2).loss.backward()
    squares = 2 * (batch.cu_seqlens.diff().double() ** 2).sum().item()
    work = (len(batch.input_ids), squares, len(batch.tiles), len(batch.target_ids))
    hardware = flops_model(config, Rates(), "full").step_flops(*work)[1]
    assert counter.get_total_flops() == pytest.approx(hardware.total, rel=5e-5)


def test_a_token_behind_a_short_window_sees_all_of_it_whatever_the_length():
    """Gemma 3 1B: 22 of 26 layers see 512 tokens. Exact for long samples, by 4 % of a layer too much for short ones."""
    config = full_config("google/gemma-3-1b-it")
    flops, text = flops_model(config, Rates()), config.text_config
    width, weights = 4 * 256, 1152 * (2 * 1024 + 2 * 256) + 3 * 1152 * 6912
    assert flops.per_token.model == 3 * (2 * 26 * weights + 22 * 4 * width * 512)
    assert flops.per_square.model == 3 * 4 * 2 * width
    assert 4 * width * 512 / (2 * weights) < 0.04
    text.sliding_window = 4096
    assert flops_model(config, Rates()).per_token.model == 3 * 2 * 26 * weights
    assert flops_model(config, Rates()).per_square.model == 3 * 26 * 2 * width


def test_hfu_counts_the_logits_of_micro_batches_with_several_chunks_again(monkeypatch):
    """Two micro-batches, one of them with more targets than a chunk: counts, record and HFU against torch's counter."""
    config = pairing_config(CLIP, VICUNA)
    model, many = model_and_batch(config, Rates(), "none")
    few = pack_tiny([replace(e, slot=3) for e, _ in random_samples(5, 1, images=(1,), max_text=8)])
    monkeypatch.setattr(head, "CHUNK", len(few.target_ids))
    assert len(many.target_ids) > head.CHUNK
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for batch in (many, few):
            model(**batch.model_inputs(torch.device("cpu")), num_sources=2).loss.backward()

    monkeypatch.setattr(agreement, "agree", lambda values: values)  # a single rank
    counts = agreement.agree_on_step([many, few], 4)
    assert counts.counts["chunked"] == len(many.target_ids)
    record = {**counts.counts, **counts.io, "supervised": int(counts.supervised.sum()), "data_wait_s": 0, "step_s": 1}
    record["squared_lengths"] *= 2  # the math kernel computes the masked half as well
    rank = SimpleNamespace(num_processes=1, device=torch.device("cpu"))
    journal = SimpleNamespace(accelerator=rank, progress=Progress(1, 0), flops=flops_model(config, Rates()), peak=1.0)
    derived = Journal.derived(journal, record)
    assert derived["hfu"] == pytest.approx(counter.get_total_flops(), rel=5e-5)
    again = 2 * config.text_config.hidden_size * config.text_config.vocab_size * len(many.target_ids)
    assert derived["hfu"] - derived["mfu"] == pytest.approx(again, rel=1e-6)


def model_and_batch(config, rates: Rates, checkpointing: str):
    """A tiny model whose layers are checkpointed, and three samples with images."""
    model = LlavaNextForConditionalGeneration(config).train()
    model.set_attn_implementation(attention_names("sdpa"))
    freeze(model, rates)
    apply_checkpointing(model, checkpointing)
    anyres = geometry(config)
    return model, pack_tiny([e for e, _ in random_samples(3, 3, images=(1, 2), anyres=anyres)], anyres)


def test_full_checkpointing_adds_a_forward_less_what_is_not_needed_again():
    config, work = full_config(VICUNA), (8192, 4 * 2048.0**2, 16, 800)
    (model, none), (_, selective), (_, full) = (
        flops_model(config, Rates(), policy).step_flops(*work) for policy in ("none", "selective", "full")
    )
    assert none == selective == model
    # of 202 M weights of a layer, the last matrix has 45 M
    assert full.llm / model.llm == pytest.approx(1 + (1 - 45.1 / 202.4) / 3, abs=0.01)


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA L4", 121),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA RTX 6000 Ada Generation", 364.2),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H20", None),
        ("Tesla V100-SXM2-16GB", None),
        ("", None),
    ],
)
def test_peak_is_known_by_device_name_or_left_out(name, teraflops):
    assert peak_flops(name) == (None if teraflops is None else teraflops * 1e12)


def test_every_entry_of_the_table_can_be_reached():
    for name, peak in PEAKS:
        assert peak_flops(f"NVIDIA {name.upper()}") == peak


@pytest.mark.parametrize("kind", KINDS)
def test_as_if_makes_nodes_of_eight_with_a_known_peak(kind):
    four_nodes = parse_hardware(f"32x{kind}")
    assert (four_nodes.world, four_nodes.per_node) == (32, 8) and four_nodes.peak
    one = parse_hardware(f"1x{kind.upper()}")
    assert (one.world, one.per_node, one.memory) == (1, 1, four_nodes.memory)
    stated = float(kind.split("-")[1].removesuffix("g"))
    assert 0.9 < one.memory / 2**30 / stated <= 1


@pytest.mark.parametrize("text", ["", "h100", "8xh100", "8 h100-80g", "0xh100-80g", "-8xh100-80g", "12xh100-80g"])
def test_as_if_refuses_with_what_it_knows(text):
    with pytest.raises(ValueError, match=r"kinds: .*h100-80g, |whole nodes of 8"):
        parse_hardware(text)


def test_allocator_is_told_before_cuda_is_asked_for_anything(monkeypatch):
    """It reads its settings once, when CUDA starts; a user's own stay."""
    told = []
    for own in (None, "max_split_size_mb:64"):
        for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
            monkeypatch.setenv(name, own or "")
            monkeypatch.delenv(name)
        if own:
            monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", own)
        ask = lambda: told.append(os.environ.get("PYTORCH_ALLOC_CONF"))  # noqa: E731
        monkeypatch.setattr(torch.cuda, "is_available", ask)
        present_hardware()
    assert told == ["expandable_segments:True", None]
