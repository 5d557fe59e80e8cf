"""Two passes before the first step, so that no step of the training loop is unlike the others."""

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
    """What the warm-up measured."""

    compile_s: float  # of the first pass, beyond what the last one took
    pass_s: float  # forward and backward of one micro-batch, gradients averaged over the ranks
    peak_bytes: int | None  # of the GPU's memory; the optimizer's state is in it


def warm_up(
    forward: Callable[[Tensor, Tensor], tuple[Tensor | None, Tensor | None]],
    parameters: Sequence[nn.Parameter],
    x: Tensor,  # (micro, T) token ids
    y: Tensor,  # the same, one token on
    device: Device,
    world: World,
) -> WarmUp:
    """Run two forward and backward passes without an optimizer step.

    The first one compiles. After it, DDP sorts its buckets anew by the order in which gradients
    came; sums over three ranks and more depend on the buckets in the last bits, so that without a
    warm-up the first step of a resumed run would differ from the same step of a run that was never
    stopped. Leaves no trace: gradients are zero and the random state is what it was.
    """
    seconds = []
    on_gpu = device.torch.type == "cuda"
    with torch.random.fork_rng([device.torch] if on_gpu else []):
        for _ in range(PASSES):
            began = time.perf_counter()
            with gradient_sync(forward, world, now=True):
                with device.autocast():
                    _, loss = forward(x, y)
                assert loss is not None
                loss.backward()
            device.synchronize()
            seconds.append(time.perf_counter() - began)
    zero_gradients(parameters)
    peak = torch.cuda.max_memory_allocated(device.torch) if on_gpu else None
    return WarmUp(max(0.0, seconds[0] - seconds[-1]), seconds[-1], peak)
