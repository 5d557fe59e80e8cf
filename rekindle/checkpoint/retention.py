"""Finds checkpoints, and removes the ones that are no longer needed."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rekindle import storage
from rekindle.checkpoint.format import DESCRIPTION, Checkpoint, DamagedError, load
from rekindle.errors import UserError

_NAME = re.compile(r"step-(\d{6,})")


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first. Unfinished ones have temporary names and are not
    listed."""
    found = [p for p in folder.glob("step-*") if _NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=_step)


def newest_complete(
    folder: Path, model_class: Any = None
) -> tuple[Checkpoint | None, dict[Path, str]]:
    """The newest undamaged checkpoint in `folder`, or None if there are no checkpoints; and what is
    wrong with each newer one. `model_class`: see `load`.

    Raises `UserError` if all checkpoints are damaged.
    """
    damaged: dict[Path, str] = {}
    for path in reversed(list_checkpoints(folder)):
        try:
            return load(path, model_class), damaged
        except DamagedError as error:
            damaged[path] = error.what
    if damaged:
        raise UserError(
            f"all checkpoints in {folder} are damaged ({'; '.join(damaged.values())}): restore one "
            "from a copy, or start again in a new --out"
        )
    return None, damaged


def find(path: Path) -> Path:
    """The path of a checkpoint: `path` itself, or the newest checkpoint if `path` is a run folder.

    Raises `UserError` if it is neither.
    """
    if (path / DESCRIPTION).is_file():
        return path
    if found := list_checkpoints(path / "checkpoints"):
        return found[-1]
    if not path.exists():
        raise UserError(f"there is no {path}")
    if (path / "checkpoints").is_dir():
        raise UserError(f"the run {path} has no checkpoint yet: continue training it")
    raise UserError(
        f"{path} is not a run or a checkpoint: it has neither checkpoints/ nor {DESCRIPTION}"
    )


@dataclass(frozen=True)
class Keep:
    """Which checkpoints to keep: the `newest` ones (0: all), the `best` ones by validation loss,
    and those at multiples of `every` steps (0: none)."""

    newest: int = 0
    best: int = 0
    every: int = 0


def prune(folder: Path, keep: Keep) -> None:
    """Remove the checkpoints that `keep` does not cover. The newest one always stays."""
    found = list_checkpoints(folder)
    old = found[: -keep.newest] if keep.newest else []
    losses = {path: _validation_loss(path) for path in found} if old and keep.best else {}
    best = sorted((p for p, loss in losses.items() if loss < math.inf), key=lambda p: losses[p])
    for path in old:
        if path in best[: keep.best] or (keep.every and _step(path) % keep.every == 0):
            continue
        storage.remove_folder(path)


def _validation_loss(path: Path) -> float:
    """The recorded validation loss; infinite if it was not measured or cannot be read."""
    try:
        return storage.read_json(path / DESCRIPTION, {"validation_loss": float})["validation_loss"]
    except UserError:
        return math.inf


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
