"""examples/train.sbatch, with two torchruns of this machine for two nodes and stand-ins for Slurm's commands."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import TINY

SCRIPT = Path(__file__).parents[2] / "examples" / "train.sbatch"

# As Slurm's: the command once per node; signals are passed on to all of them.
SRUN = """\
#!/usr/bin/env bash
if [ "$1 $2" != "--cpus-per-task=$SLURM_CPUS_PER_TASK --kill-on-bad-exit=1" ]; then
  echo "srun got other options: $1 $2" >&2
  exit 2
fi
shift 2
tasks=()
trap 'kill -TERM "${tasks[@]}"' TERM
for _ in $(seq "$SLURM_JOB_NUM_NODES"); do "$@" & tasks+=("$!"); done
code=0
for task in "${tasks[@]}"; do
  while kill -0 "$task" 2>/dev/null; do wait "$task"; ended=$?; done
  [ "$ended" = 0 ] || code=$ended
done
exit "$code"
"""
SCONTROL = """\
#!/usr/bin/env bash
if [ "$1 $2 $3" = "show hostnames node[0-1]" ]; then printf 'localhost\\nnode1\\n'; else echo "$@" >>requeued; fi
"""


@pytest.fixture
def slurm(environment, tmp_path) -> dict[str, str]:
    """The environment of a batch script whose job has two nodes."""
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "bin" / "torchrun").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m torch.distributed.run "$@"\n')
    (tmp_path / "bin" / "torchrun").chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[0-1]"}
    sizes = {"SLURM_CPUS_PER_TASK": "1", "PROCESSES": "1", "DEVICE": "cpu", "PORT": str(port), "OUT": "run"}
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    modules = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return {**environment, **modules, **job, **sizes, "PATH": path}


@pytest.mark.full
def test_a_job_whose_time_is_over_saves_and_queues_itself_again(slurm, tmp_path):
    flags = [
        *TINY,
        "--dd1.iterations=100000",
        "--dd1.batch-size=8",
        "--dd1.log-every=1",
        "--dd1.checkpoint-every=100000",
    ]
    errors = tmp_path / "errors"
    with errors.open("w") as written:
        script = subprocess.Popen(["bash", str(SCRIPT), *flags], cwd=tmp_path, env=slurm, stderr=written)
        try:
            log, began = tmp_path / "run" / "metrics.jsonl", time.monotonic()
            while not (log.exists() and log.stat().st_size) and script.poll() is None:
                assert time.monotonic() - began < 120, errors.read_text()
                time.sleep(0.1)
            assert not (tmp_path / "requeued").exists()
            script.send_signal(signal.SIGTERM)
            assert script.wait(60) != 0, errors.read_text()
        finally:
            script.kill()
    assert (tmp_path / "requeued").read_text() == "requeue 7\n", errors.read_text()
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert (checkpoint / "state.json").exists()
    assert {file.name for file in checkpoint.glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}  # both nodes' parts
    assert errors.read_text().count("ddfast train: interrupted; the same command continues where it stopped") == 1
