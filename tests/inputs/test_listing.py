"""Files of records of any size listed by byte, and mixtures of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_next.data.format.records import source_name
from llava_next.data.inputs import json_stream
from llava_next.data.inputs.listing import Listing, list_json
from support.launching import ROOT


def read_all(listing: Listing) -> list[dict]:
    return [listing.reader.read(address) for address in listing.addresses]


texts = st.text(max_size=20)
plain = st.recursive(st.none() | st.booleans() | st.integers() | texts, lambda inner: st.lists(inner, max_size=3))
records = st.lists(st.dictionaries(texts, plain, max_size=4), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(records, st.booleans(), st.booleans(), st.sampled_from([None, 1, "\t"]), st.integers(16, 200))
def test_any_json_list_and_jsonl_is_listed_record_by_record(tmp_path_factory, rows, as_list, ascii, indent, chunk):
    """Also when records lie across the borders of what is read at once."""
    path = tmp_path_factory.mktemp("json") / "a.json"
    if as_list:
        text = json.dumps(rows, ensure_ascii=ascii, indent=indent)
    else:
        rows = [row | {"messages": None} for row in rows]  # an object with no key of a sample could be around a list
        text = "\r\n\n".join(json.dumps(row, ensure_ascii=ascii) for row in rows)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "READ_BYTES", chunk)
        listing = list_json(path, 0)
    assert read_all(listing) == rows
    names = [source_name(row) for row in rows]
    assert [listing.source_names[code] for code in listing.source] == names


def test_byte_order_mark_and_whitespace_do_not_matter(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf \n[ {"id": 1} \n,{"id": 2}]\n\n ')
    assert read_all(list_json(tmp_path / "a.json", 0)) == [{"id": 1}, {"id": 2}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found none"),
        ("[]", "found none"),
        ('[{"id": 1}', "expected , or ] at byte 10"),
        ('[{"id": 1},', "Expecting value at byte 11"),
        ('[{"id": 1} {"id": 2}]', "expected , or ] at byte 10"),
        ('[{"id": 1}] more', r"something follows the end of the list or object at byte 12 \(line 1\), after 1 whole"),
        ("[7, [8], null]", "found 3 values that are no objects"),
        ('{"id": 1}\n{"id": ', r"Expecting value at byte 17 \(line 2\), after 1 whole samples: the file is cut off"),
        ('[\n{"id": 1},\n{"id": "2', r"Unterminated string starting at at byte 20 \(line 3\), after 1 whole samples"),
        ("[" * 100_000, "no objects|recursion|Expecting"),
        ("no json", r"Expecting value at byte 0 \(line 1\), after 0 whole samples"),
        (
            '{"version": 2, "items": "x"}',
            "one object with the keys version, items: it is no sample, and it holds no list",
        ),
        ('{"train": [{"id": 1}], "test": [{"id": 2}]}', "holds 2 lists, under train, test. Give a list of samples"),
        ('{"data": [{"id": 1}, ', r"Expecting value at byte 21 \(line 1\), after 1 whole samples"),
        ('{"id": 1, "conversations": [{"from": "hu', r"Unterminated string starting at at byte 37 .*, after 0 whole"),
        ("\ufeff[]".encode("utf-16").decode("latin-1"), "it is UTF-16: save it as UTF-8"),
    ],
)
def test_what_is_no_list_of_samples_is_an_error_that_names_the_byte(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=message) as error:
        list_json(tmp_path / "a.json", 0)
    assert str(error.value).startswith(f"{tmp_path / 'a.json'}: ")


def test_listing_100_mb_takes_less_than_100_mb(tmp_path):
    """Peak memory of the process, against one that lists a single sample."""
    turns = json.dumps([{"from": "human", "value": "x" * 500}, {"from": "gpt", "value": "y" * 1000}] * 2)
    with open(tmp_path / "large.json", "w") as file:
        file.write("[" + ",".join(f'{{"id": {n}, "conversations": {turns}}}' for n in range(32_000)) + "]")
    (tmp_path / "small.json").write_text('[{"id": 1}]')
    assert (tmp_path / "large.json").stat().st_size > 95e6
    script = (
        "import sys; from pathlib import Path; from llava_next.data.inputs.listing import list_json;"
        "listing = list_json(Path(sys.argv[1]), 0);"
        # not ru_maxrss: that of a process begins with what its parent had
        "print(len(listing), Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
    )
    found = {}
    for name in ("small", "large"):
        command = [sys.executable, "-c", script, str(tmp_path / f"{name}.json")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        found[name] = tuple(map(int, done.stdout.split()))
    assert found["large"][0] == 32_000
    assert (found["large"][1] - found["small"][1]) * 1024 < 40e6


def write_mixture(folder: Path, *strategies: str) -> Path:
    for number in range(len(strategies)):
        rows = [{"id": f"{number}-{row}", "conversations": []} for row in range(10)]
        (folder / f"{number}.json").write_text(json.dumps(rows))
    entries = "\n".join(f"  - json_path: {n}.json\n    sampling_strategy: '{s}'" for n, s in enumerate(strategies))
    (folder / "mixture.yaml").write_text(f"datasets:\n{entries}\n")
    return folder / "mixture.yaml"


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("all", range(10)),
        ("first:3", range(3)),
        ("first:25%", range(3)),  # rounded up
        ("end:3", range(7, 10)),
        ("end:0", range(0)),
        ("first:99", range(10)),
        ("end:99", range(10)),
    ],
)
def test_sampling_strategies_keep_the_samples_they_name(tmp_path, strategy, expected):
    listing = list_json(write_mixture(tmp_path, "all", strategy), 0)
    assert [record["id"] for record in read_all(listing)] == [
        *(f"0-{row}" for row in range(10)),
        *(f"1-{row}" for row in expected),
    ]


@pytest.mark.parametrize(("strategy", "count"), [("random:4", 4), ("random:35%", 4), ("40%", 4), ("5", 5)])
def test_random_sampling_is_decided_by_the_seed_and_differs_between_files(tmp_path, strategy, count):
    path = write_mixture(tmp_path, strategy, strategy)
    drawn = [[record["id"] for record in read_all(list_json(path, seed))] for seed in (0, 0, 7)]
    assert drawn[0] == drawn[1] != drawn[2]
    first, second = ([id[2:] for id in drawn[0] if id.startswith(number)] for number in "01")
    assert len(first) == len(second) == count and first != second
    assert first == sorted(first) and len(set(first)) == count


def test_wrong_mixtures_are_clear_errors(tmp_path):
    for strategy in ("some", "first:", "first:-1", "last:3", "first:3.5"):
        with pytest.raises(ValueError, match=r"sampling_strategy '.*' is not one of all, first:N"):
            list_json(write_mixture(tmp_path, strategy), 0)
    for text in ("- a\n", "datasets: 7\n", "datasets:\n  - sampling_strategy: all\n", "a: [\n"):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ValueError, match="no mixture `datasets"):
            list_json(tmp_path / "bad.yaml", 0)


def test_the_hash_tells_inputs_apart(tmp_path):
    hashes = [list_json(write_mixture(tmp_path, s), 0).sha256 for s in ("all", "first:10", "first:9")]
    hashes.append(list_json(tmp_path / "0.json", 0).sha256)
    assert len(set(hashes)) == 4
