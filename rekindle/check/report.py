"""A report: measured values with their bands, and a verdict."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One measured value and its band. A row without a band always passes."""

    what: str
    measured: str
    band: str = ""
    passed: bool = True


@dataclass(frozen=True)
class Part:
    """The rows of one run, of several runs together, or of OpenAI's weights. An unfinished run
    passes if its values so far do."""

    name: str
    rows: tuple[Row, ...]
    is_finished: bool = True

    @property
    def passed(self) -> bool:
        return all(row.passed for row in self.rows)

    @property
    def verdict(self) -> str:
        wrong = [row for row in self.rows if not row.passed]
        if self.is_finished:
            return f"failed: {wrong[0].what}" if wrong else "passed"
        if not wrong:
            return "continue: not finished, within the bands so far"
        return f"stop: {wrong[0].what}: {wrong[0].measured}, should be {wrong[0].band}"


@dataclass(frozen=True)
class Report:
    """The result of `rekindle check`."""

    parts: tuple[Part, ...]

    @property
    def passed(self) -> bool:
        return all(part.passed for part in self.parts)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        parts = [
            {"name": p.name, "passed": p.passed, "finished": p.is_finished, "verdict": p.verdict,
             "rows": [asdict(row) for row in p.rows]}
            for p in self.parts
        ]  # fmt: skip
        return {"passed": self.passed, "parts": parts}

    def table(self) -> str:
        """The report as text: a row per value, and a verdict per part."""
        lines = []
        for part in self.parts:
            lines += ["", part.name] if lines else [part.name]
            for row in part.rows:
                mark = "" if row.passed else "  <- failed"
                band = f"   [{row.band}]" if row.band else ""
                lines.append(f"  {row.what:<26} {row.measured}{band}{mark}")
            lines.append(f"  {'verdict':<26} {part.verdict}")
        return "\n".join(lines)
