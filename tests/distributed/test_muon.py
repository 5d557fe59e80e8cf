"""Muon on several ranks, each of which orthogonalizes a share of the matrices. gloo on the CPU."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.conftest import (
    TIMEOUT,
    End,
    last,
    notes_by_rank,
    notes_of,
    same_bits,
)

Ranks = Callable[..., End]
Records = Callable[..., list[dict[str, Any]]]

# 8 square, 2 tall and 2 wide matrices: three ranks get 3, 3 and 2 of the square ones, and 1, 1
# and 0 of the others. A batch has six rows, for one to three ranks. Epsilon as in conftest.py; the
# head's learning rate is lower than by rule, so that rounding is not amplified.
TINY = (
    "--device", "cpu", "--no-compile", "--precision", "fp32", "--model.n-layer", "2",
    "--model.n-embd", "16", "--model.head-size", "8", "--model.block-size", "32",
    "--model.value-embeddings", "1", "--batch.tokens", "96", "--batch.length", "16",
    "--steps", "12", "--eval-every", "4", "--checkpoint-every", "4", "--keep-checkpoints", "0",
    "--optim.lr", "0.03", "--optim.momentum-warmup", "5", "--optim.weight-decay", "0.5",
    "--optim.eps", "1e-4", "--optim.head-lr", "0.024",
    *TIMEOUT,
)  # fmt: skip
NAN = {"step": 5, "do": "nan"}


@pytest.fixture
def fast(fork_server: Callable[..., list[End]], shard_set: Path) -> Ranks:
    """`fast(3, out, {fault}, flags=[...])`: train a tiny modern model with this many
    ranks."""

    def run(count: int, out: Path, *faults: dict[str, Any], flags: Any = ()) -> End:
        rank = [json.dumps(faults), str(notes_of(out)), "train", "demo-fast", "--data",
                str(shard_set), "--out", str(out), *TINY, *flags]  # fmt: skip
        return fork_server([{"torchrun": ["--standalone", "--nproc-per-node", str(count)],
                         "rank": rank}])[0]  # fmt: skip

    return run


@pytest.fixture
def trained(fast: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """`trained(3)`: a run with this many ranks; the last one has a NaN loss in step 5."""

    def run(count: int) -> Path:
        out = tmp_path_factory.getbasetemp() / f"muon-{count}"
        if not out.exists():
            end = fast(count, out, {"rank": count - 1, **NAN})
            assert end.status == 0, end.err
        return out

    return run


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """The final weights and optimizer state."""
    return {
        **load_file(last(run) / "model.safetensors"),
        **load_file(last(run) / "optimizer.safetensors"),
    }


@pytest.mark.parametrize("count", [2, 3])
def test_several_ranks_match_one(
    trained: Callable[[int], Path], records: Records, count: int
) -> None:
    """After 11 updates and a skipped step, tensors agree within 5e-5 of their largest number, and
    losses within 1e-6. Other micro-batches round differently, which Newton-Schulz amplifies."""
    run, like = trained(count), trained(1)
    losses = [
        [r["loss"] for r in records(folder, "train", "validation") if not r.get("skipped")]
        for folder in (run, like)
    ]
    assert len(losses[0]) == 11 + 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    mine, theirs = tensors(run), tensors(like)
    assert list(mine) == list(theirs)
    assert mine["updates"].unique().tolist() == [11]
    for name, tensor in mine.items():
        largest = theirs[name].abs().max().item()
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=5e-5 * largest, msg=name)


@pytest.mark.parametrize("count", [2, 3])
def test_ranks_keep_the_same_bits_and_skip_the_same_step(
    trained: Callable[[int], Path], count: int
) -> None:
    """After every step. A skipped step changes neither weights nor state on any rank, although only
    one rank has a NaN."""
    noted = notes_by_rank(trained(count))
    assert sorted(noted) == list(range(count))
    for notes in noted.values():
        assert [n["step"] for n in notes if n["skipped"]] == [5]
        assert [(n["before"] == n["after"]) for n in notes] == [n["skipped"] for n in notes]
        assert [n["after"] for n in notes] == [n["after"] for n in noted[0]]


@pytest.mark.parametrize("count", [2, 3])
def test_resumed_ranks_have_the_same_bits(
    trained: Callable[[int], Path], fast: Ranks, records: Records, tmp_path: Path, count: int
) -> None:
    uninterrupted, resumed = trained(count), tmp_path / "resumed"
    shutil.copytree(uninterrupted, resumed)
    for step in ("000004", "000012"):
        shutil.rmtree(resumed / "checkpoints" / f"step-{step}")
    end = fast(count, resumed)
    assert end.status == 0, end.err
    assert "resumes at step 8" in end.out
    assert same_bits(resumed, uninterrupted)
    assert records(resumed, "train") == records(uninterrupted, "train")


def test_sharding_is_rejected_before_writing_anything(fast: Ranks, tmp_path: Path) -> None:
    end = fast(2, tmp_path / "run", flags=("--shard",))
    message = "muon cannot train a sharded model yet: leave out --shard"
    assert sorted(end.errors) == [f"rekindle: error (rank {rank}): {message}" for rank in (0, 1)]
    assert not (tmp_path / "run").exists()
