"""AdamW, configured as in the lecture."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from rekindle.optim.adamw_config import AdamWConfig

STATES = ("exp_avg", "exp_avg_sq")


class AdamW:
    """PyTorch's AdamW, with weight decay on matrices and embeddings but not on biases and norms.

    The state is allocated on construction, not in the first step, so that a lack of memory shows
    early and every checkpoint has the same tensors. `fused=False` is slower, for comparison.
    """

    Config: ClassVar = AdamWConfig

    def __init__(self, model: nn.Module, config: AdamWConfig, *, fused: bool = True) -> None:
        self._named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        parameters = list(self._named.values())
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2]},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        betas = (config.beta1, config.beta2)
        self._fused = fused and parameters[0].device.type in ("cuda", "cpu", "mps")
        self._adamw = torch.optim.AdamW(
            groups,
            lr=config.lr,
            betas=betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=self._fused,
        )
        device = parameters[0].device if self._fused else "cpu"
        self._updates = torch.zeros(len(parameters), device=device)
        for p, updates in zip(parameters, self._updates, strict=True):  # each a view
            state = {name: torch.zeros_like(p) for name in STATES}
            self._adamw.state[p] = {"step": updates, **state}

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next step, in all groups."""
        for group in self._adamw.param_groups:
            group["lr"] = lr

    @torch.no_grad()
    def step(self, skip: Tensor) -> None:
        """Update the weights from their gradients. If `skip` (a scalar on the device) is true,
        nothing changes. The fused kernels read it there, so the host does not wait for it."""
        if not self._fused and skip:
            return
        self._adamw.found_inf = skip.float() if self._fused else None  # type: ignore[attr-defined]
        self._adamw.step()

    def state_tensors(self) -> dict[str, Tensor]:
        """`exp_avg.NAME` and `exp_avg_sq.NAME`, shaped like each parameter, and `updates`, the
        number of steps that were not skipped, once per parameter as PyTorch counts them."""
        states = {
            f"{key}.{name}": self._adamw.state[p][key]
            for key in STATES
            for name, p in self._named.items()
        }
        return {**states, "updates": self._updates}
