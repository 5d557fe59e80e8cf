"""The key-value cache: what attention has to remember of the positions already seen."""

import torch
from torch import Tensor

from rekindle.model.config import GPT2Config


class _Layer:
    def __init__(self, cache: "KVCache", k: Tensor, v: Tensor) -> None:
        self._cache, self._k, self._v = cache, k, v  # (B, H, capacity, D)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        start = self._cache.length
        end = start + k.shape[2]
        self._k[:, :, start:end], self._v[:, :, start:end] = k, v
        return self._k[:, :, :end], self._v[:, :, :end]


class KVCache:
    """Keys and values of all layers for up to `capacity` positions, allocated once.

    A forward pass appends to every layer; `advance` then moves on by as many positions.
    """

    def __init__(
        self, config: GPT2Config, B: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (B, config.n_head, capacity, config.n_embd // config.n_head)
        self.length = 0
        self._layers = [
            _Layer(
                self,
                torch.empty(shape, device=device, dtype=dtype),
                torch.empty(shape, device=device, dtype=dtype),
            )
            for _ in range(config.n_layer)
        ]

    def __getitem__(self, layer: int) -> _Layer:
        return self._layers[layer]

    def advance(self, positions: int) -> None:
        self.length += positions
