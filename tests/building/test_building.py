"""Builds that are stopped, spread over machines, or lose disk and network: whole at the end, with the same bytes."""

import hashlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import index_shards
from building.jobs import Output, hold
from llava_next.data.format.index import read_dataset
from llava_next.data.storage.client import Storage, StorageError
from llava_next.data.storage.lease import LEASE_FILE
from support.builds import TOOL, arguments_for, checksums, make_inputs, run, tool_result
from support.faults import S3Server


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert path.exists()


def test_a_killed_build_continues_where_it_stopped_and_ends_with_the_same_bytes(tmp_path):
    make_inputs(tmp_path, 100)
    out, shard = tmp_path / "out", ("--shard_samples", 20)
    command = [sys.executable, str(TOOL), *arguments_for(tmp_path, out, *shard)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    wait_for(out / "building" / "000001.parquet", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    with pytest.raises(ValueError, match=r"no dataset\.json"):
        read_dataset(out)
    done = [path for path in out.glob("shard-*.tar") if (out / "building" / f"{path.stem[6:]}.parquet").exists()]
    before = {path: path.stat().st_mtime_ns for path in done}
    assert len(before) >= 2
    assert run(tmp_path, out, *shard).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in done} == before
    assert run(tmp_path, tmp_path / "clean", *shard).returncode == 0
    assert checksums(out) == checksums(tmp_path / "clean")


def test_a_second_build_into_one_place_is_refused_and_other_parts_of_the_first_are_not(inputs, built, tmp_path):
    out = tmp_path / "out"
    with Output(str(out)).hold():
        refused = run(inputs, out)
        assert refused.returncode == 1 and "is in use by another build: process" in refused.stderr
        assert "wait for it or end it" in refused.stderr and [path.name for path in out.iterdir()] == [LEASE_FILE]
    with Output(str(out)).hold(1, 2):
        assert run(inputs, out, "--part", "1/2").returncode == 1
        assert run(inputs, out, "--part", "2/2").returncode == 0
    assert run(inputs, out).returncode == 0
    assert checksums(out) == checksums(built)  # no lease is left


def test_indexing_twice_at_once_is_refused(built, tmp_path):
    shards = shutil.copytree(built, tmp_path / "set")
    for name in ("dataset.json", "index.parquet"):
        (shards / name).unlink()
    with hold(Storage(shards), take_over=False), pytest.raises(SystemExit, match="in use by another build"):
        index_shards.main([str(shards), "--tower", "clip-336", "--workers", "0"])
    assert not (shards / "dataset.json").exists() and not (shards / LEASE_FILE).exists()


def test_a_shard_that_was_cut_off_after_its_record_is_built_again(inputs, built, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert run(inputs, out, "--part", "1/2").returncode == 0
    (out / "shard-000000.tar").write_bytes(b"half")
    assert run(inputs, out).returncode == 0
    assert checksums(out) == checksums(built)


@pytest.mark.parametrize("parts", [2, 5])
def test_parts_of_several_machines_merge_to_the_bytes_of_one(inputs, built, tmp_path, parts):
    out = tmp_path / "out"
    for part in range(parts, 0, -1):
        early = tool_result("--merge", "--out", out)
        assert early.returncode == 1
        result = run(inputs, out, "--part", f"{part}/{parts}")
        assert result.returncode == 0 and "--merge" in result.stdout
        assert not (out / "dataset.json").exists()
        if part == 2:
            early = tool_result("--merge", "--out", out)
            assert early.returncode == 1 and "shards are not built yet" in early.stderr
    assert tool_result("--merge", "--out", out).returncode == 0
    assert checksums(out) == checksums(built)
    again = tool_result("--merge", "--out", out)
    assert again.returncode == 1 and "no parts of a build, or one that was merged already" in again.stderr


def test_merging_reads_each_shards_record_once_and_an_error_leaves_no_data_set(tmp_path, monkeypatch):
    records = make_inputs(tmp_path, 40)
    (tmp_path / "images" / records[7]["image"]).unlink()
    for part in ("1/2", "2/2"):
        assert run(tmp_path, tmp_path / "out", "--part", part).returncode == 0
    reads, read_all = [], Storage.read_all
    monkeypatch.setattr(Storage, "read_all", lambda self, name: reads.append(name) or read_all(self, name))
    refused = tool_result("--merge", "--out", tmp_path / "out", "--max_rejected_share", 0.001)
    kept = {path.name for path in (tmp_path / "out" / "building").iterdir()}
    assert refused.returncode == 1 and "1 of 40 samples rejected" in refused.stderr
    assert not {"dataset.json", "index.parquet"} & {path.name for path in (tmp_path / "out").iterdir()}
    assert kept == {"plan.json", *(f"{number:06d}.parquet" for number in range(3))}  # a refused merge costs nothing
    reads.clear()
    assert tool_result("--merge", "--out", tmp_path / "out").returncode == 0
    records = [f"building/{number:06d}.parquet" for number in range(3)]
    assert sorted(name for name in reads if name.endswith(".parquet")) == records
    assert read_dataset(tmp_path / "out")[0].build["rejected"] == 1
    assert len((tmp_path / "out" / "rejected.jsonl").read_text().splitlines()) == 1


def test_an_unfinished_build_is_not_continued_with_other_input(inputs, tmp_path):
    assert run(inputs, tmp_path / "out", "--part", "1/2").returncode == 0
    for change in (("--seed", 1), ("--codec", "jpeg"), ("--shard_samples", 10), ("--source", "other")):
        result = run(inputs, tmp_path / "out", *change)
        assert result.returncode == 1 and "from other input or arguments that was not finished" in result.stderr


def test_mended_images_are_taken_when_the_build_failed_for_too_many_bad_ones(tmp_path):
    records = make_inputs(tmp_path, 60)
    names = [tmp_path / "images" / record["image"] for record in records[20:30]]
    for name in names:
        name.rename(name.with_suffix(".away"))
    assert run(tmp_path, tmp_path / "out").returncode == 1
    for name in names:
        name.with_suffix(".away").rename(name)
    assert run(tmp_path, tmp_path / "out").returncode == 0
    assert run(tmp_path, tmp_path / "clean").returncode == 0
    assert checksums(tmp_path / "out") == checksums(tmp_path / "clean")


def test_a_full_disk_leaves_no_data_set_and_the_build_can_go_on(inputs, built, tmp_path):
    """A limit on the size of files stands in for the disk: writing fails in the middle of a shard."""
    out = tmp_path / "out"
    limit = min(path.stat().st_size for path in built.glob("shard-*.tar")) // 2
    command = [sys.executable, str(TOOL), *arguments_for(inputs, out)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 1 and "File too large" in done.stderr and "Traceback" not in done.stderr
    assert not list(out.glob("*.tar")) and not (out / "dataset.json").exists()
    assert run(inputs, out).returncode == 0
    assert checksums(out) == checksums(built)


def test_a_bucket_gets_the_same_bytes_and_a_lost_connection_leaves_no_data_set(inputs, built, tmp_path, monkeypatch):
    with S3Server(tmp_path / "bucket") as server:
        server.use(monkeypatch)
        url, put, puts = f"{server.url}/set", Storage.put, []

        def losing(storage, name, data):
            puts.append(name)
            if len(puts) == lost_at:
                raise StorageError(f"{storage.address(name)}: connection lost")
            return put(storage, name, data)

        monkeypatch.setattr(Storage, "put", losing)
        attempts, lost_at, code = 0, -1, 1
        while code:  # until an attempt needs fewer writes
            puts.clear()
            attempts, lost_at = attempts + 1, lost_at + 3
            result = run(inputs, tmp_path / "unused", "--out", url)
            code = result.returncode
            if code == 0:
                continue
            assert "connection lost" in result.stderr
            with pytest.raises(ValueError, match=r"no dataset\.json"):
                read_dataset(url)
        assert attempts >= 3
        stored = {name: Storage(url).read_all(name) for name, _ in Storage(url).list()}
    assert {name: hashlib.sha256(data).hexdigest() for name, data in stored.items()} == checksums(built)
    assert not (tmp_path / "unused").exists()
