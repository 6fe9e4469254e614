"""The SLURM jobs: what they start on each node; a stop saves and queues it again. srun and scontrol are stubs."""

import os
import shlex
import signal
import subprocess
import time

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from llava_next.training.devices.launch import hsdp_sizes
from support.launching import ROOT

JOB = ROOT / "scripts/slurm/finetune.sbatch"
BUILD_JOB = ROOT / "scripts/slurm/build.sbatch"
OPTIONS = ["--config", "scripts/recipes/vicuna-7b/finetune.yaml", "--run_dir", "runs/with space"]
STUBS = {
    # one command a node, as srun does; the job gives --nodes first
    "srun": 'nodes=${1#--nodes=}; shift 3\nfor n in $(seq 0 $((nodes - 1))); do SLURM_NODEID=$n "$@" & done; '
    "s=0; for j in $(jobs -p); do wait $j || s=$?; done; exit $s",
    "scontrol": 'echo "$@" >> scontrol.log; [ "$1" != show ] || printf "node-a\\nnode-b\\n"',
    # a launcher whose children save when they are asked to stop; it dies of the signal itself
    "accelerate": 'printf \'%s\\n\' "$*" >> launches.log\n[ -z "$RANKS" ] || '
    "{ for r in 0 1; do python rank.py $r & done; wait -n; s=$?; wait; exit $s; }",
}
RANK = """
import signal, sys, time
def save(*_):
    open(f"saved-{sys.argv[1]}", "w").close()
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
open(f"ready-{sys.argv[1]}", "w").close()
time.sleep(60)
"""


@pytest.fixture
def cluster(tmp_path):
    """A folder with stub commands and the files that the job looks for; the job's environment."""
    (tmp_path / "bin").mkdir()
    for name, body in STUBS.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "rank.py").write_text(RANK)
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/finetune.py").touch()
    own = {"SLURM_JOB_ID": "4242", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_GPUS_ON_NODE": "8", "RANKS": ""}
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    return {**os.environ, **own, "PATH": path, "SLURM_SUBMIT_DIR": str(tmp_path), "TMPDIR": str(tmp_path)}


def start(cluster, *options, **changes):
    command = ["bash", str(JOB), *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env={**cluster, **changes}, **pipes)


def test_job_is_valid_bash_and_asks_for_requeue_and_an_early_signal():
    assert subprocess.run(["bash", "-n", JOB]).returncode == 0
    asked = {line.removeprefix("#SBATCH ") for line in JOB.read_text().splitlines() if line.startswith("#SBATCH")}
    assert {"--nodes=4", "--gpus-per-node=8", "--ntasks-per-node=1", "--requeue", "--signal=B:TERM@180"} <= asked


@pytest.mark.parametrize(("nodes", "expected"), [(4, (4, 8)), (2, (2, 8)), (1, None)])
def test_each_node_launches_its_part_of_one_job(cluster, tmp_path, monkeypatch, nodes, expected):
    job = start(cluster, *OPTIONS, SLURM_JOB_NUM_NODES=str(nodes))
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 0, output
    launches = [shlex.split(line) for line in (tmp_path / "launches.log").read_text().splitlines()]
    assert len(launches) == nodes and all(launch[0] == "launch" for launch in launches)
    monkeypatch.chdir(ROOT)
    parsed = [launch_command_parser().parse_args(launch[1:]) for launch in launches]
    parsed = [_validate_launch_command(arguments)[0] for arguments in parsed]
    assert sorted(arguments.machine_rank for arguments in parsed) == list(range(nodes))
    for arguments in parsed:
        assert (arguments.num_machines, arguments.num_processes) == (nodes, 8 * nodes)
        assert (arguments.main_process_ip, arguments.main_process_port) == ("node-a", 24242)
        assert arguments.training_script == "scripts/finetune.py"
        assert " ".join(arguments.training_script_args) == " ".join(OPTIONS)
        for name in [n for n in os.environ if n.startswith("PARALLELISM_") or n == "ACCELERATE_USE_PARALLELISM_CONFIG"]:
            monkeypatch.delenv(name)
        for name, value in prepare_multi_gpu_env(arguments).items():
            monkeypatch.setenv(name, value)
        assert hsdp_sizes() == expected and os.environ["FSDP_VERSION"] == "2"
    assert "requeue" not in (tmp_path / "scontrol.log").read_text()


def test_stop_signal_makes_the_ranks_save_and_queues_the_job_again(cluster, tmp_path):
    job = start(cluster, *OPTIONS, SLURM_JOB_NUM_NODES="1", RANKS="yes")
    waited = time.monotonic()
    while not all((tmp_path / f"ready-{rank}").exists() for rank in (0, 1)):
        assert time.monotonic() - waited < 60 and job.poll() is None
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 0, output
    assert all((tmp_path / f"saved-{rank}").exists() for rank in (0, 1))
    assert (tmp_path / "scontrol.log").read_text().splitlines()[-1] == "requeue 4242"


def test_failed_run_is_not_queued_again_and_keeps_its_status(cluster, tmp_path):
    (tmp_path / "rank.py").write_text("raise SystemExit(3)")
    job = start(cluster, *OPTIONS, SLURM_JOB_NUM_NODES="1", RANKS="yes")
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 3, output
    assert "requeue" not in (tmp_path / "scontrol.log").read_text()


def test_job_outside_of_the_repository_says_so(cluster, tmp_path):
    (tmp_path / "scripts/finetune.py").unlink()
    job = start(cluster, SLURM_JOB_NUM_NODES="1")
    assert "is not the repository" in job.communicate(timeout=60)[0] and job.returncode == 2


def build_parts(folder, array, *options, **changes):
    """Runs the build job once for each task of an array, as SLURM does. Returns exit statuses and outputs."""
    own = {"SLURM_SUBMIT_DIR": str(folder), "SLURM_CPUS_PER_TASK": "3", "SLURM_ARRAY_TASK_COUNT": str(len(array))}
    if array:
        own |= {"SLURM_ARRAY_TASK_MIN": str(min(array)), "SLURM_ARRAY_TASK_MAX": str(max(array))}
    results = []
    for task in array or [None]:
        mine = own | ({"SLURM_ARRAY_TASK_ID": str(task)} if task is not None else {})
        command = ["bash", str(BUILD_JOB), *options]
        done = subprocess.run(
            command, env={**os.environ, **mine, **changes}, capture_output=True, text=True, timeout=60
        )
        results.append((done.returncode, done.stdout + done.stderr))
    return results


@pytest.fixture
def build_folder(tmp_path):
    """A folder whose build tool prints its arguments."""
    (tmp_path / "data_tools").mkdir()
    (tmp_path / "data_tools/build_shards.py").write_text("import sys\nprint('ARGS', *sys.argv[1:], sep='|')\n")
    return tmp_path


def test_each_task_of_the_array_builds_its_part_and_the_merge_none(build_folder):
    results = build_parts(build_folder, [1, 2, 3], "--json", "a b.json", "--out", "x")
    for task, (status, output) in enumerate(results, 1):
        assert status == 0 and f"ARGS|--workers|3|--json|a b.json|--out|x|--part|{task}/3\n" in output
    [(status, output)] = build_parts(build_folder, [], "--merge", "--out", "x")
    assert status == 0 and "ARGS|--workers|3|--merge|--out|x\n" in output
    [(status, output)] = build_parts(build_folder, [7], "--out", "x", PARTS="16")
    assert status == 0 and output.endswith("--part|7/16\n")


def test_array_that_would_leave_parts_unbuilt_is_refused(build_folder):
    for array in ([0, 1], [1, 3], [2, 3]):
        assert all(status == 2 and "1-n without gaps" in output for status, output in build_parts(build_folder, array))
    (build_folder / "data_tools/build_shards.py").unlink()
    [(status, output)] = build_parts(build_folder, [1])
    assert status == 2 and "is not the repository" in output
