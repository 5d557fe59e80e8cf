"""Create a source of local files from the name of its flag."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rekindle.data.sources import from_arguments


def source_of(kind: str, paths: Sequence[Path]) -> Any:
    """The source for `--KIND PATHS`."""
    flags: dict[str, Any] = {kind: list(paths)}
    return from_arguments(**flags)
