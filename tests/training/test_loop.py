"""The loop: the original's arithmetic step by step, nothing that depends on the ranks, and what can go wrong."""

import copy
import json
import math
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributed.fsdp import fully_shard
from transformers import LlavaNextForConditionalGeneration as StockLlavaNext

import finetune
from llava_next.data.format.shards import read_sample
from llava_next.data.loading.feed import Feed
from llava_next.data.loading.loader import LoaderOptions, build_loader
from llava_next.data.plan.mixture import Mixture
from llava_next.model.forward.modeling import LlavaNextForConditionalGeneration
from llava_next.training.banner import plan_banner
from llava_next.training.devices.agreement import agree_on_step
from llava_next.training.planning import make_plan
from llava_next.training.recipe.config import parse_run
from llava_next.training.recipe.optim import Rates, build_optimizer, freeze, rate_multiplier, set_rates
from llava_next.training.setup import load_parts, open_mixture
from llava_next.training.watch.health import NonFinite
from llava_next.training.watch.journal import flat
from llava_next.training.watch.timing import StepTimer
from support.demo import build_demo
from support.faults import FaultServer
from support.launching import launch
from support.runs import demo_arguments, read_lines, run_demo
from support.tiny import pixel_batch

SAMPLES, MAX_LENGTH = 200, 300


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Digits, shards and the demo model."""
    folder = tmp_path_factory.mktemp("loop")
    build_demo(folder, SAMPLES)
    return folder


def reference_losses(demo, batch_size: int, rates: Rates, betas) -> list[float]:
    """The original's loop, written out: stock transformers, padded batches of 8, Hugging Face's mean loss, AdamW."""
    data = SimpleNamespace(template="mistral", images="anyres", max_length=MAX_LENGTH)
    parts = load_parts(SimpleNamespace(lora=None, quantize=None, model=str(demo / "base"), data=data))
    mixture = Mixture([(demo / "shards", "digits", 1.0)], parts.anyres, batch_size, max_length=MAX_LENGTH)
    model = StockLlavaNext.from_pretrained(demo / "base", dtype=torch.float32).train()
    freeze_stock(model, rates)
    optimizer = build_optimizer(model, rates, betas, 1e-8, 0.0)
    losses = []
    for step in range(mixture.total_steps):
        ids = mixture.step_ids(step)
        groups, total = [ids[i : i + 8] for i in range(0, len(ids), 8)], 0.0
        set_rates(optimizer, rate_multiplier(step, mixture.total_steps, 0.03))
        for group in groups:
            refs = [mixture.ref(sample, 0) for sample in group]
            raws = [read_sample(mixture.storages[0].read_range(r.shard, *r.location[1:3])) for r in refs]
            examples = [parts.encoder.encode(raw, 0, 0, 0) for raw in raws]
            sizes = [[(image.width, image.height) for image in raw.images] for raw in raws]
            loss = model(**pixel_batch(examples, sizes, parts.anyres, model.config)).loss / len(groups)
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def freeze_stock(model: StockLlavaNext, rates: Rates) -> None:
    """`freeze` needs names that only our class has; the stock model's parameters have the same names."""
    ours = LlavaNextForConditionalGeneration(copy.deepcopy(model.config))
    freeze(ours, rates)
    wanted = {name: p.requires_grad for name, p in ours.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(wanted[name])


def test_micro_batch_mean_without_clipping_is_the_originals_training_step_by_step(demo, tmp_path):
    """7 steps of 32 digits, a rate for each module, fp32, against a loop of padded batches; held-out loss falls."""
    rates = {"llm": 2e-4, "projector": 2e-4, "vision": 2e-5, "newline": 2e-4}
    options = [x for name, rate in rates.items() for x in (f"--optim.rates.{name}", str(rate))]
    options += [
        "--data.batch_size",
        "32",
        "--optim.loss_weighting",
        "micro_batch_mean",
        "--optim.max_grad_norm",
        "null",
    ]
    _, metrics = run_demo(demo, tmp_path / "run", *options, "--data.validation", str(demo / "shards"))
    expected = reference_losses(demo, 32, Rates(**rates), (0.9, 0.98))
    assert len(metrics) == len(expected) == 7
    assert [m["loss"] for m in metrics] == pytest.approx(expected, rel=1e-5)
    assert expected[-1] < expected[0] - 0.1
    held_out = read_lines(tmp_path / "run" / "validation.jsonl")
    assert [line["step"] for line in held_out] == [7] and held_out[0]["loss/all"] < metrics[0]["loss"]


def test_fifty_steps_do_not_depend_on_ranks_or_token_budget(demo, tmp_path):
    """1 rank with 150 tokens a micro-batch, 2 and 4 ranks with 900: losses to 1e-5, counts and samples equal.

    Two epochs of half of the samples, in steps of 4: what is compared does not grow with the steps.
    """
    options = ["--data.sources", f"[{{path: {demo / 'shards'}, repeat: 0.5}}]", "--data.epochs", "2"]
    options += ["--data.batch_size", "4", "--data.max_length", "150", "--checkpoint.every", "0"]
    runs = [
        run_demo(demo, tmp_path / f"run{world}", *options, "--data.token_budget", str(budget), processes=world)[1]
        for world, budget in ((1, 150), (2, 900), (4, 900))
    ]
    assert all([m["step"] for m in metrics] == list(range(1, 51)) for metrics in runs)
    for other in runs[1:]:
        for ours, theirs in zip(runs[0], other, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
            for name in ("samples", "tokens", "squared_lengths", "supervised", "tiles", "source_share"):
                assert ours[name] == theirs[name], name
    assert runs[0][-1]["loss"] < runs[0][0]["loss"] - 0.5
    assert max(m["micro_batches"] for m in runs[0]) > 1 == max(m["micro_batches"] for m in runs[2])


def test_run_out_of_memory_says_what_it_did_and_the_next_plan_takes_it_into_account(demo, tmp_path, monkeypatch):
    run = tmp_path / "run"
    options = [*demo_arguments(demo, run), "--data.batch_size", "8", "--data.token_budget", "300"]
    worker = "tests/support/workers/out_of_memory.py"
    done = launch(worker, 3, *options, processes=1, check=False)
    (line,) = read_lines(run / "out-of-memory.jsonl")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    said = " ".join(done.stderr.split("error on rank 0: ")[1].split())
    assert said.startswith("out of memory in the forward, micro-batch 1 of 2 of step 2") and line["step"] == 2
    assert f" of step 2: {line['tokens']} tokens, {line['tiles']} tiles, samples {line['samples']}" in said
    assert "Tried to allocate 2.00 GiB.)" in said and "page of advice" not in said
    for word in ("Estimated ", "in use at most ", "Start again: ", "--data.token_budget 300 --data.tile_budget "):
        assert word in said
    assert len(line["samples"]) >= 1 and line["tokens"] <= 300
    assert line["factor"] == pytest.approx(1.05 * max(1, line["peak"] / line["estimate"]))
    for name in ("ACCELERATE_USE_FSDP", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    config, _ = parse_run(options)
    parts = load_parts(config)
    mixture = open_mixture(config, parts)
    plan = make_plan(config, parts, mixture)
    assert plan.picking.factor == line["factor"] and plan.picked.need == line["factor"] * plan.picked.estimate.total
    assert f"memory is counted {line['factor']:.2f} times the estimate, in place of 1.05" in " ".join(
        plan_banner(plan, parts, mixture).split()
    )
    assert not (run / "model").exists()


def test_update_of_a_step_that_is_not_finite_changes_no_bit(one_process):
    """Parameters, moments and step counts, with FSDP2 and the fused optimizer; the next update counts on from there."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 1))
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)

    def update(scale: float) -> float:
        (model(torch.ones(3, 6)).sum() * scale).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).full_tensor()
        skipped = NonFinite.guard(optimizer, norm)
        optimizer.step()
        optimizer.zero_grad()
        return float(skipped)

    def everything() -> list[torch.Tensor]:
        moments = [value for state in optimizer.state.values() for value in state.values()]
        return [getattr(t, "full_tensor", lambda t=t: t)().clone() for t in [*model.parameters(), *moments]]

    assert update(1.0) == 0
    before = everything()
    for scale in (math.nan, math.inf):
        assert update(scale) == 1
        assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    assert update(1.0) == 0
    after = everything()
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert {int(t) for t in after if t.ndim == 0} == {2}


def test_run_whose_losses_are_not_finite_skips_then_stops_with_the_last_good_state(demo, tmp_path):
    """The first update of rate 1e38 ruins the weights; three updates are skipped on both ranks, and the run tells."""
    options = ["--data.batch_size", "16", "--optim.max_skipped_steps", "3", "--optim.warmup_ratio", "0"]
    options += ["--optim.rates.llm", "1e38", "--checkpoint.every", "0"]
    done, metrics = run_demo(demo, tmp_path / "run", *options, processes=2, check=False)
    assert done.returncode != 0
    assert "3 updates in a row were skipped" in done.stderr and "not finite, the update is skipped" in done.stdout
    skipped = [m for m in metrics if "skipped_update" in m]
    assert len(skipped) == 3 and all(len(m["skipped_update"]) == 16 for m in skipped)
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir() if p.name.startswith("step-")]


def test_run_without_any_target_says_so_at_each_step_and_writes_no_model(demo, tmp_path, monkeypatch):
    """8 tokens hold no answer: counted and refused; when allowed, both steps are in the log and no model is there."""
    options = ["--data.batch_size", "8", "--data.max_length", "8", "--max_steps", "2", "--checkpoint.every", "0"]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *demo_arguments(demo, tmp_path / "refused"), *options])
    with pytest.raises(SystemExit, match=r"--data\.allow_cut true goes on as it is"):
        finetune.main(None)
    assert not (tmp_path / "refused").exists()
    done, metrics = run_demo(demo, tmp_path / "run", *options, "--data.allow_cut", "true", check=False)
    assert done.returncode == 1 and "nothing was learnt and no model is written" in done.stderr
    assert done.stdout.count("none of its 8 samples has a supervised token") == 2
    assert [(m["step"], m["supervised"], m["unsupervised"], m["loss"]) for m in metrics] == [(1, 0, 8, 0), (2, 0, 8, 0)]
    assert not (tmp_path / "run/model").exists()


def test_run_over_a_failing_network_counts_retries_and_lasting_faults_end_all_ranks(demo, tmp_path):
    """5 % of all requests fail in passing: nothing is lost. Credentials that expire end the run, naming the bytes."""
    options = ["--data.batch_size", "16", "--data.epochs", "4", "--data.num_workers", "1", "--checkpoint.every", "0"]
    with FaultServer(demo / "shards") as server:
        server.share = 0.05

        def expire() -> None:
            while not (tmp_path / "run/metrics.jsonl").exists() and not server.closing.wait(0.05):
                pass
            server.lasting = "403"

        threading.Thread(target=expire).start()
        options += ["--data.sources", server.url]
        done, metrics = run_demo(demo, tmp_path / "run", *options, processes=2, check=False)
    assert done.returncode != 0 and 0 < len(metrics) < 52
    assert all(m["samples"] == (16 if m["step"] % 13 else 8) for m in metrics)  # 200 an epoch
    assert sum(m["retries"] for m in metrics) > 0 and sum(m["bytes"] for m in metrics) > 10_000
    assert "no permission" in done.stderr and f"{server.url}/shard-000" in done.stderr and ", bytes " in done.stderr


def test_too_many_in_a_row_and_nothing_less():
    watch = NonFinite(3)
    assert [watch.count(bad) for bad in (True, True, False, True, True)] == [False] * 5
    assert watch.count(True)


def test_phases_of_a_step_are_summed_over_its_micro_batches():
    timer = StepTimer(torch.device("cpu"))
    timer._marks = [
        ("forward", 0.0),
        ("backward", 1.0),
        ("forward", 3.0),
        ("backward", 4.0),
        ("optimizer", 9.0),
        ("end", 9.5),
    ]
    assert timer.seconds(timer.take()) == {"forward_s": 2.0, "backward_s": 7.0, "optimizer_s": 0.5}
    assert timer.take() == []


def test_trackers_get_one_level_of_plain_values():
    nested = {"a": {"b": 1, "c": [{"d": "x"}, {"d": None}]}, "betas": (0.9, 0.98), "on": True}
    expected = {"a/b": 1, "a/c/0/d": "x", "a/c/1/d": "None", "betas/0": 0.9, "betas/1": 0.98, "on": True}
    assert flat(nested) == expected


def test_feed_raises_the_loaders_error_in_its_place_and_ends_its_thread(demo):
    data = SimpleNamespace(template="mistral", images="anyres", max_length=MAX_LENGTH)
    parts = load_parts(SimpleNamespace(lora=None, quantize=None, model=str(demo / "base"), data=data))
    mixture = Mixture([(demo / "shards", "digits", 1.0)], parts.anyres, 16, max_length=MAX_LENGTH)
    loader = build_loader(mixture, parts.encoder, 0, 1, 900, 100, options=LoaderOptions(num_workers=0))
    original, seen = loader.dataset._read, []

    def read(ref):
        seen.append(ref.sample_id)
        if len(seen) == 60:
            raise OSError("the wire was cut")
        return original(ref)

    loader.dataset._read = read
    feed = Feed(loader)
    with pytest.raises(OSError, match="the wire was cut"):
        for step, micros in feed:
            last = step, sum(len(batch.slots) for batch in micros)
    assert last[1] == 16 and 0 <= last[0] <= 3
    with pytest.raises(OSError, match="the wire was cut"):
        next(feed)
    feed.close()
    assert not feed._thread.is_alive()


def test_ranks_with_different_configurations_all_refuse_to_start(tmp_path):
    launch("tests/support/workers/agree.py", tmp_path)
    for rank in range(2):
        same, different = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert same == "" and "different configuration" in different


def test_step_message_counts_squares_and_reads(one_process, demo):
    data = SimpleNamespace(template="mistral", images="anyres", max_length=MAX_LENGTH)
    parts = load_parts(SimpleNamespace(lora=None, quantize=None, model=str(demo / "base"), data=data))
    mixture = Mixture([(demo / "shards", "digits", 1.0)], parts.anyres, 16, max_length=MAX_LENGTH)
    feed = Feed(build_loader(mixture, parts.encoder, 0, 1, 900, 100, options=LoaderOptions(num_workers=0)))
    _, micros = next(feed)
    feed.close()
    counts = agree_on_step(micros, 16, waited=0.25)
    lengths = np.concatenate([batch.cu_seqlens.diff().numpy() for batch in micros])
    assert counts.counts["squared_lengths"] == (lengths**2).sum() and counts.counts["tokens"] == lengths.sum()
    assert counts.counts["samples"] == 16 and counts.data_wait_s == 0.25 and not (counts.stop or counts.failed)
    assert counts.io["requests"] >= 16 and counts.io["bytes"] > 0
    assert agree_on_step([], 16, stop=True, failed=True).stop and agree_on_step([], 16, failed=True).failed
