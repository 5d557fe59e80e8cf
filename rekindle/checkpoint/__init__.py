"""Checkpoints: folders of safetensors and JSON, whole or absent.

RUN/checkpoints/step-000250/
    model.safetensors      the parameters, under the model's names
    optimizer.safetensors  what the optimizer names as its state (AdamW: exp_avg.NAME, ..., updates)
    checkpoint.json        a `Description`; each file's SHA-256 and its own
"""

from rekindle.checkpoint.format import (
    DESCRIPTION,
    FILES,
    Checkpoint,
    DamagedError,
    Description,
    load,
)
from rekindle.checkpoint.retention import Keep, find, list_checkpoints, newest_whole, prune
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
    "newest_whole",
    "prune",
    "save",
    "write",
]
