"""A run killed at random moments and resumed ends with the same bits as an uninterrupted one.

    REKINDLE_KILLS=5000 python -m pytest tests/faults/test_kills.py -m slow

kills that many times. The quick tests kill a few times, since `test_operations.py` covers every
state of the disk of one run; random kills add different orders of its threads.
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

KILLS = [12, pytest.param(int(os.environ.get("REKINDLE_KILLS", 200)), marks=pytest.mark.slow)]
STEPS = 20
FLAGS = ["--steps", STEPS, "--checkpoint-every", 3, "--eval-every", 6, "--keep-checkpoints", 2,
         "--micro-batch", 8]  # fmt: skip

ForkServer = Callable[..., Any]
Records = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The uninterrupted run, created by the first test that needs it."""
    return {"run": tmp_path_factory.mktemp("straight") / "run"}


@pytest.fixture
def train(
    command: Callable, fork_server: ForkServer, straight: dict[str, Any]
) -> Callable[..., Any]:
    """`train(out, fault=...)`: the tiny recipe in a process that may be killed."""

    def run(out: Path, **job: Any) -> Any:
        return fork_server([*command(out), *FLAGS], **job)

    if not straight["run"].exists():
        began = time.monotonic()
        assert run(straight["run"]).status == 0
        straight["seconds"] = time.monotonic() - began
    return run


def everything(run: Path, records: Records) -> tuple[Any, ...]:
    """Everything of a finished run that must not differ."""
    found = [checkpoint.load(path) for path in checkpoint.list_checkpoints(run / "checkpoints")]
    bits = [[(c.path / name).read_bytes() for name in checkpoint.FILES] for c in found]
    descriptions = [
        {
            key: getattr(c.description, key)
            for key in ("step", "data_position", "guard", "evaluated")
        }
        for c in found
    ]
    kinds = ("train", "validation", "samples", "checkpoint")
    assert not list(run.rglob(".tmp-*"))
    return (bits, descriptions, *(records(run, kind) for kind in kinds))


@pytest.mark.parametrize("wanted", KILLS)
def test_killed_at_random_moments(
    tmp_path: Path, train: Callable, straight: dict[str, Any], records: Records, wanted: int
) -> None:
    seed = int(os.environ.get("REKINDLE_SEED", time.time_ns() % 10**6))
    print(f"REKINDLE_SEED={seed}")
    chance, expected = random.Random(seed), everything(straight["run"], records)
    kills = runs = 0
    while kills < wanted:
        out, runs = tmp_path / f"run-{runs}", runs + 1
        while True:
            after = chance.uniform(0.0, straight["seconds"])
            end = train(out, signal=signal.SIGKILL, after=after)
            assert end.status in (0, -signal.SIGKILL), end.err
            if end.status == 0:
                break
            kills += 1
        assert everything(out, records) == expected
        shutil.rmtree(out)  # thousands of them would fill the disk
    print(f"{kills} kills in {runs} runs")
    assert runs > wanted / 40  # otherwise it was never killed near the end


# -- preparing data -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of documents that takes a fraction of a second to prepare."""
    chance, file = random.Random(0), tmp_path_factory.mktemp("texts") / "texts.jsonl"
    with open(file, "w") as lines:
        for n in range(1000):
            words = " ".join(str(chance.randrange(10**6)) for _ in range(40))
            lines.write(json.dumps({"text": f"Number {n}. {words}"}) + "\n")
    return file


def prepare(fork_server: ForkServer, texts: Path, out: Path, **job: Any) -> Any:
    flags = ["--val-tokens", 5000, "--shard-tokens", 25_000, "--tokenizer", "bytes"]
    return fork_server(["prepare", "--jsonl", texts, "--out", out, *flags], **job)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != storage.LOCK}


@pytest.mark.parametrize("wanted", KILLS)
def test_preparing_killed_at_random_moments(
    tmp_path: Path, fork_server: ForkServer, texts: Path, wanted: int
) -> None:
    began = time.monotonic()
    assert prepare(fork_server, texts, tmp_path / "straight").status == 0
    seconds, chance, kills = time.monotonic() - began, random.Random(), 0
    expected = contents(tmp_path / "straight")
    assert len(expected) > 10
    for n in range(max(1, wanted // 20)):
        out = tmp_path / f"data-{n}"
        for _ in range(10):  # after a kill before anything is saved, preparing starts again
            end = prepare(
                fork_server, texts, out, signal=signal.SIGKILL, after=chance.uniform(0.0, seconds)
            )
            assert end.status in (0, -signal.SIGKILL), end.err
            if end.status == 0:
                break
            kills += 1
        else:
            assert prepare(fork_server, texts, out).status == 0
        assert contents(out) == expected
    assert wanted < 20 or kills  # with few kills, all may come too late
