"""The key-value cache: what attention has to remember of the positions already seen."""

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
            # Zeros: what no query may look at still meets a weight of zero, and zero times what
            # the memory held before could be NaN.
            shape = (cache.B, k.shape[1], cache.capacity, k.shape[3])
            self.k, self.v = k.new_zeros(shape), v.new_zeros(shape)
        self.k[:, :, start:end], self.v[:, :, start:end] = k, v  # a single row becomes all B
        return (self.k[:, :, :end], self.v[:, :, :end]) if start else (k, v)


class KVCache:
    """Keys and values of all layers for B rows and up to `capacity` positions, allocated once.

    A forward pass appends to every layer; `advance` then moves on by as many positions. What comes
    first may be a single row, with which all B begin. It is allocated in the type that comes.

    Attention is given the positions filled so far, whose number grows. After `fix` it is given all
    of the capacity and a mask instead, so that every step has the same shapes and reads where it
    stands from a tensor: it can be compiled once, and recorded as a CUDA graph.
    """

    positions: Tensor | None = None  # (1,): where the next token stands, of a fixed cache

    def __init__(self, n_layer: int, B: int, capacity: int) -> None:
        self.B, self.capacity, self.length = B, capacity, 0
        self._layers = [LayerCache(self) for _ in range(n_layer)]

    def __getitem__(self, layer: int) -> LayerCache:
        return self._layers[layer]

    @property
    def mask(self) -> Tensor | None:
        """Which slots the next token may look at, (1, 1, 1, capacity); None: those it is given."""
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
        """Keep all shapes from now on. The prompt must be in it; then one token at a time."""
        self.positions = torch.tensor([self.length], device=self._layers[0].k.device)
        tensors = [t for layer in self._layers for t in (layer.k, layer.v)]
        for tensor in (self.positions, *tensors):  # a CUDA graph may write to them where they lie
            torch._dynamo.mark_static_address(tensor, guard=False)
