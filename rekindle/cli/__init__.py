"""The command line: one function for each subcommand, and the only place that prints an error.

Nothing here imports torch before a command needs it, so that `--help` is fast.
"""

import io
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rekindle.cli.parser import make_parser, parse
from rekindle.errors import Stopped, UserError, is_out_of_memory

CACHE_BYTES = 100 * 2**20  # free space that the cache of compiled graphs needs

# What to try when memory runs out, by command.
_ADVICE = {
    "train": "lower --micro-batch or --batch.length, or use --recompute, or more ranks",
    "sample": "lower --num or --tokens",
    "eval": "use a device with more memory, or a smaller model",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status: 0, 1 (a comparison failed), 2 (a user's mistake), or
    128 plus the number of the signal that stopped it."""
    # A closed stream is None. Opening it here keeps our files from getting its descriptor.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a model's text may not fit its encoding
            stream.reconfigure(errors="backslashreplace")
    arguments = sys.argv[1:] if arguments is None else arguments
    _keep_compiled()
    _share_cores()
    try:
        if not arguments:
            make_parser()[0].print_help(sys.stderr)
            return 2
        namespace = parse(arguments)
        return namespace.command.run(namespace) or 0
    except UserError as error:
        return _fail(str(error))
    except OSError as error:  # of a disk or stream, not handled elsewhere
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}: fix that and run the same command again")
    except UnicodeError as error:
        return _fail(f"some text or a file name is not UTF-8 ({error})")
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(f"rekindle: {stopped}", file=sys.stderr, flush=True)
        return stopped.status
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        size = re.search(r"tried to allocate [\d.]+ ?\w+", str(error), re.IGNORECASE)
        advice = _ADVICE.get(arguments[0], "use a machine with more memory")
        return _fail(f"out of memory{f' ({size[0]})' if size else ''}: {advice}")
    except KeyboardInterrupt:
        print("\nrekindle: interrupted; run the same command again to continue", file=sys.stderr)
        return 130


def _fail(message: str) -> int:
    """Print the error, and return the exit status of a user's mistake."""
    ranks, rank = os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK", "0")
    where = f" (rank {rank})" if ranks != "1" else ""
    # One write, so that lines of several ranks do not mix.
    print(f"rekindle: error{where}: {message}\n", end="", file=sys.stderr, flush=True)
    return 2


def _keep_compiled() -> None:
    """Keep compiled graphs in the user's cache folder, so that a resumed run starts quickly. Must
    run before torch is imported."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(caches, "rekindle", "compiled")
    if not _can_be_created(folder):  # such as for a user without a home folder
        folder = Path(tempfile.gettempdir(), f"rekindle-compiled-{getattr(os, 'getuid', str)()}")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def _share_cores() -> None:
    """Let CPU threads wait for each other only briefly before they give up their core. By default
    GNU's OpenMP waits for milliseconds, which makes a step several times slower on a machine with
    other work (benchmarks/LOG.md). Must run before torch is imported."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _can_be_created(folder: Path) -> bool:
    there = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    if not (folder.is_absolute() and there.is_dir() and os.access(there, os.W_OK)):
        return False
    return shutil.disk_usage(there).free > CACHE_BYTES
