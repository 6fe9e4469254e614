"""What a run tells of itself: all that changes what is learned, each step's loss once, and names in place of places."""

import json

from llava_next.model.forward.lora import Lora
from llava_next.training.provenance import code_hash, hub_data, losses_of, recipe_of, versions
from llava_next.training.recipe.config import DataConfig, RunConfig, Source


def test_every_option_that_changes_what_is_learned_is_told():
    plain = recipe_of(RunConfig(), 5198)
    assert (plain["steps"], plain["epochs"], plain["samples a step"]) == ("5,198", "1", "128")
    assert "other options" not in plain
    assert plain["trained"] == "llm at 2e-05, projector at 2e-05, vision at 2e-06, newline at 2e-05"
    run = RunConfig(lora=Lora(r=8, alpha=16), compile_layers=True, max_steps=10, log_every=3, seed=7)
    run.data.keep_template = True
    told = recipe_of(run, 5198)
    assert told["adapters"] == "r 8, scale 2, dropout 0.05, in llm" and told["seed"] == "7"
    assert (told["steps"], told["epochs"]) == ("10 of 5,198", "0.00192 of 1")
    run.data.epochs = 2  # a folder on the way says what it has seen, not what the run is to see
    halfway = recipe_of(run, 5198, 2599)
    assert (halfway["steps"], halfway["epochs"]) == ("2,599 of 5,198", "1 of 2")
    assert told["other options"] == "data.keep_template True, compile_layers True"


def test_losses_are_those_of_each_step_s_last_run_up_to_the_one_asked_for(tmp_path):
    assert losses_of(tmp_path) == []
    lines = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "loss": 2.5}, {"step": 3, "loss": None}]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo' + "\n"
    (tmp_path / "metrics.jsonl").write_text(text + json.dumps({"step": 4, "loss": 1.0}) + "\n")
    assert losses_of(tmp_path) == [(1, 3.0), (2, 2.5), (4, 1.0)]
    assert losses_of(tmp_path, 3) == [(1, 3.0), (2, 2.5)]


def test_only_data_sets_of_the_hub_are_named_as_such():
    paths = ["hf://datasets/org/one@v1/shards", "s3://bucket/org/two", "/home/me/three", "hf://datasets/org/four/a/b"]
    assert hub_data(RunConfig(data=DataConfig(sources=[Source(path) for path in paths]))) == ["org/one", "org/four"]
    assert code_hash() in versions()["llava_next"] and len(code_hash()) == 16
