"""Checkpoints: folders of safetensors and JSON, written atomically.

RUN/checkpoints/step-000250/
    model.safetensors      the parameters, under the model's names
    optimizer.safetensors  the optimizer's `state_tensors` (AdamW: exp_avg.NAME, ..., updates)
    checkpoint.json        a `Description`, with the SHA-256 of itself and of each file
"""

from rekindle.checkpoint.format import (
    DESCRIPTION,
    FILES,
    Checkpoint,
    DamagedError,
    Description,
    load,
)
from rekindle.checkpoint.retention import Keep, find, list_checkpoints, newest_complete, prune
from rekindle.checkpoint.writer import Saver, Snapshot, amend, save, write

__all__ = [
    "DESCRIPTION",
    "FILES",
    "Checkpoint",
    "DamagedError",
    "Description",
    "Keep",
    "Saver",
    "Snapshot",
    "amend",
    "find",
    "list_checkpoints",
    "load",
    "newest_complete",
    "prune",
    "save",
    "write",
]
