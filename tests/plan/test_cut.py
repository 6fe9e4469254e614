"""Samples whose pictures alone fill the length: counted from the index, refused above the allowed share."""

from types import SimpleNamespace

import pytest

from llava_next.training.banner import cut_lines
from llava_next.training.setup import check_cut


def plan(num_all_cut: int):
    infos = [SimpleNamespace(samples=600), SimpleNamespace(samples=400)]
    return SimpleNamespace(infos=infos, num_all_cut=num_all_cut, length_for_most=2700)


def settings(allow_cut: bool):
    return SimpleNamespace(data=SimpleNamespace(max_length=2048, max_skip_share=0.001, allow_cut=allow_cut))


def test_share_above_the_allowed_one_is_refused_with_the_length_to_take():
    with pytest.raises(ValueError, match=r"2 of 1,000 samples \(0\.2%\).* 2,700 tokens keep 99 %.*allow_cut true"):
        check_cut(settings(False), plan(2))
    check_cut(settings(True), plan(2))
    check_cut(settings(False), plan(1))  # exactly the share


def test_plan_warns_of_each_such_sample_and_is_silent_without():
    assert cut_lines(plan(0)) == []
    assert "1 samples (0.10%)" in cut_lines(plan(1))[0] and "2,700 tokens" in cut_lines(plan(1))[0]
