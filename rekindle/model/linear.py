"""Linear layers whose weights stay float32, and a head that is given a few rows at a time."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HEAD_ROWS = 2_048  # that `losses` gives the head at once: their logits take 0.4 GB in float32


class Linear(nn.Linear):
    """A linear layer in its input's type: the weights stay float32 and are cast where they act.

    If they have been cast for good (`cast_linears`), it is the input that is cast to their type.
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(*self.cast(input))

    def cast(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Input, weight and bias in one type."""
        if self.weight.dtype != torch.float32:
            return input.to(self.weight.dtype), self.weight, self.bias
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return input, self.weight.to(input.dtype), bias


def cast_linears(model: nn.Module, dtype: torch.dtype, rows: int = 0) -> None:
    """Cast the weights of all linear layers once, for a model that is sampled from.

    Otherwise each pass casts them anew, which for a single token takes longer than the matmuls. The
    results are the same: embeddings and norms stay float32, so a head that was tied to the
    embedding is cast and no longer tied. For one or two `rows` of one token, float32 weights on a
    CPU with more outputs than inputs are laid out by columns: a third faster to read.
    """
    for module in model.modules():
        if not isinstance(module, Linear):
            continue
        weight, bias = module.weight.detach().to(dtype), module.bias
        on_cpu = dtype == torch.float32 and weight.device.type == "cpu"
        if 0 < rows <= 2 and on_cpu and weight.shape[0] > weight.shape[1]:
            weight = weight.t().contiguous().t()
        module.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            module.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)


def losses_in_pieces(head: Callable[[Tensor], Tensor], x: Tensor, targets: Tensor) -> Tensor:
    """(N, C), (N,) targets → the cross-entropy of each in nats, (N,) float32, 0 where the target is
    -100. Without gradients, the logits of at most `HEAD_ROWS` rows exist at a time."""
    pieces = zip(x.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True)
    return torch.cat([F.cross_entropy(head(x).float(), y, reduction="none") for x, y in pieces])
