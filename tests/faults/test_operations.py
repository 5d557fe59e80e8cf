"""A crash before any operation that changes the disk, or in the middle of a write, loses nothing.

One run is traced, and the content of its folder before each operation is recorded: exactly the
state that a kill at that moment leaves. From each state, the same command is run again and must end
with the same bits as the uninterrupted run. The same holds for the states after a power cut, except
for the log, which is not flushed at every line.
"""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rekindle import checkpoint, storage
from rekindle import trainer as rekindle_trainer
from rekindle.data import shards

Records = Callable[..., list[dict[str, Any]]]
# The shortest run with all operations: two checkpoints, the first of which is removed again.
FLAGS = ["--steps", 3, "--checkpoint-every", 2, "--eval-every", 2, "--keep-checkpoints", 1,
         "--keep-best", 0, "--micro-batch", 8, "--model.n-layer", 1,
         "--eval-tokens", 99]  # fmt: skip
CALLS = {"create", "truncate", "write", "half", "fsync", "rename", "mkdir", "rmdir", "unlink"}


def bits(run: Path) -> tuple[Any, ...]:
    """The checkpoints of a finished run; checks that no unfinished files are left."""
    found = [checkpoint.load(path) for path in checkpoint.list_checkpoints(run / "checkpoints")]
    files = [(c.path / name).read_bytes() for c in found for name in checkpoint.FILES]
    keys = ("step", "data_position", "guard", "evaluated", "validation_loss")
    assert not list(run.rglob(".tmp-*"))
    return files, [{key: getattr(c.description, key) for key in keys} for c in found]


def log(run: Path, records: Records) -> list[list[dict[str, Any]]]:
    return [records(run, kind) for kind in ("train", "validation", "samples", "checkpoint")]


@pytest.fixture(scope="module")
def traces() -> dict[str, Any]:
    return {}


@pytest.fixture
def begun(
    traces: dict[str, Any], traced: Callable, tmp_path: Path, command: Callable, records: Records
) -> Any:
    """The trace of a new run, its checkpoints and its log; cached."""
    if "begun" not in traces:
        out = tmp_path / "straight"
        traces["begun"] = traced(out, [*command(out), *FLAGS]), bits(out), log(out, records)
    return traces["begun"]


@pytest.fixture
def resumed(
    traces: dict[str, Any], begun: Any, traced: Callable, tmp_path: Path, command: Callable,
    rekindle: Callable, records: Records, one_thread: None,
) -> Any:  # fmt: skip
    """The trace of a run that resumes and has everything to repair.

    It was stopped before the validation of step 2, which is caught up on. For step 3, there is an
    unfinished checkpoint, and a damaged one that is set aside.
    """
    if "resumed" not in traces:
        out = tmp_path / "resumed"
        stop_after(1, lambda: rekindle(*command(out), *FLAGS))
        written = "fsync checkpoints/.tmp-step-000003"
        disk = [disk for name, disk in begun[0].killed.items() if name.endswith(written)][-1]
        for folder in ("step-000003", ".tmp-step-000003"):
            (out / "checkpoints" / folder).mkdir()
            for name in checkpoint.FILES:
                content = disk[f"checkpoints/.tmp-step-000003/{name}"]
                (out / "checkpoints" / folder / name).write_bytes(content)
        traces["resumed"] = traced(out, [*command(out), *FLAGS]), bits(out), log(out, records)
        assert bits(out) == begun[1]
        assert log(out, records) == begun[2]
        renamed = [name for call, _, name in traces["resumed"][0].operations if call == "rename"]
        assert "checkpoints/damaged-step-000003" in renamed
        assert "checkpoints/step-000002/checkpoint.json" in renamed
    return traces["resumed"]


def stop_after(number: int, run: Callable[[], Any]) -> None:
    """Run until a signal in step `number`."""
    original = rekindle_trainer.learning_rate

    def signalled(step: int, **options: Any) -> float:
        if step == number:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)  # until this thread has received it
        return original(step, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rekindle_trainer, "learning_rate", signalled)
        assert run().status == 128 + signal.SIGTERM


@pytest.mark.parametrize("which", [pytest.param("begun", marks=pytest.mark.slow), "resumed"])
def test_run_killed_at_any_operation_ends_the_same(
    request: pytest.FixtureRequest, tmp_path: Path, train: Callable, records: Records,
    write_disk: Callable, which: str,
) -> None:  # fmt: skip
    trace, expected, logged = request.getfixturevalue(which)
    assert {call for call, *_ in trace.operations} >= CALLS
    for n, (operation, disk) in enumerate(trace.killed.items()):
        out = write_disk(tmp_path / str(n), disk)
        train(out, *FLAGS)
        assert bits(out) == expected, operation
        assert log(out, records) == logged, operation
        shutil.rmtree(out)
    print(f"{len(trace.operations)} operations, {len(trace.killed)} states")


@pytest.mark.parametrize("which", ["begun", "resumed"])
def test_run_after_a_power_cut_at_any_operation_ends_the_same(
    request: pytest.FixtureRequest, tmp_path: Path, train: Callable, write_disk: Callable,
    which: str,
) -> None:  # fmt: skip
    trace, expected, _ = request.getfixturevalue(which)
    assert trace.without_power
    for n, (operation, disk) in enumerate(trace.without_power.items()):
        out = write_disk(tmp_path / str(n), disk)
        train(out, *FLAGS)
        assert bits(out) == expected, operation
        shutil.rmtree(out)
    print(f"{len(trace.operations)} operations, {len(trace.without_power)} states")


# -- preparing data -------------------------------------------------------------------------------


@pytest.fixture
def prepare(tmp_path: Path) -> Callable[[Path], list[Any]]:
    """`prepare(out)`: the command that prepares a few shards of both splits."""
    chance = random.Random(0)
    texts = [" ".join(map(str, chance.choices(range(999), k=9))) for _ in range(200)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "texts.jsonl").write_text(lines)
    flags = ["--val-tokens", 900, "--shard-tokens", 500, "--tokenizer", "bytes"]
    return lambda out: ["prepare", "--jsonl", tmp_path / "texts.jsonl", "--out", out, *flags]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != storage.LOCK}


def test_preparation_interrupted_at_any_operation_ends_the_same(
    tmp_path: Path, rekindle: Callable, prepare: Callable, traced: Callable, write_disk: Callable
) -> None:
    """After kills and after power cuts."""
    trace = traced(tmp_path / "straight", prepare(tmp_path / "straight"))
    assert {call for call, *_ in trace.operations} == CALLS | {"end"}
    released = [p for call, p, _ in trace.operations if call == "unlink" and p[:9] == ".progress"]
    assert released  # a shard was assembled from saved pieces
    expected = contents(tmp_path / "straight")
    for operation, disk in [*trace.killed.items(), *trace.without_power.items()]:
        out = write_disk(tmp_path / "data", disk)
        outcome = rekindle(*prepare(out))
        assert outcome.status == 0, f"{operation}: {outcome.err}"
        complete = shards.MANIFEST in disk
        assert ("already prepared" in outcome.out) == complete, operation
        assert contents(out) == expected, operation
        shutil.rmtree(out)
    print(f"{len(trace.killed)} states after kills, {len(trace.without_power)} without power")


@pytest.mark.parametrize("which", ["begun", "resumed"])
def test_no_file_is_visible_half_written_or_half_removed(
    request: pytest.FixtureRequest, which: str
) -> None:
    """Only files with temporary names are changed in place, except for the lock and the log."""
    trace, *_ = request.getfixturevalue(which)
    in_place = {
        path for call, path, _ in trace.operations
        if call not in ("mkdir", "rename", "fsync", "end") and storage.TEMPORARY not in path
    }  # fmt: skip
    assert in_place == {storage.LOCK, "metrics.jsonl"}


@pytest.mark.parametrize("which", ["begun", "resumed"])
def test_names_are_flushed_before_anything_is_removed(
    request: pytest.FixtureRequest, which: str
) -> None:
    """Otherwise a power cut could lose the new name after the old file was removed."""
    assert_names_are_flushed(request.getfixturevalue(which)[0].operations)


def test_preparation_flushes_names(tmp_path: Path, prepare: Callable, traced: Callable) -> None:
    out = tmp_path / "data"
    assert_names_are_flushed(traced(out, prepare(out)).operations)


def assert_names_are_flushed(operations: list[tuple[str, str, str]]) -> None:
    waiting: set[str] = set()  # folders with a new name
    for call, path, other in operations:
        if call == "rename" and not Path(other).name.startswith(storage.TEMPORARY):
            waiting.add(str(Path(other).parent))
        elif call == "fsync":
            waiting.discard(path)
        elif call in ("unlink", "rmdir", "end") or call == "rename":
            assert not waiting, f"{call} {path} {other}"
