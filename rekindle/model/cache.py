"""The key-value cache: keys and values of the positions that have already been processed."""

import torch
from torch import Tensor


class LayerCache:
    """One layer's keys and values."""

    k: Tensor  # (B, H, capacity, D)
    v: Tensor

    def __init__(self, cache: "KVCache") -> None:
        self._cache = cache

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add (B, H, T, D) keys and values; return those of all positions, (B, H, S, D)."""
        cache = self._cache
        if cache.positions is not None:
            self.k.index_copy_(2, cache.positions, k)
            self.v.index_copy_(2, cache.positions, v)
            return self.k, self.v
        start, end = cache.length, cache.length + k.shape[2]
        if start == 0:
            # Zeros, because masked slots get an attention weight of zero, and zero times
            # uninitialized memory could be NaN.
            shape = (cache.B, k.shape[1], cache.capacity, k.shape[3])
            self.k, self.v = k.new_zeros(shape), v.new_zeros(shape)
        self.k[:, :, start:end], self.v[:, :, start:end] = k, v  # a single row is copied to all B
        return (self.k[:, :, :end], self.v[:, :, :end]) if start else (k, v)


class KVCache:
    """Keys and values of all layers for B rows and up to `capacity` positions, allocated once.

    A forward pass appends to every layer; `advance` then moves the end of the cache. The first pass
    may have a single row, which is copied to all B rows. Its keys and values set the data type.

    Attention first reads only the positions filled so far, so its shapes grow. After `fix` it reads
    the full capacity with a mask, and the position comes from a tensor. Every step then has the
    same shapes, so it can be compiled once and recorded as a CUDA graph.
    """

    positions: Tensor | None = None  # (1,): position of the next token; None until `fix`

    def __init__(self, n_layer: int, B: int, capacity: int) -> None:
        self.B, self.capacity, self.length = B, capacity, 0
        self._layers = [LayerCache(self) for _ in range(n_layer)]

    def __getitem__(self, layer: int) -> LayerCache:
        return self._layers[layer]

    @property
    def mask(self) -> Tensor | None:
        """The slots that the next token may attend to, (1, 1, 1, capacity); None until `fix`."""
        if self.positions is None:
            return None
        return torch.arange(self.capacity, device=self.positions.device).view(1, 1, 1, -1) <= (
            self.positions
        )

    def advance(self, positions: int) -> None:
        self.length += positions
        if self.positions is not None:
            self.positions += positions

    def fix(self) -> None:
        """Keep all shapes constant. Call it after the prompt; then pass one token at a time."""
        self.positions = torch.tensor([self.length], device=self._layers[0].k.device)
        tensors = [t for layer in self._layers for t in (layer.k, layer.v)]
        for tensor in (self.positions, *tensors):  # a CUDA graph may then write to them in place
            torch._dynamo.mark_static_address(tensor, guard=False)
