"""Mutation testing: plants bugs one at a time, and reports those that no test notices.

    python -m tests.mutate                        plant all, on two cores
    python -m tests.mutate --sample 12 --seed 7   plant a sample, for CI
    python -m tests.mutate --list
    python -m tests.mutate "by hand: clip of 1.0"

Two processes each work on a copy of the repository. First, a map from tests to the functions that
they execute is built, and cached until a file changes. A bug is then checked only by tests that
execute its function, fast and specific ones first. The exit status is 1 if a bug survives that is
not listed in `EXPLAINED`.
"""

import argparse
import contextlib
import hashlib
import importlib
import json
import multiprocessing
import os
import random
import select
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from tests.mutants import EXPLAINED, MovedError, Mutant, by_hand, generated, wiring
from tests.mutate_processes import (
    LEFT_OUT,
    ROOT,
    TRACER,
    Chosen,
    Mapper,
    Seen,
    end,
    forked,
    make_copy,
    pytest_in,
)

WORKERS = 2
GENERATED = 60  # drawn from several thousand
BUDGET = 30.0  # seconds of tests per bug, by the times in the map
SLOW = 20.0  # slower tests are not run; nor are those in LEFT_OUT
STRICT = "test_wiring"  # compares complete runs: is tried early although it is slow
PATIENCE = 40.0  # a test hangs if it takes this many seconds more than 20 times its usual time
# Imported once in advance. Each process imports the package and its tests itself.
HEAVY = ("torch", "torch._dynamo", "numpy", "pyarrow.parquet", "hypothesis", "tiktoken",
         "safetensors.torch", "transformers.models.gpt2.modeling_gpt2")  # fmt: skip


class Result(NamedTuple):
    """The test that noticed a bug (or an empty string), and how long and how many tests it took."""

    noticed_by: str
    seconds: float
    tests: int


FOLDER = Path()  # this worker's


def begin_worker(parent: str) -> None:
    global FOLDER
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that `finally` runs
    FOLDER = Path(tempfile.mkdtemp(dir=parent)) / "copy"
    make_copy(FOLDER)


def map_file(job: tuple[str, Path]) -> tuple[Path, Seen]:
    """The functions that each test in a file executes, and the cache file for them. Tests that fail
    are omitted."""
    folder, found = FOLDER, FOLDER.with_name("map.json")
    tracer = TRACER.format(package=f"{folder}/rekindle/")
    (folder / "sitecustomize.py").write_text(tracer)

    def work(pipe: int) -> int:
        os.environ["REKINDLE_TRACE"] = os.devnull
        exec(tracer, {})
        mapper = Mapper(pipe, folder.parent)
        status = pytest_in(folder, [job[0]], mapper)
        found.write_text(json.dumps(mapper.seen))
        return status

    log = folder.with_name("map.log")
    pid, pipe = forked(work, log)
    try:
        with open(pipe) as lines:
            failed = [line.split()[1] for line in lines if line.startswith("failed")]
        os.waitpid(pid, 0)
    finally:
        end(pid)
        (folder / "sitecustomize.py").unlink()
    assert found.exists(), log.read_text()[-2000:]
    seen: Seen = json.loads(found.read_text())
    for name in set(failed):
        print(f"omitted because it fails without a bug: {name}", flush=True)
        del seen[name]
    return job[1], seen


def plant(job: tuple[Mutant, list[str], dict[str, float]]) -> tuple[Mutant, Result]:
    """Plant one bug, run the tests until one notices it, and remove the bug again."""
    mutant, tests, usual = job
    path, began = FOLDER / mutant.file, time.perf_counter()
    before = path.read_text()
    set_text(path, mutant.text())
    files = dict.fromkeys(name.split("::")[0] for name in tests)
    pid, pipe = forked(
        lambda pipe: pytest_in(FOLDER, files, Chosen(tests, pipe), "-x"), FOLDER.with_name("log")
    )
    try:
        noticed_by, count = watch(pid, pipe, usual) if tests else ("", 0)
    finally:
        end(pid)
        os.close(pipe)
        set_text(path, before)
    return mutant, Result(noticed_by, time.perf_counter() - began, count)


def watch(pid: int, pipe: int, usual: dict[str, float]) -> tuple[str, int]:
    """The first test that notices the bug, and the number of tests that were started."""
    at, count, allowed, rest = "the import", 0, 60.0, b""
    while True:
        if not select.select([pipe], [], [], allowed)[0]:
            end(pid)
            os.waitpid(pid, 0)
            return f"{at} (it hangs)", count
        chunk = os.read(pipe, 1 << 16)
        if not chunk:
            break
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            kind, _, at = line.decode().partition(" ")
            count += kind == "start"
            if kind == "failed":  # wait for fixtures to clean up: some mount a disk
                while select.select([pipe], [], [], PATIENCE)[0] and os.read(pipe, 1 << 16):
                    pass
                end(pid)
                os.waitpid(pid, 0)
                return at, count
            allowed = PATIENCE + 20 * usual.get(at, 1.0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return ("" if status == 0 else f"{at} (exit status {status})"), count


def set_text(path: Path, text: str) -> None:
    path.write_text(text)
    for compiled in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
        compiled.unlink()  # Python compares size and seconds only, which may be the same


# Which tests to run for a bug


def make_map(pool: Any) -> Seen:
    """The map; cached in pytest's folder per test file until that file or the package changes."""
    package, seen, missing = _digest((ROOT / "rekindle").rglob("*.py")), Seen(), []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        name = path.relative_to(ROOT).as_posix()
        if any(word in name for word in LEFT_OUT):
            continue
        key = package + _digest([path, *(ROOT / "tests").rglob("conftest.py")])
        cached = ROOT / ".pytest_cache" / "mutate" / f"{path.stem}-{key}.json"
        if cached.exists():
            seen |= json.loads(cached.read_text())
        else:
            missing.append((name, cached))
    for cached, part in pool.imap_unordered(map_file, missing):
        cached.parent.mkdir(parents=True, exist_ok=True)
        cached.write_text(json.dumps(part))
        seen |= part
    return seen


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files)))
    return digest.hexdigest()[:12]


def choose_tests(mutant: Mutant, seen: Seen) -> list[str]:
    """The tests that execute the bug's function, or any of the module if it is outside functions.
    Fast and specific tests, and files that import the module, come first, up to the budget."""
    location, module = f"{mutant.file}:{mutant.function}", f"{mutant.file}:"

    def runs(functions: list[str]) -> bool:
        if mutant.function:
            return any(f == location for f in functions)
        return any(f.startswith(module) for f in functions)

    def cost(name: str) -> float:
        entry, strict = seen[name], 0.02 if STRICT in name else 1.0
        if _imports(name.partition("::")[0], mutant.file):
            strict *= 0.05
        return strict * (entry["seconds"] + 0.02) * len(entry["functions"])

    chosen, spent = [], 0.0
    for name in sorted((n for n, e in seen.items() if runs(e["functions"])), key=cost):
        seconds = seen[name]["seconds"]
        if seconds <= SLOW and spent + seconds <= BUDGET:
            spent += seconds
            chosen.append(name)
    return chosen


@cache
def _imports(test: str, file: str) -> bool:
    """Whether a test file imports the module `file` of the package."""
    parent, _, name = file.removesuffix(".py").replace("/", ".").rpartition(".")
    text = (ROOT / test).read_text()
    return f"{parent}.{name} import" in text or f"from {parent} import {name}" in text


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutate", description=__doc__)
    parser.add_argument("name", nargs="?", help="plant only this bug")
    parser.add_argument("--list", action="store_true", help="list all bugs without planting them")
    parser.add_argument("--sample", type=int, metavar="N", help="plant a sample of N bugs")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample")
    options = parser.parse_args()
    try:
        mutants = [*by_hand(ROOT), *wiring(ROOT), *generated(ROOT, GENERATED)]
    except MovedError as error:
        print(error)
        return 2
    if options.name:
        mutants = [m for m in mutants if m.name == options.name]
    if options.sample:
        mutants = random.Random(options.seed).sample(mutants, min(options.sample, len(mutants)))
    if options.list or not mutants:
        print("\n".join(m.name for m in mutants) or "no such bug: see --list")
        return 0 if mutants else 2
    return run(mutants)


def run(mutants: list[Mutant]) -> int:
    """Plant all of `mutants` and print the results; return the exit status."""
    began = time.perf_counter()
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(ROOT / ".cache" / "compiled")  # the copies share it
    for name in HEAVY:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    context, survivors = multiprocessing.get_context("fork"), []
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as parent,
        context.Pool(WORKERS, begin_worker, [parent]) as pool,
    ):
        seen = make_map(pool)
        mapped = time.perf_counter() - began
        print(f"{len(seen)} tests, {mapped:.0f} s to build the map", flush=True)
        usual = {name: entry["seconds"] for name, entry in seen.items()}
        jobs = [(m, choose_tests(m, seen), usual) for m in mutants]
        for mutant, result in pool.imap_unordered(plant, jobs):
            name = result.noticed_by
            outcome = f"noticed by {name}" if name else f"SURVIVES {result.tests} tests"
            print(f"{result.seconds:5.1f} s | {mutant.name} | {outcome}", flush=True)
            if not name:
                survivors.append(mutant.name)
        # Let idle workers end: killing one while it waits for work could block the pool.
        pool.close()
        pool.join()
    print(f"{len(mutants)} bugs in {time.perf_counter() - began - mapped:.0f} s")
    for name in survivors:
        print(f"survives: {name}: {EXPLAINED.get(name, 'no test notices it')}")
    return int(any(name not in EXPLAINED for name in survivors))


if __name__ == "__main__":
    raise SystemExit(main())
