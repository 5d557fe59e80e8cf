"""Checks and predictions without a GPU: every rule detects a violation, and the committed results
are consistent with each other. The compilations themselves run in `make gpu-checks`."""

import copy
import json
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from benchmarks import hopper, roofline, traffic
from benchmarks.absent import CARDS
from rekindle.model.gpt2 import GPT2

ROOT = Path(__file__).parents[1]


def result(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text())


def locked(package: str) -> str:
    found = re.search(rf"^{package}==([\d.]+)", (ROOT / "requirements.lock").read_text(), re.M)
    assert found
    return found[1]


def test_committed_figures_match_the_locked_versions() -> None:
    """With other versions, only the rules would be checked."""
    assert locked("triton") in result("hopper.json")["triton"]
    assert result("traffic.json")["versions"]["torch"] == locked("torch")


# ---- Machine code --------------------------------------------------------------------------------

BACKWARD, LOSS = "MLP backward, K = 768", "cross-entropy"


@pytest.mark.parametrize("architecture", CARDS)
@pytest.mark.parametrize("triton", ["3.6.0", "3.9.0"])
def test_committed_figures_follow_every_rule(architecture: str, triton: str) -> None:
    for case, found in result("hopper.json")["triton"][triton][architecture].items():
        assert hopper.violations(case, CARDS[architecture], found) == []


@pytest.mark.parametrize(
    ("case", "key", "value", "words"),
    [
        (BACKWARD, "stack", 8, "uses no stack"),
        (BACKWARD, "spills", 2, "spills no register"),
        (BACKWARD, "shared", 116_000, "2 blocks fit"),
        (LOSS, "shared", 232_449, "shared memory"),
        (BACKWARD, "tensor_cores", 0, "tensor cores"),
        (BACKWARD, "tma_loads", 0, "TMA"),
        (LOSS, "wide_loads", 0, "loads 16 bytes"),
        (LOSS, "wide_stores", 0, "stores 16 bytes"),
        (LOSS, "registers", 33, "two blocks"),
    ],
)
def test_every_rule_detects_a_violation(case: str, key: str, value: int, words: str) -> None:
    found = result("hopper.json")["triton"][locked("triton")]["sm_90"][case]
    (violation,) = hopper.violations(case, CARDS["sm_90"], {**found, key: value})
    assert words in violation


def test_differences_name_the_path() -> None:
    expected = {"a": {"x": 1, "y": 2}, "b": {"z": 3}}
    assert hopper.differences(expected, copy.deepcopy(expected)) == []
    assert hopper.differences(expected, {"a": {"x": 1, "y": 5}}) == [
        "a: y: 5, expected 2",
        "b: None, expected {'z': 3}",
    ]
    assert hopper.differences({}, {"new": 1}) == ["new: 1, expected None"]


def test_changed_figure_is_reported_for_a_known_triton() -> None:
    committed = result("hopper.json")
    found = copy.deepcopy(committed["triton"][locked("triton")])
    assert hopper.unexpected(committed, locked("triton"), found) == []
    found["sm_90"][LOSS]["registers"] += 1
    (difference,) = hopper.unexpected(committed, locked("triton"), found)
    assert f"sm_90: {LOSS}" in difference
    assert hopper.unexpected(committed, "99.0", found) == []


def test_each_case_launches_one_kernel() -> None:
    with hopper._recording() as recorders:
        for launch in hopper.CASES.values():
            launch()
    assert sum(len(r.calls) for r in recorders.values()) == len(hopper.CASES)


# ---- Generated code ------------------------------------------------------------------------------


def float32_logits(ways: dict[str, Any]) -> None:
    ways["bf16"]["buffers_like_logits"]["float32"] = 1


def second_copy_of_logits(ways: dict[str, Any]) -> None:
    ways["bf16 + kernels"]["buffers_like_logits"]["bfloat16"] = 2


def logits_read_again(ways: dict[str, Any]) -> None:
    ways["bf16 + loss kernel"]["rest"]["cross_entropy_gb"] = 6.6


@pytest.mark.parametrize(
    ("planted", "words"),
    [
        (float32_logits, "float32"),
        (second_copy_of_logits, "2 buffers"),
        (logits_read_again, "reads the logits again"),
    ],
)
def test_traffic_rules_detect_violations(
    planted: Callable[[dict[str, Any]], None], words: str
) -> None:
    ways = result("traffic.json")["ways"]
    assert traffic.violations(ways) == []
    planted(ways)
    (violation,) = traffic.violations(ways)
    assert words in violation


def test_changed_traffic_is_reported_for_the_same_torch() -> None:
    committed = result("traffic.json")
    committed["versions"]["torch"] = version("torch")
    ways = copy.deepcopy(committed["ways"])
    assert traffic.problems(committed, ways) == []
    ways["bf16"]["layer"]["kernels"] += 1
    (problem,) = traffic.problems(committed, ways)
    assert "bf16: layer: kernels" in problem
    committed["versions"]["torch"] = "99.0"
    assert traffic.problems(committed, ways) == []
    second_copy_of_logits(ways)
    assert len(traffic.problems(committed, ways)) == 1


# ---- Predictions ---------------------------------------------------------------------------------


def test_committed_predictions_follow_from_the_committed_traffic() -> None:
    predicted = json.loads(json.dumps(roofline.predict(result("traffic.json"))))
    committed = result("predictions.json")
    assert {key: committed[key] for key in predicted} == predicted


@pytest.mark.parametrize("way", traffic.WAYS)
def test_matmuls_equal_those_of_the_generated_code(way: str) -> None:
    found = result("traffic.json")["ways"][way]
    layers = traffic.CONFIG.n_layer
    counted = {shape: layers * times for shape, times in found["layer"]["matmuls"].items()}
    counted.update(found["rest"]["matmuls"])
    expected = {
        f"{M} × {K} × {N}{' with GELU' if gelu else ''}": times
        for (M, K, N, gelu), times in roofline.matmuls(
            traffic.CONFIG, traffic.N, way == "bf16 + kernels"
        ).items()
    }
    assert counted == expected


def test_flops_and_parameters_equal_the_models_own(tiny: Any) -> None:
    model, T = GPT2(tiny.model), 32
    c = tiny.model
    flops = sum(
        times * 2 * M * K * N for (M, K, N, _), times in roofline.matmuls(c, 5 * T, False).items()
    )
    full_attention = 12 * c.n_layer * c.n_embd * T
    assert flops == 5 * T * (model.flops_per_token(T) - full_attention)
    assert roofline.attention_flops(c, 5 * T, T) == 5 * T * full_attention * 7 / 12
    padding = (c.padded_vocab_size - c.vocab_size) * c.n_embd
    assert roofline.parameters(c) == model.parameter_count() + padding


def test_half_the_rows_take_half_the_time() -> None:
    moved, card = result("traffic.json"), roofline.CARDS["H100"]
    full = roofline.micro_batch(card, "bf16", moved, traffic.CONFIG, 64)
    half = roofline.micro_batch(card, "bf16", moved, traffic.CONFIG, 32)
    for part in ("attention", "memory-bound", "cross-entropy"):
        assert half[part] == pytest.approx(full[part] / 2)
    assert half["matmuls"] == pytest.approx(full["matmuls"] / 2, rel=0.02)
