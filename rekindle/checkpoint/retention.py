"""Which checkpoints there are, and which of them stay."""

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
    """The checkpoints under `folder`, oldest first. Unfinished ones have other names."""
    found = [p for p in folder.glob("step-*") if _NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=_step)


def newest_whole(
    folder: Path, model_class: Any = None
) -> tuple[Checkpoint | None, dict[Path, str]]:
    """The newest whole checkpoint under `folder`, if there is any, and what is wrong with those
    after it. `model_class`: as `load` has it.

    Raises `UserError` if there are checkpoints but none is whole.
    """
    damaged: dict[Path, str] = {}
    for path in reversed(list_checkpoints(folder)):
        try:
            return load(path, model_class), damaged
        except DamagedError as error:
            damaged[path] = error.what
    if damaged:
        raise UserError(
            f"no checkpoint in {folder} is whole ({'; '.join(damaged.values())}): restore one from "
            "a copy, or start anew in another --out"
        )
    return None, damaged


def find(path: Path) -> Path:
    """The checkpoint that a run folder or a checkpoint folder stands for: itself, or the newest.

    Raises `UserError` if it is neither.
    """
    if (path / DESCRIPTION).is_file():
        return path
    if found := list_checkpoints(path / "checkpoints"):
        return found[-1]
    if not path.exists():
        raise UserError(f"there is no {path}")
    if (path / "checkpoints").is_dir():
        raise UserError(f"the run {path} has no checkpoint yet: train it further")
    raise UserError(
        f"{path} is no run and no checkpoint: it has neither checkpoints/ nor {DESCRIPTION}"
    )


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay: the `newest` ones (0: all), the `best` by validation loss, and those
    at multiples of `every` steps (0: none)."""

    newest: int = 0
    best: int = 0
    every: int = 0


def prune(folder: Path, keep: Keep) -> None:
    """Remove what `keep` does not name. The newest one, just written, always stays."""
    found = list_checkpoints(folder)
    old = found[: -keep.newest] if keep.newest else []
    losses = {path: _validation_loss(path) for path in found} if old and keep.best else {}
    best = sorted((p for p, loss in losses.items() if loss < math.inf), key=lambda p: losses[p])
    for path in old:
        if path in best[: keep.best] or (keep.every and _step(path) % keep.every == 0):
            continue
        storage.remove_folder(path)


def _validation_loss(path: Path) -> float:
    """As its description has it; infinite if it was not measured or cannot be read."""
    try:
        return storage.read_json(path / DESCRIPTION, {"validation_loss": float})["validation_loss"]
    except UserError:
        return math.inf


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
