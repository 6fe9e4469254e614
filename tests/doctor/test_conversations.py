"""What the doctor says of conversations in data sets built before: pictures that were lost, turns left out."""

import json

from doctor.checking import KINDS
from inspect_shards import main as inspect
from llava_next.data.format.shards import RawSample
from llava_next.data.format.writer import ShardWriter
from support.builds import GEOMETRY, SMALL, call, tool_result, turns


def test_lost_pictures_and_left_out_turns_are_found_in_data_built_before(tmp_path):
    lost, greeting = turns("<image>\nWhat?"), {"from": "gpt", "value": "Hello."}
    conversations = [turns("Hi"), lost, [greeting, *turns("How?")], [{"from": "system", "value": "Go."}, *turns("A?")]]
    with ShardWriter(tmp_path / "set", SMALL) as writer:
        for number, conversation in enumerate(conversations):
            writer.write(RawSample(f"k{number}", f"{number}", "text", conversation, []))
    result = call(inspect, tmp_path / "set", "--verify", "--workers", 0)
    assert result.returncode == 0, result.stderr
    assert (
        f"warning: 1 samples: {KINDS['lost_picture'].title}\n  row 1 (key k1): a question has <image>" in result.stdout
    )
    assert "note: 1 samples begin with a turn that is not human, which training leaves out" in result.stdout
    assert "note: 1 samples have a system prompt of their own." in result.stdout
    assert f"look at this: 1 sample: {KINDS['lost_picture'].title} (all 4 samples were read)" in result.stdout


def test_characters_that_were_meant_are_no_problem(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"conversations": turns("What is <image>?")}]))
    build = ["--json", tmp_path / "a.json", "--out", tmp_path / "set", *GEOMETRY, "--workers", 0]
    assert tool_result(*build, "--allow_text_image_token").returncode == 0
    assert "nothing is wrong" in call(inspect, tmp_path / "set", "--verify", "--workers", 0).stdout
