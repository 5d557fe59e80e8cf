"""Killed at any moment, the same command again ends with the bits of a run that nobody touched.

    REKINDLE_KILLS=5000 python -m pytest tests/faults/test_kills.py

kills as often as one likes; without it, enough for every change.
"""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rekindle import storage
from rekindle.runtime import checkpoint

KILLS = int(os.environ.get("REKINDLE_KILLS", 200))
STEPS = 40
FLAGS = ["--steps", STEPS, "--checkpoint-every", 3, "--eval-every", 6, "--keep-checkpoints", 2,
         "--batch.micro", 8]  # fmt: skip

Nursery = Callable[..., Any]
Records = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run that nobody disturbs, made by the first test that asks for it."""
    return {"run": tmp_path_factory.mktemp("straight") / "run"}


@pytest.fixture
def train(command: Callable, nursery: Nursery, straight: dict[str, Any]) -> Callable[..., Any]:
    """`train(out, fault=...)`: the tiny recipe in a process that may be killed."""

    def run(out: Path, **job: Any) -> Any:
        return nursery([*command(out), *FLAGS], **job)

    if not straight["run"].exists():
        began = time.monotonic()
        assert run(straight["run"]).status == 0
        straight["seconds"] = time.monotonic() - began
    return run


def everything(run: Path, records: Records) -> tuple[Any, ...]:
    """All that a run has at its end and that may not differ."""
    found = [checkpoint.load(path) for path in checkpoint.list_checkpoints(run / "checkpoints")]
    bits = [[(c.path / name).read_bytes() for name in checkpoint.FILES] for c in found]
    said = [
        {
            key: c.description[key]
            for key in ("step", "data_position", "guard", "updates", "examined")
        }
        for c in found
    ]
    kinds = ("train", "validation", "samples", "checkpoint")
    assert not list(run.rglob(".tmp-*"))
    return (bits, said, *(records(run, kind) for kind in kinds))


def test_killed_at_random_moments(
    tmp_path: Path, train: Callable, straight: dict[str, Any], records: Records
) -> None:
    seed = int(os.environ.get("REKINDLE_SEED", time.time_ns() % 10**6))
    print(f"REKINDLE_SEED={seed}")
    chance, expected = random.Random(seed), everything(straight["run"], records)
    kills = runs = 0
    while kills < KILLS:
        out, runs = tmp_path / f"run-{runs}", runs + 1
        while True:
            after = chance.uniform(0.0, straight["seconds"])
            end = train(out, signal=signal.SIGKILL, after=after)
            assert end.status in (0, -signal.SIGKILL), end.err
            if end.status == 0:
                break
            kills += 1
        assert everything(out, records) == expected
        shutil.rmtree(out)  # thousands of them would fill a disk
    print(f"{kills} kills in {runs} runs")
    assert runs > KILLS / 40  # else it was never killed near the end


# A model of this size is written in two calls: the length with the header, and the tensors.
MOMENTS = {
    "before anything": "write run.json 1 1 kill",
    "in the middle of run.json": "write run.json 1 1 half",
    "in the middle of the weights": "write model.safetensors 5 1 half",
    "in the middle of the moments": "write optimizer.safetensors 5 1 half",
    "in the middle of the description": "write checkpoint.json 3 1 half",
    "before the weights are on the disk": "fsync model.safetensors 2 1 kill",
    "after the weights are on the disk": "fsync model.safetensors 2 1 after",
    "before a file has its name": "rename optimizer.safetensors 2 1 kill",
    "after a file has its name": "rename optimizer.safetensors 2 1 after",
    "before the checkpoint has its name": "rename checkpoints/step-000006 1 1 kill",
    "after the checkpoint has its name": "rename checkpoints/step-000006 1 1 after",
    "before an old one is removed": "rename removed-step-000003 1 1 kill",
    "while an old one is removed": "rename removed-step-000003 1 1 after",
    "after the last checkpoint has its name": "rename checkpoints/step-000040 1 1 after",
    "before the last old one is removed": "rename removed-step-000036 1 1 kill",
    "in the middle of a line of the log": "write metrics.jsonl 9 1 half",
    "before a line of the log": "write metrics.jsonl 9 1 kill",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_on_purpose(
    tmp_path: Path, train: Callable, straight: dict[str, Any], records: Records, moment: str
) -> None:
    out = tmp_path / "run"
    end = train(out, fault=MOMENTS[moment])
    assert end.status == -signal.SIGKILL, f"it was never there: {end}"
    assert train(out).status == 0
    assert everything(out, records) == everything(straight["run"], records)


def test_killed_while_going_on(
    tmp_path: Path, train: Callable, straight: dict[str, Any], records: Records
) -> None:
    """While the log is cut back to the checkpoint."""
    out = tmp_path / "run"
    assert train(out, fault="write metrics.jsonl 30 1 kill").status == -signal.SIGKILL
    for fault in ("write .tmp-metrics.jsonl 2 1 half", "rename metrics.jsonl 1 1 kill"):
        assert train(out, fault=fault).status == -signal.SIGKILL
    assert train(out).status == 0
    assert everything(out, records) == everything(straight["run"], records)


# -- preparing data -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of documents, enough for a second's work."""
    import json

    chance, file = random.Random(0), tmp_path_factory.mktemp("texts") / "texts.jsonl"
    with open(file, "w") as lines:
        for n in range(4000):
            words = " ".join(str(chance.randrange(10**6)) for _ in range(40))
            lines.write(json.dumps({"text": f"Number {n}. {words}"}) + "\n")
    return file


def prepare(nursery: Nursery, texts: Path, out: Path, **job: Any) -> Any:
    flags = ["--val-tokens", 20000, "--shard-tokens", 100_000, "--tokenizer", "bytes"]
    return nursery(["prepare", "--jsonl", texts, "--out", out, *flags], **job)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != storage.LOCK}


@pytest.mark.parametrize("end", ["kill", "after"])
def test_preparing_killed_while_it_tidies_up(
    tmp_path: Path, nursery: Nursery, texts: Path, end: str
) -> None:
    assert prepare(nursery, texts, tmp_path / "straight").status == 0
    out, fault = tmp_path / "data", f"rename removed-.progress 1 1 {end}"
    assert prepare(nursery, texts, out, fault=fault).status == -signal.SIGKILL
    assert "prepared already" in prepare(nursery, texts, out).out
    assert contents(out) == contents(tmp_path / "straight")


def test_preparing_killed_at_random_moments(tmp_path: Path, nursery: Nursery, texts: Path) -> None:
    began = time.monotonic()
    assert prepare(nursery, texts, tmp_path / "straight").status == 0
    seconds, chance, kills = time.monotonic() - began, random.Random(), 0
    expected = contents(tmp_path / "straight")
    assert len(expected) > 10
    for n in range(max(3, KILLS // 30)):
        out = tmp_path / f"data-{n}"
        for _ in range(20):  # a kill before anything is saved begins anew
            end = prepare(
                nursery, texts, out, signal=signal.SIGKILL, after=chance.uniform(0.0, seconds)
            )
            assert end.status in (0, -signal.SIGKILL), end.err
            if end.status == 0:
                break
            kills += 1
        else:
            assert prepare(nursery, texts, out).status == 0
        assert contents(out) == expected
    assert kills
