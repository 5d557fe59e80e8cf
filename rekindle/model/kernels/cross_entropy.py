"""Cross-entropy of a linear head: the gradient of the logits replaces the logits.

Shapes in comments: N rows, which are all positions of a batch, C channels, V rows of the (padded)
vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from rekindle.model.kernels.common import in_autocast_dtype, jit, tl, triton, why_not

IGNORED = -100  # the target that counts in no loss, as in F.cross_entropy


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """Bend logits so that none passes ±`cap`: cap · x / sqrt(x² + cap²); 0 leaves them."""
    return logits * (cap / (logits.square() + cap * cap).sqrt()) if cap else logits


def plain_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, cap: float = 0.0
) -> Tensor:
    """What `linear_cross_entropy` computes."""
    return F.cross_entropy(soft_cap((hidden @ weight.T).float(), cap), targets)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, cap: float = 0.0
) -> Tensor:
    """Mean cross-entropy in nats of a linear head: a float32 scalar, NaN if no target counts.

    `hidden` (N, C), `weight` (V, C), `targets` (N,) int64, of which -100 is ignored; the logits go
    through `soft_cap` first if `cap` is not 0. The gradient
    of the logits takes the place of the logits, so that N × V numbers are held once. A target that
    is neither -100 nor in [0, V) makes the loss NaN. Raises `ValueError` if the shapes do not fit.
    """
    hidden, weight = in_autocast_dtype(hidden, weight)
    if why_not(hidden.device, hidden.dtype):
        return plain_linear_cross_entropy(hidden, weight, targets, cap=cap)
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"{tuple(targets.shape)} targets for hidden {tuple(hidden.shape)}")
    want_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _linear_cross_entropy(hidden, weight, targets, want_grad, cap)[0]


LOG2_E: Any = tl.constexpr(1.4426950408889634) if triton else 0.0


@jit
def _bend(x, CAP: tl.constexpr):
    """`soft_cap` is x times this, and its slope is this cubed."""
    return CAP / tl.sqrt(x * x + CAP * CAP)


@jit
def _add_block(highest, total, logits, columns, V, CAP: tl.constexpr, FULL: tl.constexpr):
    """Each lane's maximum and sum of exp(logit - maximum), after one more block of the row."""
    if FULL:
        x = tl.load(logits + columns).to(tl.float32)
    else:
        x = tl.load(logits + columns, mask=columns < V, other=-float("inf")).to(tl.float32)
    if CAP > 0:
        x = tl.where(FULL | (columns < V), x * _bend(x, CAP), -float("inf"))
    higher = tl.maximum(highest, tl.max(x, 1))
    exps = tl.exp2(tl.fma(x, LOG2_E, (-higher * LOG2_E)[:, None]))
    return higher, total * tl.exp2((highest - higher) * LOG2_E) + tl.sum(exps, 1)


@jit
def _differentiate_block(logits, columns, V, offset, CAP: tl.constexpr, FULL: tl.constexpr):
    """Replace a block of logits by weight · softmax, with `offset` = log2(weight / sum of exp)."""
    if FULL:
        x = tl.load(logits + columns).to(tl.float32)
    else:
        x = tl.load(logits + columns, mask=columns < V, other=0.0).to(tl.float32)
    slope = 1.0
    if CAP > 0:
        bend = _bend(x, CAP)
        x, slope = x * bend, bend * bend * bend
    grad = tl.exp2(tl.fma(x, LOG2_E, offset)) * slope
    tl.store(logits + columns, grad.to(logits.dtype.element_ty), mask=FULL | (columns < V))


@jit
def _cross_entropy_kernel(
    logits, row_stride, targets, losses, count, V,
    IGNORED: tl.constexpr, WRITE_GRAD: tl.constexpr, CAP: tl.constexpr,
    LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One row: its loss, and if asked for, its gradient over its logits.

    Instructions, not memory, limit its speed: log2(e) is multiplied in one fused step, the weight
    is part of the exponent, only the last block is masked, and one thread corrects the target.
    """
    row = tl.program_id(0).to(tl.int64)  # N × V passes 2^31
    logits += row * row_stride
    target = tl.load(targets + row)
    inside = (target >= 0) & (target < V)
    ignored = target == IGNORED
    at_target = tl.load(logits + target, mask=inside, other=float("nan")).to(tl.float32)
    target_slope = 1.0
    if CAP > 0:
        bend = _bend(at_target, CAP)
        at_target, target_slope = at_target * bend, bend * bend * bend

    # Each lane (a thread) keeps its own maximum and its sum of exp(logit - maximum): threads wait
    # for each other only once per row. The maximum starts finite, as a lane may have no column.
    block = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    highest = tl.full((LANES,), -1e38, tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    full = V // (LANES * WIDTH) * (LANES * WIDTH)
    for start in range(0, full, LANES * WIDTH):
        highest, total = _add_block(highest, total, logits, start + block, V, CAP, True)
    if full < V:
        highest, total = _add_block(highest, total, logits, full + block, V, CAP, False)
    top = tl.max(highest, 0)
    log_total = top + tl.log(tl.sum(total * tl.exp(highest - top), 0))
    tl.store(losses + row, tl.where(ignored, 0.0, log_total - at_target))

    if WRITE_GRAD:
        weight = 1.0 / tl.load(count).to(tl.float32)
        weight = tl.where(ignored, 0.0, tl.where(inside, weight, float("nan")))
        offset = tl.log2(weight) - log_total * LOG2_E  # ignored: exp2(-inf) is 0
        for start in range(0, full, LANES * WIDTH):  # the row is still in L2
            _differentiate_block(logits, start + block, V, offset, CAP, True)
        if full < V:
            _differentiate_block(logits, full + block, V, offset, CAP, False)
        tl.debug_barrier()  # the target's probability has been written
        grad = (tl.exp2(tl.fma(at_target, LOG2_E, offset)) - weight) * target_slope
        tl.store(logits + target, grad.to(logits.dtype.element_ty), mask=inside)


def _row_losses(
    logits: Tensor, targets: Tensor, count: Tensor, write_grad: bool, cap: float = 0.0
) -> Tensor:
    """Logits (N, V) before the soft-cap → losses (N,), 0 where ignored. With `write_grad`, the
    logits become their own gradient in a mean over `count` targets."""
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):
        # 32 warps per row, one thread per lane: few rows are in flight at a time, so L2 holds them
        # until they are read again. Each lane's part of a block is one 16-byte load.
        _cross_entropy_kernel[(logits.shape[0],)](
            logits, logits.stride(0), targets.contiguous(), losses, count, logits.shape[1],
            IGNORED, write_grad, cap, LANES=1024, WIDTH=8, num_warps=32,
        )  # fmt: skip
    return losses


# Product and kernel are one operator that mutates nothing: a compiler has no reason for a copy.
@torch.library.custom_op("rekindle::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, want_grad: bool, cap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """→ the loss, and the gradient of the logits (N, V) if wanted, else an empty tensor."""
    logits = hidden @ weight.T  # (N, V)
    count = (targets != IGNORED).sum()
    loss = _row_losses(logits, targets, count, want_grad, cap).sum() / count
    return loss, logits if want_grad else logits.new_empty(0)


@_linear_cross_entropy.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, want_grad: bool, cap: float = 0.0
) -> tuple[Tensor, Tensor]:
    shape = (hidden.shape[0], weight.shape[0]) if want_grad else (0,)
    return hidden.new_empty((), dtype=torch.float32), hidden.new_empty(shape)


def _save_for_cross_entropy(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, *_ = inputs
    _, dlogits = output
    ctx.mark_non_differentiable(dlogits)
    ctx.set_materialize_grads(False)  # else autograd makes N × V zeros as the gradient of dlogits
    ctx.save_for_backward(hidden, weight, dlogits)


@once_differentiable
def _cross_entropy_backward(ctx: Any, dloss: Tensor, _: None) -> tuple[Tensor | None, ...]:
    hidden, weight, dlogits = ctx.saved_tensors
    dhidden, dweight = dlogits @ weight, dlogits.T @ hidden
    # In fp32, or the scalar is rounded to bf16; and here, where it costs less than on the logits.
    return *((d.float() * dloss).to(d.dtype) for d in (dhidden, dweight)), None, None, None


_linear_cross_entropy.register_autograd(
    _cross_entropy_backward, setup_context=_save_for_cross_entropy
)
