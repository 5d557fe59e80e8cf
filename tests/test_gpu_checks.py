"""What is checked and predicted without a GPU: each rule can be broken, and what is committed
belongs together. The compilations themselves run in `make gpu-checks`."""

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


def test_the_committed_figures_are_of_the_locked_versions() -> None:
    """Of another version only the rules would be checked."""
    assert locked("triton") in result("hopper.json")["triton"]
    assert result("traffic.json")["versions"]["torch"] == locked("torch")


# ---- Machine code --------------------------------------------------------------------------------

BACKWARD, LOSS = "MLP backward, K = 768", "cross-entropy"


@pytest.mark.parametrize("architecture", CARDS)
@pytest.mark.parametrize("triton", ["3.6.0", "3.9.0"])
def test_no_rule_is_broken(architecture: str, triton: str) -> None:
    for case, found in result("hopper.json")["triton"][triton][architecture].items():
        assert hopper.violations(case, CARDS[architecture], found) == []


@pytest.mark.parametrize(
    ("case", "place", "key", "value", "words"),
    [
        (BACKWARD, 0, "stack", 8, "uses no stack"),
        (BACKWARD, 0, "spills", 2, "spills no register"),
        (BACKWARD, 2, "shared", 232_449, "232,448 bytes"),
        (BACKWARD, 1, "tensor_cores", 0, "tensor cores"),
        (BACKWARD, 3, "wide_loads", 0, "loads 16 bytes"),
        (LOSS, 0, "wide_stores", 0, "stores 16 bytes"),
        (LOSS, 0, "registers", 33, "two blocks"),
    ],
)
def test_each_rule_can_be_broken(case: str, place: int, key: str, value: int, words: str) -> None:
    found = copy.deepcopy(result("hopper.json")["triton"][locked("triton")]["sm_90"][case])
    found[list(found)[place]][key] = value
    (said,) = hopper.violations(case, CARDS["sm_90"], found)
    assert words in said


def test_differences_name_the_place() -> None:
    expected = {"a": {"x": 1, "y": 2}, "b": {"z": 3}}
    assert hopper.differences(expected, copy.deepcopy(expected)) == []
    assert hopper.differences(expected, {"a": {"x": 1, "y": 5}}) == [
        "a: y: 5, expected 2",
        "b: None, expected {'z': 3}",
    ]
    assert hopper.differences({}, {"new": 1}) == ["new: 1, expected None"]


def test_a_figure_that_changed_is_unexpected() -> None:
    committed = result("hopper.json")
    found = copy.deepcopy(committed["triton"][locked("triton")])
    assert hopper.unexpected(committed, locked("triton"), found) == []
    found["sm_90"][LOSS][""]["registers"] += 1
    (said,) = hopper.unexpected(committed, locked("triton"), found)
    assert f"sm_90: {LOSS}" in said
    assert hopper.unexpected(committed, "99.0", found) == []


def test_each_case_launches_one_kernel() -> None:
    with hopper._recording() as recorders:
        for launch in hopper.CASES.values():
            launch()
    assert sum(len(r.calls) for r in recorders.values()) == len(hopper.CASES)


# ---- Generated code ------------------------------------------------------------------------------


def in_float32(ways: dict[str, Any]) -> None:
    ways["bf16"]["buffers_like_logits"]["float32"] = 1


def copied(ways: dict[str, Any]) -> None:
    ways["bf16 + kernels"]["buffers_like_logits"]["bfloat16"] = 2


def read_again(ways: dict[str, Any]) -> None:
    ways["bf16 + loss kernel"]["rest"]["cross_entropy_gb"] = 6.6


@pytest.mark.parametrize(
    ("planted", "words"),
    [(in_float32, "float32"), (copied, "2 buffers"), (read_again, "once more")],
)
def test_what_traffic_forbids(planted: Callable[[dict[str, Any]], None], words: str) -> None:
    ways = result("traffic.json")["ways"]
    assert traffic.violations(ways) == []
    planted(ways)
    (said,) = traffic.violations(ways)
    assert words in said


def test_traffic_that_changed_is_complained_of() -> None:
    committed = result("traffic.json")
    committed["versions"]["torch"] = version("torch")
    ways = copy.deepcopy(committed["ways"])
    assert traffic.complaints(committed, ways) == []
    ways["bf16"]["layer"]["kernels"] += 1
    (said,) = traffic.complaints(committed, ways)
    assert "bf16: layer: kernels" in said
    committed["versions"]["torch"] = "99.0"
    assert traffic.complaints(committed, ways) == []
    copied(ways)
    assert len(traffic.complaints(committed, ways)) == 1


# ---- Predictions ---------------------------------------------------------------------------------


def test_the_predictions_are_those_of_the_committed_traffic() -> None:
    predicted = json.loads(json.dumps(roofline.predict(result("traffic.json"))))
    committed = result("predictions.json")
    assert {key: committed[key] for key in predicted} == predicted


@pytest.mark.parametrize("way", traffic.WAYS)
def test_the_matmuls_are_those_of_the_generated_code(way: str) -> None:
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


def test_the_operations_and_parameters_are_the_models(tiny: Any) -> None:
    model, T = GPT2(tiny.model), 32
    c = tiny.model
    done = sum(
        times * 2 * M * K * N for (M, K, N, _), times in roofline.matmuls(c, 5 * T, False).items()
    )
    full_attention = 12 * c.n_layer * c.n_embd * T
    assert done == 5 * T * (model.flops_per_token(T) - full_attention)
    assert roofline.attention_flops(c, 5 * T, T) == 5 * T * full_attention * 7 / 12
    padding = (c.padded_vocab_size - c.vocab_size) * c.n_embd
    assert roofline.parameters(c) == model.parameter_count() + padding


def test_a_larger_step_takes_longer() -> None:
    """At twice the width four times the matmuls, twice the bytes; at half the rows half of all."""
    moved, card = result("traffic.json"), roofline.CARDS["H100"]
    whole = roofline.micro_batch(card, "bf16", moved, traffic.CONFIG, 64)
    half = roofline.micro_batch(card, "bf16", moved, traffic.CONFIG, 32)
    for part in ("attention", "memory-bound", "cross-entropy"):
        assert half[part] == pytest.approx(whole[part] / 2)
    assert half["matmuls"] == pytest.approx(whole["matmuls"] / 2, rel=0.02)
