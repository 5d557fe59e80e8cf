"""Muon: momentum that is made orthogonal before it becomes an update of a matrix (Jordan et al.
2024, https://kellerjordan.github.io/posts/muon/). AdamW trains whatever is no hidden matrix.
With AdamW for the matrices too, a loss is 0.20 nats a byte higher (benchmarks/LOG.md).

Shapes in comments: K matrices of one shape, R rows and C columns, are one stack.
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
    """Bring the singular values of each matrix in (K, R, C) near 1: to 0.7-1.2, unless they are
    tiny. Five Newton-Schulz steps with Jordan's coefficients, which lift small values fastest."""
    tall = stack.shape[1] > stack.shape[2]
    x = stack.mT if tall else stack  # its Gram matrix is the smaller one
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x.mT if tall else x


def orthogonalize_shares(stack: Tensor) -> Tensor:
    """`orthogonalize` a (K, R, C) that all ranks hold: each does K / ranks of the matrices and
    gathers the rest, so that all get the same bits. Zeros fill up a share that is too small."""
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
    """Muon for those parameters of a `LanguageModel` whose role is "matrix", AdamW for the others.

    Matrices of one shape are one stack: a step is a few batched matmuls, where `torch.optim.Muon`
    loops over the tensors. Between ranks, all hold the whole state, which is allocated here, and
    share the work on the matrices. Raises `UserError` if the model is sharded.
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
        groups = [{"params": [named[n]], "scale": rates[n]} for n in others]
        betas, eps = (config.beta1, config.beta2), config.eps
        self._adamw = torch.optim.AdamW(groups, betas=betas, eps=eps, weight_decay=0.0, fused=True)
        updates = torch.zeros(1 + len(others), device=device)  # Muon's, and one for each of AdamW's
        self._updates = updates[0]
        for name, count in zip(others, updates[1:], strict=True):
            state = {key: torch.zeros_like(named[name]) for key in STATES}
            self._adamw.state[named[name]] = {"step": count, **state}
            self._state |= {f"{key}.{name}": tensor for key, tensor in state.items()}
        self._state["updates"] = updates

    def set_lr(self, lr: float) -> None:
        """The learning rate of matrices in the next step; the others keep their ratios to it."""
        self._lr = lr

    @torch.no_grad()
    def step(self, skip: Tensor) -> None:
        """Update the weights from their gradients; where `skip` (a scalar on the device) is true,
        nothing changes, and the host does not wait to know."""
        momentum = self._momentum()
        for matrices, buffer in self._stacks:
            self._step(matrices, buffer, momentum, skip)
        self._updates += ~skip
        for group in self._adamw.param_groups:
            group["lr"] = self._lr * group["scale"]
        self._adamw.found_inf = skip.float()  # type: ignore[attr-defined]
        self._adamw.step()

    def _momentum(self) -> Tensor:
        """Momentum rises in a straight line to its final value [modded-nanogpt]."""
        c = self._config
        done = ((self._updates + 1) / max(1, c.momentum_warmup)).clamp(max=1)  # 0 ... 1
        return c.momentum_start + (c.momentum - c.momentum_start) * done

    def _step(self, matrices: list[Tensor], buffer: Tensor, momentum: Tensor, skip: Tensor) -> None:
        gradient = torch.stack([p.grad for p in matrices if p.grad is not None])  # (K, R, C)
        averaged = buffer.lerp(gradient, 1 - momentum)
        buffer.copy_(torch.where(skip, buffer, averaged))
        update = gradient.lerp(averaged, momentum) if self._config.nesterov else averaged
        # bf16 is enough [Jordan] and fast on a GPU.
        update = orthogonalize_shares(update.bfloat16() if update.is_cuda else update).float()
        # A matrix of more rows than columns may change its output by as much as its input's size
        # differs: what makes one rate fit all widths [Bernstein, "Deriving Muon"].
        update *= max(1, update.shape[1] / update.shape[2]) ** 0.5
        if self._config.weight_decay:
            decay = self._config.weight_decay * torch.stack(matrices)
            if self._config.cautious:
                decay = torch.where(decay * update > 0, decay, 0)
            update += decay
        change = torch.where(skip, 0, self._lr * update)
        torch._foreach_sub_(matrices, list(change))  # pyright: ignore[reportPrivateImportUsage]

    def state_tensors(self) -> dict[str, Tensor]:
        """`momentum.NAME` of matrices; `exp_avg.NAME` and `exp_avg_sq.NAME` of the others, all of
        each parameter's shape; and `updates`, the number of steps that were not skipped, once for
        Muon and once for each parameter of AdamW's."""
        return dict(self._state)
