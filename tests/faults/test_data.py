"""Data that changes during a run is detected before the run trains on it."""

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rekindle import checkpoint
from rekindle import trainer as rekindle_trainer
from rekindle.data import shards
from rekindle.data.batches import Batches, Windows, validation_batches
from rekindle.data.shards import HEADER_BYTES, Manifest, Unchanged
from rekindle.errors import UserError

Records = Callable[..., list[dict[str, Any]]]
WriteShards = Callable[..., Manifest]
PREFETCHED = 3  # batches read before a step: one held by the thread, two in the queue


@pytest.fixture
def data(tmp_path: Path, shard_set: Path) -> Path:
    """A copy of the shards that may be changed."""
    return shutil.copytree(shard_set, tmp_path / "data")


def replace(path: Path) -> None:
    """Replace the file by another one with the same length and time of modification."""
    before, other = path.stat(), path.with_name("other")
    other.write_bytes(path.read_bytes()[::-1])
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(other, path)


def overwrite(path: Path) -> None:
    with open(path, "rb+") as file:
        file.seek(HEADER_BYTES)
        file.write(b"\x21\x00" * 100)


def cut(path: Path) -> None:
    os.truncate(path, 0)  # no page is left: reading one would kill the process


def corrupt(path: Path, token: int, value: int) -> None:
    """Change a token like a bad disk or memory: size and time of the file stay the same."""
    before = path.stat()
    with open(path, "rb+") as file:
        file.seek(HEADER_BYTES + 2 * token)
        file.write(np.uint16(value).tobytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES = [replace, overwrite, cut, Path.unlink]


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], Any]], None]:
    """`meanwhile(5, action)`: call `action` in step 5, after the next batches have been read."""

    def arrange(at: int, action: Callable[[], Any]) -> None:
        original = rekindle_trainer.learning_rate

        def wrapped(step: int, **options: Any) -> float:
            if step == at:
                time.sleep(0.1)
                action()
            return original(step, **options)

        monkeypatch.setattr(rekindle_trainer, "learning_rate", wrapped)

    return arrange


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", ["train-0000.bin", "train-0001.bin", "val-0001.bin"])
def test_changed_shard_ends_the_run(
    tmp_path: Path, data: Path, train: Callable, command: Callable, rekindle: Callable,
    records: Records, meanwhile: Callable, monkeypatch: pytest.MonkeyPatch, change: Callable,
    name: str,
) -> None:  # fmt: skip
    """Everything that was trained, logged and saved until then is correct."""
    eval_every = 3 if name.startswith("val") else 0  # evaluation would detect it too
    flags = ("--data", data, "--steps", 24, "--checkpoint-every", 2, "--eval-every", eval_every)
    train(tmp_path / "straight", *flags)
    meanwhile(7, lambda: change(data / name))
    outcome = rekindle(*command(tmp_path / "run"), *flags)
    assert outcome.status == 2
    assert f"{data / name} changed while the run was reading it" in outcome.err
    done = records(tmp_path / "run", "train")
    assert 7 <= done[-1]["step"] <= 7 + PREFETCHED
    assert done == records(tmp_path / "straight", "train")[: len(done)]
    evaluated = records(tmp_path / "run", "validation")
    assert evaluated == records(tmp_path / "straight", "validation")[: len(evaluated)]
    found = checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")
    assert found[-1].name <= f"step-{done[-1]['step'] + 1:06d}"
    for path in found:
        for file in checkpoint.FILES:
            other = tmp_path / "straight" / "checkpoints" / path.name / file
            assert (path / file).read_bytes() == other.read_bytes()


def test_batch_that_changes_while_read_is_not_trained_on(
    tmp_path: Path, data: Path, command: Callable, rekindle: Callable, records: Records,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    original = Batches.batch

    def batch(batches: Batches, number: int, split: Any) -> Any:
        if number == 6:
            overwrite(data / "train-0000.bin")
        return original(batches, number, split)

    monkeypatch.setattr(Batches, "batch", batch)
    assert rekindle(*command(tmp_path / "run"), "--data", data, "--eval-every", 0).status == 2
    assert records(tmp_path / "run", "train")[-1]["step"] == 5


def test_run_resumes_once_the_data_is_restored(
    tmp_path: Path, data: Path, shard_set: Path, train: Callable, command: Callable,
    rekindle: Callable, meanwhile: Callable, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with monkeypatch.context():
        meanwhile(5, lambda: overwrite(data / "train-0000.bin"))
        assert rekindle(*command(tmp_path / "run"), "--data", data).status == 2
        monkeypatch.undo()
    outcome = rekindle(*command(tmp_path / "run"), "--data", data)
    assert outcome.status == 2
    changed = "train-0000.bin has changed since it was prepared (its SHA-256 differs, first"
    assert changed in outcome.err
    shutil.copy(shard_set / "train-0000.bin", data)
    assert "resumes at step" in train(tmp_path / "run", "--data", data).out


@pytest.mark.parametrize(("name", "token"), [("train-0001.bin", 333), ("val-0001.bin", 77)])
def test_an_id_out_of_range_is_named(
    tmp_path: Path, data: Path, command: Callable, rekindle: Callable, meanwhile: Callable,
    name: str, token: int,
) -> None:  # fmt: skip
    """Even if size and time of the file are unchanged. Two epochs are 19 steps."""
    meanwhile(2, lambda: corrupt(data / name, token, 60_000))
    flags = ("--steps", 24, "--eval-every", 3, "--checkpoint-every", 4)
    outcome = rekindle(*command(tmp_path / "run"), "--data", data, *flags)
    assert outcome.status == 2
    assert (
        f"{data / name} contains the id 60000, outside the vocabulary of 257 "
        f"(first at token {token}), but passed the check when the run started"
    ) in outcome.err
    found = checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")
    assert all(path.name < "step-000020" for path in found)


def test_run_stopped_after_the_change_saves_a_correct_checkpoint(
    tmp_path: Path, data: Path, train: Callable, command: Callable, rekindle: Callable,
    meanwhile: Callable, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def change() -> None:
        overwrite(data / "train-0000.bin")
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context():
        meanwhile(5, change)
        outcome = rekindle(*command(tmp_path / "run"), "--data", data)
        assert outcome.status == 128 + signal.SIGTERM
        monkeypatch.undo()
    train(tmp_path / "run")  # with the original data
    train(tmp_path / "straight")
    ends = [tmp_path / name / "checkpoints" / "step-000012" for name in ("run", "straight")]
    for name in checkpoint.FILES:
        assert (ends[0] / name).read_bytes() == (ends[1] / name).read_bytes()


# -- the parts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_check_for_changes_names_the_file(data: Path, change: Callable) -> None:
    unchanged = Unchanged(data, shards.read_manifest(data))
    (data / "train-0000.bin").read_bytes()
    (data / "another file").write_text("is ignored")
    unchanged.check()
    change(data / "train-0001.bin")
    with pytest.raises(UserError, match=r"train-0001\.bin changed while"):
        unchanged.check()


def test_link_to_other_tokens_is_detected(tmp_path: Path, data: Path) -> None:
    """In a folder of links, like the hub's cache."""
    links = tmp_path / "links"
    links.mkdir()
    for path in data.iterdir():
        (links / path.name).symlink_to(path)
    unchanged = Unchanged(links, shards.read_manifest(links))
    unchanged.check()
    (links / "train-0001.bin").unlink()
    (links / "train-0001.bin").symlink_to(data / "train-0000.bin")
    with pytest.raises(UserError, match=r"train-0001\.bin changed while"):
        unchanged.check()


@pytest.mark.parametrize("token", [0, 15, 16, 17, 300, 496])
def test_windows_detect_an_id_out_of_range(data: Path, token: int) -> None:
    """Anywhere in a window, and only in the windows that contain it."""
    corrupt(data / "train-0001.bin", token, 257)
    manifest = shards.read_manifest(data)
    windows = Windows(shards.open_split(data, manifest, "train"), 16, manifest.vocab_size)
    holding = [n for n in range(len(windows)) if _holds(windows, n, 257)]
    assert len(holding) == (2 if token and token % 16 == 0 and token < 512 else 1)
    others = np.setdiff1d(np.arange(len(windows)), holding)
    windows.read(others)
    for number in holding:
        with pytest.raises(
            UserError, match=rf"train-0001\.bin contains the id 257, .* token {token}\),"
        ):
            windows.read(np.append(others, number))


def _holds(windows: Windows, number: int, token: int) -> bool:
    return token in Windows(windows.shards, windows.T).read(np.array([number]))


def test_the_largest_id_is_in_range(tmp_path: Path, write_shards: WriteShards) -> None:
    manifest = write_shards(tmp_path, [100], [60])
    corrupt(tmp_path / "train-0000.bin", 5, 256)
    windows = Windows(shards.open_split(tmp_path, manifest, "train"), 16, 257)
    assert 256 in windows.read(np.arange(len(windows)))
    assert len(windows.read(np.arange(0))) == 0


def test_validation_detects_an_id_out_of_range(data: Path) -> None:
    corrupt(data / "val-0001.bin", 42, 300)
    found = shards.open_split(data, shards.read_manifest(data), "val")
    with pytest.raises(UserError, match=r"val-0001\.bin contains the id 300, .* at token 42\),"):
        list(validation_batches(found, 16, 10**6, 4, vocab_size=257))
