"""Words that this project does not use, and what to say instead: `python -m tests.words`.

Prints FILE:LINE: "WORD": say "REPLACEMENT" for each one found, and exits with status 1 if there is
any. Reads code, comments, names and documentation, but not recorded output.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = (
    "*.md", "*.toml", "Makefile", "launch/*", "docs/*.md",
    *(f"{d}/**/*.{kind}" for d in ("rekindle", "tests", "benchmarks") for kind in ("py", "md")),
)  # fmt: skip
SKIPPED = (
    "tests/words.py", "tests/test_words.py", "tests/faults/corpus", "tests/train/old_run",
    "benchmarks/results",
)  # fmt: skip
RECORDED = {  # what a command or an earlier version wrote
    "docs/wikipedia-on-a-laptop.md": re.compile(r"^```.*?^```", re.M | re.S),
    "benchmarks/LOG.md": re.compile(r"^\|.*", re.M),
}

# Regular expression, ignoring case: what to say instead. A space also matches an underscore, a
# hyphen or a line break. A match that contains the group `fine` is not reported.
WORDS = {
    r"go(?:es|ing)? on(?! (?:the|a)\b)": "resumes, continues",
    r"(?:gone|went) on(?! (?:the|a)\b)": "resumed, continued",
    r"objections?": "skip reason",
    r"refused steps?": "skipped step",
    r"shar(?:e|es|ed|ing) out": "sharded, divided",
    r"told": "signalled, stop requested, or the plain sentence",
    r"for ever": "without limit, never ends",
    r"who(?:so)?ever": "the plain sentence",
    r"nobody": "the plain sentence",
    r"(?P<fine>not )?so many": "N, X, a number of",
    r"(?P<fine>there )?(?:is|are|was|were) no (?!longer|more|less|fewer|other)[a-z]+": "is not a",
    r"anew": "again, from scratch",
    r"speak(?:s|ing)?|spoken?": "print, report, evaluate",
    r"hears?|heard": "receive",
    r"undisturbed": "uninterrupted",
    r"micro steps?": "micro-batch",
    r"(?P<fine>dot )?products(?! of)": "matmuls",
    r"mend(?:s|ed|ing)? (?:that|it)": "fix",
    r"of which each": "each of which",
    r"stands? still": "is stuck",
    r"as it were": "the plain sentence",
    r"likewise\.": "the sentence again",
    r"newest whole|whole checkpoints?": "complete",
    r'(?<!")utilisation(?!")': "MFU",  # quoted: a key of ladder.json
}
_SPACE = r'[\s_"#-]+(?:f")?'
PATTERNS = [
    (re.compile(rf"(?<![a-z])(?:{word.replace(' ', _SPACE)})(?![a-z])", re.I), instead)
    for word, instead in WORDS.items()
]


def find(text: str) -> Iterator[tuple[int, str, str]]:
    """The line, the words found and the replacement, for each use of `WORDS` in `text`."""
    for pattern, instead in PATTERNS:
        for match in pattern.finditer(text):
            if not match.groupdict().get("fine"):
                found = re.sub(_SPACE, " ", match[0]).strip()
                yield text.count("\n", 0, match.start()) + 1, found, instead


def read(path: Path, name: str) -> str:
    """The text of a file, in which recorded output is blank."""
    text = path.read_text(encoding="utf-8")
    if name in RECORDED:
        text = RECORDED[name].sub(lambda m: "\n" * m[0].count("\n"), text)
    return text


def main(root: Path = ROOT) -> int:
    """Print every old word in the files below `root`; 1 if there are any, else 0."""
    status = 0
    for path in sorted({path for pattern in FILES for path in root.glob(pattern)}):
        name = path.relative_to(root).as_posix()
        if not name.startswith(SKIPPED) and path.is_file():
            for line, found, instead in sorted(find(read(path, name))):
                print(f'{name}:{line}: "{found}": say "{instead}"')
                status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
