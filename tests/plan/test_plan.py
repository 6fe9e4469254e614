"""The plan: which samples a step holds, and how they are dealt to ranks."""

import hashlib
import heapq
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_next.data.plan.dealing import CostModel, deal
from llava_next.data.plan.order import Order, Source, num_steps, order, plan_hash
from support.published import profile_samples

REPEATS = st.sampled_from([0.0, 0.3, 0.5, 1.0, 1.5, 2.0, 3.7])


def source_sizes():
    return st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=6), min_size=1, max_size=3)


@given(source_sizes(), st.data(), st.integers(0, 2**40), st.integers(0, 3), st.none() | st.integers(1, 4))
def test_every_sample_comes_exactly_repeat_times(sizes, data, seed, epoch, window):
    sources = [Source(f"s{i}", shards, data.draw(REPEATS)) for i, shards in enumerate(sizes)]
    ids = order(sources, seed, epoch, window)
    counts = np.bincount(ids, minlength=sum(source.num_samples for source in sources))
    start = 0
    for source in sources:
        mine, start = counts[start : start + source.num_samples], start + source.num_samples
        assert mine.sum() == int(source.num_samples * source.repeat + 0.5)
        assert mine.size == 0 or set(mine) <= {int(source.repeat), int(source.repeat) + 1}
    assert start == len(counts)


@given(source_sizes(), st.data(), st.integers(0, 2**40), st.none() | st.integers(1, 4))
def test_any_stretch_of_the_order_is_that_of_the_whole(sizes, data, seed, window):
    sources = [Source(f"s{i}", shards, data.draw(REPEATS)) for i, shards in enumerate(sizes)]
    whole, lazy = order(sources, seed, 1, window), Order(sources, seed, 1, window)
    assert len(lazy) == len(whole)
    for _ in range(6):  # one object, stretches here and there: what it keeps of earlier ones must not show
        start = data.draw(st.integers(0, len(whole)))
        stop = data.draw(st.integers(0, len(whole) + 3))
        assert np.array_equal(lazy.ids(start, stop), whole[start:stop])


def test_a_hundred_million_samples_are_ordered_window_by_window_in_flat_memory():
    """100,000 shards of 1,000 samples in two sources, windows of 200 shards: the fortieth needs no more
    memory than the tenth, and all less than 20 MB."""
    sources = [Source("a", np.full(70_000, 1000)), Source("b", np.full(30_000, 1000), 2.0)]
    steps, batch = Order(sources, seed=1, shuffle_shards=200), 128
    assert len(steps) == 130_000_000
    peaks = []
    tracemalloc.start()
    for window in range(40):
        start = window * 200_000 + 50_000_000
        assert len(np.unique(steps.ids(start, start + batch))) == batch
        peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    assert peaks[-1] < 20e6 and peaks[-1] < 1.01 * peaks[9]


def test_order_is_the_same_for_ever():
    """Pinned, so that no NumPy release and no change here can alter a running training unnoticed."""
    sources = [Source("a", [100] * 7 + [31], 1.5), Source("b", [64] * 3)]
    digests = [
        hashlib.sha256(order(sources, seed=42, epoch=epoch, shuffle_shards=window).astype("<i8").tobytes()).hexdigest()[
            :16
        ]
        for epoch, window in ((0, None), (1, None), (0, 2))
    ]
    assert digests == ["ddc7811ce449f590", "87abf85b682332f2", "f797fe2263eabf15"]


def test_epochs_and_seeds_differ_but_hold_the_same_samples():
    source = [Source("a", [50] * 4)]
    orders = [order(source, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert all(sorted(ids) == list(range(200)) for ids in orders)
    assert all((orders[a] == orders[b]).mean() < 0.05 for a, b in ((0, 1), (0, 2), (1, 2)))


def test_window_reads_from_few_shards_at_a_time():
    ids = order([Source("a", [10] * 12)], seed=3, shuffle_shards=3)
    windows = [set(ids[start : start + 30] // 10) for start in range(0, 120, 30)]
    assert all(len(window) == 3 for window in windows)
    assert set.union(*windows) == set(range(12))
    assert list(ids[:30]) != sorted(ids[:30])


def test_half_of_a_source_is_a_random_half():
    ids = order([Source("a", [1000] * 4, 0.5)], seed=0)
    assert len(ids) == len(set(ids)) == 2000
    assert all(abs((ids // 1000 == shard).sum() - 500) < 60 for shard in range(4))  # 4 sigma: 60


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 40_000), min_size=2, max_size=5), st.integers(0, 9))
def test_shares_of_sources_hold_over_any_200_steps(sizes, seed):
    batch = 128
    sources = [Source(str(i), [size]) for i, size in enumerate(sizes)]
    ids, total = order(sources, seed), sum(sizes)
    which = np.searchsorted(np.cumsum(sizes), ids, side="right")
    span = min(200 * batch, total)
    for number, size in enumerate(sizes):
        counts = np.concatenate([[0], np.cumsum(which == number)])
        shares = (counts[span:] - counts[:-span]) / span
        assert np.abs(shares - size / total).max() < max(0.01, 2 / span)


def test_a_million_samples_come_once_each():
    ids = order([Source("a", [1000] * 600), Source("b", [1000] * 400, 1.0)], seed=1)
    assert np.array_equal(np.sort(ids), np.arange(1_000_000))


def test_last_step_may_be_smaller():
    assert num_steps(10, 4) == 3 and num_steps(8, 4) == 2 and num_steps(0, 4) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Source("a", [3], -1), "repeat is -1"),
        (lambda: Source("a", [3], float("nan")), "repeat is nan"),
        (lambda: Source("a", [3, -2]), "a shard with -2 samples"),
        (lambda: order([Source("a", [3])], -1), "seed -1"),
        (lambda: order([Source("a", [3])], 0, shuffle_shards=0), "shuffle_shards is 0"),
        (lambda: num_steps(3, 0), "batch_size is 0"),
        (lambda: deal([1, 2], [1], 1, 10, 10), "two vectors of one size"),
        (lambda: deal([1, -2], [1, 1], 1, 10, 10), "negative"),
        (lambda: deal([1], [1], 0, 10, 10), "world is 0"),
        (lambda: deal([1], [1], 1, 0, 10), "token_budget is 0"),
    ],
)
def test_what_cannot_be_planned_is_an_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_plan_hash_tells_every_change_of_the_plan():
    base = {"index_hashes": ["x", "y"], "names": ["a", "b"], "repeats": [1, 2.0], "seed": 0, "batch_size": 128}
    changes = {
        "index_hashes": ["x", "z"],
        "names": ["a", "c"],
        "repeats": [1, 2.5],
        "seed": 1,
        "batch_size": 256,
        "shuffle_shards": 8,
    }
    hashes = {plan_hash(**base)} | {plan_hash(**{**base, name: value}) for name, value in changes.items()}
    assert len(hashes) == 1 + len(changes)
    assert plan_hash(**base) == plan_hash(**{**base, "repeats": [1.0, 2]})


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 6)), max_size=40),
    st.integers(1, 9),
    st.integers(1, 9000),
    st.integers(1, 12),
)
def test_bins_hold_every_sample_once_within_budget(samples, world, token_budget, tile_budget):
    lengths, tiles = (np.array(column, np.int64) for column in (zip(*samples, strict=True) if samples else ((), ())))
    bins = deal(lengths, tiles, world, token_budget, tile_budget)
    assert all(len(ranks) == world for ranks in bins)
    flat = [members for ranks in bins for members in ranks]
    assert sorted(np.concatenate(flat)) == list(range(len(samples)))
    for members in flat:
        assert list(members) == sorted(members)
        fits = lengths[members].sum() <= token_budget and tiles[members].sum() <= tile_budget
        assert fits or len(members) == 1  # a sample beyond the budget is alone
    again = deal(lengths, tiles, world, token_budget, tile_budget)
    assert [[list(members) for members in ranks] for ranks in again] == [[list(m) for m in ranks] for ranks in bins]


def test_more_ranks_than_samples_leaves_ranks_empty():
    bins = deal([100, 200], [1, 1], 4, 1000, 10)
    assert sorted(map(len, bins[0])) == [0, 0, 1, 1] and len(bins) == 1


def efficiency(costs: np.ndarray, bins: list[list[np.ndarray]]) -> float:
    slowest = sum(max(int(costs[members].sum()) for members in ranks) for ranks in bins)
    return costs.sum() / len(bins[0]) / slowest


def plain_longest_first(lengths, costs, world: int, token_budget: int) -> float:
    """Efficiency of the baseline: longest first into the cheapest bin with room, best of four micro-batch counts."""
    found, n_micro = [], 0
    while len(found) < 4:
        n_micro += 1
        heap, parked = [(0, number, 0) for number in range(n_micro * world)], []
        for sample in np.argsort(-costs, kind="stable"):
            while heap and heap[0][0] and heap[0][2] + lengths[sample] > token_budget:
                parked.append(heapq.heappop(heap))
            if not heap:
                break
            cost, number, tokens = heapq.heappop(heap)
            for entry in (*parked, (cost + int(costs[sample]), number, tokens + int(lengths[sample]))):
                heapq.heappush(heap, entry)
            parked.clear()
        else:
            ranked = sorted((cost for cost, _, _ in heap), reverse=True)
            found.append(costs.sum() / world / sum(ranked[::world]))
    return max(found)


@pytest.mark.parametrize(("world", "goal"), [(8, 0.986), (16, 0.972), (32, 0.95), (64, 0.937)])
def test_dealing_is_efficient_and_beats_longest_first(world, goal):
    """128 samples of mix665K's profile, at most 8,192 tokens a micro-batch, over 40 steps."""
    ours, plain = [], []
    for seed in range(40):
        lengths, tiles = profile_samples(128, seed)
        costs = CostModel().sample_cost(lengths, tiles)
        ours.append(efficiency(costs, deal(lengths, tiles, world, 8192, 64)))
        plain.append(plain_longest_first(lengths, costs, world, 8192))
    assert np.mean(ours) >= goal
    # With 64 ranks and two samples a bin, longest first is all but optimal already (bound: 94.0 %).
    assert np.mean(ours) >= np.mean(plain) + (0.002 if world < 64 else 0)


def test_fewer_micro_steps_win_near_ties():
    """Sixteen equal samples on four ranks: one micro-step of four each, not four of one."""
    assert len(deal([1000] * 16, [5] * 16, 4, 8192, 64)) == 1


def test_costs_are_the_published_arithmetic():
    """A mean mix665K sample is 102.4 TFLOP with Vicuna-7B: 97.0 for the language model, 5.1 for 4.5 tiles."""
    lengths, tiles = profile_samples(20_000, 0)
    model = CostModel()
    assert model.sample_cost(lengths, tiles).mean() / 1e12 == pytest.approx(102.4, rel=0.02)
    assert model.sample_cost(lengths * 0, tiles).mean() / 1e12 == pytest.approx(5.1, rel=0.03)
