"""A cache of compiled code that a killed process left damaged is repaired."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rekindle.runtime.compiling import repair_cache

# Compiles a function, and loads it from the cache the next time. Loading a partial library would
# raise an error or kill the process, depending on where it was cut.
SCRIPT = """
import torch
from rekindle.runtime.compiling import repair_cache

@torch.compile
def double(x):
    return (x * 2).sum()

repair_cache()
print(double(torch.ones(100)).item())
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.slow  # compiles in processes of their own
def test_libraries_cut_short_are_compiled_again(
    cache: Path, tmp_path: Path, python: Callable
) -> None:
    assert python("-c", SCRIPT, cwd=tmp_path).stdout == "200.0\n"
    whole = {library: library.read_bytes() for library in cache.glob("*/*.so")}
    assert whole
    repair_cache()
    assert all(library.read_bytes() == content for library, content in whole.items())
    for part in (0.0, 0.1, 0.99):
        for library, content in whole.items():
            library.write_bytes(content[: int(part * len(content))])
        assert python("-c", SCRIPT, cwd=tmp_path).stdout == "200.0\n", part
        assert {len(library.read_bytes()) for library in whole} == set(map(len, whole.values()))


@pytest.mark.parametrize("part", [0.0, 0.001, 0.1, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("busy", [False, True])
def test_only_partial_libraries_that_no_process_writes_are_removed(
    cache: Path, part: float, busy: bool
) -> None:
    """A process that compiles holds the lock of the library."""
    import torch

    real = next((Path(torch.__file__).parent / "lib").glob("libshm*.so")).read_bytes()
    library, lock = cache / "ab" / "cabcd.main.so", cache / "locks" / "cabcd.lock"
    library.parent.mkdir(parents=True)
    lock.parent.mkdir()
    library.write_bytes(real[: int(part * len(real))])
    with open(lock, "w") as held:
        if busy:
            fcntl.flock(held, fcntl.LOCK_EX)
        repair_cache()
    assert library.exists() == (busy or part == 1.0)


def test_without_a_cache_nothing_happens(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repair_cache()
    assert not cache.exists()
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    repair_cache()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
