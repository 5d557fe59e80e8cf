"""After a stop signal, a run saves a checkpoint and ends within seconds; after two, at once."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch._C._distributed_c10d import HashStore

from rekindle import checkpoint
from rekindle import trainer as rekindle_trainer
from rekindle.evaluate import loss
from rekindle.runtime import signals as listening
from rekindle.runtime.signals import ECHO, SIGNALS, Listener

ForkServer = Callable[..., Any]
Records = Callable[..., list[dict[str, Any]]]
KINDS = ("train", "validation", "samples")


@pytest.fixture(autouse=True)
def receive_every_signal() -> Iterator[None]:
    """Undo that a shell started the tests in the background, or `nohup` did: they ignore some."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files")
def test_listener_leaves_no_open_files() -> None:
    before, handlers = len(os.listdir("/proc/self/fd")), [signal.getsignal(n) for n in SIGNALS]
    with Listener() as listener:
        assert len(os.listdir("/proc/self/fd")) == before + 2
    assert len(os.listdir("/proc/self/fd")) == before
    assert [signal.getsignal(n) for n in SIGNALS] == handlers
    assert not listener.signal


@pytest.fixture
def send_signal(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """`send_signal(5, SIGTERM)`: send the signal to this process in step 5."""

    def arrange(at: int, number: int) -> None:
        original = rekindle_trainer.learning_rate

        def signalled(step: int, **options: Any) -> float:
            if step == at:
                os.kill(os.getpid(), number)
                time.sleep(0.05)  # until this thread has received it
            return original(step, **options)

        monkeypatch.setattr(rekindle_trainer, "learning_rate", signalled)

    return arrange


@pytest.mark.parametrize(
    ("at", "number"), zip((5, 7, 0, 3, 11), [*SIGNALS, SIGNALS[0]], strict=True)
)
def test_stopped_run_resumes_to_the_same_result(
    tmp_path: Path, train: Callable, rekindle: Callable, command: Callable, records: Records,
    send_signal: Callable, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, at: int,
) -> None:  # fmt: skip
    """In the first step, with and without a checkpoint due, and in the last step."""
    train(tmp_path / "straight")
    out, before = tmp_path / "run", signal.getsignal(number)
    with monkeypatch.context():
        send_signal(at, number)
        outcome = rekindle(*command(out))
        monkeypatch.undo()
    assert outcome.status == 128 + number
    assert outcome.err == (
        f"rekindle: stopped by {number.name} after step {at}; a checkpoint was saved: run the "
        "same command to resume\n"
    )
    assert signal.getsignal(number) == before
    assert checkpoint.list_checkpoints(out / "checkpoints")[-1].name == f"step-{at + 1:06d}"
    train(out)
    ends = [run / "checkpoints" / "step-000012" for run in (out, tmp_path / "straight")]
    for name in checkpoint.FILES:
        assert (ends[0] / name).read_bytes() == (ends[1] / name).read_bytes()
    assert records(out, *KINDS) == records(tmp_path / "straight", *KINDS)


@pytest.mark.parametrize("at", [0, 4, 12])
def test_signal_during_an_evaluation_does_not_wait_for_its_end(
    tmp_path: Path, train: Callable, rekindle: Callable, command: Callable, records: Records,
    monkeypatch: pytest.MonkeyPatch, at: int,
) -> None:  # fmt: skip
    """The resumed run evaluates what the stopped one did not."""
    flags = ["--micro-batch", 1, "--eval-tokens", 200]
    train(tmp_path / "straight", *flags)
    out, original, batches = tmp_path / "run", loss.validation_batches, []

    def signalled(*arguments: Any) -> Iterator[Any]:
        for number, batch in enumerate(original(*arguments)):
            batches.append(number)
            if number == 2 and batches.count(0) == 1 + at // 4:  # evaluations so far
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.05)  # until the listening thread has received it
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(loss, "validation_batches", signalled)
        outcome = rekindle(*command(out), *flags)
    assert outcome.status == 128 + signal.SIGTERM
    assert batches[-1] == 2
    newest = checkpoint.list_checkpoints(out / "checkpoints")[-1]
    assert newest.name == f"step-{at:06d}"
    assert not checkpoint.load(newest).description.evaluated
    train(out, *flags)
    ends = [run / "checkpoints" / "step-000012" for run in (out, tmp_path / "straight")]
    for name in checkpoint.FILES:
        assert (ends[0] / name).read_bytes() == (ends[1] / name).read_bytes()
    assert records(out, *KINDS) == records(tmp_path / "straight", *KINDS)


def test_run_stops_at_the_next_step(
    tmp_path: Path, command: Callable, fork_server: ForkServer
) -> None:
    out = tmp_path / "run"
    end = fork_server(
        [*command(out), "--steps", 100_000],
        signal=signal.SIGTERM, until=str(out / "metrics.jsonl"),
    )  # fmt: skip
    assert end.status == 128 + signal.SIGTERM
    assert "stopped by SIGTERM" in end.err


def test_second_signal_ends_the_run_at_once(
    tmp_path: Path, command: Callable, fork_server: ForkServer
) -> None:
    """Even if the disk would take ten minutes. An unfinished file is not used as a checkpoint."""
    out = tmp_path / "run"
    end = fork_server(
        [*command(out), "--steps", 100_000, "--checkpoint-every", 0],
        signal=signal.SIGTERM, until=str(out / "metrics.jsonl"), again=ECHO + 0.5,
        fault="fsync model 1 1 sleep600000",
    )  # fmt: skip
    assert end.status == 128 + signal.SIGTERM
    assert "stopped by" not in end.err
    assert not checkpoint.list_checkpoints(out / "checkpoints")


@pytest.mark.parametrize("signals", [1, 1000])
def test_second_signal_works_while_the_main_thread_is_blocked(
    monkeypatch: pytest.MonkeyPatch, signals: int
) -> None:
    """The main thread is blocked in C++, as when waiting for a missing rank."""
    monkeypatch.setattr(listening, "ECHO", 0.05)
    seconds = 600 if signals > 1 else 0.5  # how long it is blocked
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            with Listener() as listener:
                threading.Thread(target=send_many, args=[signals], daemon=True).start()
                with suppress(RuntimeError):
                    HashStore().wait(["never set"], timedelta(seconds=seconds))
                while not listener.signal:
                    time.sleep(0.01)
                status = 42  # it waited to the end
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == (42 if signals == 1 else 128 + signal.SIGTERM)


def send_many(signals: int) -> None:
    for _ in range(signals):
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)


def test_an_echo_of_the_first_signal_is_not_a_second_one() -> None:
    """torchrun forwards Ctrl-C to processes that already received it from the terminal."""
    with Listener() as listener:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        assert listener.signal == signal.SIGINT


def test_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Listener() as listener:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            assert not listener.signal
    finally:
        signal.signal(signal.SIGINT, before)
