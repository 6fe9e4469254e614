"""The benchmarks measure what they say: levers change no result, data sets are what is stated, figures add up."""

import argparse
import gzip
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

from benchmarking import ablate, cards, compare, datasets, gpu_all, levers, loader, training, truth
from benchmarking.samples import STAGES, profile_sizes
from benchmarking.serving import Serving
from benchmarking.step import project
from benchmarking.streaming import Pass, take
from llava_next.data.format.index import read_dataset
from llava_next.data.format.shards import read_sample
from llava_next.data.storage.client import Storage
from llava_next.model.forward import head, modeling
from llava_next.model.forward.attention import attention_names
from llava_next.model.forward.modeling import LlavaNextForConditionalGeneration
from llava_next.training.forecast.activations import Compute
from llava_next.training.forecast.budget import Layout, Unit, estimate
from llava_next.training.recipe.optim import Rates, freeze
from llava_next.training.watch.profile import StepProfiler
from support.launching import launch
from support.published import CLIP, LLAMA3
from support.tiny import pack_tiny, random_samples, tiny_config

CPU = torch.device("cpu")


def one_source(seed: int, count: int) -> list:
    """Random samples, all of source 0."""
    return [(replace(example, source=0), sizes) for example, sizes in random_samples(seed, count)]


@pytest.fixture(scope="module")
def bench():
    """Six samples in two micro-batches, and a tiny model with a trainable tower."""
    torch.manual_seed(0)
    model = LlavaNextForConditionalGeneration(tiny_config()).train()
    model.set_attn_implementation(attention_names("sdpa"))
    freeze(model, Rates())
    samples = one_source(0, 6)
    found = levers.Bench(SimpleNamespace(device=CPU), model, samples, [])
    examples = [example for example, _ in samples]
    found.micros = [pack_tiny(part).weighted(found.weights) for part in (examples[:4], examples[4:])]
    return found


@pytest.mark.parametrize("name", [name for name in levers.SWITCHES if name not in (*levers.GPU_ONLY, *levers.LIGER)])
def test_lever_moves_neither_loss_nor_gradients(bench, name, monkeypatch):
    """Loss to 1e-6, every gradient to 1e-5."""
    if name == "chunked_loss":
        monkeypatch.setattr(head, "CHUNK", 4)
    with_it = ablate.measure(bench.model, bench.micros, CPU, 1)
    with levers.SWITCHES[name][1](bench) as micros:
        without = ablate.measure(bench.model, micros, CPU, 1)
    assert without.loss == pytest.approx(with_it.loss, rel=1e-6)
    assert without.distance(with_it) < 1e-5
    assert len(with_it.gradients) == sum(p.requires_grad for p in bench.model.parameters())


def test_levers_really_add_the_work_that_they_are_about(bench, monkeypatch):
    """Tokens, positions of the head, chunks, layers of the tower, type of the tiles."""
    examples = [example for example, _ in bench.samples]
    lengths = [len(example.input_ids) for example in examples]
    with levers.padding(bench) as micros:
        assert [len(b.input_ids) for b in micros] == [4 * max(lengths[:4]), 2 * max(lengths[4:])]
    with levers.all_logits(bench) as micros:
        assert [len(b.target_positions) for b in micros] == [len(b.input_ids) for b in bench.micros]
    with levers.one_chunk(bench):
        assert head.CHUNK > 10**6
    assert head.CHUNK == 1024
    calls = []
    last = bench.model.vision_tower.encoder.layers[-1]
    monkeypatch.setattr(last, "forward", lambda hidden, **_: calls.append(1) or hidden)
    ablate.measure(bench.model, bench.micros, CPU, 1)
    assert not calls
    with levers.every_vision_layer(bench) as micros:
        ablate.measure(bench.model, micros, CPU, 1)
    assert len(calls) == len(bench.micros)
    normalise = modeling.normalise
    with levers.float_tiles(bench) as micros:
        assert {b.tiles.dtype for b in micros} == {torch.float32}
    assert modeling.normalise is normalise


def test_distance_sees_a_gradient_that_is_off_by_a_thousandth(bench):
    outcome = ablate.measure(bench.model, bench.micros, CPU, 1)
    name = max(outcome.gradients, key=lambda name: outcome.gradients[name].norm())
    moved = replace(outcome, gradients={**outcome.gradients, name: outcome.gradients[name] * 1.001})
    assert moved.distance(outcome) == pytest.approx(1e-3, rel=1e-2)


def test_copies_make_a_large_index_over_one_shard(tmp_path):
    """40 rows and 4 shard names over the bytes of 10 samples; each row's bytes are the sample it names."""
    assert datasets.write_shards(tmp_path / "set", datasets.SMALL, 10, 10, copies=4) == 40
    info, index = read_dataset(tmp_path / "set")
    assert (info.samples, len(info.shards), info.tiles) == (40, 4, 80)
    assert len({(tmp_path / "set" / shard.name).stat().st_ino for shard in info.shards}) == 1
    storage = Storage(tmp_path / "set")
    for row in (0, 13, 39):
        where = index.locate(row)
        data = storage.read_range(info.shards[where.shard].name, where.offset, where.nbytes)
        assert read_sample(data, where.key).id == str(row % 10)


def test_photographs_have_five_tiles_and_text_of_the_stated_length():
    samples = datasets.raw_samples(datasets.CLIP, 4)
    assert [1 + image.rows * image.cols for s in samples for image in s.images] == [5] * 4
    encoder, _ = datasets.build_encoder(datasets.CLIP)
    rng = np.random.default_rng(0)
    tokens = [
        len(
            encoder.template.encode(datasets.conversation(rng, False), encoder.tokenizer, encoder.image_token_id, [])[0]
        )
        for _ in range(200)
    ]
    # the system prompt and each turn's frame add some 70 tokens
    assert datasets.MEAN_TOKENS - 40 < np.mean(tokens) < datasets.MEAN_TOKENS + 120


@pytest.mark.parametrize("reader", ["ours", "webdataset"])
def test_pass_over_http_sees_every_sample_once(tmp_path, reader):
    datasets.write_shards(tmp_path / "set", datasets.SMALL, 24, 6)
    names = [f"shard-{number:06d}.tar" for number in range(4)]
    with Serving(tmp_path / "set") as server:
        what = Pass(reader, server.url, 24, names, small=True, batch_size=4, num_workers=0, server_early=False)
        found = take(what, timeout=100)
        assert server.set() == (2 + 24 if reader == "ours" else 4)  # dataset.json, index, a range a sample; shards
    assert (found.error, found.seen) == (None, 24)
    assert found.cpu_ms_per_sample > 0 and found.samples_per_s > 0


def test_pass_that_hangs_is_ended_with_its_workers(tmp_path):
    datasets.write_shards(tmp_path / "set", datasets.SMALL, 4, 2)
    with Serving(tmp_path / "set") as server:
        server.set(script=["stall"] * 9, stall_seconds=1e5)
        url = server.url
        found = take(Pass("webdataset", url, 4, ["shard-000000.tar", "shard-000001.tar"], num_workers=1), timeout=6)
    assert (found.error, found.seen) == ("hung", 0)
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [command for command in commands if url.encode() in command]


def test_outcome_of_a_fault_is_told_by_how_the_run_ended():
    found = {"lost": 5, "altered": 0, "end": "regular"}
    assert loader.tell(found) == "5 lost, went on"
    assert loader.tell({**found, "lost": 0}) == "0 lost, went on"
    assert loader.tell({**found, "lost": 0, "altered": 1}) == "0 lost, 1 altered, went on"
    assert loader.tell({**found, "end": "error"}) == "stopped with an error, 5 not delivered"
    assert loader.tell({**found, "end": "hung"}) == "hung, 5 not delivered"


def test_depth_is_the_largest_that_fits():
    work = training.Work("vicuna-7b", "clip-336", "small", 2, 4096, 16, 4)
    sizes = {}
    for depth in (2, 3):
        config = work.config(depth)
        counts = training.empty_units(config, work.rates)
        layout = Layout(shard=1, compute=Compute())
        sizes[depth] = estimate(config, counts, work.rates, "full", layout, 4096, 16).total
    between = (sizes[2] + sizes[3]) / 2 / training.SPARE
    assert training.pick(work, between, "full") == (2, "full")
    assert training.pick(work, 10 * between)[0] == 4
    with pytest.raises(ValueError, match="single layer"):
        training.pick(work, 1e6, "full")


def test_projection_by_hand():
    """8 B weights of which 7 B train, 8 GPUs: 7/8 x (4 x 8 + 4 x 7) GB = 52.5 GB a micro-batch, at 340 GB/s."""
    found = project(1.0, 0.08, 4, Unit(int(7e9), int(1e9)))
    assert found["communication_s"] == pytest.approx(4 * 52.5 / 340)
    assert found["step_s_all_hidden"] == pytest.approx(1 / 0.985 + 0.01)
    assert found["step_s_none_hidden"] == pytest.approx(1 / 0.985 + 4 * 52.5 / 340 + 0.01)


def test_profile_sizes_follow_the_stage():
    second, first = profile_sizes(2000, 0), profile_sizes(2000, 0, stage=1)
    assert 0.03 < np.mean([not pictures for _, pictures in second]) < 0.12
    assert all(pictures for _, pictures in first)
    assert 18 < np.mean([text for text, _ in first]) < 23
    assert STAGES[1].batch_size == 256 and STAGES[2].rates == Rates()


def test_cards_name_no_folder_of_the_machine():
    assert cards.command_line(["step", "--out", "/x", "--steps", "2", "--out=y"]) == (
        "python scripts/benchmark.py step --steps 2"
    )


def test_cards_compare_number_by_number():
    first = {"figures": {"a": 2.0, "b": {"c": 4, "name": "x"}, "list": [1, 3], "zero": 0, "gone": 1, "flag": True}}
    second = {"figures": {"a": 3.0, "b": {"c": 1}, "list": [2, 3], "zero": 5, "flag": True}}
    rows = compare.shared(first, second)
    assert rows == [("a", 2.0, 3.0), ("b.c", 4.0, 1.0), ("list.0", 1.0, 2.0), ("list.1", 3.0, 3.0)]
    assert cards.rounded({"x": 123456.789, "y": [float("nan"), 2]}) == {"x": 123500.0, "y": [None, 2]}


def test_all_of_a_gpu_ends_in_time_and_says_what_it_left_out(tmp_path, monkeypatch, capfd):
    limits = {"true": 5, "false": 5, "kept": 5, "sleep": 0.3}
    jobs = [gpu_all.Job(name, (name,), most, least=0.1) for name, most in limits.items()]
    jobs += [gpu_all.Job(f"truth: {part}", ("truth", part), 5, least=0.1) for part in ("good", "bad")]
    monkeypatch.setattr(gpu_all, "JOBS", (*jobs, gpu_all.Job("late", ("true",), 5, least=100)))
    sleep = ["sh", "-c", "setsid sleep 61.5 & wait"]  # in a session of its own, as the launcher's ranks are
    commands = {
        "kept": ["grep", "-q", "no word of why", str(tmp_path / "gpu-all-cuda.json")],  # on disk by now
        "sleep": sleep,
        "truth: good": ["true"],
        "truth: bad": ["sh", "-c", "echo beyond its bound >&2; exit 3"],
    }
    monkeypatch.setattr(gpu_all, "command_of", lambda job, _: commands.get(job.name, list(job.arguments)))
    (tmp_path / "truth-good-cuda.json").write_text(json.dumps({"figures": {"found": "off by 1e-7"}}))
    names = [job.name for job in gpu_all.JOBS]
    gpu_all.run(argparse.Namespace(limit=50.0, device="cuda", jobs=names, options="", out=tmp_path))
    ended = json.loads((tmp_path / "gpu-all-cuda.json").read_text())["figures"]
    assert [ended[name]["ended"] for name in names] == [
        *("done", "exit status 1: no word of why", "done", "stopped after 0 s"),
        *("off by 1e-7", "exit status 3: beyond its bound", "not begun: no time left"),
    ]
    assert ["sleep", "61.5"] not in [process.info["cmdline"] for process in psutil.process_iter(["cmdline"])]


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("LLAVA_NEXT_GPU_ALL"), reason="an hour; set LLAVA_NEXT_GPU_ALL=1 to run")
def test_every_job_for_a_gpu_ends_whole_on_a_cpu(tmp_path):
    """None may fail by itself where there are minutes. Needs torchao on PYTHONPATH."""
    names, options = [job.name for job in gpu_all.JOBS], "--steps 1 --warmup 1 --shortened 20 --samples 1"
    gpu_all.run(argparse.Namespace(limit=7000.0, device="cpu", jobs=names, options=options, out=tmp_path))
    ended = json.loads((tmp_path / "gpu-all-cpu.json").read_text())["figures"]
    assert list(ended) == names and [name for name in names[len(truth.PARTS) :] if ended[name]["ended"] != "done"] == []
    assert [name for name in names if "exit status" in ended[name]["ended"]] == []
    card = json.loads((tmp_path / "ablate-vicuna-7b-clip-336-tiny-cpu.json").read_text())
    assert {row["lever"].partition(":")[0] for row in card["figures"]["levers"]} >= {"packing", "compile", "prefetch_2"}


def test_truth_holds_to_its_bounds_and_names_what_is_beyond_them():
    """A step is its own reference to 1e-6 of stock transformers'; one weight a hundredth off is found by its bound."""
    case = truth.Case((CLIP, LLAMA3), CPU)
    theirs = case.one_by_one()
    found = truth.distance(case.packed("sdpa"), theirs)
    assert found.worst[0] < 1e-5 and len(found.gradients) > 50
    assert truth.within((*found.worst, "tiny"), truth.FLOAT32).startswith("loss and gradients off by")
    share, *_ = truth.excess(found, found, "tiny")
    assert share < 0.01
    with torch.no_grad():
        case.ours.model.language_model.layers[0].mlp.up_proj.weight.mul_(1.01)
    moved = truth.distance(case.packed("sdpa"), theirs)
    with pytest.raises(AssertionError, match=r"of tiny.*bound 0.0001"):
        truth.within((*moved.worst, "tiny"), truth.FLOAT32)
    share, value, what = truth.excess(replace(found, loss=0.5), found, "tiny")
    with pytest.raises(AssertionError, match=r"varlen beyond the bound: varlen: 5.0e-01 \(loss of tiny\)"):
        truth.lines_of_kernels({"varlen": (share, value, what)}, [])
    with pytest.raises(AssertionError, match=r"one side only: lm_head.weight"):
        truth.distance((theirs[0], {k: v for k, v in theirs[1].items() if k != "lm_head.weight"}), theirs)


def test_truth_of_the_kernels_reaches_them_as_a_layer_does():
    """Grouped heads and a window too. On a CPU there is only the loop, half of twice its own distance away."""
    line = truth.check_kernels(CPU)
    assert line.startswith("sdpa: ") and "fa3 cannot run here" in line
    assert 10 < int(re.search(r"(\d+) % of its bound", line)[1]) < 50


def test_profiler_traces_the_chosen_step_and_no_other(tmp_path):
    profiler = StepProfiler([2], tmp_path, CPU)
    for step in (1, 2, 3):
        with profiler.step(step):
            torch.ones(8, 8) @ torch.ones(8, 8)
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == ["step-2.json.gz", "step-2.txt"]
    events = json.loads(gzip.decompress((tmp_path / "profile" / "step-2.json.gz").read_bytes()))["traceEvents"]
    assert sum(event.get("name") == "aten::mm" for event in events) == 1
    with StepProfiler([1], tmp_path / "other", CPU, is_main_process=False).step(1):
        pass
    assert not (tmp_path / "other").exists()


def test_step_runs_the_trainer_and_its_parts_add_up(tmp_path):
    """The command itself on a CPU: card, parts, stock comparison, trace, operators."""
    options = ("--device", "cpu", "--samples", 1, "--shortened", 20, "--warmup", 1, "--steps", 1)
    where = ("--out", tmp_path, "--profile", tmp_path / "traces")
    launch("scripts/benchmark.py", "step", *options, *where, processes=1)
    card = json.loads((tmp_path / "step-vicuna-7b-clip-336-tiny-cpu.json").read_text())
    figures = card["figures"]
    parts = figures["seconds_by_part"]
    assert sum(parts.values()) == pytest.approx(figures["step_s"], rel=1e-3)
    assert min(parts[name] for name in ("vision_forward", "llm_forward", "head_forward", "backward", "optimizer")) > 0
    assert figures["samples_per_s"] == pytest.approx(1 / figures["step_s"], rel=1e-3)
    assert figures["layers"] == [2, 2] and figures["mfu"] is None and "projection" not in figures
    assert len(figures["losses"]) == 1 and 0 < figures["losses"][0] < 20
    shares = [operator["share"] for operator in figures["operators"]]
    assert len(shares) == 10 and shares == sorted(shares, reverse=True) and 0.5 < sum(shares) <= 1
    stock = figures["against_stock"]["loss"]
    assert stock["packed"] == pytest.approx(stock["padded"], rel=1e-4)
    assert (tmp_path / "traces" / "profile" / "step-3.json.gz").stat().st_size > 1000
    assert card["command"].startswith("python scripts/benchmark.py step") and card["versions"]["torch"]
