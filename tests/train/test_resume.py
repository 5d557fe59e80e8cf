"""A run that was stopped equals one that was not, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import rekindle.start
import rekindle.trainer
from rekindle import checkpoint, storage
from rekindle import trainer as rekindle_trainer
from rekindle.evaluate.evaluator import Evaluator
from tests.conftest import updates

# Runs a training in which one call of a function ends the process as `kill -9` does.
KILL = """
import importlib, os, signal, sys
from rekindle.cli import main

module, function, at = sys.argv[1], sys.argv[2], int(sys.argv[3])
module = importlib.import_module(module)
original, calls = getattr(module, function), 0

def deadly(*arguments, **options):
    global calls
    calls += 1
    if calls == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **options)

setattr(module, function, deadly)
main(sys.argv[4:])
"""

OTHER_KINDS = ("train", "validation", "samples")

Train = Callable[..., Any]
Records = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def straight_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("straight") / "run"


@pytest.fixture
def straight(straight_folder: Path, train: Train) -> Path:
    """The run of 12 steps that nobody disturbed. Its 10th batch is the last of the first epoch."""
    if not straight_folder.exists():
        train(straight_folder)
    return straight_folder


def raise_before(patch: pytest.MonkeyPatch, step: int, error: type[BaseException]) -> list[int]:
    """From now on `error` comes before `step`; the list tells which steps were begun."""
    original, calls = rekindle.trainer.learning_rate, []

    def interrupted(at: int, **options: Any) -> float:
        calls.append(at)
        if at == step:
            raise error
        return original(at, **options)

    patch.setattr(rekindle.trainer, "learning_rate", interrupted)
    return calls


def stop_before(monkeypatch: pytest.MonkeyPatch, train: Train, step: int, *arguments: Any) -> None:
    """Start a training that is interrupted when it comes to `step`."""
    with monkeypatch.context() as patch:
        calls = raise_before(patch, step, Interrupted)
        with pytest.raises(Interrupted):
            train(*arguments)
    assert calls[-1] == step


class Interrupted(Exception):
    """Somebody pressed a key, or the machine was taken away."""


def final_state(run: Path, step: int = 12) -> dict[str, Any]:
    """Everything a run's last checkpoint holds, and that may not differ."""
    folder = run / "checkpoints" / f"step-{step:06d}"
    checkpoint.load(folder)
    description = storage.read_json(folder / "checkpoint.json")
    return {
        "model": (folder / "model.safetensors").read_bytes(),
        "optimizer": (folder / "optimizer.safetensors").read_bytes(),
        "data_position": description["data_position"],
    }


def assert_same(run: Path, other: Path, records: Records) -> None:
    assert final_state(run) == final_state(other)
    # Every loss, norm and sample, and each of them once; a checkpoint is told of when it is whole.
    assert records(run, "checkpoint") == records(other, "checkpoint")
    for each in zip(records(run, *OTHER_KINDS), records(other, *OTHER_KINDS), strict=True):
        assert each[0] == each[1]


@pytest.mark.parametrize("at", [2, 4, 6, 9, 11])
def test_a_stopped_run_goes_on_to_the_same_bits(
    straight: Path,
    tmp_path: Path,
    train: Train,
    records: Records,
    monkeypatch: pytest.MonkeyPatch,
    at: int,
) -> None:
    """Before its first checkpoint, just after one, between two, and across the epoch's end."""
    out = tmp_path / "run"
    stop_before(monkeypatch, train, at, out)
    outcome = train(out)
    if at < 4:
        assert "starts at step 0 of 12" in outcome.out
    else:
        assert f"resumes at step {at // 4 * 4} of 12" in outcome.out
    assert_same(out, straight, records)


def test_stopped_again_and_again(
    straight: Path,
    tmp_path: Path,
    train: Train,
    records: Records,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for at in (5, 6, 10):
        stop_before(monkeypatch, train, at, tmp_path / "run")
    train(tmp_path / "run")
    assert_same(tmp_path / "run", straight, records)


def test_other_intervals_and_more_steps_change_no_step(
    straight: Path, tmp_path: Path, train: Train, records: Records
) -> None:
    """With a constant learning rate: with a cosine, more steps mean another one."""
    constant = ("--schedule.final", 1, "--schedule.warmup", 0)
    train(tmp_path / "whole", *constant)
    out = tmp_path / "parts"
    train(out, *constant, "--steps", 5, "--eval-every", 2, "--checkpoint-every", 0)
    outcome = train(out, *constant, "--eval-every", 3, "--checkpoint-every", 5)
    assert "resumes at step 5 of 12" in outcome.out
    assert final_state(out) == final_state(tmp_path / "whole")
    assert records(out, "train") == records(tmp_path / "whole", "train")
    assert [r["step"] for r in records(out, "validation")] == [0, 2, 4, 5, 6, 9, 12]
    assert [r["step"] for r in records(out, "checkpoint")] == [5, 10, 12]
    assert records(straight, "train") != records(out, "train")  # the schedule mattered


def test_a_finished_run_does_nothing_more(
    straight: Path, tmp_path: Path, train: Train, records: Records
) -> None:
    before, state = records(straight), final_state(straight)
    outcome = train(straight)
    assert "has finished all 12 steps; continue with --steps" in outcome.out
    assert records(straight) == before
    assert final_state(straight) == state


def test_the_learning_rate_goes_on_where_it_was(straight: Path, records: Records) -> None:
    from rekindle.optim.schedule import learning_rate

    rates = [r["lr"] for r in records(straight, "train")]
    expected = [learning_rate(s, peak=0.01, warmup=3, steps=12, final=0.1) for s in range(12)]
    assert rates == expected


def test_every_step_is_logged_once(straight: Path, records: Records) -> None:
    assert [r["step"] for r in records(straight, "train")] == list(range(12))
    assert [r["step"] for r in records(straight, "validation")] == [0, 4, 8, 12]
    assert {r["tokens"] for r in records(straight, "validation")} == {300}
    assert [r["step"] for r in records(straight, "checkpoint")] == [4, 8, 12]
    assert all(len(r["texts"]) == 2 for r in records(straight, "samples"))
    losses = [r["loss"] for r in records(straight, "train")]
    assert losses[-1] < losses[0]


def test_the_split_of_the_run_is_used_again(
    tmp_path: Path, train: Train, command: Callable, rekindle: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Micro-batch, threads, precision and compilation: without them the bits would differ."""
    flags = ("--micro-batch", 2, "--precision", "autocast")
    train(tmp_path / "whole", *flags)
    out = tmp_path / "run"
    stop_before(monkeypatch, train, 6, out, *flags)
    torch.set_num_threads(2)
    arguments = command(out)
    at = arguments.index("--precision")
    outcome = rekindle(*arguments[:at], *arguments[at + 2 :])
    assert outcome.status == 0, outcome.err
    assert "autocast" in outcome.out
    assert "2 rows x 16 x 4 micro-steps x 1 ranks" in outcome.out
    split = storage.read_json(out / "checkpoints" / "step-000012" / "checkpoint.json")["machine"]
    assert split["memory"] > 2**29
    assert split == {
        "micro_batch": 2, "threads": 1, "device": "cpu", "precision": "autocast",
        "compile": False, "kernels": False, "recompute": False, "shard": False,
        "deterministic": False, "keep_memory": True, "name": "CPU", "memory": split["memory"],
    }  # fmt: skip
    first = storage.read_json(out / "checkpoints" / "step-000004" / "checkpoint.json")["machine"]
    assert first == split


def test_a_run_begun_without_compilation_goes_on_without(
    tmp_path: Path, command: Callable, rekindle: Callable, train: Train,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    stop_before(monkeypatch, train, 6, tmp_path / "run")
    arguments = [a for a in command(tmp_path / "run") if a != "--no-compile"]
    outcome = rekindle(*arguments)
    assert outcome.status == 0
    assert "running without torch.compile: as the run was started" in outcome.out


def test_what_a_checkpoint_remembers(straight: Path, shard_set: Path) -> None:
    names = sorted(p.name for p in (straight / "checkpoints").iterdir())
    assert names == ["step-000004", "step-000008", "step-000012"]
    description = storage.read_json(straight / "checkpoints" / names[1] / "checkpoint.json")
    assert description["step"] == updates(straight / "checkpoints" / names[1]) == 8
    assert description["data_position"] == {"windows": 64}
    assert description["recipe"]["seed"] == 1337
    assert description["recipe"]["optim.lr"] == 0.01
    assert description["data"]["path"] == str(shard_set)
    assert len(description["data"]["fingerprint"]) == 64
    assert description["tokenizer"]["name"] == "bytes"
    assert description["versions"]["torch"] == torch.__version__
    assert description["model"]["padded_vocab_size"] == 384


def test_keep_checkpoints(tmp_path: Path, train: Train) -> None:
    train(tmp_path / "run", "--keep-checkpoints", 2, "--checkpoint-every", 2)
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-000010", "step-000012"]


# -- stopped while a checkpoint is being written --------------------------------------------------


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor file of a checkpoint takes much longer than a step."""
    original = storage.Folder.write_tensors

    def slow(self: storage.Folder, name: str, arrays: Any) -> None:
        time.sleep(0.3)
        original(self, name, arrays)

    monkeypatch.setattr(storage.Folder, "write_tensors", slow)


def test_a_slow_disk_changes_nothing(
    straight: Path, tmp_path: Path, train: Train, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written is the state at the time of the save, though the training has gone on."""
    out, went_on = tmp_path / "run", threading.Event()
    rate, write = rekindle.trainer.learning_rate, storage.Folder.write_tensors

    def learning_rate(step: int, **options: Any) -> float:
        if step == 7:  # step 6 is logged
            went_on.set()
        return rate(step, **options)

    def slow(self: storage.Folder, name: str, arrays: Any) -> None:
        assert went_on.wait(timeout=60)  # or the training waits for the disk
        write(self, name, arrays)

    monkeypatch.setattr(rekindle.trainer, "learning_rate", learning_rate)
    monkeypatch.setattr(storage.Folder, "write_tensors", slow)
    train(out)
    for step in (4, 8, 12):
        assert final_state(out, step) == final_state(straight, step)
    logged = storage.read_json_lines(out / "metrics.jsonl")
    order = [(r["kind"], r["step"]) for r in logged if r["kind"] in ("train", "checkpoint")]
    assert order.index(("checkpoint", 4)) > order.index(("train", 6))  # it did not stand still
    first = next(r for r in logged if r["kind"] == "checkpoint")
    assert 0 < first["stall_s"] < first["seconds"]


def test_an_error_does_not_cut_off_what_is_being_written(
    straight: Path, tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch, slow_disk: None
) -> None:
    out = tmp_path / "run"
    stop_before(monkeypatch, train, 5, out)
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-000004"]
    assert final_state(out, 4) == final_state(straight, 4)


def test_nor_does_ctrl_c(
    straight: Path, tmp_path: Path, rekindle: Callable, command: Callable, records: Records,
    monkeypatch: pytest.MonkeyPatch, slow_disk: None,
) -> None:  # fmt: skip
    out = tmp_path / "run"
    raise_before(monkeypatch, 5, KeyboardInterrupt)
    outcome = rekindle(*command(out))
    assert outcome.status == 130
    assert "finishing the checkpoint in progress" in outcome.out
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-000004"]
    assert final_state(out, 4) == final_state(straight, 4)
    assert [r["step"] for r in records(out, "checkpoint")] == [4]


# -- killed by the system -------------------------------------------------------------------------


@pytest.fixture
def kill(
    python: Callable[..., subprocess.CompletedProcess[str]], command: Callable, tmp_path: Path
) -> Callable[..., str]:
    """`kill(out, "module.function", n, *flags)`: train, and die in the n-th call."""

    def call(out: Path, function: str, at: int, *flags: object) -> str:
        script = tmp_path / "kill.py"
        script.write_text(KILL)
        module, _, name = function.rpartition(".")
        finished = python(script, module, name, at, *command(out), *flags)
        assert finished.returncode == -signal.SIGKILL, finished.stderr
        return finished.stdout

    return call


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_killed_while_it_writes_a_checkpoint(
    straight: Path, tmp_path: Path, train: Train, records: Records, kill: Callable[..., str]
) -> None:
    """Just before its second checkpoint gets its name: that of step 4 is the last one."""
    out = tmp_path / "run"
    printed = kill(out, "os.rename", 2)
    assert "step     8 | validation" in printed
    left = sorted(p.name for p in (out / "checkpoints").iterdir())
    assert left == [".tmp-step-000008", "step-000004"]
    assert "resumes at step 4" in train(out).out
    names = sorted(p.name for p in (out / "checkpoints").iterdir())
    assert names == ["step-000004", "step-000008", "step-000012"]
    assert_same(out, straight, records)


# -- forks ----------------------------------------------------------------------------------------


def test_a_fork_begins_where_the_other_run_was(
    straight: Path, tmp_path: Path, train: Train, records: Records
) -> None:
    """With nothing changed it is the same run, in another folder."""
    before = sorted(p.name for p in straight.rglob("*"))
    outcome = train(tmp_path / "fork", "--fork", straight / "checkpoints" / "step-000008")
    assert "forked at step 8 of " in outcome.out
    assert final_state(tmp_path / "fork") == final_state(straight)
    assert records(tmp_path / "fork", "train") == records(straight, "train")[8:]
    assert sorted(p.name for p in straight.rglob("*")) == before


def test_a_fork_may_change_the_recipe_and_goes_on_as_changed(
    straight: Path, tmp_path: Path, train: Train, records: Records, refuses: Callable,
    command: Callable, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    flags = ("--seed", 7, "--optim.lr", 0.02, "--steps", 16)
    train(tmp_path / "whole", "--fork", straight, *flags)  # the newest checkpoint: step 12
    assert [r["step"] for r in records(tmp_path / "whole", "train")] == [12, 13, 14, 15]
    out = tmp_path / "fork"
    stop_before(monkeypatch, train, 14, out, "--fork", straight, *flags, "--checkpoint-every", 1)
    train(out, "--fork", straight, *flags)  # the same command again
    assert final_state(out, 16) == final_state(tmp_path / "whole", 16)
    refuses(command(out), "--seed was 7, now 1337", "--optim.lr was 0.02, now 0.01")


def test_a_fork_stopped_before_its_own_first_checkpoint(
    straight: Path,
    tmp_path: Path,
    train: Train,
    records: Records,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(straight.parent)
    fork = ("--fork", Path("run") / "checkpoints" / "step-000004", "--optim.lr", 0.02)
    out, whole = tmp_path / "run", tmp_path / "whole"
    train(whole, *fork)
    stop_before(monkeypatch, train, 6, out, *fork)
    assert list((out / "checkpoints").iterdir()) == []
    monkeypatch.chdir(tmp_path)  # it knows its parent from anywhere
    assert "resumes at step 4 of 12" in train(out, *fork[2:]).out
    assert_same(out, whole, records)


def test_a_fork_outlives_its_parent(
    tmp_path: Path, train: Train, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "parent", "--steps", 4)
    fork = ("--fork", tmp_path / "parent" / "checkpoints" / "step-000004")
    stop_before(monkeypatch, train, 10, tmp_path / "fork", *fork)
    storage.remove_folder(tmp_path / "parent")
    train(tmp_path / "fork", *fork)  # the same command again
    assert [r["step"] for r in records(tmp_path / "fork", "train")] == list(range(4, 12))


# -- compiled -------------------------------------------------------------------------------------


# 30 s of C++; other tests here resume to the same bits, and model/test_compile.py compares what is
# compiled with what is not.
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(sys.platform == "darwin", reason="needs OpenMP for the compiler")
def test_compiled_with_two_threads_it_is_the_same_bits_too(
    tmp_path: Path, command: Callable, rekindle: Callable, records: Records,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """And clean names in the checkpoint, and no compilation after the first examination."""
    from torch._dynamo.utils import counters

    from rekindle.runtime.device import why_not_compile

    if reason := why_not_compile(torch.device("cpu")):
        pytest.skip(reason)

    def train_compiled(out: Path, *flags: object) -> str:
        torch.set_num_threads(2)
        arguments = [a for a in command(out) if a != "--no-compile"]
        outcome = rekindle(*arguments, "--model.n-layer", 1, *flags)  # half as much to compile
        assert outcome.status == 0, outcome.err
        return outcome.out

    counters.clear()
    assert "compiled" in train_compiled(tmp_path / "whole")
    graphs = counters["stats"]["unique_graphs"]
    assert 0 < graphs <= 3  # a step, and a validation
    stop_before(monkeypatch, train_compiled, 6, tmp_path / "run")
    train_compiled(tmp_path / "run")
    assert_same(tmp_path / "run", tmp_path / "whole", records)
    names = checkpoint.load(tmp_path / "run" / "checkpoints" / "step-000012").model
    assert not any("_orig_mod" in name for name in names)
    assert "transformer.h.0.mlp.c_fc.bias" in names
    split = json.loads(
        (tmp_path / "run" / "checkpoints" / "step-000012" / "checkpoint.json").read_text()
    )["machine"]
    assert (split["compile"], split["threads"]) == (True, 2)


def test_the_best_is_kept_though_the_run_was_stopped_before_it_was_examined(
    tmp_path: Path, train: Train, records: Records, rekindle: Callable, command: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """It is examined when the run goes on, and its checkpoint says so from then on."""
    flags = ["--eval-every", 2, "--checkpoint-every", 2, "--keep-best", 1, "--keep-checkpoints", 1]
    best, call = 6, Evaluator.__call__

    def judge(evaluator: Evaluator, step: int) -> float:
        call(evaluator, step)
        return 1.0 + abs(step - best)

    monkeypatch.setattr(Evaluator, "__call__", judge)
    train(tmp_path / "straight", *flags)
    original = rekindle_trainer.learning_rate

    def tell(step: int, **options: Any) -> float:
        if step == best - 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
        return original(step, **options)

    with monkeypatch.context() as patch:
        patch.setattr(rekindle_trainer, "learning_rate", tell)
        assert rekindle(*command(tmp_path / "run"), *flags).status == 128 + signal.SIGTERM
    train(tmp_path / "run", *flags)
    names = [
        [path.name for path in checkpoint.list_checkpoints(tmp_path / run / "checkpoints")]
        for run in ("straight", "run")
    ]
    assert names == [["step-000006", "step-000012"]] * 2
    assert records(tmp_path / "run", *OTHER_KINDS) == records(tmp_path / "straight", *OTHER_KINDS)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_run_that_goes_on_holds_no_file_of_its_checkpoint(
    straight: Path, tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On NFS and on Windows it could not be removed."""
    train(tmp_path / "run", "--steps", 8)
    original, seen = rekindle.trainer.learning_rate, []

    def look(step: int, **options: Any) -> float:
        seen.append("step-000008" in Path("/proc/self/maps").read_text())
        return original(step, **options)

    monkeypatch.setattr(rekindle.trainer, "learning_rate", look)
    assert "resumes at step 8 of 12" in train(tmp_path / "run").out
    assert len(seen) >= 4
    assert not any(seen)
