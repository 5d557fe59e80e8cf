"""Gradients → weights."""

from rekindle.optim.gradients import grad_norm

__all__ = ["grad_norm"]
