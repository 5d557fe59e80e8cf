"""A source of local files, by the name of its flag."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rekindle.data.sources import from_arguments


def source_of(kind: str, paths: Sequence[Path]) -> Any:
    """What `--KIND PATHS` names."""
    flags: dict[str, Any] = {kind: list(paths)}
    return from_arguments(**flags)
