"""A cache of compiled code that a killed process left damaged is repaired."""

from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = """
import os, sys, torch
from pathlib import Path
from rekindle.runtime.compiling import with_repaired_cache

@torch.compile
def double(x):
    return (x * 2).sum()

cache = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
for library in cache.rglob("*.so") if "cut" in sys.argv else []:
    content = library.read_bytes()
    library.write_bytes(content[: int(len(content) * float(sys.argv[2]))])
run = with_repaired_cache if "plain" not in sys.argv else lambda call: call()
print(run(lambda: double(torch.ones(100))).item())
"""


@pytest.mark.slow  # compiles in processes of their own
def test_libraries_cut_short_are_compiled_again(
    tmp_path: Path, python: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    first = python("-c", SCRIPT, cwd=tmp_path)
    assert first.stdout == "200.0\n", first.stderr
    assert list((tmp_path / "cache").rglob("*.so"))
    assert python("-c", SCRIPT, "cut", 0.1, "plain", cwd=tmp_path).returncode == 1
    for part in (0.0, 0.1, 0.9):
        again = python("-c", SCRIPT, "cut", part, cwd=tmp_path)
        assert again.stdout == "200.0\n", (part, again.stderr)


def test_other_errors_are_not_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a library inside the cache is removed, and each only once."""
    from rekindle.runtime.compiling import with_repaired_cache

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    outside = tmp_path / "outside.so"
    outside.write_text("")
    for message in ("a bug", f"{outside}: file too short", f"{tmp_path}/cache/a.so: gone"):
        calls = []

        def fail(message: str = message, calls: list[int] = calls) -> None:
            calls.append(1)
            raise RuntimeError(message)

        with pytest.raises(RuntimeError, match=message[:5]):
            with_repaired_cache(fail)
        assert calls == [1]
    assert outside.exists()
