"""AdamW as the lecture sets it up, and one flat buffer for all gradients."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def make_adamw(
    model: nn.Module, lr: float, betas: tuple[float, float], eps: float, weight_decay: float,
    fused: bool = True,
) -> torch.optim.AdamW:  # fmt: skip
    """AdamW with weight decay on matrices (embeddings among them), none on biases and norms."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = fused and parameters[0].device.type in ("cuda", "cpu", "mps")
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=fused)


class GradientBuffer:
    """All gradients of a model in one tensor, which each parameter's `grad` is a view of.

    Accumulating, summing over ranks, measuring and clipping are then one operation each, and the
    sum over ranks happens once a step because nobody asks for it earlier.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        parameters = list(parameters)
        self.flat = torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device)
        self._views: list[tuple[Tensor, Tensor]] = []
        start = 0
        for p in parameters:
            self._views.append((p, self.flat[start : start + p.numel()].view_as(p)))
            start += p.numel()

    def reset(self) -> None:
        """Set all gradients to zero, before the first micro-step."""
        self.flat.zero_()
        for parameter, view in self._views:
            parameter.grad = view

    def shares(self) -> tuple[Tensor, ...]:
        """What each rank has a share of: to be added up over them, in place, before `norm`."""
        return (self.flat,)

    def norm(self) -> Tensor:
        """The length of the whole gradient, a scalar."""
        return torch.linalg.vector_norm(self.flat)

    def clip(self, norm: Tensor, limit: float) -> None:
        """Shorten the gradient to `limit` if it is longer; `norm` is its length."""
        self.flat.mul_((limit / (norm + 1e-6)).clamp(max=1.0))
