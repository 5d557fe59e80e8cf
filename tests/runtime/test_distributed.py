"""Communication between ranks, tested on a single rank."""

import pytest
import torch
import torch.distributed as dist

from rekindle.errors import UserError
from rekindle.runtime.distributed import World, reason

GLOO = "[{}third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]"


@pytest.mark.parametrize(
    ("error", "reason_given"),
    [
        (RuntimeError(GLOO.format("/__w/pytorch/") + ":45. This is"), "Connection closed by peer"),
        (RuntimeError(GLOO.format("../") + ":45. This is"), "Connection closed by peer"),
        (dist.DistBackendError("NCCL error: remote process exited"), "NCCL error"),
    ],
)
def test_lost_rank_is_a_one_line_error(error: RuntimeError, reason_given: str) -> None:
    with (
        pytest.raises(UserError, match=rf"^lost the connection to another rank \({reason_given}"),
        World().collective(),
    ):
        raise error
    assert "/" not in reason(error)


def test_other_errors_pass_through() -> None:
    with pytest.raises(torch.OutOfMemoryError), World().collective():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")


def test_totals_stop_waiting() -> None:
    """An NCCL sum alone does not, because it returns before it is done."""
    world = World()
    world.location.start_waiting()
    assert world.totals(torch.tensor([1.0, 2.5])) == [1.0, 2.5]
    assert world.location.waited() == 0
