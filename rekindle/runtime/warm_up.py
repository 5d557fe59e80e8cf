"""Two passes before the first step, so that compilation and DDP's setup are not part of a step."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rekindle.optim.gradients import zero_gradients
from rekindle.runtime.device import Device
from rekindle.runtime.distributed import World, gradient_sync

PASSES = 2


@dataclass(frozen=True)
class WarmUp:
    """Measurements of the warm-up."""

    compile_s: float  # how much longer the first pass took than the last
    pass_s: float  # forward and backward pass of one micro-batch, gradient all-reduce included
    peak_bytes: int | None  # peak GPU memory, optimizer state included; None on other devices


def warm_up(
    forward: Callable[[Tensor, Tensor], tuple[Tensor | None, Tensor | None]],
    parameters: Sequence[nn.Parameter],
    x: Tensor,  # (micro_batch, T) token ids
    y: Tensor,  # targets: x shifted by one token
    device: Device,
    world: World,
) -> WarmUp:
    """Run two forward and backward passes without an optimizer step.

    The first pass compiles. After it, DDP rebuilds its buckets in the order in which the gradients
    arrived. With three or more ranks, the last bits of a sum depend on the buckets, so without a
    warm-up the first step of a resumed run would differ from the same step of an uninterrupted one.
    Afterwards, gradients are zero and the random state is restored.
    """
    seconds = []
    on_gpu = device.torch.type == "cuda"
    with torch.random.fork_rng([device.torch] if on_gpu else []):
        for _ in range(PASSES):
            start_time = time.perf_counter()
            with gradient_sync(forward, world, now=True):
                with device.autocast():
                    _, loss = forward(x, y)
                assert loss is not None
                loss.backward()
            device.synchronize()
            seconds.append(time.perf_counter() - start_time)
    zero_gradients(parameters)
    peak = torch.cuda.max_memory_allocated(device.torch) if on_gpu else None
    return WarmUp(max(0.0, seconds[0] - seconds[-1]), seconds[-1], peak)
