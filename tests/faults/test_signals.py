"""Told to stop, a run saves what it has done and ends within seconds; told twice, at once."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rekindle import train as rekindle_train
from rekindle.runtime import checkpoint
from rekindle.runtime.signals import ECHO, SIGNALS, Listener

Nursery = Callable[..., Any]
Records = Callable[..., list[dict[str, Any]]]
KINDS = ("train", "validation", "samples")


@pytest.fixture(autouse=True)
def hears_ctrl_c() -> Iterator[None]:
    """What a shell starts in the background ignores it, and so would these tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files")
def test_a_listener_leaves_nothing_open() -> None:
    before, handlers = len(os.listdir("/proc/self/fd")), [signal.getsignal(n) for n in SIGNALS]
    with Listener() as listener:
        assert len(os.listdir("/proc/self/fd")) == before + 2
    assert len(os.listdir("/proc/self/fd")) == before
    assert [signal.getsignal(n) for n in SIGNALS] == handlers
    assert not listener.told


@pytest.fixture
def tell(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """`tell(5, SIGTERM)`: this process gets the signal in step 5."""

    def arrange(at: int, number: int) -> None:
        original = rekindle_train.learning_rate

        def signalled(step: int, **options: Any) -> float:
            if step == at:
                os.kill(os.getpid(), number)
                time.sleep(0.05)  # until this thread has heard of it
            return original(step, **options)

        monkeypatch.setattr(rekindle_train, "learning_rate", signalled)

    return arrange


@pytest.mark.parametrize(("at", "number"), zip((5, 7, 0, 11), [*SIGNALS, SIGNALS[0]], strict=True))
def test_a_run_that_is_told_to_stop_goes_on_to_the_same_end(
    tmp_path: Path, train: Callable, rekindle: Callable, command: Callable, records: Records,
    tell: Callable, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, at: int,
) -> None:  # fmt: skip
    """In the first step, where no checkpoint is due, where one is, and in the last step."""
    train(tmp_path / "straight")
    out, before = tmp_path / "run", signal.getsignal(number)
    with monkeypatch.context():
        tell(at, number)
        outcome = rekindle(*command(out))
        monkeypatch.undo()
    assert outcome.status == 128 + number
    assert outcome.err == (
        f"rekindle: stopped by {number.name} after step {at}, and all of it is saved: the same "
        "command goes on\n"
    )
    assert signal.getsignal(number) == before
    assert checkpoint.list_checkpoints(out / "checkpoints")[-1].name == f"step-{at + 1:06d}"
    train(out)
    ends = [run / "checkpoints" / "step-000012" for run in (out, tmp_path / "straight")]
    for name in checkpoint.FILES:
        assert (ends[0] / name).read_bytes() == (ends[1] / name).read_bytes()
    assert records(out, *KINDS) == records(tmp_path / "straight", *KINDS)


def test_it_ends_within_seconds(tmp_path: Path, command: Callable, nursery: Nursery) -> None:
    began = time.monotonic()
    end = nursery(
        [*command(tmp_path / "run"), "--steps", 100_000], signal=signal.SIGTERM, after=1.5
    )
    assert end.status == 128 + signal.SIGTERM
    assert "stopped by SIGTERM" in end.err
    assert time.monotonic() - began < 20  # of a run that would take minutes


def test_a_second_signal_ends_it_at_once(
    tmp_path: Path, command: Callable, nursery: Nursery
) -> None:
    """Though the disk would take a minute; and nothing half-written is taken for a checkpoint."""
    began = time.monotonic()
    end = nursery(
        [*command(tmp_path / "run"), "--steps", 100_000, "--checkpoint-every", 0],
        signal=signal.SIGTERM, after=1.5, again=ECHO + 1, fault="fsync model 1 1 sleep60000",
    )  # fmt: skip
    assert end.status == 128 + signal.SIGTERM
    assert "stopped by" not in end.err
    assert time.monotonic() - began < 30
    assert not checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")


def test_a_second_signal_is_heard_where_python_is_not(
    python: Callable[..., Any],
) -> None:
    """The main thread waits in C++, as for a rank that never comes."""
    script = """
import os, signal, sys, threading, time
from datetime import timedelta
from torch.distributed import HashStore
from rekindle.runtime.signals import ECHO, Listener

def tell(twice):
    for _ in range(1 + twice):
        time.sleep(ECHO + 0.2)
        os.kill(os.getpid(), signal.SIGTERM)

twice = sys.argv[1] == "twice"
with Listener() as listener:
    threading.Thread(target=tell, args=[twice]).start()
    try:
        HashStore().wait(["what nobody sets"], timedelta(seconds=60 if twice else 2 * ECHO + 1))
    except RuntimeError:
        assert listener.told == signal.SIGTERM
        print("waited to the end")
"""
    once, twice = (python("-c", script, often) for often in ("once", "twice"))
    assert (once.returncode, once.stdout) == (0, "waited to the end\n"), once.stderr
    assert (twice.returncode, twice.stdout) == (128 + signal.SIGTERM, ""), twice.stderr


def test_an_echo_of_the_first_signal_is_not_a_second_one() -> None:
    """torchrun passes Ctrl-C on to processes that the terminal has told already."""
    with Listener() as listener:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        assert listener.told == signal.SIGINT


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Listener() as listener:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            assert not listener.told
    finally:
        signal.signal(signal.SIGINT, before)
