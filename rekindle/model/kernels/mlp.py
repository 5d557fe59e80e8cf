"""An MLP whose GELU is computed inside the matmuls around it.

The first matmul also writes GELU's derivative, which the backward pass of the second multiplies by:
neither GELU nor its derivative needs a pass over memory of its own.

Shapes in comments: N rows, which are all positions of a batch, C channels, F the width inside the
MLP.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from rekindle.model.kernels.common import (
    INTERPRETED,
    TensorDescriptor,
    in_autocast_dtype,
    jit,
    multiprocessors,
    tl,
    why_not,
)


def plain_mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """What `fused_mlp` computes."""
    return F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2, b2)


def fused_mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """Two linear layers around GELU in its tanh form: `x` (..., C) → (..., C).

    `w1` (F, C), `b1` (F,), `w2` (C, F), `b2` (C,). GELU and its derivative are computed at the end
    of the first matmul. Where the kernels cannot run, or a width is not a multiple of `MULTIPLE`,
    this is `plain_mlp`. GPUs other than Hopper run it too, but slowly: see `why_not_mlp`. Raises
    `ValueError` if the shapes or dtypes do not fit.
    """
    x, w1, b1, w2, b2 = parameters = in_autocast_dtype(x, w1, b1, w2, b2)
    odd = any(side % MULTIPLE for side in (*w1.shape, w2.shape[0]))
    if why_not(x.device, x.dtype) or odd or not x.numel():
        return plain_mlp(x, w1, b1, w2, b2)
    want_grad = torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
    y, _, _ = _mlp(x.reshape(-1, x.shape[-1]), w1, b1, w2, b2, want_grad)
    return y.view(*x.shape[:-1], w2.shape[0])


@dataclass(frozen=True)
class Tiles:
    """How a matmul is divided: programs compute tiles of `m` × `n`, `k` at a time."""

    m: int
    n: int
    k: int
    warps: int
    stages: int  # steps of `k` that are loaded ahead
    per_sm: int  # programs on each multiprocessor: one computes while the other one stores
    ahead: bool  # start to load the next tile before this one is finished


# The fastest on an H200 at the sizes of GPT-2 124M (benchmarks/LOG.md).
FORWARD_TILES = Tiles(m=128, n=128, k=64, warps=4, stages=3, per_sm=2, ahead=True)
BACKWARD_TILES = Tiles(m=128, n=128, k=64, warps=4, stages=3, per_sm=2, ahead=False)
MULTIPLE = 8  # TMA needs rows that are a multiple of 16 bytes apart: 8 numbers in bf16


@jit
def _gelu_gate(x):
    """GELU's tanh form is x · gate(x): (1 + tanh(u)) / 2 is sigmoid(2u)."""
    return tl.sigmoid(2 * 0.7978845608028654 * (x + 0.044715 * x * x * x))  # sqrt(2 / pi)


@jit
def _finish(product, bias, slope, out, sums, row, column, N, BACKWARD: tl.constexpr):
    """The end of `_matmul_gelu_kernel`, for the part of its product at (row, column)."""
    columns = column + tl.arange(0, product.shape[1])
    if BACKWARD:
        result = product * slope.load([row, column]).to(tl.float32)
        tl.store(sums + columns, tl.sum(result, 0), mask=columns < N)
    else:
        x = product + tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
        gate = _gelu_gate(x)
        result = x * gate
        if slope is not None:
            inner = 2 * 0.7978845608028654 * (1 + 3 * 0.044715 * x * x)
            derivative = gate + result * (1 - gate) * inner
            slope.store([row, column], derivative.to(slope.dtype))
    out.store([row, column], result.to(out.dtype))


@jit
def _matmul_gelu_kernel(
    a, b, bias, slope, out, sums, M, N,
    K: tl.constexpr, BACKWARD: tl.constexpr, FLOAT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PROGRAMS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """out = gelu(a @ bᵀ + bias) and slope = gelu'(a @ bᵀ + bias), with a (M, K) and b (N, K); or
    out = (a @ b) · slope and its sums over the rows of each tile, with b (K, N)."""
    across = tl.cdiv(N, BLOCK_N)
    tiles = tl.cdiv(M, BLOCK_M) * across
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=AHEAD):  # type: ignore
        row, column = tile // across * BLOCK_M, tile % across * BLOCK_N
        product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):  # loads beyond the edges are zero
            a_tile = a.load([row, k])
            b_tile = b.load([k, column]) if BACKWARD else b.load([column, k]).T
            if FLOAT:
                a_tile, b_tile = a_tile.to(tl.float32), b_tile.to(tl.float32)
            product = tl.dot(a_tile, b_tile, product)
        into = sums + tile // across * N if BACKWARD else sums
        # Half a tile at a time: the product and all results do not fit into registers together.
        left, right = product.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
        _finish(left, bias, slope, out, into, row, column, N, BACKWARD)
        _finish(right, bias, slope, out, into, row, column + BLOCK_N // 2, N, BACKWARD)


def _launch(
    a: Tensor, b: Tensor, out: Tensor, slope: Tensor | None, tiles: Tiles, *,
    bias: Tensor | None = None, sums: Tensor | None = None,
) -> None:  # fmt: skip
    """Run the kernel: the forward pass with `bias` (N,), the backward pass with `sums` (tiles of
    rows, N)."""
    backward = bias is None
    half = [tiles.m, tiles.n // 2]
    (M, K), N = a.shape, out.shape[1]
    programs = tiles.per_sm * multiprocessors(a.device)
    with torch.cuda.device_of(a):
        _matmul_gelu_kernel[(programs,)](
            TensorDescriptor.from_tensor(a, [tiles.m, tiles.k]),
            TensorDescriptor.from_tensor(b, [tiles.k, tiles.n] if backward else [tiles.n, tiles.k]),
            bias,
            None if slope is None else TensorDescriptor.from_tensor(slope, half),
            TensorDescriptor.from_tensor(out, half),
            sums, M, N, K, backward,
            INTERPRETED,  # the interpreter would multiply the bits of bf16 as integers
            tiles.m, tiles.n, tiles.k, programs, tiles.ahead,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip


def _aligned(t: Tensor) -> Tensor:
    """The tensor, contiguous and at an address that TMA can read from."""
    t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


def _check(**sides: tuple[Tensor, tuple[int, ...]]) -> None:
    """Raises `ValueError` unless each tensor has its shape and all have the same dtype."""
    (first, _), *_ = sides.values()
    for name, (t, shape) in sides.items():
        if t.shape != shape or t.dtype != first.dtype:
            raise ValueError(
                f"{name} {tuple(t.shape)} in {t.dtype} does not fit {shape} in {first.dtype}"
            )


@torch.library.custom_op("rekindle::mlp", mutates_args=())
def _mlp(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, want_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """x (N, C) → y (N, C), and for the backward pass GELU and its derivative (N, F), or empty."""
    (N, C), width = x.shape, len(w1)
    _check(x=(x, (N, C)), w1=(w1, (width, C)), b1=(b1, (width,)), w2=(w2, (w2.shape[0], width)))
    h = x.new_empty(N, width)
    slope = x.new_empty((N, width) if want_grad else 0)
    arguments = _aligned(x), _aligned(w1), h, slope if want_grad else None, FORWARD_TILES
    _launch(*arguments, bias=b1.contiguous())
    return F.linear(h, w2, b2), h if want_grad else x.new_empty(0), slope


@_mlp.register_fake
def _(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, want_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (x.shape[0], w1.shape[0]) if want_grad else (0,)
    return x.new_empty(x.shape[0], w2.shape[0]), x.new_empty(shape), x.new_empty(shape)


@torch.library.custom_op("rekindle::gelu_backward", mutates_args=())
def _gelu_backward(dy: Tensor, w2: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """dy (N, C) → the gradient of GELU's argument (N, F), and its sum over N in float32 (F,)."""
    (N, width), C = slope.shape, len(w2)
    _check(slope=(slope, (N, width)), dy=(dy, (N, C)), w2=(w2, (C, width)))
    dpre = torch.empty_like(slope)
    rows_of_tiles = -(-N // BACKWARD_TILES.m)
    sums = dy.new_empty(rows_of_tiles, width, dtype=torch.float32)
    _launch(_aligned(dy), _aligned(w2), dpre, slope, BACKWARD_TILES, sums=sums)
    return dpre, sums.sum(0)


@_gelu_backward.register_fake
def _(dy: Tensor, w2: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(slope), slope.new_empty(slope.shape[1], dtype=torch.float32)


def _save_for_mlp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w1, _, w2, _, _ = inputs
    _, h, slope = output
    ctx.mark_non_differentiable(h, slope)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, w1, w2, h, slope)


@once_differentiable
def _mlp_backward(ctx: Any, dy: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    x, w1, w2, h, slope = ctx.saved_tensors
    dpre, db1 = _gelu_backward(dy, w2, slope)
    return dpre @ w1, dpre.T @ x, db1.to(dpre.dtype), dy.T @ h, dy.sum(0), None


_mlp.register_autograd(_mlp_backward, setup_context=_save_for_mlp)
