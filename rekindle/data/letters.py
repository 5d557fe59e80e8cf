"""Letters that are newer than the Unicode tables of one of two encoders.

One encoder treats such a character as a letter, the other as a symbol, so they split words
differently. Which characters are affected depends on the installed versions, so all code points
that Unicode may have added recently are tested. This takes 0.2 s.
"""

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

# Ranges of code points that cannot get new letters: they are full, or not for letters.
_OLD = (
    (0x0, 0x80), (0x3400, 0x4DC0), (0x4E00, 0xA000), (0xAC00, 0xD7A4), (0xD800, 0xF900),
    (0x20000, 0x2A6E0), (0x40000, 0x110000),
)  # fmt: skip
_PROBE = "{0}'ll\n"  # the apostrophe starts a new word after a letter, but not after a symbol


def differing_letters(
    reference: Callable[[str], Sequence[int]], other: Callable[[bytes], np.ndarray]
) -> list[int]:
    """The code points that only one of two GPT-2 encoders treats as a letter or digit."""
    starts, ends = zip(*_OLD, strict=True)
    gaps = zip(ends[:-1], starts[1:], strict=True)
    points = [c for start, end in gaps for c in range(start, end) if not chr(c).isspace()]
    text = "".join(map(_PROBE.format, map(chr, points)))
    contraction, newline = reference("'ll")[0], reference("\n")[0]

    def letters(ids: np.ndarray) -> np.ndarray:
        found = np.zeros(len(points) + 1, bool)
        found[np.cumsum(ids == newline)[ids == contraction]] = True
        return found[:-1]

    differ = letters(np.asarray(reference(text))) != letters(other(text.encode()))
    return np.array(points)[differ].tolist()


class Letters:
    """A set of code points; tests whether texts contain any of them."""

    def __init__(self, points: Sequence[int]) -> None:
        numbers = np.array(points, np.int64)
        runs = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1) if points else []
        ranges = [(int(run[0]), int(run[-1])) for run in runs]
        literals = "".join(f"{chr(first)}-{chr(last)}" for first, last in ranges)
        self.pattern = re.compile(f"[{literals}]" if points else r"(?!)")  # for Python strings
        self._re2 = "[" + "".join(f"\\x{{{a:x}}}-\\x{{{b:x}}}" for a, b in ranges) + "]"
        # The first two UTF-8 bytes of each letter, a quick test that most texts fail.
        self._beginnings = np.zeros(1 << 16, bool)
        for point in points:
            first, second = chr(point).encode()[:2]
            self._beginnings[first << 8 | second] = True
        self._lowest = min((chr(point).encode()[0] for point in points), default=256)

    def are_in(self, texts: "pa.StringArray") -> bool:
        """Whether any of the texts contains any of the letters."""
        from pyarrow import compute

        data = texts.buffers()[2]
        if data is None or self._lowest > 255:
            return False
        text = np.frombuffer(data, np.uint8)
        positions = np.flatnonzero(text[:-1] >= self._lowest)
        beginnings = text[positions].astype(np.uint16) << 8 | text[positions + 1]
        if not self._beginnings[beginnings].any():
            return False
        found = compute.call_function(
            "match_substring_regex", [texts], compute.MatchSubstringOptions(self._re2)
        )
        return bool(compute.call_function("any", [found]).as_py())
