"""Evaluation: validation loss and tasks."""
