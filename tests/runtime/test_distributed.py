"""What ranks say to each other, seen from one of them."""

import pytest
import torch
import torch.distributed as dist

from rekindle.errors import UserError
from rekindle.runtime.distributed import World, reason

GLOO = "[{}third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError(GLOO.format("/__w/pytorch/") + ":45. This is"), "Connection closed by peer"),
        (RuntimeError(GLOO.format("../") + ":45. This is"), "Connection closed by peer"),
        (dist.DistBackendError("NCCL error: remote process exited"), "NCCL error"),
    ],
)
def test_a_lost_rank_is_told_in_a_line(error: RuntimeError, said: str) -> None:
    with (
        pytest.raises(UserError, match=rf"^lost the connection to another rank \({said}"),
        World().collective(),
    ):
        raise error
    assert "/" not in reason(error)


def test_what_is_no_lost_rank_is_not_taken_for_one() -> None:
    with pytest.raises(torch.OutOfMemoryError), World().collective():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")


def test_totals_end_the_waiting() -> None:
    """NCCL's sum alone does not."""
    world = World()
    world.location.start_waiting()
    assert world.totals(torch.tensor([1.0, 2.5])) == [1.0, 2.5]
    assert world.location.waited() == 0
