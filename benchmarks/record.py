"""The output of `benchmarks.gpu all`: three append-only files, each smaller than 16 MiB.

`results.jsonl` has one JSON object per line: an arm's results so far, or how the arm ended.
`stderr.txt` has everything that the arms print, `kernels.txt` the tables of the profiler. Lines are
written immediately and never changed, so that losing the machine loses at most the last line.
"""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

LIMIT = 16 * 2**20 - 1
CUT = b"\n[cut: the file has reached its size limit]\n"
DONE, FAILED, STOPPED = "done", "failed", "stopped"  # how an arm ended; stopped: no time left


class Record:
    """The three files in `folder`, which is created if it is missing."""

    def __init__(self, folder: Path, limit: int = LIMIT) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.results, self.output, self.kernels = (
            folder / name for name in ("results.jsonl", "stderr.txt", "kernels.txt")
        )
        self._limit = limit

    def result(self, arm: str, found: dict[str, Any]) -> None:
        """Append an arm's results so far. They replace earlier results of this arm."""
        self._line({"arm": arm, "event": "result", **found})

    def end(self, arm: str, status: str, seconds: float, why: str = "") -> None:
        """Append how an arm ended: `DONE`, `FAILED` or `STOPPED`."""
        ended = {"arm": arm, "event": "end", "status": status, "seconds": round(seconds, 1)}
        self._line({**ended, "why": why} if why else ended)

    def table(self, arm: str, text: str) -> None:
        """Append a table of the profiler."""
        self._append(self.kernels, f"==== {arm}\n{text}\n".encode())

    def printed(self, text: bytes) -> None:
        """Append output of an arm."""
        self._append(self.output, text)

    def copy_results(self, earlier: Path) -> None:
        """Copy the results in the folder `earlier`, unless there are results already."""
        source = earlier / self.results.name
        if source.exists() and not self.results.exists():
            self._append(self.results, source.read_bytes())

    def _line(self, entry: dict[str, Any]) -> None:
        stamped = {**entry, "at": datetime.now(UTC).isoformat(timespec="seconds")}
        before = self.results.read_bytes()[-1:] if self.results.exists() else b""
        torn = b"" if before in (b"", b"\n") else b"\n"  # the last line is incomplete
        self._append(self.results, torn + json.dumps(stamped).encode() + b"\n")

    def _append(self, path: Path, data: bytes) -> None:
        room = self._limit - len(CUT) - (path.stat().st_size if path.exists() else 0)
        if room < 0:
            return
        with path.open("ab", buffering=0) as file:
            file.write(data if len(data) <= room else data[:room] + CUT)


def read(folder: Path) -> list[dict[str, Any]]:
    """The entries of results.jsonl in `folder`, without incomplete lines."""
    path = folder / "results.jsonl"
    entries: list[dict[str, Any]] = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return entries


def results(folder: Path) -> dict[str, dict[str, Any]]:
    """The last results of each arm."""
    return {e["arm"]: e for e in read(folder) if e["event"] == "result"}


def statuses(folder: Path) -> dict[str, str]:
    """How the last run of each arm ended."""
    return {e["arm"]: e["status"] for e in read(folder) if e["event"] == "end"}
