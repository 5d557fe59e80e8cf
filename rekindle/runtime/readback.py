"""Asynchronous copies of small tensors from the device to the host."""

import torch
from torch import Tensor


class Readback:
    """A copy of a small tensor to the host, started by the constructor. Reading it waits for that
    copy only, not for work submitted to the GPU afterwards."""

    def __init__(self, tensor: Tensor) -> None:
        self._copy, self._copied = tensor, None
        if tensor.is_cuda:
            self._copy = tensor.to("cpu", non_blocking=True)  # into pinned memory
            self._copied = torch.cuda.Event()
            self._copied.record()

    def tolist(self) -> list[float]:
        if self._copied:
            self._copied.synchronize()
        return self._copy.tolist()
