"""Compiling with a cache of compiled code that a killed process may have left damaged."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")

MOST_REPAIRS = 20  # files; each attempt finds one


def with_repaired_cache(call: Callable[[], T]) -> T:
    """Call what compiles. If it fails on a file of the cache that a kill cut short, remove that
    file and call it again.

    Inductor writes a library under its final name, so that a process killed while it compiles
    leaves a part of one, and every later run with the same code would fail to load it.
    """
    for _ in range(MOST_REPAIRS):
        try:
            return call()
        except Exception as error:
            damaged = _damaged_file(str(error))
            if damaged is None:
                raise
            damaged.unlink(missing_ok=True)
            torch._dynamo.reset()
    return call()


def _damaged_file(message: str) -> Path | None:
    """The file of the cache that an error of the dynamic loader names."""
    cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    found = re.search(r"(/\S+?\.so): ", message)
    if not (cache and found):
        return None
    path = Path(found[1])
    return path if path.is_relative_to(cache) and path.exists() else None
