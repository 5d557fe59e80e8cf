"""Linear layers with float32 weights, and losses computed a few rows at a time."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HEAD_ROWS = 2_048  # per call of the head in `losses`: their float32 logits take 0.4 GB


class Linear(nn.Linear):
    """A linear layer that computes in its input's type: float32 weights are cast when used.

    After `cast_linears`, the input is cast to the type of the weights instead.
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(*self.cast(input))

    def cast(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Input, weight and bias, cast to one type."""
        if self.weight.dtype != torch.float32:
            return input.to(self.weight.dtype), self.weight, self.bias
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return input, self.weight.to(input.dtype), bias


def cast_linears(model: nn.Module, dtype: torch.dtype, rows: int = 0) -> None:
    """Cast the weights of all linear layers once, for sampling.

    Otherwise each forward pass casts them again, which takes longer than the matmuls of a single
    token. Results are the same, because embeddings and norms stay float32; a head that was tied to
    the embedding is no longer tied. For one or two `rows` on a CPU, float32 weights with more
    outputs than inputs are stored column by column, which is a third faster to read.
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
    -100. Without gradients, only the logits of `HEAD_ROWS` rows are held at a time."""
    pieces = zip(x.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True)
    return torch.cat([F.cross_entropy(head(x).float(), y, reduction="none") for x, y in pieces])
