"""Two agents of two ranks each on the loopback address, as `scripts/train.nodes.sh` and, with
stand-ins for the commands of SLURM, `scripts/train.slurm.sh` start them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.jobs import alone, arguments, assert_same_curve
from tests.distributed.launch import children, free_port, workers
from tests.helpers import ROOT, read_log, read_metrics, write_splits

SRUN = """#!/usr/bin/env bash
# What srun does here: the command once a node, and their end.
while [[ $1 == --* ]]; do shift; done
pids=()
for node in $(seq 0 $((SLURM_JOB_NUM_NODES - 1))); do SLURM_NODEID=$node "$@" & pids+=($!); done
trap 'kill -TERM "${pids[@]}"' TERM
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit $status
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_splits(tmp_path_factory.mktemp("data"), (9, 6), (6, 4))


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    given = dict(NODES="2", HEAD=f"127.0.0.1:{free_port()}", RANKS="2", RESTARTS="0", OMP_NUM_THREADS="1")
    return {**os.environ, "PATH": path, **given, **more}


def flags(data: Path, out: Path, **more: int) -> list[str]:
    return arguments(data, out, **more)[1:]  # without `train`


def test_two_nodes_run_as_one_process(data, tmp_path):
    alone(*arguments(data, tmp_path / "one"))
    given = environment()
    nodes = [
        subprocess.Popen(
            ["bash", "scripts/train.nodes.sh", *flags(data, tmp_path / "two")],
            env=given,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip
        for _ in range(2)
    ]
    outputs = []
    try:
        outputs = [node.communicate(timeout=150)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert sum(output.count("4 ranks on 1 node, gloo") for output in outputs) == 1, outputs
    assert_same_curve(tmp_path / "two", tmp_path / "one")


def test_a_rank_killed_on_one_node_brings_both_back(data, tmp_path):
    """Without --resume: the agent of the other node counts no failure of its own."""
    out, given = tmp_path / "run", {**environment(), "RANKS": "1", "RESTARTS": "1", "JOB": "7"}
    command = ["bash", "scripts/train.nodes.sh", *flags(data, out, steps=400)]
    logs = [open(tmp_path / f"{node}.txt", "w") for node in range(2)]
    nodes = [subprocess.Popen(command, env=given, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT) for log in logs]
    try:
        end = time.monotonic() + 100
        while not list((out / "checkpoints").glob("step_*[1-9]0.safetensors")) and time.monotonic() < end:
            time.sleep(0.05)
        victims = {rank: pid for node in nodes for rank, pid in workers(node.pid).items()}
        os.kill(victims[1], signal.SIGKILL)
        codes = [node.wait(timeout=150) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
        for log in logs:
            log.close()
    said = [(tmp_path / f"{node}.txt").read_text() for node in range(2)]
    assert codes == [0, 0], said
    assert sum("resumed" in text for text in said) == 1, said
    assert [row["step"] for row in read_log(out)] == [*range(2, 401, 2), 400]


def test_slurm_script_starts_stops_and_goes_on(data, tmp_path):
    """SIGTERM, as SLURM sends it before the end of the job's time; then the same line again."""
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/sh\necho 127.0.0.1\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    given = environment(
        SLURM_JOB_NODELIST="n[1-2]", SLURM_JOB_NUM_NODES="2", SLURM_JOB_ID="7", SLURM_SUBMIT_DIR=str(ROOT)
    )
    given["PATH"] = f"{tmp_path}{os.pathsep}{given['PATH']}"
    out = tmp_path / "run"
    for steps, stops in ((4000, True), (None, False)):
        command = flags(data, out, steps=steps or 4000)
        if not stops:  # a few steps more than it had come
            newest = max((out / "checkpoints").glob("step_*"))
            command = flags(data, out, steps=int(newest.stem[5:]) + 3)
        job = subprocess.Popen(
            ["bash", "scripts/train.slurm.sh", *command],
            env=given, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        output = ""
        try:
            if stops:
                for line in job.stdout:
                    output += line
                    if "step 20/" in line:
                        break
                for pid in children(job.pid):  # SLURM signals the job's steps, not the script
                    os.kill(pid, signal.SIGTERM)
            output += job.communicate(timeout=150)[0]
        finally:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)
        assert ("signal 15" in output) == stops, output
        assert (job.returncode == 0) != stops, output
    assert "resumed" in output
    assert read_metrics(out)["queries"] == 24
