"""The benchmarks page is up to date, and the GPU commands run to completion. Here they run on a CPU
with tiny models, so that mistakes are not found in rented GPU time."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import cool_down, gpu, measured, parts, predicted, rehearsal, tables, ways
from rekindle import recipes
from rekindle.ladder import Levers, Work
from rekindle.recipes import Recipe

Bench = Callable[..., dict[str, Any]]


def test_page_is_up_to_date() -> None:
    assert (tables.FOLDER / "README.md").read_text() == tables.page()


def test_benchmark_without_a_result_is_listed_as_not_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    page = tables.page()
    for table in tables.TABLES:
        assert f"## {table.title}\n" in page
        assert f"**Not measured** yet: `{table.command}`" in page


@pytest.fixture
def bench(
    monkeypatch: pytest.MonkeyPatch, tiny: Recipe, shard_set: Path, tmp_path: Path, one_thread: None
) -> Bench:
    """`bench("step", ...)` runs a command and returns its JSON, after checking that the page shows
    it."""
    for name in ("gpt2-124m", "gpt2-medium", "gpt2-large", "gpt2-xl"):
        monkeypatch.setitem(recipes.RECIPES, name, dataclasses.replace(tiny, name=name))
    monkeypatch.setattr(measured, "in_fresh_process", measured.measure)
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)

    def run(name: str, *flags: object) -> dict[str, Any]:
        out = tmp_path / f"gpu-{name}.json"
        arguments = ["gpu", name, "--device", "cpu", "--out", out, *flags]
        if name != "hellaswag":
            arguments += ["--data", shard_set]
        monkeypatch.setattr(sys, "argv", [str(a) for a in arguments])
        gpu.main()
        monkeypatch.setattr(tables, "RESULTS", tmp_path)
        section = tables.page().split(f"{tables.GPU} {name}")[0].split("##")[-1]
        assert "Not measured" not in section
        return json.loads(out.read_text())

    return run


def test_step(bench: Bench) -> None:
    found = bench("step", "--steps", 2, "--arms", "lecture;bf16;lecture;lecture, eager")
    assert list(found["arms"]) == ["lecture", "bf16", "lecture, eager"]
    assert found["arms"]["lecture"]["times_lecture"] == 1
    assert [run["levers"]["precision"] for run in found["runs"]][:2] == ["autocast", "bf16"]
    assert set(gpu.ORDER.split(";")) <= set(ways.ARMS)


def test_sizes(bench: Bench) -> None:
    runs = bench("sizes")["runs"]
    assert len(runs) == 8
    assert [run["recompute"] for run in runs[:2]] == [False, True]


def test_micro_batch_is_halved_until_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts: list[int] = []

    def measure(work: Work, levers: Levers) -> dict[str, Any]:
        attempts.append(levers.micro)
        if levers.micro > 2:
            raise torch.OutOfMemoryError
        return {"micro": levers.micro}

    monkeypatch.setattr(measured, "measure", measure)
    monkeypatch.setattr(measured, "in_fresh_process", measured._try)
    work, levers = Work("demo", "", "cpu", 8), dataclasses.replace(ways.LECTURE, micro=8)
    for here in (True, False):
        assert measured.measure_what_fits(work, levers, here=here) == {"micro": 2}
    assert attempts == [8, 4, 2] * 2


def test_gate(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {"steps": 1, "against_autocast": {
        "bf16": cool_down.paired(np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.001, 3.002]))
    }}  # fmt: skip
    monkeypatch.setattr(cool_down, "cool_down", lambda o, save: save(seen))
    found = bench("gate")
    assert found["updates"]["passed"], found["updates"]
    assert 1e-4 < found["bf16"]["pytorch"] < 0.3
    assert found["cool_down"]["against_autocast"]["bf16"]["equivalent"]


def test_hellaswag(bench: Bench, tmp_path: Path) -> None:
    row = {"ctx": "a b", "endings": ["c", "d", "e f", "g"], "label": 1}
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for _ in range(5)))
    found = bench("hellaswag", "--file", file, "--recipe", "demo", "--limit", 3)
    assert found["questions"] == 3
    assert found["seconds"]["median"] > 0


@pytest.mark.slow  # 10 s for a benchmark that is run by hand; its statistics are tested below
def test_cool_down_trains_and_scores_documents(
    monkeypatch: pytest.MonkeyPatch, shard_set: Path
) -> None:
    """The real command with two steps, in its own processes."""
    monkeypatch.delitem(cool_down.FLAGS, "bf16")
    saved: list[dict[str, Any]] = []
    options = SimpleNamespace(
        recipe="demo", data=shard_set, device="cpu", cool_down_steps=2, cool_down_tokens=256,
        documents=3, no_compile=True,
    )  # fmt: skip
    cool_down.cool_down(options, saved.append)  # type: ignore[arg-type]
    assert list(saved[-1]["loss"]) == ["autocast", "autocast, again"]
    assert all(4 < loss < 7 for loss in saved[-1]["loss"].values())
    assert saved[-1]["documents"] == 3
    again = saved[-1]["against_autocast"]["autocast, again"]
    assert (again["difference_nats"], again["equivalent"]) == (0, True)  # a CPU is deterministic


def test_equivalent_only_if_the_difference_is_certainly_small() -> None:
    reference = np.linspace(2, 4, 50)
    noise = np.where(np.arange(50) % 2, 0.1, -0.1)
    assert cool_down.paired(reference + 0.003, reference)["equivalent"]
    assert not cool_down.paired(reference + 0.005, reference)["equivalent"]
    assert not cool_down.paired(reference - 0.005, reference)["equivalent"]
    assert not cool_down.paired(reference + noise, reference)["equivalent"]


def test_forecast_adds_up_steps_and_pauses() -> None:
    recipe = dataclasses.replace(
        recipes.get_recipe("gpt2-124m"), steps=1000, eval_every=250, checkpoint_every=500
    )
    seen = {
        "step_seconds": {"p10": 1.0, "median": 2.0, "p90": 3.0}, "validation_s": [10.0, 20.0],
        "hellaswag_s": [], "checkpoint_stall_s": [0.5], "first_step_s": [30.0, None],
    }  # fmt: skip
    found = rehearsal.forecast(recipe, seen, 3.0)
    extra = 5 * 15 + 2 * 0.5 + 30
    assert found["hours"]["median"] == pytest.approx((2000 + extra) / 3600, abs=1e-3)
    assert found["hours"]["p90"] == pytest.approx((3000 + extra) / 3600, abs=1e-3)
    assert found["dollars"]["median"] == pytest.approx(3 * (2000 + extra) / 3600, abs=0.01)


def test_rehearsal_reads_a_log_whose_checkpoint_was_killed_before_it_was_logged(
    tmp_path: Path,
) -> None:
    """The resumed run adds the record without durations (docs/formats.md)."""
    records: list[dict[str, Any]] = [
        {"kind": "train", "step": step, "seconds": 0.5, "time": 0.0} for step in range(8)
    ]
    records += [
        {"kind": "checkpoint", "step": 4, "time": 0.0},
        {"kind": "checkpoint", "step": 8, "time": 0.0, "seconds": 1.0, "stall_s": 0.25},
    ]
    log = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "metrics.jsonl").write_text(log)
    recipe = recipes.get_recipe("demo")
    found = rehearsal._figures(recipe, tmp_path, 10.0, 4.0, 5, [1.0, None], None)
    assert (found["steps"], found["checkpoint_stall_s"]) == (8, [0.25])
    assert found["forecast"]["steps"] == recipe.steps


def test_kernels_are_divided_among_the_predicted_parts() -> None:
    """The names are from profiles of an H200."""
    kernels = {
        "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT": "matmuls",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float>": "matmuls",
        "_matmul_gelu_kernel": "matmuls",
        "triton_red_fused__log_softmax__to_copy_prepare_softmax_online_18": "cross-entropy",
        "_cross_entropy_kernel": "cross-entropy",
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>": (
            "gradient sums, optimizer"
        ),
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native": (
            "gradient sums, optimizer"
        ),
        "Memset (Device)": "gradient sums, optimizer",
        "triton_poi_fused_gelu_gelu_backward_view_4": "memory-bound",
        "triton_per_fused__to_copy_add_native_layer_norm_view_9": "memory-bound",
    }
    versions = json.loads((tables.RESULTS / "gpu-versions.json").read_text())
    kernels |= dict.fromkeys(versions["attention_kernels"], "attention")
    assert {name: parts.part_of(name) for name in kernels} == kernels
    found = parts.by_part((name, 1.0) for name in kernels)
    assert found == {
        "matmuls": 3, "attention": 4, "cross-entropy": 2, "gradient sums, optimizer": 3,
        "memory-bound": 2,
    }  # fmt: skip


def test_parts_of_a_step_stand_next_to_their_predictions() -> None:
    result = json.loads((tables.RESULTS / "gpu-step.json").read_text())
    before = json.dumps(result)
    header, *rows = predicted.parts(result)
    assert json.dumps(result) == before
    for measured_row, predicted_row in zip(rows[::2], rows[1::2], strict=True):
        assert predicted_row[0] == f"{measured_row[0]}, predicted"
        matmuls = header.index("matmuls")
        assert float(measured_row[matmuls]) == pytest.approx(float(predicted_row[matmuls]), rel=0.1)
