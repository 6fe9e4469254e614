"""Levers that bring code of others into the step, or move FSDP2's gathers: what they replace, and that they leave."""

import argparse
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from torch.distributed.fsdp import FSDPModule, fully_shard

import benchmark
from benchmarking import ablate, float8, gpu_all, levers, training, truth
from benchmarking.samples import STAGES
from llava_next.model.folders.dry import LLMS
from llava_next.model.forward.attention import attention_names
from llava_next.model.forward.modeling import LlavaNextForConditionalGeneration
from llava_next.training.devices.launch import layer_stacks
from llava_next.training.recipe.optim import Rates, freeze
from support.tiny import geometry, pack_tiny, pairing_config, random_samples

CPU = torch.device("cpu")
CLIP = "openai/clip-vit-large-patch14-336"
VICUNA, *_ = LLMS


def bench_of(llm: str = VICUNA, rates: Rates | None = None) -> levers.Bench:
    """Three samples in two micro-batches, and a tiny model of the language model's kind."""
    config = pairing_config(CLIP, llm)
    torch.manual_seed(0)
    model = LlavaNextForConditionalGeneration(config).train()
    model.set_attn_implementation(attention_names("sdpa"))
    freeze(model, rates or Rates())
    anyres = geometry(config)
    samples = [(replace(e, source=0), sizes) for e, sizes in random_samples(0, 3, images=(1,), anyres=anyres)]
    found = levers.Bench(SimpleNamespace(device=CPU), model, samples, [])
    examples = [example for example, _ in samples]
    found.micros = [pack_tiny(part, anyres).weighted(found.weights) for part in (examples[:2], examples[2:])]
    return found


def test_attention_by_another_kernel_is_put_back_and_missing_kernels_say_so():
    bench = bench_of()
    config = bench.model.config.text_config
    bench.model.set_attn_implementation({"text_config": "segment", "vision_config": "sdpa"})
    with levers.SWITCHES["varlen"][1](bench) as micros:
        assert micros is bench.micros and config._attn_implementation == "segment_loop"
    assert config._attn_implementation == "segment"
    with pytest.raises(levers.Unavailable, match="flash cannot run here"), levers.SWITCHES["varlen_or_flash"][1](bench):
        pass


@pytest.mark.parametrize(("name", "calls"), [("liger_norm", 2 * 2 + 1), ("liger_swiglu", 2), ("liger_rope", 2)])
def test_liger_replaces_its_operation_in_this_model_and_no_trace_stays(liger, monkeypatch, name, calls):
    """In two layers, called for each micro-batch; loss to 1e-6, gradients to 1e-5."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    bench = bench_of()
    classes = [type(module) for module in bench.model.modules()]
    plain = ablate.measure(bench.model, bench.micros, CPU, 1)
    with levers.SWITCHES[name][1](bench) as micros:
        other = ablate.measure(bench.model, micros, CPU, 1)
    assert len(liger) == calls * len(micros) and len(set(liger)) == 1
    assert other.loss == pytest.approx(plain.loss, rel=1e-6) and other.distance(plain) < 1e-5
    assert [type(module) for module in bench.model.modules()] == classes


def test_row_says_that_liger_is_missing_or_the_time_over(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    bench = bench_of()
    rows = [ablate.row(name, end, ablate.switch, bench, "liger_rope", 1) for name, end in (("a", 1e9), ("b", 0.0))]
    assert [row["error"] for row in rows] == ["liger-kernel is not installed", "not begun: no time left"]
    assert "liger-kernel is not installed" in ablate.line(rows[0])

    def fails() -> None:
        raise RuntimeError("an illegal access\nand much more")

    assert ablate.row("c", 1e9, fails) == {"lever": "c", "error": "RuntimeError: an illegal access"}


@pytest.mark.parametrize("vision", [2e-6, None])
def test_prefetch_changes_no_bit_and_names_only_layers_that_run(one_process, monkeypatch, vision):
    """Two layers ahead both ways; the tower's last layer never runs, and when frozen none of it goes backward."""
    named = {"forward": [], "backward": []}
    for way, lists in named.items():
        method = f"set_modules_to_{way}_prefetch"
        own = getattr(FSDPModule, method)
        monkeypatch.setattr(FSDPModule, method, lambda s, m, own=own, ls=lists: (ls.append((s, m)), own(s, m)))
    bench = bench_of(rates=Rates(vision=vision))
    for layer in (layer for layers in layer_stacks(bench.model) for layer in layers):
        fully_shard(layer)
    fully_shard(bench.model)
    plain = ablate.measure(bench.model, bench.micros, CPU, 1)
    training.prefetch(bench.model, 2)
    ahead = ablate.measure(bench.model, bench.micros, CPU, 1)
    assert ahead.loss == plain.loss
    assert all(torch.equal(ahead.gradients[name], value) for name, value in plain.gradients.items())
    tower, decoder = map(list, layer_stacks(bench.model))
    order = [*tower[:-1], *decoder]
    assert named["forward"] == [(layer, order[i + 1 : i + 3]) for i, layer in enumerate(order)]
    order = [*tower[: -1 if vision else 0], *decoder][::-1]
    assert named["backward"] == [(layer, order[i + 1 : i + 3]) for i, layer in enumerate(order)]


def test_float8_comparison_moves_all_rates_but_the_towers_and_takes_the_worst_step():
    assert float8.faster(Rates(), 1e-3) == Rates(llm=1e-3, projector=1e-3, newline=1e-3)
    assert float8.faster(STAGES[1].rates, 0.1) == Rates(llm=None, projector=0.1, vision=None, newline=0.1)
    assert float8.distance([4.0, 2.0, 5.0], [4.0, 2.02, 4.96]) == pytest.approx(0.01)


def test_top_operators_are_shares_of_the_device_that_was_timed():
    def event(key, host, device, on=DeviceType.CPU, note=False):
        times = {"self_cpu_time_total": host, "self_device_time_total": device}
        return SimpleNamespace(key=key, count=2, device_type=on, is_user_annotation=note, **times)

    cuda = DeviceType.CUDA
    events = [
        event("aten::mm", 10.0, 300.0),
        event("aten::mul", 30.0, 60.0),
        event("gemm", 0.0, 300.0, cuda),
        event("mul", 0.0, 60.0, cuda),
        event("not of an operator", 0.0, 40.0, cuda),
        event("a note", 0.0, 400.0, cuda, note=True),
    ]
    found = [(o["name"], o["share"]) for o in training.top_operators(events, on_gpu=True)]
    assert found == [("aten::mm", 0.75), ("aten::mul", 0.15)]
    found = [(o["name"], o["share"], o["calls"]) for o in training.top_operators(events, on_gpu=False, count=1)]
    assert found == [("aten::mul", 0.75, 2)]


def test_jobs_of_gpu_all_are_commands_of_the_benchmark_and_the_first_fit_its_limit():
    args = argparse.Namespace(device="cpu", out="cards", options="--samples 1 --shortened 20")
    for job in gpu_all.JOBS:
        parsed = benchmark.parse(gpu_all.command_of(job, args)[2:])
        assert (parsed.what, parsed.device) == (job.arguments[0], "cpu")
        assert parsed.part == job.arguments[1] if job.truth else parsed.samples == 1
    names, most = [job.name for job in gpu_all.JOBS], [job.most for job in gpu_all.JOBS]
    checks = len(truth.PARTS)
    assert names[:checks] == [f"truth: {part}" for part in truth.PARTS] and max(most[:checks]) <= 60
    assert names[checks:][:4] == ["vicuna-7b", "compile", "float8", "levers"] and sum(most[checks:][:4]) <= 570
    assert len(set(names)) == len(names) and all(job.least <= job.most for job in gpu_all.JOBS)
