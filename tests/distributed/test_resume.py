"""Ranks that resume compute the same bits as ranks that were never stopped."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.conftest import End, same_bits

# 4 MB of gradients: more than one of DDP's buckets, which start at 1 MiB.
LARGE = ("--model.n-embd", 128, "--model.n-layer", 4, "--steps", 6, "--checkpoint-every", 2)


@pytest.mark.parametrize(
    ("count", "compiled"),
    [(2, False), (3, False), *(pytest.param(n, True, marks=pytest.mark.slow) for n in (2, 3))],
)
def test_resumed_ranks_compute_the_same_bits(
    tmp_path: Path, ranks: Callable[..., End], records: Callable[..., list[dict[str, Any]]],
    count: int, compiled: bool,
) -> None:  # fmt: skip
    flags = (*LARGE, "--batch.tokens", 16 * 4 * count, "--micro-batch", 2)
    flags += ("--compile", "--timeout", 300) if compiled else ()
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    end = ranks(count, straight, flags=flags)
    assert end.status == 0, end.err
    shutil.copytree(straight, resumed)
    for step in ("000004", "000006"):
        shutil.rmtree(resumed / "checkpoints" / f"step-{step}")
    end = ranks(count, resumed, flags=flags)
    assert end.status == 0, end.err
    assert same_bits(resumed, straight)
    assert records(resumed, "train") == records(straight, "train")
