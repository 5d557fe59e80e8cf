"""A flipped bit in one rank's memory is detected before it is saved, and the rank is named."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rekindle.errors import UserError
from rekindle.model.gpt2 import GPT2
from rekindle.optim.adamw import AdamW
from rekindle.optim.adamw_config import AdamWConfig
from rekindle.recipes import Recipe
from rekindle.runtime import replicas
from rekindle.runtime.distributed import World
from tests.distributed.conftest import End, read_notes, saved

Ranks = Callable[..., End]
WEIGHT = "transformer.h.1.mlp.c_fc.weight"
ADVICE = (
    " after step {}: faulty memory or a faulty GPU; replace it, then run the same command to "
    "resume from the newest checkpoint"
)


def test_two_ranks_that_disagree_are_both_named(tmp_path: Path, ranks: Ranks) -> None:
    """The lowest bit of a weight, detected when the next checkpoint is due. The run can resume."""
    out = tmp_path / "run"
    fault = {"rank": 1, "step": 6, "do": "flip", "what": "weight", "name": WEIGHT, "bit": 0}
    end = ranks(2, out, fault)
    assert end.status != 0
    assert sorted(end.errors) == [
        f"rekindle: error (rank {rank}): {WEIGHT} differs between ranks 0, 1{ADVICE.format(7)}"
        for rank in (0, 1)
    ], end.err
    assert saved(out) == ["step-000004"]
    assert ranks(2, out).status == 0


def test_majority_of_three_ranks_is_right(tmp_path: Path, ranks: Ranks) -> None:
    """Optimizer state, without a checkpoint: ranks are also compared every 100 steps."""
    out = tmp_path / "run"
    flags = ("--batch.tokens", 96, "--checkpoint-every", 0, "--steps", 110, "--eval-every", 0)
    fault = {"rank": 1, "step": 90, "do": "flip", "what": "exp_avg_sq", "name": WEIGHT, "bit": 24}
    end = ranks(3, out, fault, flags=flags)
    assert end.status != 0
    message = f"{WEIGHT} on rank 1 differs from the other ranks{ADVICE.format(99)}"
    assert end.errors
    assert set(end.errors) <= {f"rekindle: error (rank {rank}): {message}" for rank in range(3)}
    assert max(read_notes(out)) == 99
    assert saved(out) == []


@dataclass(frozen=True)
class Stub(World):
    """A world where `others` have these checksums, and the remaining ranks those of this rank."""

    others: dict[int, Tensor] = field(default_factory=dict)
    given: list[Tensor] = field(default_factory=list)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        self.given.append(tensor)
        return [self.others.get(rank, tensor) for rank in range(self.size)]


@pytest.fixture
def trained(tiny: Recipe) -> tuple[GPT2, AdamW]:
    """A model and its optimizer after one step."""
    model = GPT2(tiny.model.for_training())
    optimizer = AdamW(model, AdamWConfig(lr=1e-3))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step(torch.tensor(False))
    return model, optimizer


def flipped(model: GPT2, optimizer: AdamW, what: str, bit: int) -> Tensor:
    """The checksums of a rank with one flipped bit."""
    model, optimizer = deepcopy((model, optimizer))
    p = model.get_parameter(WEIGHT)
    tensor = p.detach() if what == "weight" else optimizer.state_tensors()[f"{what}.{WEIGHT}"]
    tensor.view(torch.int32)[3, 7] ^= torch.tensor(1 << bit).to(torch.int32)
    stub = Stub(size=2)
    replicas.compare(model, optimizer, stub, 1)
    return stub.given[0]


@pytest.mark.parametrize("what", ["weight", "exp_avg", "exp_avg_sq"])
def test_any_flipped_bit_is_detected(trained: tuple[GPT2, AdamW], what: str) -> None:
    name = WEIGHT if what == "weight" else f"{what}.{WEIGHT}"
    replicas.compare(*trained, Stub(size=3), 8)
    for bit in (0, 11, 23, 30, 31):
        stub = Stub(size=3, others={2: flipped(*trained, what, bit)})
        with pytest.raises(UserError) as error:
            replicas.compare(*trained, stub, 8)
        assert str(error.value) == (
            f"{name} on rank 2 differs from the other ranks{ADVICE.format(7)}"
        )


@pytest.mark.parametrize(
    ("size", "bits", "named"),
    [
        (3, {0: 1}, "on rank 0 differs"),
        (4, {0: 1, 3: 2}, "differs between ranks 0, 1, 2, 3 "),  # two of four: not a majority
        (5, {0: 1, 3: 2}, "differs between ranks 0, 3 "),
        (5, {0: 1, 1: 1, 2: 2}, "differs between ranks 0, 1, 2, 3, 4 "),  # nor two of five
        (3, {1: 1, 2: 2}, "differs between ranks 0, 1, 2 "),
    ],
)
def test_only_a_majority_is_right(
    trained: tuple[GPT2, AdamW], size: int, bits: dict[int, int], named: str
) -> None:
    others = {rank: flipped(*trained, "weight", bit) for rank, bit in bits.items()}
    with pytest.raises(UserError, match=named):
        replicas.compare(*trained, Stub(size=size, others=others), 8)
