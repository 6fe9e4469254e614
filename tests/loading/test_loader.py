"""From plan to packed batches: order, resuming, packing, and what a batch holds."""

import json
import multiprocessing.forkserver
import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from llava_next.data.loading.encode import Encoder
from llava_next.data.loading.feed import Feed
from llava_next.data.loading.loader import _ENCODER_FILES, LoaderOptions, build_loader, start_worker_server
from llava_next.data.plan.mixture import Mixture
from llava_next.training.setup import load_parts
from support.demo import build_demo
from support.tiny import ANYRES, pack_tiny, random_samples

BATCH = 16
IN_PROCESS = LoaderOptions(num_workers=0)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """80 samples in 4 shards, the plan over them, and the encoder of the demo model."""
    folder = tmp_path_factory.mktemp("loader")
    build_demo(folder, samples=80)
    data = SimpleNamespace(template="mistral", images="anyres", max_length=300)
    parts = load_parts(SimpleNamespace(lora=None, quantize=None, model=str(folder / "base"), data=data))
    return folder, parts.encoder


def mixture(folder, encoder, **changes) -> Mixture:
    options = {"batch_size": BATCH, "max_length": 300, **changes}
    return Mixture([(str(folder / "shards"), None, 1.0)], encoder.anyres, **options)


def stream(folder, encoder, world=1, start_step=0, num_workers=0, token_budget=2000, **changes):
    """[(step, sample ids in slot order)] over all ranks."""
    plan = mixture(folder, encoder, **changes)
    seen = {}
    for rank in range(world):
        feed = Feed(build_loader(plan, encoder, rank, world, token_budget, 100, start_step, LoaderOptions(num_workers)))
        for step, micros in feed:
            pairs = [pair for batch in micros for pair in zip(batch.slots, batch.sample_ids, strict=True)]
            seen.setdefault(step, []).extend(pairs)
        feed.close()
    return [(step, [i for _, i in sorted(pairs)]) for step, pairs in sorted(seen.items())]


def test_workers_have_their_encoder_from_the_process_they_are_forked_from_or_else_load_it(demo):
    folder, encoder = demo
    first, other = replace(encoder), replace(encoder, max_length=12)
    multiprocessing.forkserver._forkserver._stop()  # one that other tests have started holds no encoder, or another
    start_worker_server(first)
    probe = multiprocessing.get_context("forkserver").Process(target=len, args=("",))
    probe.start()
    probe.join()  # now it has loaded what it was told to
    os.unlink(_ENCODER_FILES[first])
    assert stream(folder, first, num_workers=1) == stream(*demo)
    loader = build_loader(mixture(folder, other), other, 0, 1, 2000, 100, options=LoaderOptions(num_workers=1))
    assert max(batch.max_seqlen for batch in loader) == 12


def test_sample_ids_are_the_same_for_any_world_size_budget_and_workers(demo):
    reference = stream(*demo)
    assert len(reference) == 5 and sorted(i for _, ids in reference for i in ids) == list(range(80))
    assert stream(*demo, world=2) == reference
    assert stream(*demo, world=3, token_budget=300) == reference
    assert stream(*demo, num_workers=2) == reference


def test_resumed_stream_is_the_tail_of_the_whole_one(demo):
    assert stream(*demo, start_step=3) == stream(*demo)[3:]


def test_every_epoch_has_every_sample_once_in_its_own_order(demo):
    two = stream(*demo, epochs=2)
    first, second = ([i for _, ids in two[k : k + 5] for i in ids] for k in (0, 5))
    assert len(two) == 10 and sorted(first) == sorted(second) == list(range(80)) and first != second


def test_long_sample_is_cut_at_the_end_with_its_features(demo):
    folder, encoder = demo
    short = Encoder(encoder.template, encoder.tokenizer, encoder.image_token_id, encoder.anyres, max_length=12)
    for batch in build_loader(mixture(folder, encoder), short, 0, 1, 2000, 100, options=IN_PROCESS):
        assert batch.max_seqlen <= 12 and batch.num_truncated > 0
        assert len(batch.feature_index) == len(batch.image_positions)
        assert (batch.input_ids[batch.image_positions] == encoder.image_token_id).all()


def test_packed_fields_agree_with_each_other():
    samples = random_samples(0, 9)
    batch = pack_tiny([e for e, _ in samples])
    lengths = batch.cu_seqlens.diff()
    assert lengths.tolist() == [len(e.input_ids) for e, _ in samples] and batch.max_seqlen == lengths.max()
    assert batch.position_ids.tolist() == [p for n in lengths.tolist() for p in range(n)]
    patches = ANYRES.patches_per_tile  # the last patches of the last tile may be padding
    assert (batch.num_tiles - 1) * patches < batch.feature_index.max() <= batch.num_tiles * patches
    starts = set(batch.cu_seqlens.tolist())
    assert not starts & {p + 1 for p in batch.target_positions.tolist()}  # no segment's first token is a target
    labels = np.concatenate([e.labels for e, _ in samples])
    assert batch.target_ids.tolist() == labels[batch.target_positions.numpy() + 1].tolist()
    assert torch.bincount(batch.target_slot, minlength=9).tolist() == batch.supervised


def test_digits_reach_the_batch_pixel_by_pixel(demo):
    """The tiles that the model sees are those that AnyRes cuts from the PNG (lossless codec)."""
    folder, encoder = demo
    records = json.loads((folder / "digits/train.json").read_text())
    plan = mixture(folder, encoder)
    by_row = {int(plan.ref(i, 0).location.key): i for i in range(80)}
    row = next(r for r, record in enumerate(records) if "image" in record)
    image = Image.open(folder / "digits/images" / records[row]["image"])
    batches = [b for b in build_loader(plan, encoder, 0, 1, 1, 1, options=IN_PROCESS) if by_row[row] in b.sample_ids]
    assert len(batches) == 1  # a budget of one token gives every sample a micro-batch of its own
    assert np.array_equal(batches[0].tiles.numpy(), encoder.anyres.tiles(image))
