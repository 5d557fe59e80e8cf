"""Ranks with injected faults, and tools to compare their runs."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rekindle import checkpoint, storage

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
Records = Callable[..., list[dict[str, Any]]]
Notes = dict[int, dict[int, dict[str, Any]]]  # by step and rank

# Weights are compared up to rounding, so they must not amplify noise: the gradient of the keys'
# bias is only rounding errors, which AdamW would amplify with its usual epsilon of 1e-8.
FLAGS = ("--optim.eps", "1e-4")
TIMEOUT = ("--timeout", "60")  # ranks that wait for each other must not block the tests


class End(NamedTuple):
    """How torchrun ended."""

    status: int
    out: str
    err: str
    seconds: float

    @property
    def errors(self) -> list[str]:
        """The messages of rekindle itself."""
        return [line for line in self.err.splitlines() if line.startswith("rekindle: ")]


@pytest.fixture(scope="session")
def fork_server() -> Iterator[Callable[..., list[End]]]:
    """`fork_server([{...}, ...])`: one torchrun for each host, see fork_server.py."""
    process = subprocess.Popen(
        [sys.executable, HERE / "fork_server.py"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    requests, results = process.stdin, process.stdout
    assert requests
    assert results

    def run(hosts: list[dict[str, Any]], limit: float = 200) -> list[End]:
        print(json.dumps({"hosts": hosts, "limit": limit}), file=requests, flush=True)
        return [End(**end) for end in json.loads(results.readline())]

    yield run
    requests.close()
    process.wait()


@pytest.fixture
def ranks(
    fork_server: Callable[..., list[End]], command: Callable[[Path], list[str]]
) -> Callable[..., End]:
    """`ranks(2, out, {fault}, {fault}, flags=[...], torchrun=[...])`: train with this many ranks,
    which write notes next to `out`. `patience`: seconds between torchrun's SIGTERM and SIGKILL."""

    def run(
        count: int, out: Path, *faults: dict[str, Any], flags: Any = (), torchrun: Any = (),
        patience: float = 30,
    ) -> End:  # fmt: skip
        rank = [json.dumps(faults), str(notes_of(out)), *command(out), *FLAGS, *TIMEOUT]
        rank += map(str, flags)
        options = ["--standalone", "--nproc-per-node", str(count), *torchrun]
        return fork_server([{"torchrun": options, "rank": rank, "patience": patience}])[0]

    return run


@pytest.fixture
def uninterrupted(ranks: Callable[..., End], tmp_path_factory: Any) -> Callable[..., Path]:
    """`uninterrupted(2, "--shard")`: a run with this many ranks, without faults."""

    def run(count: int, *flags: str) -> Path:
        out = tmp_path_factory.getbasetemp() / "-".join(["uninterrupted", str(count), *flags])
        if not out.exists():
            end = ranks(count, out, flags=flags)
            assert end.status == 0, end.err
        return out

    return run


def notes_of(out: Path) -> Path:
    """The folder where the ranks of the run `out` record what they train on."""
    folder = out.with_name(f"{out.name}-notes")
    folder.mkdir(exist_ok=True)
    return folder


def notes_by_rank(out: Path) -> dict[int, list[dict[str, Any]]]:
    """All notes of each rank, in the order of time."""
    files = sorted(notes_of(out).iterdir())
    return {int(f.stem.removeprefix("rank-")): storage.read_json_lines(f) for f in files}


def read_notes(out: Path) -> Notes:
    """Notes by step and rank; the last one of a step that was repeated."""
    notes: Notes = {}
    for rank, noted in notes_by_rank(out).items():
        for note in noted:
            notes.setdefault(note["step"], {})[rank] = note
    return notes


def global_batches(notes: Notes) -> dict[int, str]:
    """A hash of the rows of each step, in the order of the global batch: the rows of micro-batch
    m of rank r start at (m·ranks + r)·micro."""
    hashes = {}
    for step, by_rank in notes.items():
        rows = np.array([by_rank[r]["rows"] for r in sorted(by_rank)])
        hashes[step] = hash_rows(rows.swapaxes(0, 1).reshape(-1, rows.shape[-1]))
    return hashes


def hash_rows(rows: np.ndarray) -> str:
    return hashlib.sha256(rows.astype(np.int64).tobytes()).hexdigest()


def saved(out: Path) -> list[str]:
    return [path.name for path in checkpoint.list_checkpoints(out / "checkpoints")]


def same_bits(run: Path, other: Path) -> bool:
    """Whether two runs have the same newest checkpoint."""
    ends = [checkpoint.list_checkpoints(r / "checkpoints")[-1] for r in (run, other)]
    return ends[0].name == ends[1].name and all(
        (ends[0] / name).read_bytes() == (ends[1] / name).read_bytes() for name in checkpoint.FILES
    )


def assert_close(run: Path, other: Path, records: Records) -> None:
    """Equal up to rounding: losses, gradient norms, validation losses, weights."""
    logged, expected = records(run, "train", "validation"), records(other, "train", "validation")
    assert len(logged) == len(expected) == 12 + 4
    for record, like in zip(logged, expected, strict=True):
        assert (record["kind"], record["step"]) == (like["kind"], like["step"])
        assert record["loss"] == pytest.approx(like["loss"], rel=2e-6)
        if record["kind"] == "train":
            assert record["grad_norm"] == pytest.approx(like["grad_norm"], rel=2e-5)
            assert record["lr"] == like["lr"]
        else:
            assert record["tokens"] == like["tokens"] == 300
            assert record["bits_per_byte"] == pytest.approx(like["bits_per_byte"], rel=2e-6)
    weights, like = (load_file(last(r) / "model.safetensors") for r in (run, other))
    for name, weight in weights.items():
        torch.testing.assert_close(weight, like[name], rtol=1e-4, atol=2e-6, msg=name)


def last(run: Path) -> Path:
    return run / "checkpoints" / "step-000012"
