"""The command line: one function for each subcommand, and the only place that prints an error.

Nothing here imports torch before a command needs it, so that `--help` answers at once.
"""

import io
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rekindle.cli.parser import make_parser
from rekindle.errors import Stopped, UserError, is_out_of_memory

# What needs less memory, by command.
_ADVICE = {
    "train": "give a smaller --micro-batch or --batch.length, or --recompute, or more ranks",
    "sample": "ask for fewer --num or --tokens",
    "eval": "score on a device with more memory, or a smaller model",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status: 0, 1 (verify: they differ), 2 (a user's mistake), or
    128 and the number of the signal that asked to stop."""
    # A closed one is None; opened here, nothing else takes its number and is written to instead.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not all of them can print what a model says
            stream.reconfigure(errors="backslashreplace")
    arguments = sys.argv[1:] if arguments is None else arguments
    options = make_parser(arguments).parse_args(arguments)
    _keep_compiled()
    try:
        return options.command(options) or 0
    except UserError as error:
        return _fail(str(error))
    except OSError as error:  # of a disk or a stream; where more can be said, it was
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}: mend that and give the same command again")
    except UnicodeError as error:
        return _fail(f"a text or a name is no UTF-8 ({error})")
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(f"rekindle: {stopped}", file=sys.stderr, flush=True)
        return stopped.status
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        size = re.search(r"tried to allocate [\d.]+ ?\w+", str(error), re.IGNORECASE)
        advice = _ADVICE.get(options.name, "give it a machine with more")
        return _fail(f"out of memory{f' ({size[0]})' if size else ''}: {advice}")
    except KeyboardInterrupt:
        print("\nrekindle: stopped; the same command resumes from what was saved", file=sys.stderr)
        return 130


def _fail(said: str) -> int:
    """Print what is wrong, and return the exit status of a user's mistake."""
    ranks, rank = os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK", "0")
    where = f" (rank {rank})" if ranks != "1" else ""
    # In one piece, or the lines of several ranks run together.
    print(f"rekindle: error{where}: {said}\n", end="", file=sys.stderr, flush=True)
    return 2


def _keep_compiled() -> None:
    """Let compiled graphs outlive the machine's temporary folder, so that a run that goes on begins
    at once. Has to be said before torch is imported."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(caches, "rekindle", "compiled")
    if not _may_be_made(folder):  # as for users without a home
        folder = Path(tempfile.gettempdir(), f"rekindle-compiled-{getattr(os, 'getuid', str)()}")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def _may_be_made(folder: Path) -> bool:
    there = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    return folder.is_absolute() and there.is_dir() and os.access(there, os.W_OK)
