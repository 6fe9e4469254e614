"""Runs whose plan changed on the way: what is left of the current epoch when a run goes on under another plan.

A run is a list of `Leg`s, each a stretch of steps under one plan. A leg takes its own order of the epoch that it begins
in without those samples that earlier legs have seen in that epoch; samples are the same when their shards are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llava_next.data.plan.order import Order, Source, num_steps


@dataclass(frozen=True)
class Leg:
    """A stretch of a run under one plan, as kept in checkpoints.

    Args:
        sources: of each source `name`, `repeat`, `data` (hash of its shards) and `shards` ([samples, count] runs).
        seed, batch_size, shuffle_shards: of the order.
        first_step: step of the run, counted from 0, at which it begins.
        epoch: the epoch that this step is in.
    """

    sources: tuple[dict, ...]
    seed: int
    batch_size: int
    shuffle_shards: int | None
    first_step: int = 0
    epoch: int = 0

    @property
    def plan_sources(self) -> list[Source]:
        """Its sources as the plan takes them."""
        return [
            Source(s["name"], [size for size, count in s["shards"] for _ in range(count)], s["repeat"])
            for s in self.sources
        ]

    def order(self, epoch: int) -> Order:
        """The order of an epoch."""
        return Order(self.plan_sources, self.seed, epoch, self.shuffle_shards)


def split(steps: int, epoch: int, rest: int | None, per_epoch: int, batch_size: int) -> tuple[int, int]:
    """(epoch, step in it) after `steps` steps of a leg that began in `epoch` with `rest` samples of it left."""
    first = num_steps(per_epoch if rest is None else rest, batch_size)
    if steps < first:
        return epoch, steps
    later, within = divmod(steps - first, num_steps(per_epoch, batch_size))
    return epoch + 1 + later, within


def place(legs: list[Leg], step: int) -> tuple[int, int]:
    """(epoch, step in it) of a step of the last leg."""
    leg = legs[-1]
    rest = len(rest_of_epoch(legs)) if len(legs) > 1 else None
    per_epoch = sum(source.epoch_samples for source in leg.plan_sources)
    return split(step - leg.first_step, leg.epoch, rest, per_epoch, leg.batch_size)


def rest_of_epoch(legs: list[Leg]) -> np.ndarray:
    """What the last leg takes in the epoch that it begins in: its order without what earlier legs have seen, int64."""
    leg = legs[-1]
    ids = leg.order(leg.epoch).ids()
    offsets = np.cumsum([0, *(source.num_samples for source in leg.plan_sources)])
    seen = np.zeros(offsets[-1], np.int64)
    for number in range(len(legs) - 1):
        for old, rows in _seen(legs[: number + 1], legs[number + 1].first_step, leg.epoch):
            same = [k for k, source in enumerate(leg.sources) if source["data"] == old["data"]]
            same.sort(key=lambda k: leg.sources[k]["name"] != old["name"])
            if same:
                np.add.at(seen, offsets[same[0]] + rows, 1)
    # An id that comes several times an epoch loses as many of its places as were seen, from the front.
    ranking = np.argsort(ids, kind="stable")
    sorted_ids = ids[ranking]
    occurrence = np.empty_like(ids)
    occurrence[ranking] = np.arange(len(ids)) - np.searchsorted(sorted_ids, sorted_ids)
    return ids[occurrence >= seen[ids]]


def _seen(legs: list[Leg], stop_step: int, epoch: int) -> list[tuple[dict, np.ndarray]]:
    """(source, rows of it) that the last of `legs`, ended at `stop_step`, has taken in `epoch`."""
    leg = legs[-1]
    stop_epoch, steps = place(legs, stop_step)
    if stop_epoch < epoch:
        return []
    ids = rest_of_epoch(legs) if len(legs) > 1 and leg.epoch == epoch else leg.order(epoch).ids()
    ids = ids[: steps * leg.batch_size]
    offsets = np.cumsum([0, *(source.num_samples for source in leg.plan_sources)])
    source = np.searchsorted(offsets, ids, side="right") - 1
    return [(s, ids[source == number] - offsets[number]) for number, s in enumerate(leg.sources)]


def differences(before: dict, now: dict) -> list[str]:
    """What two plans' states (see `Mixture.state`) differ in, by the configuration's keys; empty when in nothing."""
    keys = {"epochs": "data.epochs", "batch_size": "data.batch_size", "shuffle_shards": "data.shuffle_shards"}
    found = [
        f"{key}: {before.get(name)!r} -> {now[name]!r}"
        for name, key in {**keys, "seed": "seed", "format": "format of the plan"}.items()
        if before.get(name) != now[name]
    ]
    old, new = before.get("sources", {}), now["sources"]
    found += [f"data.sources: {name} is gone" for name in old if name not in new]
    for name, source in new.items():
        was = old.get(name)
        if was is None:
            found.append(f"data.sources: {name} is new")
        elif was["repeat"] != source["repeat"]:
            found.append(f"data.sources: repeat of {name}: {was['repeat']:g} -> {source['repeat']:g}")
        if was is not None and was["index"] != source["index"]:
            found.append(f"data.sources: {name} holds other data than before (its index.parquet changed)")
    if not found and before.get("plan_hash") != now["plan_hash"]:
        found.append(f"data.sources: another order: {', '.join(old)} -> {', '.join(new)}")
    return found
