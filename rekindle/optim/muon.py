"""Muon: updates matrices by their orthogonalized momentum (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon/). AdamW trains all other parameters. With AdamW for the
matrices too, the loss was 0.20 nats per byte higher (benchmarks/LOG.md).

Shapes in comments: a stack holds K matrices of one shape, with R rows and C columns.
"""

from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from rekindle.errors import UserError
from rekindle.optim.muon_config import MuonConfig

STATES = ("exp_avg", "exp_avg_sq")  # of AdamW


def orthogonalize(stack: Tensor) -> Tensor:
    """Bring the singular values of each matrix in (K, R, C) close to 1 (0.7 to 1.2, unless they are
    tiny) by five Newton-Schulz steps with Jordan's coefficients, which raise small values fastest.
    """
    tall = stack.shape[1] > stack.shape[2]
    x = stack.mT if tall else stack  # has the smaller Gram matrix
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x.mT if tall else x


def orthogonalize_on_ranks(stack: Tensor) -> Tensor:
    """`orthogonalize` a stack (K, R, C) that every rank holds. Each rank computes K / ranks of the
    matrices, padded with zeros to equal shares, and an all-gather gives every rank the same bits.
    """
    if not dist.is_initialized():
        return orthogonalize(stack)
    ranks, rank, K = dist.get_world_size(), dist.get_rank(), len(stack)
    share = -(-K // ranks)
    own = stack[rank * share :][:share]
    own = F.pad(own, (0, 0, 0, 0, 0, share - len(own)))
    gathered = stack.new_empty(ranks * share, *stack.shape[1:])
    dist.all_gather_into_tensor(gathered, orthogonalize(own).contiguous())
    return gathered[:K]


class Muon:
    """Muon for the parameters of a `LanguageModel` with the role "matrix", AdamW for the others.

    Matrices of the same shape are stacked, so a step is a few batched matmuls, while
    `torch.optim.Muon` loops over the tensors. The state is allocated on construction. With several
    ranks, each holds the full state and orthogonalizes its share of the matrices. Raises
    `UserError` if the model is sharded.
    """

    Config: ClassVar = MuonConfig

    def __init__(self, model: Any, config: MuonConfig) -> None:
        self._config, self._lr = config, config.lr
        roles = model.parameter_roles()
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if any(hasattr(p, "full_tensor") for p in named.values()):
            raise UserError("muon cannot train a sharded model yet: leave out --shard")
        device = next(iter(named.values())).device
        self._state: dict[str, Tensor] = {}

        stacks: dict[torch.Size, list[str]] = {}
        for name, p in named.items():
            if roles[name] == "matrix":
                stacks.setdefault(p.shape, []).append(name)
        self._stacks: list[tuple[list[Tensor], Tensor]] = []  # K matrices, momentum (K, R, C)
        for shape, names in stacks.items():
            momentum = torch.zeros(len(names), *shape, device=device)
            self._stacks.append(([named[n] for n in names], momentum))
            self._state |= {f"momentum.{n}": m for n, m in zip(names, momentum, strict=True)}

        others = [n for n in named if roles[n] != "matrix"]
        rates = {n: config.adamw_lr(roles[n]) / config.lr for n in others}  # relative to matrices
        self._adamw = torch.optim.AdamW(
            [{"params": [named[n]], "scale": rates[n]} for n in others],
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=0.0,
            fused=True,
        )
        updates = torch.zeros(
            1 + len(others), device=device
        )  # Muon's, then one per AdamW parameter
        self._updates = updates[0]
        for name, count in zip(others, updates[1:], strict=True):
            state = {key: torch.zeros_like(named[name]) for key in STATES}
            self._adamw.state[named[name]] = {"step": count, **state}
            self._state |= {f"{key}.{name}": tensor for key, tensor in state.items()}
        self._state["updates"] = updates

    def set_lr(self, lr: float) -> None:
        """Set the matrices' learning rate for the next step; the others keep their ratios to it."""
        self._lr = lr

    @torch.no_grad()
    def step(self, skip: Tensor) -> None:
        """Update the weights from their gradients. If `skip` (a scalar on the device) is true,
        nothing changes. The host does not wait for it."""
        momentum = self._momentum()
        for matrices, buffer in self._stacks:
            self._step_stack(matrices, buffer, momentum, skip)
        self._updates += ~skip
        for group in self._adamw.param_groups:
            group["lr"] = self._lr * group["scale"]
        self._adamw.found_inf = skip.float()  # type: ignore[attr-defined]
        self._adamw.step()

    def _momentum(self) -> Tensor:
        """The momentum, which rises linearly to its final value [modded-nanogpt]."""
        c = self._config
        done = ((self._updates + 1) / max(1, c.momentum_warmup)).clamp(max=1)  # 0 ... 1
        return c.momentum_start + (c.momentum - c.momentum_start) * done

    def _step_stack(
        self, matrices: list[Tensor], buffer: Tensor, momentum: Tensor, skip: Tensor
    ) -> None:
        gradient = torch.stack([p.grad for p in matrices if p.grad is not None])  # (K, R, C)
        averaged = buffer.lerp(gradient, 1 - momentum)
        buffer.copy_(torch.where(skip, buffer, averaged))
        update = gradient.lerp(averaged, momentum) if self._config.nesterov else averaged
        # bf16 is enough [Jordan] and fast on a GPU.
        update = orthogonalize_on_ranks(update.bfloat16() if update.is_cuda else update).float()
        # So that one learning rate suits all shapes and widths [Bernstein, "Deriving Muon"].
        update *= max(1, update.shape[1] / update.shape[2]) ** 0.5
        if self._config.weight_decay:
            decay = self._config.weight_decay * torch.stack(matrices)
            if self._config.cautious:
                decay = torch.where(decay * update > 0, decay, 0)
            update += decay
        change = torch.where(skip, 0, self._lr * update)
        torch._foreach_sub_(matrices, list(change))  # pyright: ignore[reportPrivateImportUsage]

    def state_tensors(self) -> dict[str, Tensor]:
        """`momentum.NAME` of matrices, `exp_avg.NAME` and `exp_avg_sq.NAME` of the others, and
        `updates`: the steps that were not skipped, for Muon and for each AdamW parameter."""
        return dict(self._state)
