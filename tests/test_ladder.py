"""The ladder: every rung trains to the same losses; results are a table, JSON and a picture."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rekindle import ladder, recipes
from rekindle.errors import UserError
from rekindle.ladder import CPU_RUNGS, GPU_RUNGS, Levers, Work
from rekindle.ladder.measure import _handle, measure
from rekindle.recipes import Recipe
from rekindle.runtime.device import get_device


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch, tiny: Recipe, shard_set: Path) -> Work:
    monkeypatch.setitem(recipes.RECIPES, "tiny", dataclasses.replace(tiny, name="tiny"))
    return Work("tiny", str(shard_set), "cpu", rows=8, steps=3, warmup=1)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure in this process, where torch is already imported, and without compiling."""
    monkeypatch.setattr(ladder, "measure_in_fresh_process", measure)
    monkeypatch.setattr(ladder, "why_not_compile", lambda device: "not in this test")


def test_mlp_kernel_is_skipped_unless_the_gpu_is_a_hopper() -> None:
    cpu = get_device("cpu")
    name, reason = ladder._unavailable(Levers(mlp_kernel=True), cpu) or ("", "")
    assert name == "mlp_kernel"
    assert "Hopper" in reason
    assert ladder._unavailable(Levers(loss_kernel=True), cpu) is None


@pytest.mark.parametrize(
    ("change", "tolerance"),
    [
        ({"micro": 2}, 1e-5),
        ({"attention": "fused", "fused_adamw": True}, 1e-5),
        ({"padded": True}, 2e-1),  # padding rows take part in the softmax: 127 of 384 here
        ({"separate_qkv": True, "recompute": True}, 1e-5),
        ({"precision": "autocast"}, 1e-2),
        ({"precision": "bf16"}, 1e-2),
    ],
)
def test_every_lever_gives_the_same_losses(
    work: Work, change: dict[str, Any], tolerance: float, one_thread: None
) -> None:
    naive = measure(work, Levers(micro=8))
    pulled = measure(work, Levers(**{"micro": 8, **change}))
    for key in ("first_loss", "loss"):
        if "padded" in change:
            assert naive[key] < pulled[key] < naive[key] + 0.6
        else:
            assert pulled[key] == pytest.approx(naive[key], rel=tolerance)
    assert naive["loss"] != naive["first_loss"]


def test_measured_figures(work: Work, one_thread: None) -> None:
    found = measure(work, Levers(micro=4))
    assert found["tokens_per_s"] == pytest.approx(8 * 16 / found["ms_per_step"] * 1e3)
    assert found["ms_per_step_p10"] <= found["ms_per_step"] <= found["ms_per_step_p90"]
    assert 0.1 < found["peak_memory_gib"] < 64
    assert found["utilisation"] is None  # CPUs have no published peak
    assert found["attention_kernel"] is None
    assert found["levers"]["micro"] == 4


def test_climb_measures_every_rung(
    work: Work,
    in_this_process: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    one_thread: None,
) -> None:
    result = ladder.climb(Path(work.data), tmp_path, "cpu", "tiny", steps=2)
    names = [rung["rung"] for rung in result["rungs"]]
    assert names == [r.name for r in CPU_RUNGS if r.name != "compile"]
    assert json.loads((tmp_path / "ladder.json").read_text()) == result
    printed = capsys.readouterr().out
    assert "compile              skipped: not in this test" in printed
    for rung in result["rungs"]:
        assert f"{rung['tokens_per_s']:,.0f}" in printed
        assert rung["why"] in printed
    levers = [rung["levers"] for rung in result["rungs"]]
    assert levers[0]["threads"] == 1
    assert levers[-1]["keep_memory"]
    assert levers[-1]["fused_adamw"]  # earlier levers remain set
    assert not any(rung["compile"] for rung in levers)


def test_command_draws_a_picture(
    work: Work,
    in_this_process: None,
    tmp_path: Path,
    rekindle: Callable[..., Any],
    one_thread: None,
) -> None:
    out = tmp_path / "out"
    outcome = rekindle(
        "ladder", "--device", "cpu", "--recipe", "tiny", "--data", work.data, "--out", out,
        "--steps", 2,
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    assert "times faster than `one core`" in outcome.out
    assert (out / "ladder.png").read_bytes().startswith(b"\x89PNG")


def test_micro_batch_is_halved_until_it_fits(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(work: Work, levers: Levers) -> dict[str, Any]:
        return {"out_of_memory": True} if levers.micro > 4 else {"micro": levers.micro}

    monkeypatch.setattr(ladder, "measure_in_fresh_process", measure)
    levers, figures = ladder.measure_what_fits(work, Levers(micro=16))
    assert levers.micro == figures["micro"] == 4
    monkeypatch.setattr(
        ladder, "measure_in_fresh_process", lambda work, levers: {"out_of_memory": True}
    )
    with pytest.raises(UserError, match="not even one row of tiny fits"):
        ladder.measure_what_fits(work, Levers(micro=16))


def test_measuring_in_a_fresh_process(shard_set: Path) -> None:
    """Once for real: the output of the process is read back."""
    work = Work("demo", str(shard_set), "cpu", rows=2, steps=2, warmup=1)
    found = ladder.measure_in_fresh_process(work, Levers(threads=1, micro=2))
    assert found["tokens_per_s"] > 0


def test_the_lectures_rungs_come_first_and_levers_exist() -> None:
    lecture = [r.name for r in GPU_RUNGS].index("lecture")
    assert [r.name for r in GPU_RUNGS[:lecture]] == [
        "fp32", "TF32", "bf16", "compile", "flash attention", "padded vocabulary",
    ]  # fmt: skip
    for rungs in (GPU_RUNGS, CPU_RUNGS):
        levers = Levers()
        for rung in rungs:
            levers = dataclasses.replace(levers, **rung.change)
            assert rung.why
        assert levers.compile


def test_error_in_a_rung_is_one_line_and_its_stderr_is_kept(
    monkeypatch: pytest.MonkeyPatch, work: Work, tmp_path: Path
) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho first >&2; echo the reason >&2; exit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(ladder.sys, "executable", str(broken))
    with pytest.raises(ladder.RungError) as caught:
        ladder.measure_in_fresh_process(work, Levers())
    assert str(caught.value) == "its process ended with status 3: the reason"
    assert caught.value.stderr == "first\nthe reason\n"


def test_failed_rung_does_not_stop_the_others(
    work: Work,
    in_this_process: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    one_thread: None,
) -> None:
    """The next rungs build on those that worked."""
    measure = ladder.measure_in_fresh_process

    def fails(work: Work, levers: Levers) -> dict[str, Any]:
        if levers.fused_adamw:
            raise ladder.RungError("no fusion", "a trace\nno fusion\n")
        if levers.precision != "fp32":
            return {"out_of_memory": True}
        return measure(work, levers)

    monkeypatch.setattr(ladder, "measure_in_fresh_process", fails)
    result = ladder.climb(Path(work.data), tmp_path, "cpu", "tiny", steps=2)
    assert [rung["rung"] for rung in result["rungs"]] == [
        "one core", "all cores", "padded vocabulary", "memory kept",
    ]  # fmt: skip
    assert not any(rung["levers"]["fused_adamw"] for rung in result["rungs"])
    assert {rung["levers"]["micro"] for rung in result["rungs"]} == {8}
    fused, bf16 = result["failed"]
    assert fused == {"rung": "fused AdamW", "stderr": "a trace\nno fusion\n"}
    assert (bf16["rung"], bf16["stderr"][:16]) == ("bf16", "not even one row")
    assert json.loads((tmp_path / "ladder.json").read_text()) == result
    assert "fused AdamW          failed: no fusion" in capsys.readouterr().out
    assert "errors in ladder.json): fused AdamW, bf16" in ladder.summary(result, 1.0)


def test_error_if_every_rung_fails_names_ladder_json(
    work: Work, in_this_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(work: Work, levers: Levers) -> dict[str, Any]:
        raise ladder.RungError("broken")

    monkeypatch.setattr(ladder, "measure_in_fresh_process", fails)
    with pytest.raises(UserError, match=r"no rung could be measured: .*ladder\.json"):
        ladder.climb(Path(work.data), tmp_path, "cpu", "tiny", steps=2)
    assert len(json.loads((tmp_path / "ladder.json").read_text())["failed"]) == 6


def test_out_of_memory_is_reported_as_a_result(monkeypatch: pytest.MonkeyPatch, work: Work) -> None:
    def measure(work: Work, levers: Levers) -> dict[str, Any]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("rekindle.ladder.measure.measure", measure)
    request = {"work": dataclasses.asdict(work), "levers": dataclasses.asdict(Levers())}
    assert _handle(json.dumps(request)) == {"out_of_memory": True}
