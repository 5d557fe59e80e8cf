"""Only one process may write to a folder: a second one names the first and changes nothing."""

import errno
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rekindle import checkpoint, start, storage
from rekindle import trainer as rekindle_trainer
from rekindle.data import prepare as rekindle_prepare
from rekindle.data.sources.ready_made import PublishedShards, ShardFolder
from rekindle.data.tokenizer import get_tokenizer
from rekindle.errors import UserError
from rekindle.observe.console import Console
from rekindle.storage import Lock

ForkServer = Callable[..., Any]


def contents(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_refused(end: Any, folder: Path) -> None:
    assert end.status == 2
    assert end.err.startswith(f"rekindle: error: {folder} is in use by process {os.getpid()} on ")
    assert end.err.endswith(": wait until it has finished, or choose another --out\n")
    assert end.err.count("\n") == 1


@pytest.fixture
def meanwhile(
    monkeypatch: pytest.MonkeyPatch, fork_server: ForkServer, command: Callable
) -> Callable[..., list[Any]]:
    """`meanwhile(out, 5)`: in step 5, start another process with `out`; returns how it ended."""

    def arrange(out: Path, at: int) -> list[Any]:
        original, ends = rekindle_trainer.learning_rate, []

        def wrapped(step: int, **options: Any) -> float:
            if step == at:
                before = contents(out)
                ends.append(fork_server(command(out)))
                assert contents(out) == before
            return original(step, **options)

        monkeypatch.setattr(rekindle_trainer, "learning_rate", wrapped)
        return ends

    return arrange


def test_second_run_in_a_folder_is_rejected(
    tmp_path: Path, train: Callable, meanwhile: Callable, records: Callable
) -> None:
    """For a new run and for a resumed one. The first run is not affected."""
    out = tmp_path / "run"
    train(tmp_path / "straight", "--checkpoint-every", 0)
    for steps, at in ((12, 3), (18, 14)):
        (end,) = (meanwhile(out, at), train(out, "--checkpoint-every", 0, "--steps", steps))[0]
        assert_refused(end, out)
        if steps == 12:
            ends = [run / "checkpoints" / "step-000012" for run in (out, tmp_path / "straight")]
            for name in checkpoint.FILES:
                assert (ends[0] / name).read_bytes() == (ends[1] / name).read_bytes()
            assert records(out) == records(tmp_path / "straight")


def test_second_run_does_not_inspect_checkpoints_of_the_first(
    tmp_path: Path, train: Callable, command: Callable, rekindle: Callable
) -> None:
    """A checkpoint that is being removed would look damaged."""
    out = tmp_path / "run"
    train(out)
    for path in checkpoint.list_checkpoints(out / "checkpoints"):
        (path / "model.safetensors").unlink()
    with Lock(out) as lock:
        lock.take()
        assert_refused(rekindle(*command(out)), out)
    assert "all checkpoints in" in rekindle(*command(out)).err


def test_only_one_of_two_simultaneous_runs_starts(
    tmp_path: Path, command: Callable, rekindle: Callable, fork_server: ForkServer, train: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """While this run checks the hashes of its data, another one trains to the end."""
    out, verify = tmp_path / "run", start._verify_data

    def meanwhile(*arguments: Any) -> None:
        assert fork_server(command(out)).status == 0
        verify(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(start, "_verify_data", meanwhile)
        end = rekindle(*command(out), "--seed", 7)
    assert end.status == 2
    assert end.err == (
        f"rekindle: error: another process has just started a run in {out}: run the same command "
        "again, or choose another --out\n"
    )
    train(tmp_path / "straight")
    assert contents_of_checkpoints(out) == contents_of_checkpoints(tmp_path / "straight")


def contents_of_checkpoints(run: Path) -> list[bytes]:
    found = checkpoint.list_checkpoints(run / "checkpoints")
    return [(path / name).read_bytes() for path in found for name in checkpoint.FILES]


def test_run_without_its_lock_file_is_locked_again(tmp_path: Path, train: Callable) -> None:
    """As in a copy without hidden files."""
    train(tmp_path / "run", "--steps", 4)
    (tmp_path / "run" / ".lock").unlink()
    assert "resumes at step 4" in train(tmp_path / "run").out


def test_lock_is_free_after_a_kill(
    tmp_path: Path, fork_server: ForkServer, command: Callable, train: Callable
) -> None:
    out = tmp_path / "run"
    end = fork_server(command(out), fault="rename checkpoints/step-000008 1 1 kill")
    assert end.status == -signal.SIGKILL
    before = (out / ".lock").read_text()
    assert before.startswith("process ")
    assert "resumes at step 4 of 12" in train(out).out
    assert (out / ".lock").read_text() != before
    assert (out / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_second_preparation_into_a_folder_is_rejected(
    tmp_path: Path, fork_server: ForkServer, rekindle: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, out = tmp_path / "texts.jsonl", tmp_path / "data"
    text.write_text("".join(json.dumps({"text": f"Number {n}."}) + "\n" for n in range(300)))
    command = ["prepare", "--jsonl", text, "--tokenizer", "bytes", "--val-tokens", 200, "--out"]
    write, ends = rekindle_prepare._Preparation._finish, []

    def wrapped(preparation: Any) -> Any:
        before = contents(out)
        ends.append(fork_server([*command, out]))
        assert contents(out) == before
        return write(preparation)

    monkeypatch.setattr(rekindle_prepare._Preparation, "_finish", wrapped)
    assert rekindle(*command, out).status == 0
    assert_refused(ends[0], out)
    assert "already prepared" in fork_server([*command, out]).out
    assert fork_server([*command, tmp_path / "other"]).status == 0
    mine, other = (contents(folder) for folder in (out, tmp_path / "other"))
    assert {p.name: c for p, c in mine.items() if p.name != ".lock"} == {
        p.name: c for p, c in other.items() if p.name != ".lock"
    }


@pytest.mark.parametrize("make", [lambda folder: PublishedShards(), ShardFolder])
def test_ready_made_shards_are_locked(tmp_path: Path, shard_set: Path, make: Callable) -> None:
    """The second process is rejected before it contacts the hub."""
    (tmp_path / "train.bin").write_bytes((shard_set / "train-0000.bin").read_bytes())
    with Lock(tmp_path) as first, Lock(tmp_path) as second:
        first.take()
        with pytest.raises(UserError, match=rf"in use by process {os.getpid()} on "):
            make(tmp_path).take(tmp_path, get_tokenizer("gpt2"), Console(quiet=True), second)
    assert {path.name for path in tmp_path.iterdir()} == {"train.bin", ".lock"}


def test_lock_is_released(tmp_path: Path) -> None:
    with Lock(tmp_path) as lock:
        lock.take()
        lock.take()
        with Lock(tmp_path) as other, pytest.raises(UserError, match="in use"):
            other.take(create=False)
    with Lock(tmp_path) as lock:
        lock.take()


def test_missing_lock_file_is_created_only_on_request(tmp_path: Path) -> None:
    with Lock(tmp_path) as lock:
        lock.take(create=False)
        assert storage.is_empty(tmp_path)
        assert not list(tmp_path.iterdir())


def test_file_system_without_locks_does_not_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on some clusters. If the file system reports that the lock is held, it does block."""
    import fcntl

    def failing_flock(number: int) -> Callable[[int, int], None]:
        def flock(descriptor: int, operation: int) -> None:
            raise OSError(number, os.strerror(number))

        return flock

    monkeypatch.setattr(fcntl, "flock", failing_flock(errno.ENOSYS))
    with storage.Lock(tmp_path) as first, storage.Lock(tmp_path) as second:
        first.take()
        second.take()
    monkeypatch.setattr(fcntl, "flock", failing_flock(errno.EAGAIN))
    with storage.Lock(tmp_path) as lock, pytest.raises(UserError, match="is in use by"):
        lock.take()
