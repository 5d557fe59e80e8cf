"""An MLP whose GELU is computed inside the matmuls around it.

Shapes in comments: N rows, which are all positions of a batch, C channels, F the width inside the
MLP.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from rekindle.model.kernels.common import INTERPRETED, in_autocast_dtype, jit, tl, triton, why_not


def plain_mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """What `fused_mlp` computes."""
    return F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2, b2)


def fused_mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """Two linear layers around GELU in its tanh form: `x` (..., C) → (..., C).

    `w1` (F, C), `b1` (F,), `w2` (C, F), `b2` (C,). GELU is computed at the end of the first
    product, its derivative at the end of the second's backward; neither costs a pass over memory.
    Raises `ValueError` if the shapes or dtypes do not fit.
    """
    x, w1, b1, w2, b2 = parameters = in_autocast_dtype(x, w1, b1, w2, b2)
    if why_not(x.device, x.dtype):
        return plain_mlp(x, w1, b1, w2, b2)
    want_grad = torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
    y, _, _ = _mlp(x.reshape(-1, x.shape[-1]), w1, b1, w2, b2, want_grad)
    return y.view(*x.shape[:-1], w2.shape[0])


@jit
def _gelu_gate(x):
    """GELU's tanh form is x · gate(x): (1 + tanh(u)) / 2 is sigmoid(2u)."""
    return tl.sigmoid(2 * 0.7978845608028654 * (x + 0.044715 * x * x * x))  # sqrt(2 / pi)


@jit
def _gelu_store(product, bias, pre, out, M, N, top, left, row_stride, BACKWARD: tl.constexpr):
    """The end of `_matmul_gelu_kernel`, for the part of its product at (top, left)."""
    rows = tl.arange(0, product.shape[0])[:, None]
    columns = left + tl.arange(0, product.shape[1])[None, :]
    mask = (rows < M - top) & (columns < N)
    corner = top.to(tl.int64) * row_stride  # M × N passes 2^31, a tile does not
    offsets = rows * row_stride + columns
    if BACKWARD:
        x = tl.load(pre + corner + offsets, mask=mask, other=0.0).to(tl.float32)
        gate = _gelu_gate(x)
        slope = 2 * 0.7978845608028654 * (1 + 3 * 0.044715 * x * x)
        result = product * gate * (1 + x * (1 - gate) * slope)
    else:
        x = product + tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)
        if pre is not None:
            tl.store(pre + corner + offsets, x.to(pre.dtype.element_ty), mask=mask)
        result = x * _gelu_gate(x)
    tl.store(out + corner + offsets, result.to(out.dtype.element_ty), mask=mask)


@jit(do_not_specialize=["M_bits"])  # else the value 16 compiles again
def _matmul_gelu_kernel(
    a, b, bias, pre, out, M, N, row_stride, b_stride_k, b_stride_n, M_bits,
    K: tl.constexpr, BACKWARD: tl.constexpr, FLOAT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of out = gelu(a @ b + bias), or of (a @ b) · gelu'(pre), with a (M, K), b (K, N)."""
    # Tiles go down GROUP rows of tiles before they go right: L2 holds what these share.
    tile, across = tl.program_id(0), tl.cdiv(N, BLOCK_N)
    first = tile // (GROUP * across) * GROUP
    height = tl.minimum(tl.cdiv(M, BLOCK_M) - first, GROUP)
    within = tile % (GROUP * across)
    top = (first + within % height) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)[:, None]
    columns = within // height * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    inner = tl.arange(0, BLOCK_K)
    a += top.to(tl.int64) * K + (rows * K + inner[None, :])
    b += inner[:, None] * b_stride_k + columns * b_stride_n
    in_rows, in_columns = rows < M - top, columns < N

    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            a_tile = tl.load(a, mask=in_rows, other=0.0)
            b_tile = tl.load(b, mask=in_columns, other=0.0)
        else:
            left = K - start
            a_tile = tl.load(a, mask=in_rows & (inner[None, :] < left), other=0.0)
            b_tile = tl.load(b, mask=in_columns & (inner[:, None] < left), other=0.0)
        if FLOAT:
            a_tile, b_tile = a_tile.to(tl.float32), b_tile.to(tl.float32)
        product = tl.dot(a_tile, b_tile, product)
        a += BLOCK_K
        b += BLOCK_K * b_stride_k

    # Half a tile at a time, for a whole one does not fit into registers three times.
    left, right = product.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
    column = within // height * BLOCK_N
    _gelu_store(left, bias, pre, out, M, N, top, column, row_stride, BACKWARD)
    column += BLOCK_N // 2
    _gelu_store(right, bias, pre, out, M, N, top, column, row_stride, BACKWARD)


def _candidates(configs: list[Any], named_args: dict[str, Any], **_: Any) -> list[Any]:
    """Who asked for the same bits in every process gets the first, which fits every GPU."""
    return configs[:1] if torch.are_deterministic_algorithms_enabled() else configs


CONFIGURATIONS: list[Any] = []  # that autotuning chooses from
if triton:
    CONFIGURATIONS = [
        triton.Config(
            {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": 64, "GROUP": 8}, num_warps=w, num_stages=s
        )
        for m, n, w, s in [(128, 128, 8, 3), (128, 256, 8, 3), (256, 128, 8, 3), (128, 128, 4, 4)]
    ]
    _matmul_gelu_kernel = triton.autotune(
        CONFIGURATIONS[:1] if INTERPRETED else CONFIGURATIONS,
        key=["M_bits", "N", "K", "BACKWARD"],  # not M: evaluation has many sizes of batches
        prune_configs_by={"early_config_prune": _candidates},
    )(_matmul_gelu_kernel)


def _matmul_gelu(
    a: Tensor, b: Tensor, out: Tensor, pre: Tensor | None, bias: Tensor | None = None
) -> None:
    """Write gelu(a @ b + bias) into `out` (M, N), and what GELU is taken of into `pre` if given.
    Without a bias this is the backward: write (a @ b) · gelu'(pre). `a` (M, K), `b` (K, N)."""
    (M, K), N = a.shape, b.shape[1]
    if b.shape[0] != K or b.dtype != a.dtype or (bias is not None and bias.shape != (N,)):
        shapes = [tuple(t.shape) for t in (a, b, bias) if t is not None]
        raise ValueError(f"shapes or dtypes do not fit: {shapes}, {a.dtype}, {b.dtype}")
    bias = None if bias is None else bias.contiguous()
    with torch.cuda.device_of(a):
        _matmul_gelu_kernel[
            lambda size: (triton.cdiv(M, size["BLOCK_M"]) * triton.cdiv(N, size["BLOCK_N"]),)
        ](
            a.contiguous(), b, bias, pre, out, M, N, out.stride(0), b.stride(0), b.stride(1),
            M.bit_length(), K=K, BACKWARD=bias is None,
            FLOAT=INTERPRETED,  # which would multiply the bits of bf16 as integers
        )  # fmt: skip


@torch.library.custom_op("rekindle::mlp", mutates_args=())
def _mlp(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, want_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """x (N, C) → y (N, C), and for the backward GELU's result and argument (N, F), or empty."""
    h = x.new_empty(x.shape[0], w1.shape[0])
    pre = torch.empty_like(h) if want_grad else x.new_empty(0)
    _matmul_gelu(x, w1.T, out=h, pre=pre if want_grad else None, bias=b1)
    return F.linear(h, w2, b2), h if want_grad else x.new_empty(0), pre


@_mlp.register_fake
def _(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, want_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (x.shape[0], w1.shape[0]) if want_grad else (0,)
    return x.new_empty(x.shape[0], w2.shape[0]), x.new_empty(shape), x.new_empty(shape)


@torch.library.custom_op("rekindle::mlp_dpre", mutates_args=())
def _mlp_dpre(dy: Tensor, w2: Tensor, pre: Tensor) -> Tensor:
    """The gradient (N, F) of GELU's argument, of dy (N, C)."""
    dpre = torch.empty_like(pre)
    _matmul_gelu(dy, w2, out=dpre, pre=pre)
    return dpre


@_mlp_dpre.register_fake
def _(dy: Tensor, w2: Tensor, pre: Tensor) -> Tensor:
    return torch.empty_like(pre)


def _save_for_mlp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w1, _, w2, _, _ = inputs
    _, h, pre = output
    ctx.mark_non_differentiable(h, pre)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, w1, w2, h, pre)


@once_differentiable
def _mlp_backward(ctx: Any, dy: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    x, w1, w2, h, pre = ctx.saved_tensors
    dpre = _mlp_dpre(dy, w2, pre)
    return dpre @ w1, dpre.T @ x, dpre.sum(0), dy.T @ h, dy.sum(0), None


_mlp.register_autograd(_mlp_backward, setup_context=_save_for_mlp)
