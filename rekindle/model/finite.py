"""Finds out why a model computes nan or inf."""

import torch

from rekindle.model import HasParameters


def why_not_finite(model: HasParameters) -> str:
    """A short reason why `model` computes nan or inf: the name and index of the first weight that
    is not finite, or that the activations overflow. Reads every weight once."""
    for name, p in model.named_parameters():
        tensor = getattr(p, "_local_tensor", p).detach()  # this rank's shard, if sharded
        bad = ~tensor.isfinite()
        if not bool(bad.any()):
            continue
        index = bad.nonzero()[0].tolist()
        value = float(tensor[tuple(index)])
        where = "" if tensor.shape != p.shape else f" at {index}"
        return f"its weights are broken: {name} is {value}{where}"
    return (
        "every weight is finite, so the activations overflow: use --precision fp32, or a model "
        "that was trained with a lower learning rate"
    )


def first_not_finite(values: torch.Tensor) -> int | None:
    """The index of the first of `values` (N,) that is not finite, or None."""
    bad = (~values.isfinite()).nonzero()
    return int(bad[0]) if len(bad) else None
