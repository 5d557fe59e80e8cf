"""AdamW as the lecture sets it up."""

import torch
from torch import nn


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
