"""A disk that is full, broken, slow or missing does not stop training or destroy anything."""

import errno
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rekindle import checkpoint
from rekindle import trainer as rekindle_trainer

ForkServer = Callable[..., Any]
Records = Callable[..., list[dict[str, Any]]]

FULL, BROKEN = errno.ENOSPC, errno.EIO


@pytest.fixture
def train(command: Callable, fork_server: ForkServer) -> Callable[..., Any]:
    return lambda out, *flags, **job: fork_server([*command(out), *flags], **job)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("straight") / "run"


@pytest.fixture
def expected(straight: Path, train: Callable) -> Path:
    """The run without faults."""
    if not straight.exists():
        assert train(straight).status == 0
    return straight


def weights(run: Path, step: int = 12) -> list[bytes]:
    folder = run / "checkpoints" / f"step-{step:06d}"
    checkpoint.load(folder)
    return [(folder / name).read_bytes() for name in checkpoint.FILES]


def assert_same_records(run: Path, other: Path, records: Records) -> None:
    """Checkpoint records are compared separately, because they may be logged later."""
    for kinds in (("train", "validation", "samples"), ("checkpoint",)):
        assert records(run, *kinds) == records(other, *kinds)


def steps(run: Path) -> list[int]:
    found = checkpoint.list_checkpoints(run / "checkpoints")
    return [checkpoint.load(path).step for path in found]


@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
def test_saving_is_retried_when_the_disk_fails_once(
    tmp_path: Path, train: Callable, expected: Path, records: Records, call: str
) -> None:
    out = tmp_path / "run"
    end = train(out, fault=f"{call} optimizer.safetensors 1 1 {BROKEN}")
    assert end.status == 0, end.err
    assert "step     4 | saving failed: Input/output error; retrying in 0 s" in end.out
    assert steps(out) == [4, 8, 12]
    assert weights(out) == weights(expected)
    assert_same_records(out, expected, records)


def test_training_continues_when_a_checkpoint_cannot_be_saved(
    tmp_path: Path, train: Callable, expected: Path, records: Records
) -> None:
    """Step 8 fails in three attempts. Step 4 is kept meanwhile, although only one is to be kept."""
    out = tmp_path / "run"
    end = train(
        out, "--keep-checkpoints", 1, "--keep-best", 0,
        fault=f"write step-000008/.tmp-model 1 99 {FULL}",
    )  # fmt: skip
    assert end.status == 0, end.err
    assert end.out.count("step     8 | saving failed: No space left on device") == 3
    assert steps(out) == [12]
    assert weights(out) == weights(expected)
    assert records(out, "train") == records(expected, "train")


def test_failure_to_save_the_last_checkpoint_is_an_error(
    tmp_path: Path, train: Callable, expected: Path, records: Records
) -> None:
    out = tmp_path / "run"
    end = train(
        out, "--keep-checkpoints", 1, "--keep-best", 0,
        fault=f"fsync step-000012/.tmp-model 1 99 {FULL}",
    )  # fmt: skip
    assert end.status == 2
    assert end.err == (
        f"rekindle: error: saving the checkpoint of step 12 in {out / 'checkpoints'} failed (No "
        "space left on device): free some space or make the folder writable, then run the same "
        "command again; it resumes from the newest checkpoint\n"
    )
    assert steps(out) == [8]
    assert train(out).status == 0
    assert weights(out) == weights(expected)
    assert_same_records(out, expected, records)


def test_log_lines_are_kept_until_they_can_be_written(
    tmp_path: Path, train: Callable, expected: Path, records: Records
) -> None:
    out = tmp_path / "run"
    end = train(out, fault=f"write metrics.jsonl 3 5 {FULL}")
    assert end.status == 0, end.err
    assert (
        "metrics.jsonl cannot be written (No space left on device): lines are kept in memory"
        in end.out
    )
    assert "metrics.jsonl can be written again; no lines were lost" in end.out
    assert_same_records(out, expected, records)


def test_resume_without_room_for_the_log_is_an_error(
    tmp_path: Path, train: Callable, expected: Path, records: Records
) -> None:
    """A resumed run rewrites its log."""
    out = tmp_path / "run"
    assert train(out, fault="rename checkpoints/step-000012 1 1 kill").status == -signal.SIGKILL
    before = (out / "metrics.jsonl").read_bytes()
    end = train(out, fault=f"write .tmp-metrics.jsonl 1 1 {FULL}")
    assert end.status == 2
    assert end.err == (
        f"rekindle: error: {out}/metrics.jsonl cannot be rewritten (No space left on device): "
        "free disk space or fix its permissions, then run the same command again\n"
    )
    assert (out / "metrics.jsonl").read_bytes() == before
    assert train(out).status == 0
    assert_same_records(out, expected, records)


def test_unwritable_log_does_not_stop_the_run(
    tmp_path: Path, train: Callable, expected: Path
) -> None:
    end = train(tmp_path / "run", fault=f"write metrics.jsonl 1 9999 {FULL}")
    assert end.status == 0, end.err
    assert "the last lines of metrics.jsonl are lost (No space left on device)" in end.out
    assert weights(tmp_path / "run") == weights(expected)


STARTS = [f"write metrics.jsonl 1 99 {FULL}", f"write .lock 1 1 {FULL}", f"fsync run 1 9 {BROKEN}"]


@pytest.mark.parametrize("fault", STARTS)
def test_disk_failure_at_the_start_is_one_line(tmp_path: Path, train: Callable, fault: str) -> None:
    """Or it does not affect the run."""
    end = train(tmp_path / "run", fault=fault)
    assert "Traceback" not in end.err
    assert end.err.count("\n") == (1 if end.status else 0)
    assert end.status in (0, 2)
    assert train(tmp_path / "run").status == 0


def test_missing_checkpoints_are_an_error(tmp_path: Path, train: Callable) -> None:
    """As when a linked disk is not mounted: starting from scratch would overwrite the log."""
    out = tmp_path / "run"
    assert train(out).status == 0
    log = (out / "metrics.jsonl").read_bytes()
    shutil.move(out / "checkpoints", tmp_path / "elsewhere")
    end = train(out)
    assert end.status == 2
    assert f"the log of {out} lists checkpoints, but none is there: check that" in end.err
    assert (out / "metrics.jsonl").read_bytes() == log
    shutil.move(tmp_path / "elsewhere", out / "checkpoints")
    assert train(out, "--steps", 14).status == 0


def test_slow_disk_changes_nothing(
    tmp_path: Path, train: Callable, expected: Path, records: Records
) -> None:
    end = train(tmp_path / "run", fault="fsync safetensors 1 99 sleep200")
    assert end.status == 0, end.err
    assert weights(tmp_path / "run") == weights(expected)
    assert records(tmp_path / "run", "train") == records(expected, "train")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for less than two checkpoints."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=350k", "tmpfs", str(folder)]
    if (
        os.name != "posix"
        or os.geteuid()
        or subprocess.run(command, capture_output=True).returncode
    ):
        pytest.skip("may not mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_real_small_disk(small_disk: Path, tmp_path: Path, train: Callable, expected: Path) -> None:
    """When it is full, the checkpoint that fitted stays complete, and the run can be moved."""
    out = small_disk / "run"
    end = train(out)
    assert end.status == 2
    assert "No space left on device" in end.err
    found = steps(out)
    assert found
    assert 12 not in found
    shutil.copytree(out, tmp_path / "moved")
    assert train(tmp_path / "moved").status == 0
    assert weights(tmp_path / "moved") == weights(expected)


def test_disk_that_becomes_read_only(
    small_disk: Path, train: Callable, expected: Path, tmp_path: Path
) -> None:
    out = small_disk / "run"
    assert train(out, "--steps", 4).status == 0
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    end = train(out)
    assert end.status == 2
    assert end.err == (
        f"rekindle: error: {out} is not writable (Read-only file system): choose another --out\n"
    )
    assert steps(out) == [4]


def test_deleted_run_folder_is_recreated(
    tmp_path: Path, rekindle: Callable, command: Callable, expected: Path, records: Records,
    monkeypatch: pytest.MonkeyPatch, one_thread: None,
) -> None:  # fmt: skip
    """When the next checkpoint is saved, from which the same command resumes."""
    out, original = tmp_path / "run", rekindle_trainer.learning_rate

    def remove(step: int, **options: Any) -> float:
        if step == 6:
            while not steps(out):  # wait for it, because it is written in the background
                time.sleep(0.01)
            shutil.rmtree(out)
        return original(step, **options)

    with monkeypatch.context() as patch:
        patch.setattr(rekindle_trainer, "learning_rate", remove)
        outcome = rekindle(*command(out), "--steps", 10)
    assert outcome.status == 0, outcome.err
    assert (
        "metrics.jsonl cannot be written (No such file or directory): lines are kept in memory"
        in outcome.out
    )
    assert steps(out) == [8, 10]
    outcome = rekindle(*command(out))
    assert "resumes at step 10 of 12" in outcome.out
    assert (out / "run.json").is_file()
    assert [r["step"] for r in records(out, "train")] == [6, 7, 8, 9, 10, 11]
    other = rekindle(*command(out), "--seed", 1)
    assert "was started with a different recipe" in other.err
