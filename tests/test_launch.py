"""launch/slurm.sh, with stand-ins for Slurm's commands that record how they were called."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "launch" / "slurm.sh"
SCONTROL = '#!/bin/sh\n[ "$1" = show ] && printf "one\\ntwo\\n" || echo "$@" >> "$CALLS/scontrol"\n'
# Like the training, it runs until it receives SIGTERM, and then takes a moment to save.
SRUN = """#!/bin/sh
echo "$@" >> "$CALLS/srun"
trap 'sleep 0.5; echo saved >> "$CALLS/srun"; exit 1' TERM
[ "$END" ] && exit "$END"
echo $$ > "$CALLS/pid"
while :; do sleep 0.05; done
"""
SCANCEL = '#!/bin/sh\necho "$@" >> "$CALLS/scancel"\nkill -TERM "$(cat "$CALLS/pid")"\n'

Job = Callable[[str], "subprocess.Popen[bytes]"]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """`job(end)`: run the script as Slurm does. Its training exits with status `end`, or runs until
    it is signalled if `end` is empty."""
    (tmp_path / "calls").mkdir()
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN), ("scancel", SCANCEL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "[one,two]"}
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"

    def run(end: str) -> "subprocess.Popen[bytes]":
        env = {**os.environ, **slurm, "PATH": path, "CALLS": str(tmp_path / "calls"), "END": end}
        return subprocess.Popen([SCRIPT, "gpt2-124m", "--data", "data", "--out", "run"], env=env)

    return run


def read(file: Path) -> str:
    return file.read_text() if file.exists() else ""


def test_starts_one_torchrun_per_host(job: Job, tmp_path: Path) -> None:
    assert job("0").wait(timeout=20) == 0
    call = read(tmp_path / "calls" / "srun")
    assert call.startswith("torchrun --nnodes 2 --nproc-per-node gpu --max-restarts 3")
    assert "--rdzv-endpoint one:29500" in call
    assert call.endswith("-m rekindle train gpt2-124m --data data --out run\n")
    assert not read(tmp_path / "calls" / "scontrol")


def test_user_error_is_not_requeued(job: Job, tmp_path: Path) -> None:
    assert job("2").wait(timeout=20) == 2
    assert not read(tmp_path / "calls" / "scontrol")


def test_saves_and_requeues_before_the_time_limit(job: Job, tmp_path: Path) -> None:
    process = job("")
    while not (tmp_path / "calls" / "pid").exists():
        time.sleep(0.02)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 0
    assert read(tmp_path / "calls" / "scancel") == "--signal=TERM 7\n"
    assert read(tmp_path / "calls" / "srun").endswith("saved\n")
    assert read(tmp_path / "calls" / "scontrol") == "requeue 7\n"
