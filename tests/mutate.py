"""Mutation testing: plants bugs one at a time, and says which of them no test notices.

    python -m tests.mutate                        all of them, on two cores
    python -m tests.mutate --sample 12 --seed 7   some of them, for CI
    python -m tests.mutate --list
    python -m tests.mutate "by hand: clip of 1.0"

Two processes work on a copy of the repository each. A map of which test runs which function is made
first, and kept until a file changes; a bug then meets only tests that run the function it is in,
quick and specific ones first. The exit status is 1 if a bug lives that `EXPLAINED` does not name.
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
GENERATED = 60  # drawn from some thousands
BUDGET = 30.0  # seconds of tests, as the map has them, that one bug may meet
SLOW = 20.0  # seconds of a test that is not run here, as are tests of many or compiled processes
STRICT = "test_wiring"  # compares all that a run does: it comes earlier than its length allows
PATIENCE = 40.0  # seconds beyond twenty times its usual ones after which a test hangs
# Imported once, before the package and its tests, which each process imports anew.
HEAVY = ("torch", "torch._dynamo", "numpy", "pyarrow.parquet", "hypothesis", "tiktoken",
         "safetensors.torch", "transformers.models.gpt2.modeling_gpt2")  # fmt: skip


class Ended(NamedTuple):
    """How the tests that a bug met ended: the test that noticed it, or an empty string."""

    by: str
    seconds: float
    met: int


FOLDER = Path()  # this worker's


def begin_worker(parent: str) -> None:
    global FOLDER
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that `finally` runs
    FOLDER = Path(tempfile.mkdtemp(dir=parent)) / "copy"
    make_copy(FOLDER)


def map_file(job: tuple[str, Path]) -> tuple[Path, Seen]:
    """What each test in a file runs, and where to keep that; tests that fail are left out."""
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
        with open(pipe) as told:
            failed = [line.split()[1] for line in told if line.startswith("failed")]
        os.waitpid(pid, 0)
    finally:
        end(pid)
        (folder / "sitecustomize.py").unlink()
    assert found.exists(), log.read_text()[-2000:]
    seen: Seen = json.loads(found.read_text())
    for name in set(failed):
        print(f"left out, for it fails without a bug: {name}", flush=True)
        del seen[name]
    return job[1], seen


def plant(job: tuple[Mutant, list[str], dict[str, float]]) -> tuple[Mutant, Ended]:
    """Plant one bug, run these tests until one notices it, and take the bug out again."""
    mutant, tests, usual = job
    path, began = FOLDER / mutant.file, time.perf_counter()
    before = path.read_text()
    set_text(path, mutant.text())
    files = dict.fromkeys(name.split("::")[0] for name in tests)
    pid, pipe = forked(
        lambda pipe: pytest_in(FOLDER, files, Chosen(tests, pipe), "-x"), FOLDER.with_name("log")
    )
    try:
        by, met = watch(pid, pipe, usual) if tests else ("", 0)
    finally:
        end(pid)
        os.close(pipe)
        set_text(path, before)
    return mutant, Ended(by, time.perf_counter() - began, met)


def watch(pid: int, pipe: int, usual: dict[str, float]) -> tuple[str, int]:
    """Which test notices the bug first, and how many were begun."""
    at, met, allowed, rest = "the import", 0, 60.0, b""
    while True:
        if not select.select([pipe], [], [], allowed)[0]:
            end(pid)
            os.waitpid(pid, 0)
            return f"{at} (it hangs)", met
        chunk = os.read(pipe, 1 << 16)
        if not chunk:
            break
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            kind, _, at = line.decode().partition(" ")
            met += kind == "start"
            if kind == "failed":  # time for fixtures to tidy up: some have mounted a disk
                while select.select([pipe], [], [], PATIENCE)[0] and os.read(pipe, 1 << 16):
                    pass
                end(pid)
                os.waitpid(pid, 0)
                return at, met
            allowed = PATIENCE + 20 * usual.get(at, 1.0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return ("" if status == 0 else f"{at} (exit status {status})"), met


def set_text(path: Path, text: str) -> None:
    path.write_text(text)
    for compiled in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
        compiled.unlink()  # it is told from the source by size and seconds, which may be the same


# Which tests a bug meets


def make_map(pool: Any) -> Seen:
    """The map, of each test file from pytest's cache if neither it nor the package has changed."""
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
    whole = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files)))
    return whole.hexdigest()[:12]


def choose_tests(mutant: Mutant, seen: Seen) -> list[str]:
    """Those that run the function, or one of the module if the bug is in no function; first those
    that are quick, specific, or in a file that imports the module; as many as the budget allows."""
    place, module = f"{mutant.file}:{mutant.function}", f"{mutant.file}:"

    def runs(functions: list[str]) -> bool:
        if mutant.function:
            return any(f == place for f in functions)
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
    """Whether a file of tests imports the module `file` of the package."""
    parent, _, name = file.removesuffix(".py").replace("/", ".").rpartition(".")
    text = (ROOT / test).read_text()
    return f"{parent}.{name} import" in text or f"from {parent} import {name}" in text


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutate", description=__doc__)
    parser.add_argument("name", nargs="?", help="plant this bug alone")
    parser.add_argument("--list", action="store_true", help="name all bugs, and plant none")
    parser.add_argument("--sample", type=int, metavar="N", help="plant N of them")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
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
        print("\n".join(m.name for m in mutants) or "there is no such bug: see --list")
        return 0 if mutants else 2
    return run(mutants)


def run(mutants: list[Mutant]) -> int:
    """Plant all of `mutants`, and say what became of them."""
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
        print(f"{len(seen)} tests, {mapped:.0f} s for the map", flush=True)
        usual = {name: entry["seconds"] for name, entry in seen.items()}
        texts = [(m, choose_tests(m, seen), usual) for m in mutants]
        for mutant, ended in pool.imap_unordered(plant, texts):
            fate = f"noticed by {ended.by}" if ended.by else f"LIVES after {ended.met} tests"
            print(f"{ended.seconds:5.1f} s | {mutant.name} | {fate}", flush=True)
            if not ended.by:
                survivors.append(mutant.name)
        # Idle workers end by themselves. One that is killed while it goes to sleep would not.
        pool.close()
        pool.join()
    print(f"{len(mutants)} bugs in {time.perf_counter() - began - mapped:.0f} s")
    for name in survivors:
        print(f"lives: {name}: {EXPLAINED.get(name, 'no test notices it')}")
    return int(any(name not in EXPLAINED for name in survivors))


if __name__ == "__main__":
    raise SystemExit(main())
