"""The model of training on many GPUs: the committed results are up to date, and its terms behave as
they should."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import allreduce, roofline, scaling, scaling_page
from rekindle.model.gpt2_config import SIZES
from rekindle.recipes import get_recipe

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
TRAFFIC = json.loads((RESULTS / "traffic.json").read_text())
XL = get_recipe("gpt2-xl")


@pytest.fixture(scope="module")
def predicted() -> dict[str, Any]:
    return json.loads(json.dumps(scaling.predict(TRAFFIC)))


def test_committed_results_and_page_are_up_to_date(predicted: dict[str, Any]) -> None:
    committed = json.loads(scaling.OUT.read_text())
    assert {key: committed[key] for key in predicted} == predicted
    page = scaling.DOCS.read_text()
    assert scaling_page.table(predicted) in page
    assert scaling_page.with_table(page, predicted) == page


def test_bytes_measured_with_gloo_match_the_formula() -> None:
    """Only the bytes: the seconds were measured on two cores and are not comparable."""
    rows = json.loads((RESULTS / "allreduce-gloo.json").read_text())["all_reduces"]
    assert {row["ranks"] for row in rows} == set(allreduce.RANKS)
    for row in rows:
        formula = row["ranks"] * scaling.ring_bytes(row["bytes"], row["ranks"])
        assert row["sent"] == pytest.approx(formula, rel=0.02)


def test_gloo_comparison_fits_latency_and_bandwidth_to_two_ranks() -> None:
    """With 1 ms and 1 GB/s, the formula reproduces 2 ranks exactly and predicts 4."""

    def seconds(length: int, size: int) -> float:
        return 1e-3 * (size - 1) + scaling.ring_bytes(length, size) / 1e9

    found = {
        size: {str(n): {"seconds": seconds(n, size), "sent_bytes": 1} for n in allreduce.SIZES}
        for size in (2, 4)
    }
    for row in allreduce.compare(found):
        assert row["seconds"] == pytest.approx(row["seconds_by_formula"], abs=2e-5)
        assert row["sent_by_formula"] == 2 * (row["ranks"] - 1) * row["bytes"]


def test_all_reduce_time() -> None:
    gigabyte = 1e9
    assert scaling.all_reduce(gigabyte, 1) == 0
    within_host = scaling.all_reduce(gigabyte, 8)
    assert within_host == pytest.approx(2 * 7 / 8 * gigabyte / scaling.A["nvlink"], rel=0.05)
    times = [scaling.all_reduce(gigabyte, n) for n in scaling.RANKS]
    assert times == sorted(times)
    fast = scaling.all_reduce(gigabyte, 64, nic=1e30)
    slow = scaling.all_reduce(gigabyte, 64) - fast
    assert slow == pytest.approx(2 * 7 / 8 * gigabyte / 8 / scaling.A["nic"])


def test_more_gpus_are_faster_and_less_efficient(predicted: dict[str, Any]) -> None:
    for model in predicted["models"].values():
        found = list(model["ranks"].values())
        rates = [x["tokens_per_s"] for x in found]
        shares = [x["efficiency"] for x in found]
        assert rates == sorted(rates)
        assert shares == sorted(shares, reverse=True)
        assert shares[0] == 1


def test_ranks_are_limited_to_the_windows_of_a_batch() -> None:
    assert XL.batch.rows == 1024
    assert scaling.predict_step(XL, 1024, TRAFFIC)
    assert scaling.predict_step(get_recipe("gpt2-124m"), 512, TRAFFIC)
    assert scaling.predict_step(get_recipe("gpt2-124m"), 1024, TRAFFIC) is None


def test_step_takes_at_least_the_launch_time_of_its_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = get_recipe("gpt2-124m")
    monkeypatch.setitem(scaling.A, "launch", 1.0)
    step = scaling.predict_step(recipe, 512, TRAFFIC)
    assert step
    way = TRAFFIC["ways"][scaling.WAY]
    assert step.compute == 12 * way["layer"]["kernels"] + way["rest"]["kernels"]


def test_best_checkpoint_interval_costs_least(monkeypatch: pytest.MonkeyPatch) -> None:
    step = scaling.predict_step(XL, 64, TRAFFIC)
    assert step
    costs = scaling.run_costs(XL, step, 64)

    def total(interval: float) -> float:
        stall = 12 * roofline.parameters(XL.model.for_training()) / scaling.A["copy"]
        return stall / interval + (interval / 2 + scaling.A["restart"]) / scaling.DAY

    best = costs["best_interval_s"]
    assert costs["best_checkpoints"] + costs["best_deaths"] == pytest.approx(total(best))
    assert total(best) < min(total(0.9 * best), total(1.1 * best))
    assert costs["checkpoints"] + costs["deaths"] == pytest.approx(total(costs["interval_s"]))


def test_rows_that_fit() -> None:
    """At 16 bytes per parameter, XL fits in 80 GB without sharding, but not in 24 GB."""
    assert scaling.rows_that_fit(SIZES["gpt2-xl"].for_training(), 1024) >= 1
    needed = 16 * roofline.parameters(SIZES["gpt2-xl"].for_training())
    assert 24e9 < needed < 80e9
    assert scaling.rows_that_fit(SIZES["gpt2"].for_training(), 1024) == scaling.MOST_ROWS


def test_sharding_communicates_for_every_micro_batch() -> None:
    config = XL.model.for_training()
    once = scaling.all_reduce(4 * roofline.parameters(config), 8)
    assert scaling.sharded(config, 8, 1) == pytest.approx(1.5 * once)
    assert scaling.sharded(config, 8, 16) == pytest.approx(24 * once)
