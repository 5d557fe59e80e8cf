"""A non-finite step or a loss spike is skipped; ten in a row roll the run back."""

import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import rekindle.start
import rekindle.trainer
from rekindle import checkpoint
from rekindle.data import shards
from rekindle.data.batches import Batches
from rekindle.data.tokenizer import ByteTokenizer
from rekindle.runtime.signals import Listener
from rekindle.train import StepResult
from tests.conftest import train_command, updates

Records = Callable[..., list[dict[str, Any]]]
# The loss falls from 6 to 2 within these steps, so only a strict guard detects a spike.
FLAGS = ["--steps", 60, "--checkpoint-every", 8, "--eval-every", 20, "--optim.lr", 0.03,
         "--spike", 3]  # fmt: skip


class Killed(BaseException):
    """Simulates the end of the process."""


@dataclass
class Watched:
    """Faults to inject into a run, by batch number, and a record of its steps."""

    faults: dict[int, str] = field(default_factory=dict)
    end: dict[int, Any] = field(default_factory=dict)  # before this batch: a signal, or `Killed`
    steps: list[tuple[int, float, str]] = field(default_factory=list)  # batch, lr, "skipped" or ""
    numbers: dict[bytes, int] = field(default_factory=dict)  # batch numbers by inputs
    listener: Listener = field(default_factory=Listener)

    def listen(self) -> Listener:
        self.listener = Listener()
        return self.listener

    def batch(self, original: Callable, *arguments: Any) -> tuple[np.ndarray, np.ndarray]:
        number = arguments[1]
        x, y = original(*arguments)
        self.numbers[np.ascontiguousarray(x).tobytes()] = number
        if self.faults.get(number) == "labels":
            y = np.random.default_rng(number).integers(
                0, 32, y.shape
            )  # tokens that the data does not contain
        return x, y

    def step(self, original: Callable, forward: Any, *arguments: Any, **options: Any) -> StepResult:
        _, optimizer, x, _ = arguments
        number = self.numbers[x.numpy().tobytes()]
        if (end := self.end.pop(number, None)) is Killed:
            raise Killed
        if end:
            os.kill(os.getpid(), end)
            while not self.listener.signal:  # another thread receives it
                time.sleep(0.001)
        where, _, what = self.faults.get(number, "").partition(" ")
        value = float(what or 1)

        def corrupted(x: Tensor, y: Tensor) -> tuple[Any, Tensor]:
            logits, loss = forward(x, y)
            return logits, loss * (value if where == "loss" else 1.0)

        def one_element(gradient: Tensor) -> Tensor:
            gradient = gradient.clone()
            gradient.view(-1)[7] = value
            return gradient

        weight = forward.transformer.h[1].mlp.c_fc.weight
        hook = weight.register_hook(one_element) if where == "gradient" else None
        before = bits(forward, optimizer)
        result = original(corrupted, *arguments, **options)
        if hook:
            hook.remove()
        assert (bits(forward, optimizer) == before) == result.skipped
        assert where != "gradient" or math.isfinite(result.loss)
        self.steps.append((number, options["lr"], "skipped" if result.skipped else ""))
        return result


def bits(model: torch.nn.Module, optimizer: Any) -> list[bytes]:
    """The bytes of the weights, the optimizer state and the count of updates."""
    tensors = (*model.parameters(), *optimizer.state_tensors().values())
    return [t.detach().numpy().tobytes() for t in tensors]


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Watched]:
    """`watch(faults, end)`: inject these faults into the following runs."""
    batch, step = Batches.batch, rekindle.trainer.train_step

    def begin(faults: dict[int, str], end: dict[int, Any] | None = None) -> Watched:
        watched = Watched(faults, end or {})
        monkeypatch.setattr(rekindle.start, "Listener", watched.listen)
        monkeypatch.setattr(Batches, "batch", lambda *a: watched.batch(batch, *a))
        monkeypatch.setattr(
            rekindle.trainer, "train_step", lambda *a, **o: watched.step(step, *a, **o)
        )
        return watched

    return begin


@pytest.fixture
def run(
    command: Callable, rekindle: Callable, tmp_path: Path, one_thread: None
) -> Callable[..., Any]:
    """`run("name")`: train for 60 steps, with a checkpoint every 8 steps."""
    return lambda name: rekindle(*command(tmp_path / name), *FLAGS)


def end_of(run: Path, records: Records) -> tuple[Any, ...]:
    """The parts of a finished run that must be equal in equal runs."""
    last = checkpoint.list_checkpoints(run / "checkpoints")[-1]
    description = checkpoint.load(last).description
    assert description.step == 60
    return (
        [(last / name).read_bytes() for name in checkpoint.FILES],
        {key: getattr(description, key) for key in ("data_position", "guard", "validation_loss")},
        records(run, "train", "validation", "samples", "rollback"),
    )


@pytest.fixture(scope="module")
def ends() -> dict[str, Any]:
    return {}


@pytest.fixture
def uninterrupted(
    watch: Callable, run: Callable, tmp_path: Path, records: Records, ends: dict[str, Any]
) -> Callable[[dict[int, str]], tuple[Any, ...]]:
    """`uninterrupted(faults)`: `end_of` a run with these faults that is not stopped; cached."""

    def end(faults: dict[int, str]) -> tuple[Any, ...]:
        if (name := str(faults)) not in ends:
            watch(faults)
            assert run("straight").status == 0
            ends[name] = end_of(tmp_path / "straight", records)
        return ends[name]

    return end


BAD = ["loss nan", "loss inf", "loss -inf", "gradient nan", "gradient inf", "gradient -inf"]


def test_skipped_step_consumes_its_batch_and_learning_rate(
    watch: Callable, run: Callable, tmp_path: Path
) -> None:
    """`Watched.step` checks that no bit of the weights and the optimizer state changes."""
    plain = watch({})
    assert run("plain").status == 0
    faults = {3 + 5 * n: bad for n, bad in enumerate(BAD)} | {50: "labels"}
    corrupted = watch(faults)
    assert run("run").status == 0
    assert [step[:2] for step in corrupted.steps] == [step[:2] for step in plain.steps]
    assert [number for number, _, skipped in corrupted.steps if skipped] == list(faults)
    last = checkpoint.load(tmp_path / "run" / "checkpoints" / "step-000060")
    assert updates(last.path) == 60 - len(faults)
    assert all(tensor.isfinite().all() for tensor in last.model.values())


def interrupt(run: Callable, number: Any) -> None:
    """Run until the signal or the kill that was passed to `watch`."""
    if number is Killed:
        with pytest.raises(Killed):
            run("run")
    else:
        assert run("run").status == 128 + number


@pytest.mark.parametrize("number", [signal.SIGTERM, Killed], ids=["stopped", "killed"])
@pytest.mark.parametrize("at", [5, 41, 52])
def test_guard_state_survives_a_stop(
    watch: Callable, run: Callable, uninterrupted: Callable, tmp_path: Path, records: Records,
    at: int, number: Any,
) -> None:  # fmt: skip
    """Before and during a series of skipped steps."""
    faults = dict.fromkeys((4, 5, 6, 8), "loss nan")
    faults |= dict.fromkeys((20, 40, 41, 51, 53), "labels")  # 20 is too early to be skipped
    expected = uninterrupted(faults)
    assert [r["step"] for r in expected[2] if r.get("skipped")] == [
        4, 5, 6, 8, 40, 41, 51, 53,
    ]  # fmt: skip
    watch(faults, {at: number})
    interrupt(run, number)
    assert run("run").status == 0
    assert end_of(tmp_path / "run", records) == expected


# -- ten in a row ----------------------------------------------------------------------------------

STREAK = dict.fromkeys(range(44, 54), "labels")


def test_ten_skipped_steps_roll_back_past_the_data(
    watch: Callable, run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result is the same as of a run on data without these batches."""
    watched = watch(STREAK)
    outcome = run("run")
    assert outcome.status == 0, outcome.err
    assert (
        "the 10 steps before step 54 were skipped in a row: rolled back to step 40, "
        "continuing with batch 54 (batches 40 to 53 are skipped)"
    ) in outcome.out
    assert [number for number, _, _ in watched.steps] == list(range(74))
    rates = [lr for _, lr, _ in watched.steps]
    assert rates[54:68] == rates[40:54]
    numbers = Batches.numbers
    with monkeypatch.context() as patch:
        patch.setattr(Batches, "numbers", lambda self, n: numbers(self, n + 14 if n >= 40 else n))
        watch({})
        assert run("without").status == 0
    ends = [tmp_path / name / "checkpoints" / "step-000060" for name in ("run", "without")]
    for name in checkpoint.FILES:
        assert (ends[0] / name).read_bytes() == (ends[1] / name).read_bytes()
    descriptions = [checkpoint.load(end).description for end in ends]
    assert descriptions[0].guard == descriptions[1].guard
    assert descriptions[0].data_position == {"windows": 74 * 8}


@pytest.mark.parametrize("number", [signal.SIGTERM, Killed], ids=["stopped", "killed"])
@pytest.mark.parametrize("at", [46, 53, 54])
def test_run_stopped_around_a_rollback_ends_the_same(
    watch: Callable, run: Callable, uninterrupted: Callable, tmp_path: Path, records: Records,
    at: int, number: Any,
) -> None:  # fmt: skip
    """In the streak, in its last step, and right after the rollback."""
    expected = uninterrupted(STREAK)
    watch(STREAK, {at: number})
    interrupt(run, number)
    assert run("run").status == 0
    assert end_of(tmp_path / "run", records) == expected


def test_rollback_ignores_checkpoints_saved_in_the_streak(
    watch: Callable, run: Callable, uninterrupted: Callable, tmp_path: Path, records: Records
) -> None:
    expected = uninterrupted(STREAK)
    watch(STREAK, {45: signal.SIGTERM, 49: signal.SIGUSR1})
    names = []
    for status in (128 + signal.SIGTERM, 128 + signal.SIGUSR1, 0):
        assert run("run").status == status
        found = checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")
        names.append([path.name for path in found[-2:]])
    assert names[0] == ["step-000040", "step-000046"]
    assert names[1] == ["step-000046", "step-000050"]
    assert not (tmp_path / "run" / "checkpoints" / "step-000050").exists()
    assert end_of(tmp_path / "run", records) == expected


def test_rollback_ignores_a_damaged_checkpoint(
    watch: Callable, run: Callable, tmp_path: Path
) -> None:
    """The checkpoint before it is used; the next start sets the damaged one aside."""
    watch(STREAK, {46: signal.SIGTERM})
    assert run("run").status == 128 + signal.SIGTERM
    watched = watch(STREAK)
    start, checkpoints = rekindle.start.start, tmp_path / "run" / "checkpoints"

    def damage(*arguments: Any) -> Any:
        session = start(*arguments)
        (checkpoints / "step-000040" / "model.safetensors").write_bytes(b"")
        return session

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rekindle.start, "start", damage)
        outcome = run("run")
    assert outcome.status == 0, outcome.err
    assert "rolled back to step 32, continuing with batch 54" in outcome.out
    assert watched.steps[-1][0] == 54 + 60 - 32 - 1


def test_no_scheduled_checkpoint_is_saved_in_a_streak(watch: Callable, run: Callable) -> None:
    watch(dict.fromkeys(range(44, 50), "labels"))
    outcome = run("run")
    assert "step    40 | saved" in outcome.out
    assert "step    48 | saved" not in outcome.out
    assert "step    56 | saved" in outcome.out


# -- noisy data, and real kills --------------------------------------------------------------------


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data whose batches 44 to 53, in order, are noise."""
    folder = tmp_path_factory.mktemp("noisy")
    chance = np.random.default_rng(0)
    tokens = (np.cumsum(chance.integers(0, 4, 128 * 75 + 1)) % 96 + 32).astype(np.uint16)
    tokens[128 * 44 : 128 * 54] = chance.integers(0, 32, 1280)
    entries = []
    for split in ("train", "val"):
        entries.append(shards.write_shard(folder / f"{split}.bin", [tokens], split, 1))
        tokens = tokens[:400]
    shards.Manifest(ByteTokenizer.name, ByteTokenizer.sha256, 257, {}, tuple(entries)).write(folder)
    return folder


@pytest.mark.parametrize(
    "fault",
    ["rename metrics.jsonl 1 1 kill", "rename metrics.jsonl 1 1 after",
     "write metrics.jsonl 75 1 kill", "write metrics.jsonl 76 1 half"],
)  # fmt: skip
def test_run_killed_during_a_rollback_ends_the_same(
    tmp_path: Path, fork_server: Callable, command: Callable, noisy: Path, records: Records,
    ends: dict[str, Any], fault: str,
) -> None:  # fmt: skip
    """Before and after the log is truncated, and in the lines that follow."""

    def train(name: str, **job: Any) -> Any:
        flags = [*FLAGS, "--data", noisy, "--batch.order", "sequential"]
        return fork_server([*command(tmp_path / name), *flags], **job)

    if "killed" not in ends:
        assert "rolled back to step 40, continuing with batch 54" in train("straight").out
        ends["killed"] = end_of(tmp_path / "straight", records)
    end = train("run", fault=fault)
    assert end.status == -signal.SIGKILL
    assert "saved" in end.out
    assert train("run").status == 0
    assert end_of(tmp_path / "run", records) == ends["killed"]
    (line,) = records(tmp_path / "run", "rollback")
    assert line == {"kind": "rollback", "step": 40, "skipped_at": 53, "next_batch": 54}


# -- weights that are not finite ------------------------------------------------------------------


HUGE = ("--optim.lr", 1e30, "--schedule.warmup", 0)


@pytest.mark.parametrize("flags", [("--optim.weight-decay", 1e30), ("--optim.eps", 1e-30)])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_run_that_ends_with_unusable_weights_fails(
    tmp_path: Path, command: Callable, rekindle: Callable, one_thread: None, flags: tuple,
    steps: int,
) -> None:  # fmt: skip
    """Weights that overflow, or are so large that every loss overflows."""
    outcome = rekindle(*command(tmp_path / "run"), *HUGE, *flags, "--steps", steps)
    assert outcome.status == 2
    assert "is not finite after step" in outcome.err or "a loss of nan" in outcome.err
    assert "lower --optim.lr" in outcome.err
    assert checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints") == []


@pytest.mark.parametrize("lr", [1e30, 1.0])
def test_without_a_validation_split_the_last_loss_decides(
    tmp_path: Path, write_shards: Callable, tiny_flags: list[str], rekindle: Callable, lr: float,
    one_thread: None,
) -> None:  # fmt: skip
    write_shards(tmp_path / "data", [700], [])
    flags = train_command(tmp_path / "data", tmp_path / "run", tiny_flags)
    outcome = rekindle(*flags, *HUGE, "--steps", 4, "--optim.lr", lr)
    if lr == 1e30:
        assert outcome.status == 2
        assert "the run ended with a loss of" in outcome.err
    else:
        assert outcome.status == 0, outcome.err


@pytest.mark.parametrize("what", ["weight", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_any_non_finite_number_is_found(tiny: Any, what: str, value: float) -> None:
    from rekindle.errors import UserError
    from rekindle.model.gpt2 import GPT2
    from rekindle.optim.adamw import AdamW
    from rekindle.optim.adamw_config import AdamWConfig
    from rekindle.runtime.distributed import World
    from rekindle.runtime.replicas import check_finite

    model = GPT2(tiny.model)
    optimizer = AdamW(model, AdamWConfig(lr=1e-3))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step(torch.tensor(False))
    check_finite(model, optimizer, World(), 7)
    name = "transformer.h.1.mlp.c_fc.weight"
    p = model.get_parameter(name)
    tensor = p.detach() if what == "weight" else optimizer.state_tensors()[f"{what}.{name}"]
    tensor[3, 5] = value
    called = name if what == "weight" else f"{what}.{name}"
    with pytest.raises(UserError, match=f"{called} is not finite after step 6"):
        check_finite(model, optimizer, World(), 7)
