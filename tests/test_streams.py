"""Closed pipes and streams: no traceback, and no lost error."""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT


@pytest.fixture
def run(tmp_path: Path, train: Callable[..., Any]) -> Path:
    train(tmp_path / "run", "--steps", 2)
    return tmp_path / "run"


def shell(command: str, run: Path) -> subprocess.CompletedProcess[str]:
    """Run `command` in a shell in which $RK is the program and $RUN the run folder."""
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RUN": str(run),
        "RK": f"{sys.executable} -m rekindle",
    }  # fmt: skip
    return subprocess.run(
        ["bash", "-c", command], env=environment, cwd=run.parent, capture_output=True, text=True
    )


SAMPLE = ["--device", "cpu", "--prompt", "ab", "--tokens", 3]


@pytest.mark.parametrize(
    "arguments",
    [
        ["sample", "RUN", *SAMPLE],
        ["sample", "RUN", *SAMPLE, "--json"],
        ["eval", "RUN", "--device", "cpu", "--json"],
        ["verify", "RUN"],
        ["report", "RUN"],
    ],
    ids=lambda arguments: " ".join(arguments[::4]) if isinstance(arguments, list) else None,
)
def test_closed_pipe_is_not_an_error(
    run: Path, rekindle: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, arguments: list[Any]
) -> None:
    pytest.importorskip("matplotlib")
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as closed_pipe:
        monkeypatch.setattr(sys, "stdout", closed_pipe)
        outcome = rekindle(*[run if a == "RUN" else a for a in arguments])
    assert (outcome.status, outcome.err) == (0, "")


def test_head_ends_the_output_silently(run: Path) -> None:
    """The output is larger than a pipe's buffer (64 KiB)."""
    flags = "--device cpu --prompt ab --num 9000 --tokens 3"
    done = shell(f"$RK sample $RUN {flags} | head -1", run)
    assert (done.stdout, done.stderr) == ("--- 1 of 9000 ---\n", "")


def test_full_disk_is_an_error(
    run: Path, rekindle: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    full = open("/dev/full", "w")  # noqa: SIM115
    monkeypatch.setattr(sys, "stdout", full)
    outcome = rekindle("sample", run, *SAMPLE)
    assert outcome.status == 2
    assert outcome.err.startswith("rekindle: error: No space left on device")
    with pytest.raises(OSError, match="No space"):
        full.close()


@pytest.mark.parametrize(
    "command",
    [
        "$RK eval $RUN --device cpu",
        "$RK train demo --data DATA --out $RUN-2 --device cpu --no-compile FLAGS --steps 1",
    ],
    ids=["eval", "train"],
)
def test_closed_stdout_is_not_an_error(
    run: Path, shard_set: Path, tiny_flags: list[str], command: str
) -> None:
    command = command.replace("DATA", str(shard_set)).replace("FLAGS", shlex.join(tiny_flags))
    done = shell(f"{command} >&-", run)
    assert (done.returncode, done.stderr) == (0, "")
    if "train" in command:
        assert (run.parent / "run-2" / "checkpoints" / "step-000001").is_dir()


def test_error_does_not_go_to_stdout_if_stderr_is_closed(run: Path) -> None:
    """A program that reads stdout must not mistake the error for output."""
    done = shell("$RK sample $RUN --num 0 --json 2>&-", run)
    assert (done.returncode, done.stdout) == (2, "")
