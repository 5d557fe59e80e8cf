"""Why a model's numbers are not finite: the first weight to blame, or none."""

import torch

from rekindle.model import HasParameters


def why_not_finite(model: HasParameters) -> str:
    """The reason why `model` computes nan or inf, in a few words: its first weight that is not
    finite, with its place, or that its activations overflow. Looks at each weight once."""
    for name, p in model.named_parameters():
        tensor = getattr(p, "_local_tensor", p).detach()  # of a sharded one this rank's part
        bad = ~tensor.isfinite()
        if not bool(bad.any()):
            continue
        place = bad.nonzero()[0].tolist()
        value = float(tensor[tuple(place)])
        where = "" if tensor.shape != p.shape else f" at {place}"
        return f"its weights are broken: {name} is {value}{where}"
    return (
        "every weight is finite, so the activations overflow: use --precision fp32, or a model "
        "that was trained with a lower learning rate"
    )


def first_not_finite(values: torch.Tensor) -> int | None:
    """The index of the first of `values` (N,) that is not finite, if there is one."""
    bad = (~values.isfinite()).nonzero()
    return int(bad[0]) if len(bad) else None
