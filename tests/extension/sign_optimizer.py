"""An optimizer written outside the package: the sign of an integer vote over recent gradients.

Its state differs from AdamW's: integers, one tensor for the entire model, and a count. (A toy: each
weight moves by the learning rate in the direction of most gradients.)
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rekindle.flags import flag


@dataclass(frozen=True)
class SignConfig:
    lr: float = flag(1e-2, "peak learning rate")
    memory: int = flag(4, "limit of the votes")


class SignOptimizer:
    Config: ClassVar = SignConfig

    def __init__(self, model: Any, config: SignConfig) -> None:
        self._parameters = list(model.parameters())
        self._config, self._lr = config, config.lr
        device = self._parameters[0].device
        size = sum(p.numel() for p in self._parameters)
        self._votes = torch.zeros(size, dtype=torch.int8, device=device)
        self._count = torch.zeros((), dtype=torch.int64, device=device)

    def set_lr(self, lr: float) -> None:
        self._lr = lr

    @torch.no_grad()
    def step(self, skip: Tensor) -> None:
        signs = torch.cat([p.grad.sign().flatten() for p in self._parameters])
        memory = self._config.memory
        votes = (self._votes + signs.to(torch.int8)).clamp(-memory, memory)
        self._votes.copy_(torch.where(skip, self._votes, votes))
        self._count += (~skip).long()
        moves = torch.where(skip, 0.0, self._lr * self._votes.sign().float())
        sizes = [p.numel() for p in self._parameters]
        for p, move in zip(self._parameters, moves.split(sizes), strict=True):
            p -= move.view_as(p)

    def state_tensors(self) -> dict[str, Tensor]:
        return {"votes": self._votes, "count": self._count}
