"""A language model written outside the package. Instead of attention, it has a gated running mean
of earlier positions; no biases, an untied head, a scalar and a three-dimensional parameter."""

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rekindle.errors import UserError
from rekindle.flags import flag
from rekindle.model.compute import Compute


@dataclass(frozen=True)
class GatedConfig:
    n_layer: int = flag(2, "blocks")
    width: int = flag(24, "channels")
    block_size: int = flag(32, "longest context, in tokens")
    vocab_size: int = 257
    padded_vocab_size: int = 0

    def __post_init__(self) -> None:
        if self.padded_vocab_size == 0:
            object.__setattr__(self, "padded_vocab_size", self.vocab_size)

    @classmethod
    def from_dict(cls, described: dict[str, Any]) -> "GatedConfig":
        if set(described) != {f.name for f in fields(cls)}:
            raise UserError("not a gated model")
        return cls(**described)

    def for_training(self) -> "GatedConfig":
        return replace(self, padded_vocab_size=-(-self.vocab_size // 8) * 8)


class GatedBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(3, width, width) * width**-0.5)
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B, T, C), and the sum and count (B, C + 1) of earlier positions."""
        value, gate, out = (x @ weight for weight in self.gate)
        counted = torch.cat([value, torch.ones_like(value[..., :1])], 2).cumsum(1)
        if before is not None:
            counted = counted + before[:, None]
        mean = counted[..., :-1] / counted[..., -1:]
        return x + self.scale * torch.sigmoid(gate) * (mean + torch.tanh(out)), counted[:, -1]


class RunningSums:
    """The cache of this model."""

    positions = mask = None

    def __init__(self, n_layer: int) -> None:
        self.sums: list[Tensor | None] = [None] * n_layer

    def advance(self, positions: int) -> None:
        """The sums have no positions."""

    def fix(self) -> None:
        """Their shapes never change."""


class GatedModel(nn.Module):
    Config: ClassVar = GatedConfig

    def __init__(self, config: GatedConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.padded_vocab_size, config.width)
        self.layers = nn.ModuleList(GatedBlock(config.width) for _ in range(config.n_layer))
        self.unembed = nn.Linear(config.width, config.padded_vocab_size, bias=False)

    @property
    def blocks(self) -> Any:
        return self.layers

    def use(self, compute: Compute) -> "GatedModel":
        return self

    def cast(self, dtype: torch.dtype, rows: int = 0) -> "GatedModel":
        return self

    def forward(self, idx: Tensor, targets: Tensor | None = None, cache: Any = None) -> Any:
        x = self.body(idx, cache)
        if targets is None:
            return self.head(x)[..., : self.config.vocab_size], None
        counted = (targets != -100).sum()
        return None, self.losses(x.flatten(0, 1), targets.flatten()).sum() / counted

    def body(
        self, idx: Tensor, cache: Any = None, positions: Any = None, mask: Tensor | None = None
    ) -> Tensor:
        x = self.embed(idx)
        for n, layer in enumerate(self.layers):
            x, after = layer(x, cache.sums[n] if cache else None)
            if cache:
                cache.sums[n] = after
        return x

    def head(self, x: Tensor) -> Tensor:
        return self.unembed(x)

    def losses(self, x: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.head(x).float(), targets, reduction="none")

    def parameter_roles(self) -> dict[str, str]:
        return {
            name: "embedding" if "embed" in name else ("matrix" if p.dim() > 1 else "vector")
            for name, p in self.named_parameters()
        }

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T: int) -> int:
        return 6 * self.parameter_count()

    def new_cache(self, B: int, capacity: int) -> Any:
        return RunningSums(self.config.n_layer)
