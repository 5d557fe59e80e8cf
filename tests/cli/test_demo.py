"""`rekindle demo`, except for preparing the text, which other tests cover."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rekindle import demo as module
from rekindle import recipes, storage


@pytest.fixture
def demo(
    tmp_path: Path, tiny: Any, rekindle: Callable, monkeypatch: pytest.MonkeyPatch,
    write_shards: Callable, one_thread: None,
) -> Callable[..., Any]:  # fmt: skip
    """`demo("--steps", 8)`, with the tiny recipe and generated text."""
    # Compiling takes most of a minute; model/test_compile.py tests compiled code.
    monkeypatch.setattr(
        "rekindle.runtime.device.why_not_compile", lambda device: "not in this test"
    )

    def prepare(source: Any, out: Path, *, tokenizer: str, val_tokens: int) -> None:
        assert (tokenizer, val_tokens) == ("bytes", tiny.eval_tokens)
        if not out.exists():
            write_shards(out, [700, 520], [201])

    monkeypatch.setattr(module, "from_arguments", lambda *, embedded: None)
    monkeypatch.setattr(module, "prepare", prepare)
    monkeypatch.setitem(recipes.RECIPES, "demo-fast", tiny)
    where = ["--data", tmp_path / "data", "--out", tmp_path / "run", "--device", "cpu"]

    def call(*flags: Any) -> Any:
        outcome = rekindle("demo", *where, *flags)
        assert outcome.status == 0, outcome.err
        return outcome

    return call


def test_demo_from_start_to_finish(demo: Callable[..., Any], tmp_path: Path) -> None:
    output = demo("--steps", 8).out
    assert "8 steps at" in output
    assert re.search(r"validation loss \d\.\d{3} → \d\.\d{3} nats per byte", output)
    assert f"rekindle sample {tmp_path / 'run'}" in output
    assert str(tmp_path / "run" / "loss.png") in output
    assert (tmp_path / "run" / "loss.png").is_file()
    assert (tmp_path / "run" / "checkpoints" / "step-000008").is_dir()


@pytest.mark.parametrize(("step_seconds", "steps"), [(20.0, 5), (4.0, 25), (0.001, 38)])
def test_steps_are_chosen_from_their_measured_time_and_kept(
    demo: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    step_seconds: float, steps: int,
) -> None:  # fmt: skip
    """At least FEWEST_STEPS; at most 4 epochs of 1,220 tokens, 38 steps of 128."""
    times: list[float] = []

    def seconds(call: Callable[[], Any]) -> float:
        call()
        times.append(step_seconds)
        return 100.0 if len(times) == 2 else step_seconds  # one step is disturbed

    monkeypatch.setattr(module, "_seconds", seconds)
    monkeypatch.setattr(module, "FEWEST_STEPS", 5)
    output = demo().out
    assert f"training for {steps} steps" in output
    assert len(times) == module.TIMED_STEPS
    recorded = storage.read_json(tmp_path / "run" / "run.json")["recipe"]["steps"]
    assert recorded == steps
    again = demo().out
    assert f"has finished all {steps} steps" in again
    assert len(times) == module.TIMED_STEPS  # not measured again
