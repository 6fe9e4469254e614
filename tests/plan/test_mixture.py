"""A run's data sets as one plan: what steps hold, large indexes read in parts, plans that change on the way."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_next.data.format.dataset import read_info
from llava_next.data.format.index import read_dataset
from llava_next.data.format.lazy_index import LazyIndex
from llava_next.data.format.shards import RawSample, StripInfo, encode_strip
from llava_next.data.format.writer import ShardWriter
from llava_next.data.plan.mixture import Mixture
from llava_next.data.plan.order import Order
from llava_next.data.storage.client import Storage
from support.tiny import ANYRES


def write_samples(folder, count: int, shard_samples: int, seed: int = 0):
    """A data set of `count` samples, some without and some with two pictures; all share a few strips."""
    rng = np.random.default_rng(seed)
    strips = {}
    for width, height in ((30, 20), (50, 50), (20, 80)):
        rows, cols = ANYRES.grid(width, height)
        tiles = rng.integers(0, 256, (1 + rows * cols, 28, 28, 3), np.uint8)
        strips[width, height] = StripInfo(width, height, rows, cols, *encode_strip(tiles, "jpeg"))
    with ShardWriter(folder, ANYRES, "jpeg", shard_samples) as writer:
        for number in range(count):
            images = [list(strips.values())[k] for k in rng.permutation(3)[: rng.integers(0, 3)]]
            text = "word " * int(rng.integers(1, 200))
            turns = [{"from": "human", "value": "<image>" * len(images) + "?"}, {"from": "gpt", "value": text}]
            writer.write(RawSample(f"{number:09d}", str(number), f"part{number % 3}", turns, images))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("mixture")
    return {
        "a": write_samples(root / "a", 90, 7),
        "b": write_samples(root / "b", 40, 10, seed=1),
        "c": write_samples(root / "c", 25, 25, seed=2),
    }


def mixture(folders, names="ab", repeats=(1.0, 1.0, 1.0), **changes) -> Mixture:
    sources = [(folders[name], name, repeat) for name, repeat in zip(names, repeats, strict=False)]
    return Mixture(sources, ANYRES, **{"batch_size": 8, "seed": 1, **changes})


def ids(plan: Mixture, first: int, last: int | None = None) -> list[tuple[str, int]]:
    """(source, row) of all samples of steps [first, last), in order."""
    last = plan.total_steps if last is None else last
    found = [plan.step_ids(step) for step in range(first, last)]
    found = np.concatenate(found) if found else np.zeros(0, np.int64)
    source = plan.source_of(found)
    starts = np.cumsum([0, *(s.num_samples for s in plan.plan_sources)])
    return [(plan.names[s], int(i - starts[s])) for s, i in zip(source, found, strict=True)]


def test_lazy_index_gives_the_same_rows_as_the_whole_one(folders):
    storage = Storage(folders["a"])
    info, whole = read_dataset(storage)
    lazy = LazyIndex(storage, info, read_info(storage)[1], keep_shards=3)
    assert lazy.hash() == whole.hash() and len(lazy) == len(whole) == 90
    rng = np.random.default_rng(0)
    for count in (1, 5, 40, 90):
        rows = rng.permutation(90)[:count]
        ours, theirs = lazy.take(rows), whole.take(rows)
        for name in [
            "shard",
            "offset",
            "nbytes",
            "crc32",
            "image_offsets",
            "widths",
            "heights",
            "rows",
            "cols",
            "text_bytes",
            "turns",
        ]:
            assert np.array_equal(getattr(ours, name), getattr(theirs, name)), name
        assert [ours.locate(i) for i in range(count)] == [whole.locate(row) for row in rows]
        names = [[index.source_names[i] for i in index.source] for index in (ours, theirs)]
        assert names[0] == names[1] == [f"part{row % 3}" for row in rows]
        assert np.array_equal(ours.num_tiles, theirs.num_tiles)


class CountingStorage(Storage):
    """Remembers which bytes of which object were read."""

    def read_range(self, name, start, length, size=None):
        self.__dict__.setdefault("ranges", []).append((name, start, length))
        return super().read_range(name, start, length, size)


def test_lazy_index_reads_only_the_row_groups_it_needs(folders):
    storage = CountingStorage(folders["a"])
    info, digest = read_info(storage)
    lazy = LazyIndex(storage, info, digest, keep_shards=2)
    storage.ranges.clear()
    lazy.take(np.array([3, 0, 15]))  # of the shards 0 and 2
    assert len(storage.ranges) == 2 and sum(length for _, _, length in storage.ranges) < info.index_bytes / 4
    lazy.take(np.array([6, 14]))
    assert len(storage.ranges) == 2  # still known
    lazy.take(np.array([89]))  # drops shard 0, used longer ago than or with shard 2
    lazy.take(np.array([0]))
    assert len(storage.ranges) == 4


def test_plan_and_sizes_are_the_same_whether_the_index_is_held_or_read_in_parts(folders):
    held, parts = (mixture(folders, shuffle_shards=2, resident_samples=n) for n in (1000, 10))
    assert isinstance(parts.indexes[0], LazyIndex) and not isinstance(held.indexes[0], LazyIndex)
    assert held.state() == parts.state() and ids(held, 0) == ids(parts, 0)
    for step in range(held.total_steps):
        assert np.array_equal(held.step_sizes(step), parts.step_sizes(step))
    assert list(held.requests(1, 2, 2000, 20)) == list(parts.requests(1, 2, 2000, 20))
    with pytest.raises(ValueError, match=r"a has 90 samples, too many.*shuffle_shards"):
        mixture(folders, resident_samples=10)


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_every_world_size_and_every_restart_gives_each_step_the_same_samples(folders, data):
    """Over world sizes, budgets and start steps, with windows, repeats and epochs."""
    plan = mixture(
        folders,
        "abc",
        data.draw(st.tuples(*[st.sampled_from([0.5, 1.0, 1.3, 2.0])] * 3)),
        batch_size=data.draw(st.integers(1, 40)),
        epochs=data.draw(st.integers(1, 3)),
        shuffle_shards=data.draw(st.none() | st.integers(1, 5)),
        seed=data.draw(st.integers(0, 99)),
    )
    world, start = data.draw(st.integers(1, 7)), data.draw(st.integers(0, plan.total_steps - 1))
    budget, tiles = data.draw(st.integers(100, 3000)), data.draw(st.integers(1, 30))
    seen = {}
    for rank in range(world):
        for request in plan.requests(rank, world, budget, tiles, start):
            seen.setdefault(request.step, {}).update({ref.slot: ref.sample_id for ref in request.samples})
    assert sorted(seen) == list(range(start, plan.total_steps))
    for step, by_slot in seen.items():
        assert [by_slot[slot] for slot in range(len(by_slot))] == plan.step_ids(step).tolist()


def test_steps_cut_the_order_of_each_epoch_and_the_last_is_smaller(folders):
    plan = mixture(folders, "c", batch_size=10, epochs=2)  # 25 samples
    found = [plan.step_ids(step) for step in range(plan.total_steps)]
    assert [len(ids) for ids in found] == [10, 10, 5, 10, 10, 5]
    for epoch in range(2):
        whole = Order(plan.plan_sources, seed=1, epoch=epoch).ids()
        assert np.array_equal(np.concatenate(found[3 * epoch : 3 * epoch + 3]), whole)
    for step in (-1, 6):
        with pytest.raises(ValueError, match=f"step {step} is not one of 0 to 5"):
            plan.step_ids(step)


def test_two_sources_of_one_name_are_refused(folders):
    with pytest.raises(ValueError, match="same name"):
        Mixture([(folders["a"], "x", 1.0), (folders["b"], "x", 1.0)], ANYRES, 8)


def resumed(state: dict, folders, names, step: int, **changes) -> Mixture:
    """Another plan that goes on after `step` steps of the one that `state` is from."""
    plan = mixture(folders, names, **changes)
    state = json.loads(json.dumps(state)) | {"step": step}
    with pytest.raises(ValueError, match=r"another plan.*allow_changed_plan"):
        plan.resume(state)
    assert plan.resume(state, allow_changed_plan=True)
    return plan


def test_changed_plan_goes_on_with_the_samples_not_yet_seen(folders):
    first = mixture(folders, "ab")
    plan = resumed(first.state(), folders, "bc", 6, batch_size=5, seed=9)  # a leaves, c comes
    before, after = ids(first, 0, 6), ids(plan, 6)
    assert len(before) == 48
    seen = {row for name, row in before if name == "b"}
    assert sorted(row for name, row in after if name == "b") == sorted(set(range(40)) - seen)
    assert sorted(row for name, row in after if name == "c") == list(range(25))
    assert plan.total_steps == 6 + -(-(65 - len(seen)) // 5)


def test_plan_can_change_several_times_and_in_a_later_epoch(folders):
    """Three legs over two epochs: in each epoch every sample comes exactly once."""
    first = mixture(folders, "ab", epochs=2)  # 17 steps an epoch
    second = resumed(first.state(), folders, "ab", 20, epochs=2, seed=5)
    third = resumed(second.state(), folders, "ba", 25, epochs=2, batch_size=16)
    everything = sorted([("a", row) for row in range(90)] + [("b", row) for row in range(40)])
    assert sorted(ids(first, 0, 17)) == everything
    assert sorted(ids(first, 17, 20) + ids(second, 20, 25) + ids(third, 25)) == everything
    again = mixture(folders, "ba", epochs=2, batch_size=16)  # and a plain restart of the third
    assert again.resume({**third.state(), "step": 27}) == [] and ids(again, 25) == ids(third, 25)
    assert again.epoch(25) == 1


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_nothing_is_lost_or_repeated_by_any_change_of_plan(folders, data):
    """Repeats, seeds, batch sizes and windows at random, two changes: in the end each sample came as often as the last
    plan says, or as often as it had been seen before that began, if that is more."""
    state, step, seen = None, 0, Counter()
    for leg in range(3):
        changes = {
            "batch_size": data.draw(st.integers(1, 20)),
            "seed": data.draw(st.integers(0, 5)),
            "shuffle_shards": data.draw(st.none() | st.integers(1, 3)),
            "repeats": data.draw(st.tuples(*[st.sampled_from([0.5, 1.0, 2.0])] * 2)),
        }
        plan = mixture(folders, "ab", **changes)
        wanted = Counter(ids(plan, 0))
        if leg:
            try:
                plan.resume({**state, "step": step}, allow_changed_plan=True)
            except ValueError as error:  # the new plan has nothing beyond what was seen
                assert "nothing of them is left" in str(error) and not wanted - seen
                return
        stop = data.draw(st.integers(step, plan.total_steps - 1)) if leg < 2 else plan.total_steps
        here = Counter(ids(plan, step, stop))
        if leg == 2:
            assert seen + here == wanted | seen
        state, step, seen = plan.state(), stop, seen + here


def test_differences_are_named(folders):
    state = {**mixture(folders).state(), "step": 2}
    for changes, message in (({"seed": 3}, "seed: 1 -> 3"), ({"batch_size": 4}, "batch_size: 8 -> 4")):
        with pytest.raises(ValueError, match=message):
            mixture(folders, **changes).resume(state)
    with pytest.raises(ValueError, match="sources: "):
        mixture(folders, "ac").resume(state)
    told = mixture(folders, "ac")
    assert any("b is gone" in line for line in told.resume(state, allow_changed_plan=True))
