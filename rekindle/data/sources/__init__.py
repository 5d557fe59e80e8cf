"""Sources of text. To add one, add a file here and a line in `SOURCES`."""

import difflib
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rekindle.errors import UserError

if TYPE_CHECKING:
    from rekindle.data.sources.base import Source
    from rekindle.data.sources.ready_made import ReadyMade

_PATHS: dict[str, Any] = {"type": Path, "nargs": "+"}

# Name of the flag → its class, and the argparse options of the flag. The class is called with the
# flag's value, or without arguments if the flag has none. It is imported only when the flag is
# used, so that `--help` stays fast.
SOURCES: dict[str, tuple[str, dict[str, Any]]] = {
    "embedded": (
        "python_docs.PythonDocs",
        {"action": "store_true", "help": "Python's own documentation; needs no network"},
    ),
    "parquet": (
        "parquet.ParquetSource",
        _PATHS
        | {
            "metavar": "PATH",
            "help": "Parquet files, or folders of them, with a `text` column",
        },
    ),
    "jsonl": (
        "jsonl.JsonLinesSource",
        _PATHS | {"metavar": "PATH", "help": "JSON Lines files with a `text` field"},
    ),
    "text": ("text.TextSource", _PATHS | {"metavar": "PATH", "help": "plain text files"}),
    "shards": (
        "ready_made.ShardFolder",
        {"type": Path, "metavar": "DIR", "help": "ready-made shards (llm.c, modded-nanogpt)"},
    ),
}


def from_arguments(dataset: str | None = None, **flags: Any) -> "Source | ReadyMade":
    """The source given on the command line: a dataset on the hub, or one of `SOURCES`.

    Raises `UserError` unless exactly one source is given, and if it does not exist.
    """
    named = [flag for flag, value in flags.items() if value]
    if len(named) + bool(dataset) != 1:
        *most, last = (
            f"--{flag} {options.get('metavar', '')}".strip()
            for flag, (_, options) in SOURCES.items()
        )
        raise UserError(
            "give exactly one source: a dataset (such as fineweb-edu-10bt), "
            f"{', '.join(most)} or {last}"
        )
    if dataset:
        return _dataset(dataset)
    module, _, name = SOURCES[named[0]][0].partition(".")
    kind, value = getattr(import_module(f"{__name__}.{module}"), name), flags[named[0]]
    return kind() if value is True else kind(value)


def _dataset(name: str) -> "Source | ReadyMade":
    """A source on the hub, given by a short name or by `owner/name[:folder]`."""
    from rekindle.data.sources import hub, ready_made

    if name == ready_made.DATASET:
        return ready_made.PublishedShards()
    if name in hub.DATASETS:
        return hub.HubSource(*hub.DATASETS[name])
    if Path(name).exists():
        raise UserError(
            f"{name} is a local file or folder, not a dataset on the hub: use --parquet {name}, "
            "--jsonl or --text"
        )
    if "/" in name:
        repository, _, folder = name.partition(":")
        return hub.HubSource(repository, folder)
    known = [*hub.DATASETS, ready_made.DATASET]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known
    raise UserError(
        f"unknown dataset {name!r}: did you mean {' or '.join(near)}? "
        "(any dataset on the hub: owner/name; your own files: --parquet DIR)"
    )
