"""Profiles stand in for published data sets: their counts, and sizes and lengths as said."""

import numpy as np
import pytest

from llava_next.anyres import ORIGINAL_336, AnyRes
from llava_next.data.plan.mixture import Mixture
from llava_next.data.plan.profile import Profile
from support.published import PROFILE

CLIP_336 = AnyRes(336, 14, ORIGINAL_336)


def test_profile_of_mix665k_has_its_counts_lengths_and_grids():
    profile = Profile("profile:mix665k", CLIP_336)
    index, info = profile.index, profile.info
    assert len(index) == info.samples == 665_298
    assert info.sources == {source["name"]: source["samples"] for source in PROFILE["sources"]}
    text = index.text_tokens()[0]
    assert text.min() >= 16 and text.max() <= 3800
    for number, source in enumerate(PROFILE["sources"]):
        mine = index.source == number
        assert text[mine].mean() == pytest.approx(source["text_tokens"]["mean"], rel=0.05)  # clipped, source["name"]
        assert (index.num_tiles[mine] > 0).all() == (source["sizes"] is not None)
    wide = index.widths == 1024
    rows, cols = CLIP_336.grid(1024, 768)
    assert np.unique(index.num_tiles[np.flatnonzero(np.diff(index.image_offsets))][wide]).tolist() == [1 + rows * cols]


def test_plan_over_a_profile_is_a_plan_like_any_other():
    plans = [Mixture([(Profile("profile:pretrain558k", CLIP_336), None, 1.0)], CLIP_336, 256) for _ in range(2)]
    assert plans[0].names == ["pretrain558k"] and plans[0].total_steps == 2181
    lengths, tiles = plans[0].step_sizes(7)
    assert len(lengths) == 256 and tiles.min() >= 1 and lengths.max() <= 4096
    assert plans[0].state() == plans[1].state()
    assert np.array_equal(plans[1].step_sizes(7)[0], lengths)


def test_unknown_profile_names_the_known_ones():
    with pytest.raises(ValueError, match="profile:mix: there are profiles of mix665k, pretrain558k"):
        Profile("profile:mix", CLIP_336)
