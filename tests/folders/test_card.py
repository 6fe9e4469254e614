"""The model card: it states what its parts state, goes on from stage to stage, and is the same bytes each time."""

import json

import pytest
from huggingface_hub import ModelCard

from llava_next.model.folders import card
from llava_next.model.folders.card import CURVE, Story, add_scores, part_of, points_of, read_story, thinned, write_card

STAGE = {
    "title": "stage 2",
    "data": [{"name": "mix", "samples": 665298, "weight": 0.5, "index": "0123456789abcdef"}],
    "recipe": {"samples a step": "128"},
    "versions": {"torch": "2.13.0"},
    "loss": thinned([(step, 4 / step) for step in range(1, 121)]),
    "steps": 120,
}


def hub_folder(root, repository: str, front: str):
    """A snapshot as the hub's cache keeps it."""
    folder = root / f"models--{repository.replace('/', '--')}/snapshots/0123"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(f"---\n{front}\n---\n# Text\n")
    return folder


def parts(root, *licences: str) -> list[dict]:
    names = ("lmsys/vicuna-7b-v1.5", "openai/clip-vit-large-patch14-336")
    return [part_of("part", name, hub_folder(root, name, front)) for name, front in zip(names, licences, strict=True)]


@pytest.mark.parametrize(
    ("licences", "expected"),
    [
        (("license: llama2", "license: llama2"), "llama2"),
        (("license: llama2", "tags: [x]"), "llama2"),
        (("license: llama2", "license: apache-2.0"), None),
        (("tags: [x]", "license: [a, b]"), None),
        (("license: other\nlicense_name: llama3", "not: [yaml"), "other"),
    ],
    ids=["the same", "one states none", "they differ", "none or no plain one", "with a name; the other is no YAML"],
)
def test_licence_is_what_the_parts_state_where_they_agree(tmp_path, licences, expected):
    write_card(tmp_path, Story(parts(tmp_path, *licences)))
    data = ModelCard.load(tmp_path / "README.md", ignore_metadata_errors=False).data
    assert data.license == expected and data.license_name == ("llama3" if expected == "other" else None)
    assert data.base_model == ["lmsys/vicuna-7b-v1.5", "openai/clip-vit-large-patch14-336"]
    assert (data.pipeline_tag, data.library_name, data.datasets) == ("image-text-to-text", "transformers", None)


def test_random_weights_and_local_folders_are_no_base_models(tmp_path):
    (tmp_path / "mine").mkdir()
    tower = part_of("tower", "org/clip", None)
    write_card(tmp_path, Story([tower, part_of("llm", str(tmp_path / "mine"), tmp_path / "mine")]))
    text = (tmp_path / "README.md").read_text()
    assert "base_model" not in text and "license" not in text and str(tmp_path) not in text
    assert "| tower | org/clip (random weights) | none |" in text and "| llm | mine | none |" in text


def test_story_goes_on_from_card_to_card_and_the_same_gives_the_same_bytes(tmp_path):
    story = Story(parts(tmp_path, "license: llama2", "tags: [x]"), [STAGE], ["org/data"])
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
        write_card(folder, story, "org/name")
    assert read_story(folders[0]) == story
    for name in ("README.md", CURVE):  # 120 steps are drawn
        assert folders[0].joinpath(name).read_bytes() == folders[1].joinpath(name).read_bytes()
    text = (folders[0] / "README.md").read_text()
    assert "| stage 2 | mix | 665,298 | 0.5 | `0123456789abcdef` |" in text and 'from_pretrained("org/name"' in text
    assert (folders[0] / CURVE).stat().st_size < 50_000 and f"]({CURVE})" in text


def test_losses_are_a_table_where_there_is_nothing_to_draw_with(tmp_path, monkeypatch):
    monkeypatch.setattr(card, "find_spec", lambda name: None)
    write_card(tmp_path, Story(stages=[{**STAGE, "loss": "10 2.5, 20 1.25"}]))
    assert "| step | 10 | 20 |\n|---|---|---|\n| loss | 2.5 | 1.25 |" in (tmp_path / "README.md").read_text()
    assert not (tmp_path / CURVE).exists()


def test_thinned_losses_are_means_of_equal_stretches():
    points = [(step, float(step)) for step in range(1, 11)]
    assert thinned(points, 5) == "2 1.5, 4 3.5, 6 5.5, 8 7.5, 10 9.5" and thinned([], 5) == ""
    assert points_of({"loss": thinned(points, 100)}) == points


def test_scores_come_into_a_card_later_and_replace_those_it_had(tmp_path):
    story = Story(parts(tmp_path, "license: llama2", "tags: [x]"), [STAGE])
    write_card(tmp_path, story)
    for value in (64.0, 64.9):
        add_scores(tmp_path, {"textvqa_val": {"value": value, "metric": "exact_match", "samples": 5000, "noise": 1.3}})
    read, text = ModelCard.load(tmp_path / "README.md"), (tmp_path / "README.md").read_text()
    assert [(r.dataset_name, r.metric_type, r.metric_value) for r in read.data.eval_results] == [
        ("textvqa_val", "exact_match", 64.9)
    ]
    assert "| textvqa_val | exact_match | 64.9 ± 1.3 | 5000 | - |" in text and "64 ±" not in text
    assert read_story(tmp_path).stages == [STAGE]
    (tmp_path / "README.md").write_text("# Somebody else's")
    with pytest.raises(ValueError, match="no card of this project's"):
        add_scores(tmp_path, {})


def test_prompt_of_the_card_is_the_saved_template_s(tmp_path):
    for name, told in {"vicuna_v1": "A chat between a curious", "mistral": "no place for a system prompt"}.items():
        saved = {"chat_template": card.TEMPLATES[name].jinja}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(saved))
        text = card.prompt(tmp_path)
        assert told in text and "ends with `</s>`" in text
