"""Gradients → weights."""
