"""What a plan picks: the least time of what fits, the user's values kept, and what would fit where nothing does."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from llava_next.model.forward.lora import Lora, add_adapters, quantise_under
from llava_next.model.forward.modeling import LlavaNextForConditionalGeneration
from llava_next.training.devices.hardware import parse_hardware
from llava_next.training.forecast.activations import Compute
from llava_next.training.forecast.budget import Layout, estimate, units
from llava_next.training.forecast.fitting import by_adapters, ways_to_fit, ways_to_train
from llava_next.training.forecast.picking import GRAIN, MARGIN, Picking, Steps, Wanted
from llava_next.training.forecast.speed import communication_seconds, micro_batch_flops, step_seconds
from llava_next.training.recipe.optim import AdaptedRates, Rates, freeze
from support.published import VICUNA, full_config, profile_samples

CONFIG = full_config(VICUNA)
STEPS = Steps([profile_samples(128, seed) for seed in range(4)], longest=4096, most_tiles=5)


COUNTED = {}  # by what is trained: a model of 7B takes its time even without memory


def counts_under(rates: Rates):
    if repr(rates) not in COUNTED:
        COUNTED[repr(rates)] = counted(rates)
    return COUNTED[repr(rates)]


def counted(rates: Rates):
    with torch.device("meta"):
        model = LlavaNextForConditionalGeneration(CONFIG)
    if rates.quantize:
        quantise_under(model, rates.lora, torch.bfloat16)
    if rates.lora:
        add_adapters(model, rates.lora, seed=0)
    freeze(model, rates)
    return units(model)


@pytest.fixture(scope="module")
def counts():
    return counts_under(Rates())


@pytest.fixture
def picking_for(counts):
    """Called with a machine: stage 2 of Vicuna-7B on it."""

    def make(machine: str, **changes) -> Picking:
        hardware = parse_hardware(machine)
        layout = Layout(hardware.per_node, Compute(), replicate=hardware.nodes)
        return replace(Picking(CONFIG, counts, Rates(), layout, hardware, STEPS), **changes)

    return make


@pytest.mark.parametrize(
    ("machine", "policies"),
    [
        ("8xh100-80g", ("none", "selective")),
        ("8xh200-141g", ("none",)),
        ("8xa100-40g", ("selective", *range(1, 32))),
        ("2xh100-80g", tuple(range(1, 32))),  # selective is too large, and full leaves memory unused
        ("8xrtx4090-24g", ("full",)),
    ],
)
def test_what_is_picked_fits_with_the_margin_and_takes_the_least_time(picking_for, machine, policies):
    picking = picking_for(machine)
    choice = picking.choose()
    picked = choice.picked
    assert picked.policy in policies
    assert picked.need == MARGIN * picked.estimate.total <= picking.hardware.memory
    assert picked.seconds <= min(row.seconds for row in choice.rows if row.fits) + 1e-4
    assert picked.tokens >= STEPS.longest and picked.tiles >= STEPS.most_tiles
    # all of the memory is used, unless a step needs no more
    more = not picking.fits(picked.policy, picked.tokens + GRAIN, picked.tiles + 1)
    assert more or picked.micro_batches == 1


def test_values_of_the_user_are_kept(picking_for):
    free = picking_for("8xh100-80g").choose().picked
    for wanted in (Wanted("full"), Wanted(7), Wanted(tokens=6000), Wanted(tiles=40), Wanted("none", 4200, 9)):
        found = picking_for("8xh100-80g", wanted=wanted).choose().picked
        for value, name in ((wanted.policy, "policy"), (wanted.tokens, "tokens"), (wanted.tiles, "tiles")):
            assert value in (None, getattr(found, name))
        assert found.seconds >= free.seconds - 1e-4
    assert picking_for("8xh100-80g").choose().picked == free  # as every rank finds it


def test_measured_factor_takes_the_place_of_the_assumed_one(picking_for):
    assumed, measured = (picking_for("8xh100-80g", factor=factor).choose().picked for factor in (MARGIN, 1.4))
    assert measured.need == 1.4 * measured.estimate.total <= measured.memory < 1.4 * assumed.estimate.total


def test_sample_of_many_pictures_is_counted_and_sets_no_budget(picking_for):
    album = picking_for("8xh100-80g", steps=replace(STEPS, most_tiles=60))
    picked = album.choose().picked
    assert picked.tiles < 60 and picked.fits and picked.tokens > STEPS.longest
    alone = estimate(CONFIG, album.counts, Rates(), picked.policy, album.layout, STEPS.longest, 60)
    assert MARGIN * alone.total <= picked.memory


def test_layers_of_two_kinds_lie_between_both_in_memory_and_work(picking_for):
    picking = picking_for("8xh100-80g")
    of = {policy: picking.estimate(policy, 8192, 16).activations for policy in ("selective", 8, 16, 24, "full")}
    layers = [of[policy] for policy in ("selective", 8, 16, 24)]
    steps = [a - b for a, b in itertools.pairwise(layers)]
    assert steps == pytest.approx([steps[0]] * 3) and steps[0] > 0  # so many bytes a layer
    assert of[24] - steps[0] > of["full"]  # whose tower keeps its inputs only, too
    flops = {p: micro_batch_flops(CONFIG, Rates(), p, 8192, 8192 * 1000, 16) for p in ("none", "selective", 16, "full")}
    assert flops["none"] < flops["selective"] < flops[16] < flops["full"]
    # a forward more, but for the last of a layer's products, 22 % of its weights
    assert flops["full"] / flops["none"] == pytest.approx(1 + 0.78 / 3, rel=0.01)
    assert flops["selective"] / flops["none"] == pytest.approx(1 + 0.078 / 3, rel=0.01)


def test_weights_and_gradients_move_by_the_slowest_link_between_those_that_share_them(picking_for, counts):
    whole = counts.whole
    one, two = (picking_for(machine) for machine in ("8xh100-80g", "2x8xh100-80g"))
    # gathered twice in bf16, reduced once in fp32, from the seven others
    moved = 7 / 8 * (4 * whole.parameters + 4 * whole.trainable)
    assert communication_seconds(whole, one.layout, one.hardware) == pytest.approx(moved / 340e9)
    kept = replace(one.layout, reshard=False)
    saved = 7 / 8 * 2 * whole.parameters / 340e9
    assert communication_seconds(whole, kept, one.hardware) == pytest.approx(moved / 340e9 - saved)
    # what is kept is gathered once a step
    assert communication_seconds(whole, kept, one.hardware, first=False) == pytest.approx(moved / 340e9 - 2 * saved)
    nothing = [np.zeros((3, 8))]
    for layout, gathers in ((one.layout, 6), (kept, 1)):
        expected = 7 / 8 * (2 * gathers * whole.parameters + 3 * 4 * whole.trainable) / 340e9
        assert step_seconds(nothing, whole, layout, one.hardware)[2] == pytest.approx(expected)
    # HSDP: the same in the node, and each rank's eighth of the gradients once around two nodes
    across = 4 * whole.trainable / 8 / 37e9
    assert communication_seconds(whole, two.layout, two.hardware) == pytest.approx(moved / 340e9 + across)
    over_all = Layout(16, Compute())
    everything = 15 / 16 * (4 * whole.parameters + 4 * whole.trainable)
    assert communication_seconds(whole, over_all, two.hardware) == pytest.approx(everything / 37e9)


def test_one_gpu_is_enough_for_7b_by_the_ways_to_train_that_take_less_memory(picking_for):
    fitting = {"1xrtx4090-24g": ["QLoRA"], "1xl40s-48g": ["LoRA", "QLoRA"]}
    fitting["1xh100-80g"] = ["adamw8bit", "both", "LoRA", "QLoRA"]
    for machine, ways in fitting.items():
        found = ways_to_train(picking_for(machine), counts_under)
        assert list(found) == ["adamw8bit", "bf16 master", "both", "LoRA", "QLoRA"]
        assert [way for way, row in found.items() if row.fits] == ways
        assert all(row.tokens >= 4096 for row in found.values())


def test_where_states_alone_are_too_large_only_what_fits_is_named(picking_for, counts):
    picking = picking_for("1xh100-80g")
    picked = picking.choose().picked
    assert not picked.fits and picked.estimate.states / 1e9 == pytest.approx(112.8, abs=0.1)

    def least(rates, layout, units=counts) -> float:
        return MARGIN * estimate(CONFIG, units, rates, "full", layout, STEPS.longest, STEPS.most_tiles).total / 1e9

    frozen = Rates(llm=None)
    offloaded = replace(picking.layout, offload=True)
    two, llm = least(Rates(), Layout(2, Compute())), least(frozen, picking.layout, counts_under(frozen))
    host = least(Rates(), offloaded)
    adapters = AdaptedRates(llm=2e-4, vision=None, lora=Lora())
    lora = least(adapters, picking.layout, counts_under(adapters))
    assert lora < 0.25 * picked.need / 1e9
    coded = least(Rates(), replace(picking.layout, optimizer="adamw8bit"))
    assert ways_to_fit(picking, counts_under) == [
        f"--optim.name adamw8bit ({coded:.1f} GB)",
        f"2 such GPUs ({two:.1f} GB each)",
        f"--lora.r 128 --optim.rates.llm 2e-4 --optim.rates.vision null ({lora:.1f} GB)",
        f"--optim.rates.llm null ({llm:.1f} GB)",
        f"fsdp_offload_params: true in the launch file ({host:.1f} GB, and 112.8 GB of host memory a rank; slow)",
    ]
    in_4_bits = replace(adapters, quantize="nf4")
    small, nf4 = picking_for("1xrtx4090-24g"), least(in_4_bits, picking.layout, counts_under(in_4_bits))
    said = f"--lora.r 128 --optim.rates.llm 2e-4 --optim.rates.vision null --quantize nf4 ({nf4:.1f} GB)"
    assert by_adapters(small, counts_under) == [said]
    assert by_adapters(replace(small, rates=in_4_bits), counts_under) == []
    both = least(Rates(), replace(picking.layout, shard=2, optimizer="adamw8bit", master="bf16"))
    found = ways_to_fit(picking_for("2xa100-40g"), counts_under)
    assert found[0] == f"--optim.name adamw8bit --optim.master bf16 ({both:.1f} GB)"
    given = picking_for("8xh100-80g", wanted=Wanted("none", tokens=16384))
    assert not given.choose().picked.fits
    auto = picking_for("8xh100-80g").choose().picked
    assert ways_to_fit(given, counts_under) == [f"{auto.options} ({auto.need / 1e9:.1f} GB)"]
