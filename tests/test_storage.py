"""Files and folders are written completely or not at all, whenever the process is interrupted."""

import errno
import hashlib
import json
import os
import shutil
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch_file

from rekindle import storage
from rekindle.errors import UserError
from rekindle.storage import JsonLines, new_folder, write_file


def test_new_folder_is_flushed_to_disk(tmp_path: Path, calls: list[str]) -> None:
    """A folder's entry is stored in its parent, so the parents are flushed."""
    storage.make_folder(tmp_path / "runs" / "run")
    assert (tmp_path / "runs" / "run").is_dir()
    assert sorted(calls) == sorted([f"flush {tmp_path.name}", "flush runs"])
    storage.make_folder(tmp_path / "runs" / "run")
    assert len(calls) == 2


@pytest.mark.parametrize(("number", "fails"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_file_system_that_cannot_flush_folders_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, fails: bool
) -> None:
    """As with some network file systems."""
    fsync = os.fsync

    def fail(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="error") if fails else nullcontext():
        storage.write_file(tmp_path / "file", [b"text"])
    assert (tmp_path / "file").read_bytes() == b"text"


def test_removing_a_link_keeps_its_target(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("text")
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    storage.remove_folder(tmp_path / "link")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
    assert (tmp_path / "folder" / "file").exists()


class Killed(BaseException):
    """The process ends here, without any cleanup."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A record of the order in which files are flushed and renamed."""
    seen: list[str] = []
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def noted_fsync(descriptor: int) -> None:
        seen.append(f"flush {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def noted_replace(source: Path, target: Path) -> None:
        seen.append(f"rename to {target.name}")
        replace(source, target)

    def noted_rename(source: Path, target: Path) -> None:
        seen.append(f"rename to {target.name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    monkeypatch.setattr(os, "rename", noted_rename)
    return seen


def kill_in(monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    def killed(*arguments: Any) -> None:
        raise Killed

    monkeypatch.setattr(os, function, killed)


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names open files")


# -- files ----------------------------------------------------------------------------------------


def test_write_file_writes_and_hashes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    pieces = [b"abc", np.arange(3, dtype="<u2"), bytearray(b"xyz")]
    content = b"abc\x00\x00\x01\x00\x02\x00xyz"
    assert write_file(path, pieces) == hashlib.sha256(content).hexdigest()
    assert path.read_bytes() == content
    assert storage.file_sha256(path) == hashlib.sha256(content).hexdigest()
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_file_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "file", [b"a"])
        with new_folder(tmp_path / "folder") as new:
            new.write_tensors("a.safetensors", {"a": np.zeros(1)})
            new.write_json("a.json", {})
    finally:
        os.umask(before)
    for file in ("file", "folder/a.safetensors", "folder/a.json"):
        assert (tmp_path / file).stat().st_mode & 0o777 == 0o640, file


@needs_proc
def test_write_file_flushes_before_it_renames(tmp_path: Path, calls: list[str]) -> None:
    write_file(tmp_path / "file", [b"a"])
    assert calls == ["flush .tmp-file", "rename to file", f"flush {tmp_path.name}"]


@pytest.mark.parametrize("pieces", [[b"a"], [b"a" * 10_000, b"b"], [np.zeros(10**6), b"b" * 8192]])
def test_write_file_flushes_the_last_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces: list[Any]
) -> None:
    """Nothing stays in Python's buffer, neither the end of a file nor a short file."""
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda file: flushed.append(os.fstat(file).st_size))
    write_file(tmp_path / "file", pieces)
    assert (
        flushed[0]
        == (tmp_path / "file").stat().st_size
        == sum(memoryview(p).nbytes for p in pieces)
    )


def test_write_file_hashes_while_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed, fsync = threading.Event(), os.fsync

    class Digest:
        def update(self, view: memoryview) -> None:
            hashed.set()

        def hexdigest(self) -> str:
            return "hash"

    def flush(descriptor: int) -> None:
        assert hashed.wait(10)
        fsync(descriptor)

    monkeypatch.setattr(hashlib, "sha256", Digest)
    monkeypatch.setattr(os, "fsync", flush)
    assert write_file(tmp_path / "file", [b"a"]) == "hash"


def test_hash_covers_everything_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the disk is faster than hashing."""
    sha256 = hashlib.sha256

    class Slow:
        def __init__(self) -> None:
            self._digest = sha256()

        def update(self, view: memoryview) -> None:
            time.sleep(0.02)
            self._digest.update(view)

        def hexdigest(self) -> str:
            return self._digest.hexdigest()

    monkeypatch.setattr(hashlib, "sha256", Slow)
    digest = write_file(tmp_path / "file", [b"abc", b"", b"def", b"ghi"])
    assert digest == sha256(b"abcdefghi").hexdigest()


def test_file_is_hashed_without_a_thread_while_the_process_exits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From Python 3.12 on, no thread can be started then; a checkpoint may still be in progress."""

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", start)
    digest = write_file(tmp_path / "file", [b"abc", b"def"])
    assert digest == hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest()
    assert (tmp_path / "file").read_bytes() == b"abcdef"


def test_hash_thread_has_ended_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    before = threading.active_count()
    with pytest.raises(OSError, match="No space left"):
        write_file(tmp_path / "file", [np.zeros(10**6)] * 20)
    assert threading.active_count() == before


@needs_proc
def test_move_file_flushes_before_it_renames(tmp_path: Path, calls: list[str]) -> None:
    (tmp_path / "source").write_bytes(b"a")
    storage.move_file(tmp_path / "source", tmp_path / "file")
    assert calls == ["flush source", "rename to file", f"flush {tmp_path.name}"]
    assert (tmp_path / "file").read_bytes() == b"a"


def broken_chunks() -> Iterator[bytes]:
    yield b"half"
    raise Killed


def test_file_is_absent_if_its_content_fails(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        write_file(tmp_path / "file", broken_chunks())
    assert not (tmp_path / "file").exists()
    storage.remove_unfinished(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_file_is_unchanged_if_the_process_dies_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    path = tmp_path / "file"
    write_file(path, [b"old"])
    with monkeypatch.context() as patch:
        kill_in(patch, function)
        with pytest.raises(Killed):
            write_file(path, [b"a new one"])
    assert path.read_bytes() == b"old"
    write_file(path, [b"new"])  # leftovers of the killed process do not interfere
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# -- folders --------------------------------------------------------------------------------------


def write_folder(path: Path, number: int = 1) -> storage.Folder:
    with new_folder(path) as new:
        new.write_tensors("a.safetensors", {"a": np.full(3, number, np.float32)})
        new.write_json("b.json", {"number": number})
    return new


def test_new_folder_writes_and_hashes(tmp_path: Path) -> None:
    path = tmp_path / "above" / "folder"
    files = write_folder(path).files
    assert sorted(p.name for p in path.iterdir()) == ["a.safetensors", "b.json"]
    for name, entry in files.items():
        assert entry["sha256"] == hashlib.sha256((path / name).read_bytes()).hexdigest()
        assert entry["bytes"] == (path / name).stat().st_size
    assert load_file(path / "a.safetensors")["a"].tolist() == [1, 1, 1]
    assert [p.name for p in path.parent.iterdir()] == ["folder"]


def test_tensors_can_be_read_by_safetensors(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    arrays = {
        "transposed": random.normal(size=(30, 500)).astype(np.float32).T,
        "large": random.normal(size=700_001).astype(np.float32),
        "half": random.normal(size=(3, 1)).astype(np.float16),
        "double": random.normal(size=(2, 3, 4)),
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 3), np.float32),
        "transformer.h.0.ü": np.ones(1, np.float32),
    }
    with new_folder(tmp_path / "folder") as new:
        new.write_tensors("a.safetensors", arrays)
    file = tmp_path / "folder" / "a.safetensors"
    read = load_file(file)
    assert read.keys() == arrays.keys() == load_torch_file(file).keys()
    for name, array in arrays.items():
        assert (read[name].dtype, read[name].shape) == (array.dtype, array.shape)
        assert np.array_equal(read[name], array)
        assert np.array_equal(load_torch_file(file)[name].numpy(), array)
    entry = new.files["a.safetensors"]
    assert entry == {"sha256": storage.file_sha256(file), "bytes": file.stat().st_size}


def test_tensor_files_match_those_of_safetensors(tmp_path: Path) -> None:
    """Each tensor is aligned to its element size, so that it can be memory-mapped."""
    arrays = {"a": np.ones(3, np.float16), "b": np.ones(1), "c": np.ones((2, 2), np.float32)}
    save_file(arrays, tmp_path / "theirs")
    with new_folder(tmp_path / "folder") as new:
        new.write_tensors("ours", arrays)
    assert (tmp_path / "folder" / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@needs_proc
def test_new_folder_flushes_everything_before_it_renames(tmp_path: Path, calls: list[str]) -> None:
    write_folder(tmp_path / "folder")
    rename = calls.index("rename to folder")
    flushes = {"flush .tmp-a.safetensors", "flush .tmp-b.json", "flush .tmp-folder"}
    assert flushes <= set(calls[:rename])
    assert calls[rename + 1 :] == [f"flush {tmp_path.name}"]


def write_and_fail(path: Path, error: BaseException) -> None:
    with new_folder(path) as new:
        new.write_json("b.json", {"number": 2})
        raise error


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_folder_is_absent_if_its_body_fails(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        write_and_fail(tmp_path / "folder", error)
    assert list(tmp_path.iterdir()) == []


def test_folder_is_unchanged_if_its_body_fails(tmp_path: Path) -> None:
    write_folder(tmp_path / "folder", 1)
    with pytest.raises(Killed):
        write_and_fail(tmp_path / "folder", Killed())
    assert storage.read_json(tmp_path / "folder" / "b.json") == {"number": 1}


@pytest.mark.parametrize("function", ["fsync", "rename"])
def test_folder_is_absent_if_the_process_dies_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    with monkeypatch.context() as patch:
        kill_in(patch, function)
        patch.setattr(shutil, "rmtree", lambda *a, **b: None)  # no cleanup
        with pytest.raises(Killed):
            write_folder(tmp_path / "folder")
    assert [p.name for p in tmp_path.iterdir()] == [".tmp-folder"]
    write_folder(tmp_path / "folder", 2)  # leftovers of the killed process do not interfere
    assert storage.read_json(tmp_path / "folder" / "b.json") == {"number": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_new_folder_replaces_an_old_one(tmp_path: Path) -> None:
    write_folder(tmp_path / "folder", 1)
    write_folder(tmp_path / "folder", 2)
    assert storage.read_json(tmp_path / "folder" / "b.json") == {"number": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_folder_is_never_half_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "folder")
    doomed: list[Path] = []

    def killed(path: Path, ignore_errors: bool = False) -> None:
        if path.exists():
            doomed.append(path)
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(Killed):
            storage.remove_folder(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    assert doomed[0].name.startswith(storage.TEMPORARY)
    storage.remove_unfinished(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_set_aside_is_flushed_to_disk(tmp_path: Path, calls: list[str]) -> None:
    """An earlier folder with the same name is replaced, and the rename is flushed to disk."""
    for name in ("step-000004", "damaged-step-000004"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    aside = storage.set_aside(tmp_path / "step-000004")
    assert aside == tmp_path / "damaged-step-000004"
    assert [p.name for p in tmp_path.iterdir()] == [aside.name]
    assert (aside / "file").read_text() == "step-000004"
    assert calls == [f"rename to {aside.name}", f"flush {tmp_path.name}"]


def test_remove_unfinished_removes_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".tmp-file").write_text("a")
    (tmp_path / ".tmp-folder").mkdir()
    (tmp_path / ".tmp-folder" / "file").write_text("a")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / ".tmp-file").write_text("another folder's")
    (tmp_path / "file").write_text("a")
    storage.remove_unfinished(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
    assert (tmp_path / "folder" / ".tmp-file").exists()


# -- JSON -----------------------------------------------------------------------------------------


def test_json_round_trip(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None], "ä": "→"}
    digest = storage.write_json(tmp_path / "a.json", value)
    assert storage.read_json(tmp_path / "a.json") == value
    assert digest == storage.file_sha256(tmp_path / "a.json")
    assert (tmp_path / "a.json").read_bytes().endswith(b"}\n")


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe{}"])
def test_damaged_json_is_reported(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.json is damaged"):
        storage.read_json(tmp_path / "a.json")
    with pytest.raises(UserError, match=r"there is no file .*b\.json"):
        storage.read_json(tmp_path / "b.json")


def test_log_is_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for part in ([1, 2], [3]):
        log = JsonLines(path)
        for number in part:
            log.append({"n": number})
            assert storage.read_json_lines(path)[-1] == {"n": number}  # visible immediately
        log.close()
    assert storage.read_json_lines(path) == [{"n": 1}, {"n": 2}, {"n": 3}]


def test_log_can_be_rewound(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = JsonLines(path)
    for number in range(5):
        log.append({"n": number})
    log.close()
    log = JsonLines(path, keep=lambda record: record["n"] < 3)
    log.append({"n": "new"})
    log.close()
    assert [r["n"] for r in storage.read_json_lines(path)] == [0, 1, 2, "new"]


@pytest.mark.parametrize("keep", [None, lambda record: True])
def test_truncated_last_line_is_dropped(tmp_path: Path, keep: Any) -> None:
    path = tmp_path / "log.jsonl"
    complete = json.dumps({"n": 1}) + "\n"
    for cut in ('{"n": 2', '{"n": 22}', "{"):  # the second is valid JSON, but has no newline
        path.write_text(complete + cut)
        assert storage.read_json_lines(path) == [{"n": 1}]
        log = JsonLines(path, keep)
        log.append({"n": 3})
        log.close()
        assert path.read_text() == complete + json.dumps({"n": 3}) + "\n"


def test_rewinding_a_log_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"n": 1}\n{"n": 2}\n')
    kill_in(monkeypatch, "replace")
    with pytest.raises(Killed):
        JsonLines(path, keep=lambda record: record["n"] < 2)
    assert path.read_text() == '{"n": 1}\n{"n": 2}\n'
