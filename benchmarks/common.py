"""What every benchmark records about its machine, and how it summarizes its rounds."""

import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rekindle.runtime.device import cpu_model


def command() -> str:
    """The current command line, without `--out` and with paths cut to their last part."""
    words = ["python -m", f"benchmarks.{Path(sys.argv[0]).stem}"]
    given = iter(sys.argv[1:])
    for word in given:
        if word == "--out":
            next(given, None)
        elif not word.startswith("--out="):
            words.append(Path(word).name if "/" in word else word)
    return " ".join(words)


def environment(*packages: str) -> dict[str, Any]:
    """The command, the date, the machine, and the versions of Python and `packages`."""
    return {
        "command": command(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 1),  # a busy machine gives unreliable figures
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile of at least two measurements."""
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    found = {"median": statistics.median(values), "p10": tenths[0], "p90": tenths[-1]}
    return {name: round(value, 4) for name, value in found.items()}


def write_result(out: Path, result: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2))
