"""A run that was interrupted and resumed equals an uninterrupted run, bit for bit."""

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

# Trains, but kills the process (as `kill -9` does) on the n-th call of a given function.
KILL = """
import importlib, os, signal, sys
from rekindle.cli import main

module, function, at = sys.argv[1], sys.argv[2], int(sys.argv[3])
module = importlib.import_module(module)
original, calls = getattr(module, function), 0

def kill_at(*arguments, **options):
    global calls
    calls += 1
    if calls == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **options)

setattr(module, function, kill_at)
main(sys.argv[4:])
"""

OTHER_KINDS = ("train", "validation", "samples")

Train = Callable[..., Any]
Records = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def uninterrupted_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("uninterrupted") / "run"


@pytest.fixture
def uninterrupted(uninterrupted_folder: Path, train: Train) -> Path:
    """An uninterrupted run of 12 steps. Its 10th batch is the last of the first epoch."""
    if not uninterrupted_folder.exists():
        train(uninterrupted_folder)
    return uninterrupted_folder


def raise_before(patch: pytest.MonkeyPatch, step: int, error: type[BaseException]) -> list[int]:
    """Raise `error` before `step`. Returns a list that fills with the steps that were started."""
    original, calls = rekindle.trainer.learning_rate, []

    def interrupted(at: int, **options: Any) -> float:
        calls.append(at)
        if at == step:
            raise error
        return original(at, **options)

    patch.setattr(rekindle.trainer, "learning_rate", interrupted)
    return calls


def interrupt_before(
    monkeypatch: pytest.MonkeyPatch, train: Train, step: int, *arguments: Any
) -> None:
    """Train until `step`, then raise an exception."""
    with monkeypatch.context() as patch:
        calls = raise_before(patch, step, Interrupted)
        with pytest.raises(Interrupted):
            train(*arguments)
    assert calls[-1] == step


class Interrupted(Exception):
    """An interruption of the training loop."""


def final_state(run: Path, step: int = 12) -> dict[str, Any]:
    """The parts of a run's checkpoint that must be equal between equal runs."""
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
    # Every loss, grad norm and sample, each exactly once. Checkpoints are compared separately,
    # because one is logged when it is complete, which may be some steps later.
    assert records(run, "checkpoint") == records(other, "checkpoint")
    for each in zip(records(run, *OTHER_KINDS), records(other, *OTHER_KINDS), strict=True):
        assert each[0] == each[1]


@pytest.mark.parametrize("at", [2, 4, 6, 9, 11])
def test_resumed_run_has_the_same_bits(
    uninterrupted: Path,
    tmp_path: Path,
    train: Train,
    records: Records,
    monkeypatch: pytest.MonkeyPatch,
    at: int,
) -> None:
    """Interrupted before the first checkpoint, just after one, between two, and after an epoch."""
    out = tmp_path / "run"
    interrupt_before(monkeypatch, train, at, out)
    outcome = train(out)
    if at < 4:
        assert "starts at step 0 of 12" in outcome.out
    else:
        assert f"resumes at step {at // 4 * 4} of 12" in outcome.out
    assert_same(out, uninterrupted, records)


def test_run_interrupted_several_times_has_the_same_bits(
    uninterrupted: Path,
    tmp_path: Path,
    train: Train,
    records: Records,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for at in (5, 6, 10):
        interrupt_before(monkeypatch, train, at, tmp_path / "run")
    train(tmp_path / "run")
    assert_same(tmp_path / "run", uninterrupted, records)


def test_intervals_and_more_steps_do_not_change_the_training(
    uninterrupted: Path, tmp_path: Path, train: Train, records: Records
) -> None:
    """With a constant learning rate; a cosine schedule would depend on the number of steps."""
    constant = ("--schedule.final", 1, "--schedule.warmup", 0)
    train(tmp_path / "uninterrupted", *constant)
    out = tmp_path / "resumed"
    train(out, *constant, "--steps", 5, "--eval-every", 2, "--checkpoint-every", 0)
    outcome = train(out, *constant, "--eval-every", 3, "--checkpoint-every", 5)
    assert "resumes at step 5 of 12" in outcome.out
    assert final_state(out) == final_state(tmp_path / "uninterrupted")
    assert records(out, "train") == records(tmp_path / "uninterrupted", "train")
    assert [r["step"] for r in records(out, "validation")] == [0, 2, 4, 5, 6, 9, 12]
    assert [r["step"] for r in records(out, "checkpoint")] == [5, 10, 12]
    assert records(uninterrupted, "train") != records(
        out, "train"
    )  # `uninterrupted` has a cosine schedule


def test_finished_run_does_nothing(
    uninterrupted: Path, tmp_path: Path, train: Train, records: Records
) -> None:
    before, state = records(uninterrupted), final_state(uninterrupted)
    outcome = train(uninterrupted)
    assert "has finished all 12 steps; continue with --steps" in outcome.out
    assert records(uninterrupted) == before
    assert final_state(uninterrupted) == state


def test_learning_rate_follows_the_schedule(uninterrupted: Path, records: Records) -> None:
    from rekindle.optim.schedule import learning_rate

    rates = [r["lr"] for r in records(uninterrupted, "train")]
    expected = [learning_rate(s, peak=0.01, warmup=3, steps=12, final=0.1) for s in range(12)]
    assert rates == expected


def test_every_step_is_logged_once(uninterrupted: Path, records: Records) -> None:
    assert [r["step"] for r in records(uninterrupted, "train")] == list(range(12))
    assert [r["step"] for r in records(uninterrupted, "validation")] == [0, 4, 8, 12]
    assert {r["tokens"] for r in records(uninterrupted, "validation")} == {300}
    assert [r["step"] for r in records(uninterrupted, "checkpoint")] == [4, 8, 12]
    assert all(len(r["texts"]) == 2 for r in records(uninterrupted, "samples"))
    losses = [r["loss"] for r in records(uninterrupted, "train")]
    assert losses[-1] < losses[0]


def test_machine_settings_are_reused_on_resume(
    tmp_path: Path, train: Train, command: Callable, rekindle: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Micro-batch size, threads, precision and compilation all affect the last bits."""
    flags = ("--micro-batch", 2, "--precision", "autocast")
    train(tmp_path / "uninterrupted", *flags)
    out = tmp_path / "run"
    interrupt_before(monkeypatch, train, 6, out, *flags)
    torch.set_num_threads(2)
    arguments = command(out)
    at = arguments.index("--precision")
    outcome = rekindle(*arguments[:at], *arguments[at + 2 :])
    assert outcome.status == 0, outcome.err
    assert "autocast" in outcome.out
    assert "2 rows × 16 tokens × 4 accumulation steps × 1 rank" in outcome.out
    machine = storage.read_json(out / "checkpoints" / "step-000012" / "checkpoint.json")["machine"]
    assert machine["memory"] > 2**29
    assert machine == {
        "micro_batch": 2, "threads": 1, "device": "cpu", "precision": "autocast",
        "compile": False, "kernels": "none", "recompute": False, "shard": False,
        "deterministic": False, "keep_memory": True, "name": "CPU", "memory": machine["memory"],
        "fp8_head": False,
    }  # fmt: skip
    first = storage.read_json(out / "checkpoints" / "step-000004" / "checkpoint.json")["machine"]
    assert first == machine


def test_run_started_without_compilation_resumes_without(
    tmp_path: Path, command: Callable, rekindle: Callable, train: Train,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    interrupt_before(monkeypatch, train, 6, tmp_path / "run")
    arguments = [a for a in command(tmp_path / "run") if a != "--no-compile"]
    outcome = rekindle(*arguments)
    assert outcome.status == 0
    assert "not compiled: as when the run was started" in outcome.out


def test_checkpoint_description(uninterrupted: Path, shard_set: Path) -> None:
    names = sorted(p.name for p in (uninterrupted / "checkpoints").iterdir())
    assert names == ["step-000004", "step-000008", "step-000012"]
    description = storage.read_json(uninterrupted / "checkpoints" / names[1] / "checkpoint.json")
    assert description["step"] == updates(uninterrupted / "checkpoints" / names[1]) == 8
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


# -- interrupted while a checkpoint is being written ----------------------------------------------


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make writing a tensor file take much longer than a training step."""
    original = storage.Folder.write_tensors

    def slow(self: storage.Folder, name: str, arrays: Any) -> None:
        time.sleep(0.3)
        original(self, name, arrays)

    monkeypatch.setattr(storage.Folder, "write_tensors", slow)


def test_slow_disk_does_not_change_or_delay_training(
    uninterrupted: Path,
    tmp_path: Path,
    train: Train,
    records: Records,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The checkpoint holds the state at the time of the save, although training continues."""
    out, step_6_logged = tmp_path / "run", threading.Event()
    rate, write = rekindle.trainer.learning_rate, storage.Folder.write_tensors

    def learning_rate(step: int, **options: Any) -> float:
        if step == 7:  # step 6 is logged
            step_6_logged.set()
        return rate(step, **options)

    def slow(self: storage.Folder, name: str, arrays: Any) -> None:
        assert step_6_logged.wait(timeout=60)  # times out if training waits for the disk
        write(self, name, arrays)

    monkeypatch.setattr(rekindle.trainer, "learning_rate", learning_rate)
    monkeypatch.setattr(storage.Folder, "write_tensors", slow)
    train(out)
    for step in (4, 8, 12):
        assert final_state(out, step) == final_state(uninterrupted, step)
    logged = storage.read_json_lines(out / "metrics.jsonl")
    order = [(r["kind"], r["step"]) for r in logged if r["kind"] in ("train", "checkpoint")]
    assert order.index(("checkpoint", 4)) > order.index(("train", 6))  # training continued
    first = next(r for r in logged if r["kind"] == "checkpoint")
    assert 0 < first["stall_s"] < first["seconds"]


def test_error_lets_the_checkpoint_finish(
    uninterrupted: Path,
    tmp_path: Path,
    train: Train,
    monkeypatch: pytest.MonkeyPatch,
    slow_disk: None,
) -> None:
    out = tmp_path / "run"
    interrupt_before(monkeypatch, train, 5, out)
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-000004"]
    assert final_state(out, 4) == final_state(uninterrupted, 4)


def test_ctrl_c_lets_the_checkpoint_finish(
    uninterrupted: Path, tmp_path: Path, rekindle: Callable, command: Callable, records: Records,
    monkeypatch: pytest.MonkeyPatch, slow_disk: None,
) -> None:  # fmt: skip
    out = tmp_path / "run"
    raise_before(monkeypatch, 5, KeyboardInterrupt)
    outcome = rekindle(*command(out))
    assert outcome.status == 130
    assert "finishing the checkpoint in progress" in outcome.out
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-000004"]
    assert final_state(out, 4) == final_state(uninterrupted, 4)
    assert [r["step"] for r in records(out, "checkpoint")] == [4]


# -- killed ---------------------------------------------------------------------------------------


@pytest.fixture
def kill(
    python: Callable[..., subprocess.CompletedProcess[str]], command: Callable, tmp_path: Path
) -> Callable[..., str]:
    """`kill(out, "module.function", n, *flags)`: train in a process that is killed in the n-th call
    of the function. Returns its output."""

    def call(out: Path, function: str, at: int, *flags: object) -> str:
        script = tmp_path / "kill.py"
        script.write_text(KILL)
        module, _, name = function.rpartition(".")
        finished = python(script, module, name, at, *command(out), *flags)
        assert finished.returncode == -signal.SIGKILL, finished.stderr
        return finished.stdout

    return call


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_killed_while_writing_a_checkpoint(
    uninterrupted: Path, tmp_path: Path, train: Train, records: Records, kill: Callable[..., str]
) -> None:
    """Killed just before its second checkpoint is renamed, so the one of step 4 is the newest."""
    out = tmp_path / "run"
    printed = kill(out, "os.rename", 2)
    assert "step     8 | validation" in printed
    left = sorted(p.name for p in (out / "checkpoints").iterdir())
    assert left == [".tmp-step-000008", "step-000004"]
    assert "resumes at step 4" in train(out).out
    names = sorted(p.name for p in (out / "checkpoints").iterdir())
    assert names == ["step-000004", "step-000008", "step-000012"]
    assert_same(out, uninterrupted, records)


# -- forks ----------------------------------------------------------------------------------------


def test_fork_continues_from_the_parent(
    uninterrupted: Path, tmp_path: Path, train: Train, records: Records
) -> None:
    """A fork with an unchanged recipe equals the rest of the parent run."""
    before = sorted(p.name for p in uninterrupted.rglob("*"))
    outcome = train(tmp_path / "fork", "--fork", uninterrupted / "checkpoints" / "step-000008")
    assert "forked at step 8 of " in outcome.out
    assert final_state(tmp_path / "fork") == final_state(uninterrupted)
    assert records(tmp_path / "fork", "train") == records(uninterrupted, "train")[8:]
    assert sorted(p.name for p in uninterrupted.rglob("*")) == before


def test_fork_may_change_the_recipe(
    uninterrupted: Path, tmp_path: Path, train: Train, records: Records, refuses: Callable,
    command: Callable, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    flags = ("--seed", 7, "--optim.lr", 0.02, "--steps", 16)
    train(
        tmp_path / "uninterrupted", "--fork", uninterrupted, *flags
    )  # the newest checkpoint: step 12
    assert [r["step"] for r in records(tmp_path / "uninterrupted", "train")] == [12, 13, 14, 15]
    out = tmp_path / "fork"
    interrupt_before(
        monkeypatch, train, 14, out, "--fork", uninterrupted, *flags, "--checkpoint-every", 1
    )
    train(out, "--fork", uninterrupted, *flags)  # the same command again
    assert final_state(out, 16) == final_state(tmp_path / "uninterrupted", 16)
    refuses(command(out), "--seed was 7, now 1337", "--optim.lr was 0.02, now 0.01")


def test_fork_interrupted_before_its_first_checkpoint(
    uninterrupted: Path,
    tmp_path: Path,
    train: Train,
    records: Records,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(uninterrupted.parent)
    fork = ("--fork", Path("run") / "checkpoints" / "step-000004", "--optim.lr", 0.02)
    out, expected = tmp_path / "run", tmp_path / "expected"
    train(expected, *fork)
    interrupt_before(monkeypatch, train, 6, out, *fork)
    assert list((out / "checkpoints").iterdir()) == []
    monkeypatch.chdir(tmp_path)  # the parent's path is recorded as an absolute one
    assert "resumes at step 4 of 12" in train(out, *fork[2:]).out
    assert_same(out, expected, records)


def test_fork_does_not_need_its_parent_after_its_first_checkpoint(
    tmp_path: Path, train: Train, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "parent", "--steps", 4)
    fork = ("--fork", tmp_path / "parent" / "checkpoints" / "step-000004")
    interrupt_before(monkeypatch, train, 10, tmp_path / "fork", *fork)
    storage.remove_folder(tmp_path / "parent")
    train(tmp_path / "fork", *fork)  # the same command again
    assert [r["step"] for r in records(tmp_path / "fork", "train")] == list(range(4, 12))


# -- compiled -------------------------------------------------------------------------------------


# Slow: compiles C++ for 30 s. Other tests here compare resumed runs, and model/test_compile.py
# compares compiled with eager models.
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(sys.platform == "darwin", reason="needs OpenMP for the compiler")
def test_compiled_run_on_two_threads_resumes_to_the_same_bits(
    tmp_path: Path, command: Callable, rekindle: Callable, records: Records,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Also checks that parameter names are unchanged and that nothing is compiled after the first
    evaluation."""
    from torch._dynamo.utils import counters

    from rekindle.runtime.device import why_not_compile

    if reason := why_not_compile(torch.device("cpu")):
        pytest.skip(reason)

    def train_compiled(out: Path, *flags: object) -> str:
        torch.set_num_threads(2)
        arguments = [a for a in command(out) if a != "--no-compile"]
        outcome = rekindle(*arguments, "--model.n-layer", 1, *flags)  # one layer compiles faster
        assert outcome.status == 0, outcome.err
        return outcome.out

    counters.clear()
    assert "compiled" in train_compiled(tmp_path / "uninterrupted")
    graphs = counters["stats"]["unique_graphs"]
    assert 0 < graphs <= 3  # training step and validation
    interrupt_before(monkeypatch, train_compiled, 6, tmp_path / "run")
    train_compiled(tmp_path / "run")
    assert_same(tmp_path / "run", tmp_path / "uninterrupted", records)
    names = checkpoint.load(tmp_path / "run" / "checkpoints" / "step-000012").model
    assert not any("_orig_mod" in name for name in names)
    assert "transformer.h.0.mlp.c_fc.bias" in names
    machine = json.loads(
        (tmp_path / "run" / "checkpoints" / "step-000012" / "checkpoint.json").read_text()
    )["machine"]
    assert (machine["compile"], machine["threads"]) == (True, 2)


def test_best_checkpoint_is_kept_if_the_run_stopped_before_evaluating_it(
    tmp_path: Path, train: Train, records: Records, rekindle: Callable, command: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The resumed run evaluates the checkpoint and records the loss in it."""
    flags = ["--eval-every", 2, "--checkpoint-every", 2, "--keep-best", 1, "--keep-checkpoints", 1]
    best, call = 6, Evaluator.__call__

    def evaluate(evaluator: Evaluator, step: int) -> float:
        call(evaluator, step)
        return 1.0 + abs(step - best)

    monkeypatch.setattr(Evaluator, "__call__", evaluate)
    train(tmp_path / "uninterrupted", *flags)
    original = rekindle_trainer.learning_rate

    def signal_at(step: int, **options: Any) -> float:
        if step == best - 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
        return original(step, **options)

    with monkeypatch.context() as patch:
        patch.setattr(rekindle_trainer, "learning_rate", signal_at)
        assert rekindle(*command(tmp_path / "run"), *flags).status == 128 + signal.SIGTERM
    train(tmp_path / "run", *flags)
    names = [
        [path.name for path in checkpoint.list_checkpoints(tmp_path / run / "checkpoints")]
        for run in ("uninterrupted", "run")
    ]
    assert names == [["step-000006", "step-000012"]] * 2
    assert records(tmp_path / "run", *OTHER_KINDS) == records(
        tmp_path / "uninterrupted", *OTHER_KINDS
    )


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_resumed_run_closes_its_checkpoint_files(
    uninterrupted: Path, tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On NFS and on Windows, a checkpoint with open files cannot be removed."""
    train(tmp_path / "run", "--steps", 8)
    original, seen = rekindle.trainer.learning_rate, []

    def check_open_files(step: int, **options: Any) -> float:
        seen.append("step-000008" in Path("/proc/self/maps").read_text())
        return original(step, **options)

    monkeypatch.setattr(rekindle.trainer, "learning_rate", check_open_files)
    assert "resumes at step 8 of 12" in train(tmp_path / "run").out
    assert len(seen) >= 4
    assert not any(seen)
