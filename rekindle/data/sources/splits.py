"""Which split a file belongs to, decided for every source by the words in the file's name."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

# The words by which Hugging Face's `datasets` recognizes a split (KEYWORDS in its data_files.py).
WORDS = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
LEFT_OUT = "test data by name"  # the reason reported for a file of the split `test`
MOST_NAMES = 20  # names shown on one line


def split_of(path: str) -> str | None:
    """`train`, `val` or `test`, from the words in a file's name, or else in the nearest folder's.

    Only whole words count: `values` and `medieval` do not match. With several words, `test` wins
    over `val`, and `val` over `train`: a file `train_test` is left out, not trained on.
    """
    for name in reversed(PurePosixPath(path).parts):
        found = {WORDS.get(word) for word in _words(name)}
        for split in ("test", "val", "train"):
            if split in found:
                return split
    return None


def _words(name: str) -> list[str]:
    """The runs of letters in a name, also split where an upper-case letter follows a lower-case
    one."""
    runs = re.findall(r"[^\W\d_]+", name)
    return [word.lower() for run in runs for word in re.split(r"(?<=[a-z])(?=[A-Z])", run)]


def splits_of(paths: Sequence[str]) -> list[str | None]:
    """The split of each file of a source: `val`, `train`, `test` (to be left out), or None.

    If any file is for validation, all others are for training. If none is, they get None: the hash
    of each document decides.
    """
    splits = [split_of(path) for path in paths]
    other = "train" if "val" in splits else None
    return [split if split in ("val", "test") else other for split in splits]


def split_lines(
    files: Iterable[tuple[str, str | None]],
    left_out: Iterable[tuple[str, str]],
    undecided: str = "training",
) -> list[str]:
    """A line for each split, and for each reason why files are left out. `files` are (name, split),
    `left_out` are (name, reason); `undecided` describes the use of files with split None."""
    titles = {"train": "training", "val": "validation", None: undecided}
    groups: dict[str, list[str]] = {title: [] for title in titles.values()}
    for name, split in files:
        groups[titles[split]].append(name)
    reasons: dict[str, list[str]] = defaultdict(list)
    for name, reason in left_out:
        reasons[f"left out, {reason}"].append(name)
    return [f"{title}: {_listed(names)}" for title, names in (groups | reasons).items() if names]


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:MOST_NAMES])
    more = f", and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return f"{len(names)} file{'s' * (len(names) != 1)} ({shown}{more})"
