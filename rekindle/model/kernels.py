"""Two Triton kernels for bf16 training on GPUs of Hopper's class, each beside the plain PyTorch
that defines it. They save memory traffic; every other matrix product stays cuBLAS's.

Shapes in comments: N rows, which are all positions of a batch, C channels, F the width inside an
MLP, V rows of the (padded) vocabulary.
"""

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

if TYPE_CHECKING:
    import triton.knobs
    import triton.language as tl
else:
    try:
        import triton.knobs
        import triton.language as tl
    except ImportError:  # macOS, Windows: what follows is never launched, but must be definable
        triton, tl = None, SimpleNamespace(constexpr=object)

# Triton reads TRITON_INTERPRET when it is imported and then runs kernels in NumPy, for tests.
INTERPRETED = triton is not None and triton.knobs.runtime.interpret
IGNORED = -100  # the target that counts in no loss, as in F.cross_entropy


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels do not compute such tensors, which plain PyTorch then does; or None."""
    if triton is None:
        return "Triton is not installed"
    if INTERPRETED:
        return None
    if device.type != "cuda" or torch.version.hip:
        return "the kernels are made for NVIDIA GPUs"
    if dtype != torch.bfloat16:
        return "the kernels are made for bf16"
    return None


def plain_linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """What `linear_cross_entropy` computes."""
    return F.cross_entropy((hidden @ weight.T).float(), targets)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of a linear head: a float32 scalar, NaN if no target counts.

    `hidden` (N, C), `weight` (V, C), `targets` (N,) int64, of which -100 is ignored. The gradient
    of the logits takes the place of the logits, so that N × V numbers are held once. A target that
    is neither -100 nor in [0, V) makes the loss NaN. Raises `ValueError` if the shapes do not fit.
    """
    hidden, weight = _in_autocast_dtype(hidden, weight)
    if why_not(hidden.device, hidden.dtype):
        return plain_linear_cross_entropy(hidden, weight, targets)
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"{tuple(targets.shape)} targets for hidden {tuple(hidden.shape)}")
    want_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _linear_cross_entropy(hidden, weight, targets, want_grad)[0]


def plain_mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """What `mlp` computes."""
    return F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2, b2)


def mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """Two linear layers around GELU in its tanh form: `x` (..., C) → (..., C).

    `w1` (F, C), `b1` (F,), `w2` (C, F), `b2` (C,). GELU is computed at the end of the first
    product, its derivative at the end of the second's backward; neither costs a pass over memory.
    Raises `ValueError` if the shapes or dtypes do not fit.
    """
    x, w1, b1, w2, b2 = parameters = _in_autocast_dtype(x, w1, b1, w2, b2)
    if why_not(x.device, x.dtype):
        return plain_mlp(x, w1, b1, w2, b2)
    want_grad = torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
    y, _, _ = _mlp(x.reshape(-1, x.shape[-1]), w1, b1, w2, b2, want_grad)
    return y.view(*x.shape[:-1], w2.shape[0])


def _in_autocast_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Custom operators are unknown to autocast, so what it would do is done by hand."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(t.to(torch.get_autocast_dtype(device)) for t in tensors)


_jit: Any = triton.jit if triton else lambda kernel: kernel

# ---- Cross-entropy -------------------------------------------------------------------------------


@_jit
def _cross_entropy_kernel(
    logits, row_stride, targets, losses, count, V,
    IGNORED: tl.constexpr, WRITE_GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: its loss, and if asked for, its gradient over its logits."""
    row = tl.program_id(0).to(tl.int64)  # N × V passes 2^31
    logits += row * row_stride
    target = tl.load(targets + row)
    inside = (target >= 0) & (target < V)
    ignored = target == IGNORED
    at_target = tl.load(logits + target, mask=inside, other=float("nan")).to(tl.float32)

    highest = -float("inf")
    total = 0.0  # sum of exp(logit - highest)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(logits + columns, mask=columns < V, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(x, 0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(x - higher), 0)
        highest = higher
    log_total = highest + tl.log(total)
    tl.store(losses + row, tl.where(ignored, 0.0, log_total - at_target))

    if WRITE_GRAD:
        weight = tl.where(inside, 1.0 / tl.load(count).to(tl.float32), float("nan"))
        for start in range(0, V, BLOCK):  # the row is still in L2
            columns = start + tl.arange(0, BLOCK)
            x = tl.load(logits + columns, mask=columns < V, other=0.0).to(tl.float32)
            onehot = tl.where(columns == target, 1.0, 0.0)
            grad = tl.where(ignored, 0.0, (tl.exp(x - log_total) - onehot) * weight)
            tl.store(logits + columns, grad.to(logits.dtype.element_ty), mask=columns < V)


def _row_losses(logits: Tensor, targets: Tensor, count: Tensor, write_grad: bool) -> Tensor:
    """Logits (N, V) → losses (N,), 0 where ignored. With `write_grad`, the logits become their own
    gradient in a mean over `count` targets."""
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):
        # 32 warps a row: so few rows are under way at a time that L2 holds them until they are
        # read again. A block is then one load of 16 bytes per thread.
        _cross_entropy_kernel[(logits.shape[0],)](
            logits, logits.stride(0), targets.contiguous(), losses, count, logits.shape[1],
            IGNORED, write_grad, BLOCK=8192, num_warps=32,
        )  # fmt: skip
    return losses


# Product and kernel are one operator that mutates nothing: a compiler has no reason for a copy.
@torch.library.custom_op("rekindle::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, want_grad: bool
) -> tuple[Tensor, Tensor]:
    """→ the loss, and the gradient of the logits (N, V) if wanted, else an empty tensor."""
    logits = hidden @ weight.T  # (N, V)
    count = (targets != IGNORED).sum()
    loss = _row_losses(logits, targets, count, want_grad).sum() / count
    return loss, logits if want_grad else logits.new_empty(0)


@_linear_cross_entropy.register_fake
def _(hidden: Tensor, weight: Tensor, targets: Tensor, want_grad: bool) -> tuple[Tensor, Tensor]:
    shape = (hidden.shape[0], weight.shape[0]) if want_grad else (0,)
    return hidden.new_empty((), dtype=torch.float32), hidden.new_empty(shape)


def _save_for_cross_entropy(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, _, _ = inputs
    _, dlogits = output
    ctx.mark_non_differentiable(dlogits)
    ctx.set_materialize_grads(False)  # else autograd makes N × V zeros as the gradient of dlogits
    ctx.save_for_backward(hidden, weight, dlogits)


@once_differentiable
def _cross_entropy_backward(ctx: Any, dloss: Tensor, _: None) -> tuple[Tensor | None, ...]:
    hidden, weight, dlogits = ctx.saved_tensors
    dhidden, dweight = dlogits @ weight, dlogits.T @ hidden
    # In fp32, or the scalar is rounded to bf16; and here, where it costs less than on the logits.
    return *((d.float() * dloss).to(d.dtype) for d in (dhidden, dweight)), None, None


_linear_cross_entropy.register_autograd(
    _cross_entropy_backward, setup_context=_save_for_cross_entropy
)

# ---- MLP -----------------------------------------------------------------------------------------


@_jit
def _gelu_gate(x):
    """GELU's tanh form is x · gate(x): (1 + tanh(u)) / 2 is sigmoid(2u)."""
    return tl.sigmoid(2 * 0.7978845608028654 * (x + 0.044715 * x * x * x))  # sqrt(2 / pi)


@_jit
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


@_jit
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


if triton:
    _configs = [
        triton.Config(
            {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": 64, "GROUP": 8}, num_warps=w, num_stages=s
        )
        for m, n, w, s in [(128, 128, 8, 3), (128, 256, 8, 3), (256, 128, 8, 3), (128, 128, 4, 4)]
    ]
    _matmul_gelu_kernel = triton.autotune(
        _configs[:1] if INTERPRETED else _configs,
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
