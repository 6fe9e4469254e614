"""What training would leave out: samples that lose all answers, system prompts without a place. Refused above
a share."""

from types import SimpleNamespace

import pytest
from PIL import Image

from llava_next.data.format.shards import RawSample, StripInfo, encode_strip
from llava_next.data.format.writer import ShardWriter
from llava_next.data.plan.mixture import Mixture
from llava_next.model.folders.dry import corpus_texts, train_tokenizer
from llava_next.templates import get_template
from llava_next.tokenise import DATA_TOKENS
from llava_next.training.banner import text_lines
from llava_next.training.setup import check_cut, check_systems, cut_warning
from support.shards import SMALL, TURNS


def plan(num_all_cut: int, exact_cut: bool = True):
    values = {"samples_per_epoch": 1000, "max_length": 2048, "length_for_most": 2700}
    return SimpleNamespace(**values, num_all_cut=num_all_cut, exact_cut=exact_cut)


def settings(allow_cut: bool):
    return SimpleNamespace(data=SimpleNamespace(max_skip_share=0.001, allow_cut=allow_cut))


def test_share_above_the_allowed_one_is_refused_with_the_length_to_take():
    message = r"data.validation: 2 of 1,000 samples \(0\.20%\).* 2,700 tokens keep 99 %.*allow_cut true"
    with pytest.raises(ValueError, match=message):
        check_cut(settings(False), plan(2), "data.validation")
    check_cut(settings(True), plan(2))
    check_cut(settings(False), plan(1))  # exactly the share


def test_samples_whose_pictures_fill_the_length_are_counted_as_often_as_an_epoch_takes_them(tmp_path):
    """Of 3 pictures two have more patches than the length, of a set that an epoch takes twice."""
    with ShardWriter(tmp_path, SMALL) as writer:
        for number, size in enumerate([(32, 32), (64, 64), (64, 64)]):
            strip = StripInfo(*size, *SMALL.grid(*size), *encode_strip(SMALL.tiles(Image.new("RGB", size))))
            writer.write(RawSample(f"k{number}", str(number), "s", TURNS, [strip]))
    tokens = SMALL.num_tokens(32, 32), SMALL.num_tokens(64, 64)
    assert tokens[0] < tokens[1]
    for length, count in ((tokens[0], 6), (tokens[1], 4), (tokens[1] + 1, 0)):
        mixture = Mixture([(tmp_path, "s", 2.0)], SMALL, batch_size=2, max_length=length)
        assert (mixture.num_all_cut, mixture.samples_per_epoch, mixture.exact_cut) == (count, 6, False)
        assert mixture.length_for_most > tokens[1]


def test_plan_warns_of_each_such_sample_and_is_silent_without():
    assert cut_warning(plan(0)) is None
    assert cut_warning(plan(1)).startswith("1 of 1,000 samples (0.10%) teach nothing: data.max_length 2,048 cuts all")
    assert cut_warning(plan(1, exact_cut=False)).startswith("at least 1 of 1,000")


def run_of(template: str, system_prompts: int):
    """Configuration, parts and plan of 1,000 samples as far as texts are concerned."""
    infos = [
        SimpleNamespace(samples=600, build={"system_prompts": system_prompts}),
        SimpleNamespace(samples=400, build={}),
    ]
    tokenizer = train_tokenizer(corpus_texts([], "qwen"), 512, "qwen")
    tokenizer.add_tokens([f"<loc_{number}>" for number in range(8)], special_tokens=True)
    tokenizer.init_kwargs[DATA_TOKENS] = ["<loc_0>"]
    parts = SimpleNamespace(encoder=SimpleNamespace(template=get_template(template), tokenizer=tokenizer))
    config = SimpleNamespace(data=SimpleNamespace(template=template, max_skip_share=0.001))
    return config, parts, SimpleNamespace(infos=infos)


def test_system_prompts_without_a_place_are_counted_before_the_first_step():
    config, parts, mixture = run_of("mistral", 2)
    with pytest.raises(ValueError, match=r"mistral has no place.* 2 of 1,000 samples.*--system drop or --sys"):
        check_systems(config, parts, mixture)
    assert "2 samples have a system prompt of their own" in text_lines(config, parts, mixture)[0]
    for template, count in (("mistral", 1), ("qwen", 600)):  # exactly the share; a template with a place
        config, parts, mixture = run_of(template, count)
        check_systems(config, parts, mixture)
    assert not any("system prompt" in line for line in text_lines(config, parts, mixture))


def test_plan_names_special_tokens_that_data_may_contain_and_those_it_may_not():
    may, may_not = text_lines(*run_of("qwen", 0))
    assert may.endswith("data may contain <loc_0>")
    assert "<loc_1>, <loc_2>, <loc_3>, <loc_4> and 3 more: characters where data spells them" in may_not
