"""`rekindle check` on logs that the tests write: values inside and outside each band."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rekindle import recipes, storage
from rekindle.check import bands, gpt2
from rekindle.check.judge import interval, judge
from rekindle.check.record import RunRecord, read_run
from rekindle.check.report import Part
from rekindle.data.shards import Manifest, Shard, open_split, read_manifest
from rekindle.errors import UserError
from rekindle.observe.console import Console

EDU, CLASSIC = (
    {"name": "HuggingFaceFW/fineweb-edu:sample/10BT", "settings": bands.LAYOUT},
    {"name": "kjj0/fineweb10B-gpt2"},
)
END = 19_073


def curve(until: int, offset: float = 0.0, **at: float | None) -> dict[int, Any]:
    """The published validation losses up to a step, plus `offset`; `s250=` replaces one."""
    losses = {s: loss + offset for s, loss in bands.CURVE.items() if s <= until}
    if until == END:
        losses[END] = 3.075 + offset
    return losses | {int(name[1:]): loss for name, loss in at.items()}


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., Path]:
    """`write_run("a", losses={250: 6.2}, taken=300)`: a run folder with its log and manifest."""

    def write(
        name: str, *, recipe: str = "gpt2-124m", losses: dict[int, float | None] | None = None,
        taken: int = END, tokens: int = bands.FINAL_TOKENS, scores: dict[int, float] | None = None,
        source: dict[str, Any] = EDU, first: dict[int, float] | None = None, seconds: float = 0.5,
        forked: str | None = None, **changes: Any,
    ) -> Path:  # fmt: skip
        known = ("gpt2", "0" * 64, 50257)
        manifest = Manifest(*known, source, (Shard("t.bin", "train", 9, 1, name),))
        (tmp_path / f"{name}-data").mkdir()
        manifest.write(tmp_path / f"{name}-data")
        run = tmp_path / name
        run.mkdir()
        described = recipes.override(recipes.get_recipe(recipe), changes)
        data = {"path": str(tmp_path / f"{name}-data"), "fingerprint": manifest.fingerprint}
        storage.write_json(run / "run.json", {
            "recipe": recipes.flatten(described), "data": data, "forked_from": forked,
        })  # fmt: skip
        training = dict(enumerate(bands.FIRST_LOSSES)) | (first or {})
        records = [
            {"kind": "train", "step": s, "loss": training.get(s, 4.0), "seconds": seconds}
            for s in range(taken)
        ]
        records += [
            {"kind": "validation", "step": s, "loss": loss, "tokens": tokens}
            for s, loss in (losses or {}).items()
        ]
        records += [
            {"kind": "hellaswag", "step": s, "acc_norm": score, "total": 10_042}
            for s, score in (scores or {}).items()
        ]
        records.append({"kind": "samples", "step": 1, "texts": []})
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (run / "metrics.jsonl").write_text(lines)
        return run

    return write


def no_evaluation(run: RunRecord) -> float:
    raise UserError(f"{run.folder} has no checkpoint")


def judged(*folders: Path, price: float | None = None, evaluate: Any = no_evaluation) -> list[Part]:
    return judge([read_run(folder) for folder in folders], price, evaluate)


def row(part: Part, what: str) -> Any:
    return next(r for r in part.rows if r.what == what)


def failed(part: Part) -> list[str]:
    return [r.what for r in part.rows if not r.passed]


REACHED = {13_500: 0.2934, 14_000: 0.2999, 14_500: 0.2950}


def test_published_run_passes(write_run: Callable[..., Path], rekindle: Callable) -> None:
    run = write_run("run", losses=curve(END), scores=REACHED)
    done = rekindle("check", run, "--price-per-hour", 6, "--json")
    assert done.status == 0, done.out
    found = json.loads(done.out)
    assert found["passed"]
    [part] = found["parts"]
    assert (part["verdict"], part["finished"]) == ("passed", True)
    rows = {r["what"]: r["measured"] for r in part["rows"]}
    assert rows["final loss"] == "3.0750"
    assert rows["published curve"].startswith("43 of 43 within")
    assert rows["GPT-2 124M surpassed"] == (
        "both at step 14,000, 7,340,032,000 tokens, 1.94 h, cost 11.67 at 6 per hour, "
        "loss 3.1211, HellaSwag 0.2999 ± 0.0090"
    )
    printed = rekindle("check", run)
    assert printed.status == 0
    assert "GPT-2 124M surpassed" in printed.out
    assert "cost" not in printed.out
    assert printed.out.splitlines()[-1].split() == ["verdict", "passed"]


@pytest.mark.parametrize(
    ("losses", "wrong"),
    [
        (curve(END, s19073=3.0845), []),
        (curve(END, s19073=3.0855), ["final loss"]),
        (curve(END, s19073=3.0645), ["final loss"]),
        (curve(END, s19073=None), ["final loss"]),
        (curve(END, s250=6.1631, s1000=4.1533, s1250=3.9518), []),  # the correct run of PR 30
        (curve(END, s250=6.4300), ["loss at step 250", "published curve"]),  # the wrong one
        (curve(END, s1000=4.07), ["loss at step 1,000", "published curve"]),
        (curve(END, s2000=3.6935), ["loss at step 2,000", "published curve"]),
        (curve(END, s2000=3.6920), []),
        (curve(END, s1750=3.7790), []),
        (curve(END, s12000=3.1215), ["published curve"]),
        (curve(END, s12000=None), ["published curve"]),
    ],
)
def test_finished_run_must_follow_the_published_curve(
    write_run: Callable[..., Path], losses: dict[int, float], wrong: list[str]
) -> None:
    [part] = judged(write_run("run", losses=losses, scores=REACHED))
    assert failed(part) == wrong
    assert part.passed == (not wrong)


def test_other_validation_tokens_have_a_wider_band_and_the_final_loss_is_evaluated(
    write_run: Callable[..., Path],
) -> None:
    """The recipe evaluates 10,485,760 tokens, the published run 1,310,720."""
    losses = curve(END, s2000=3.7200, s500=5.39)
    run = write_run("run", losses=losses, scores=REACHED, tokens=10_485_760)
    [part] = judged(run, evaluate=lambda _: 3.0800)
    assert failed(part) == []
    assert row(part, "final loss").measured == "3.0800"
    [part] = judged(run, evaluate=lambda _: 3.0900)
    assert failed(part) == ["final loss"]
    [part] = judged(run)
    assert failed(part) == ["final loss"]
    assert "not measured" in row(part, "final loss").measured
    further = curve(END, s2000=3.7240)
    [part] = judged(write_run("b", losses=further, scores=REACHED, tokens=10_485_760),
                    evaluate=lambda _: 3.08)  # fmt: skip
    assert failed(part) == ["loss at step 2,000", "published curve"]


@pytest.mark.parametrize(
    ("taken", "losses", "verdict"),
    [
        (100, {0: 10.9516}, "continue"),
        (300, curve(250), "continue"),
        (300, curve(250, s250=6.43), "stop: loss at step 250: 6.4300, should be 6.1729 ± 0.06"),
        (1_100, curve(1_000, s1000=4.8797), "stop: loss at step 1,000: 4.8797"),
        (2_100, curve(2_000, s2000=3.62), "stop: loss at step 2,000: 3.6200"),
        (2_100, curve(2_000, s1500=None), "stop: published curve: 8 of 9 within, worst nan"),
    ],
)
def test_verdict_on_an_unfinished_run(
    write_run: Callable[..., Path], rekindle: Callable, taken: int, losses: dict[int, float],
    verdict: str,
) -> None:  # fmt: skip
    run = write_run("run", losses=losses, taken=taken)
    [part] = judged(run)
    assert part.verdict.startswith(verdict)
    assert rekindle("check", run).status == (0 if verdict == "continue" else 1)


def test_first_training_losses_are_compared_for_the_same_seed(
    write_run: Callable[..., Path],
) -> None:
    [part] = judged(write_run("near", taken=50, first={9: 9.9703}))
    assert failed(part) == []
    [part] = judged(write_run("far", taken=50, first={9: 9.9725}))
    assert failed(part) == ["first training losses"]
    assert part.verdict == (
        "stop: first training losses: 9 of 10 within, worst 9.9725 at step 9, should be "
        "9.9613 ± 0.01"
    )
    [part] = judged(write_run("other", taken=50, first={9: 9.9725}, seed=1))
    assert failed(part) == []


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"optim.lr": 1.8e-3}, "recipe"),
        ({"steps": 20_000}, "recipe"),
        ({"forked": "another"}, "recipe"),
        ({"seed": 5}, ""),
        ({"eval_every": 500}, ""),
        ({"source": EDU | {"name": "HuggingFaceFW/fineweb:sample/10BT"}}, "data"),
        ({"source": EDU | {"settings": bands.LAYOUT | {"layout": "documents"}}}, "data"),
        ({"source": EDU | {"settings": bands.LAYOUT | {"shard_tokens": 10**7}}}, "data"),
        ({"source": {"name": "parquet: downloads"}}, ""),
    ],
)
def test_changed_recipe_or_data_fails(
    write_run: Callable[..., Path], changes: dict[str, Any], wrong: str
) -> None:
    [part] = judged(write_run("run", taken=300, losses=curve(250), **changes))
    assert [what for what in failed(part) if what in ("recipe", "data")] == (
        [wrong] if wrong else []
    )


def test_missing_data_is_assumed_to_be_right(write_run: Callable[..., Path]) -> None:
    run = write_run("run", taken=300, losses=curve(250))
    data = run.with_name("run-data")
    data.rename(run.with_name("moved"))
    [part] = judged(run)
    assert row(part, "data").measured == "unknown, assumed to be FineWeb-Edu"
    assert read_run(run, run.with_name("moved")).dataset == "FineWeb-Edu"
    other = write_run("other", taken=1)
    with pytest.raises(UserError, match="is not the run's training data"):
        read_run(run, other.with_name("other-data"))


def fast(write_run: Callable[..., Path], *ends: float | None, **options: Any) -> list[Path]:
    named: dict[str, Any] = {"recipe": "gpt2-124m-fast", "taken": 3_250, "source": CLASSIC,
                             "tokens": bands.RECORD_TOKENS} | options  # fmt: skip
    return [
        write_run(f"fast-{seed}", losses={3_250: end}, seed=seed, **named)
        for seed, end in enumerate(ends)
    ]


@pytest.mark.parametrize(
    ("ends", "options", "wrong"),
    [
        ([3.2755], {}, []),
        ([3.2765], {}, ["(3.28 - mean)·√n"]),
        ([3.2765, 3.2775], {}, []),  # mean 3.2770: 0.0042
        ([3.2765, 3.2785], {}, ["(3.28 - mean)·√n"]),  # mean 3.2775: 0.0035
        ([3.2755, None], {}, ["finished runs"]),
        ([3.2755], {"tokens": 1_000_000}, ["finished runs"]),
        ([3.2755], {"taken": 3_000, "losses": {}}, ["finished runs"]),
    ],
)
def test_rule_of_the_public_record(
    write_run: Callable[..., Path], ends: list[float], options: dict[str, Any], wrong: list[str]
) -> None:
    if "losses" in options:
        runs = [write_run("a", recipe="gpt2-124m-fast", source=CLASSIC, seed=1, **options)]
    else:
        runs = fast(write_run, *ends, **options)
    parts = judged(*runs)
    assert len(parts) == len(runs) + 1
    assert failed(parts[-1]) == wrong
    assert all(part.passed for part in parts[:-1])


def test_same_seed_twice_fails(write_run: Callable[..., Path]) -> None:
    [run] = fast(write_run, 3.27)
    parts = judged(run, run)
    assert failed(parts[-1]) == ["seeds"]


def test_changed_fast_recipe_fails(write_run: Callable[..., Path]) -> None:
    [run] = fast(write_run, 3.27, **{"optim.head_lr": 0.008})
    assert failed(judged(run)[0]) == ["recipe"]


def test_fast_recipe_on_fineweb_edu_must_surpass_gpt2(
    write_run: Callable[..., Path],
) -> None:
    named: dict[str, Any] = {"recipe": "gpt2-124m-fast", "taken": 3_250, "seconds": 3.6}
    losses = {1_000: 3.4, 2_000: 3.2920, 3_000: 3.20, 3_250: 3.19}
    run = write_run("a", losses=losses, scores={2_000: 0.2954, 3_000: 0.2956}, **named)
    [part] = judged(run, price=10)
    assert part.passed
    measured = row(part, "GPT-2 124M surpassed").measured
    assert measured.startswith("both at step 3,000, 1,572,864,000 tokens, 3.00 h, cost 30.00 at 10")
    [part] = judged(write_run("b", losses=losses, scores={3_250: 0.2950}, **named))
    assert failed(part) == ["GPT-2 124M surpassed"]
    measured = row(part, "GPT-2 124M surpassed").measured
    assert measured.startswith("loss at step 2,000")
    assert measured.endswith("HellaSwag not reached")
    [part] = judged(write_run("c", losses=losses, **named))
    assert row(part, "GPT-2 124M surpassed").measured.endswith("HellaSwag not measured")
    [part] = judged(write_run("d", losses={2_000: 3.2925}, scores={2_000: 0.3}, **named))
    assert not part.passed
    [part] = judged(write_run("e", losses={2_000: 3.2925}, **named | {"taken": 2_100}))
    assert part.passed  # not finished


def test_hours_are_unknown_if_the_log_lacks_steps(write_run: Callable[..., Path]) -> None:
    run = write_run("run", losses=curve(END), scores=REACHED)
    log = run / "metrics.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[1:]))
    [part] = judged(run, price=6)
    measured = row(part, "GPT-2 124M surpassed").measured
    assert "hours unknown" in measured
    assert "cost" not in measured


def test_confidence_interval_of_an_accuracy() -> None:
    assert interval(0.2955, 10_042) == pytest.approx(0.00892, rel=1e-2)


def test_mistakes_are_one_line(
    write_run: Callable[..., Path], refuses: Callable[..., str], tmp_path: Path
) -> None:
    refuses(["check", tmp_path], "has no run.json")
    run = write_run("run", recipe="demo", taken=1)
    refuses(["check", run], "recipe demo, for which there are no bands")
    fine = write_run("fine", taken=1)
    refuses(["check", fine, "--price-per-hour", "-1"], "--price-per-hour must be at least 0")
    (fine / "metrics.jsonl").write_text('{"kind": "train", "step": 0, "loss": "a"}\n')
    refuses(["check", fine], "metrics.jsonl is damaged")
    (fine / "metrics.jsonl").unlink()
    refuses(["check", fine], "has no metrics.jsonl")


def measured(loss: float = 3.2924, score: float = 0.2955, tokens: int = bands.FINAL_TOKENS) -> Any:
    return {
        "validation": {"loss": loss, "tokens": tokens},
        "hellaswag": {"acc_norm": score, "total": 10_042},
    }


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({}, []),
        ({"loss": 3.2970, "score": 0.2946}, []),
        ({"loss": 3.2980}, ["loss on FineWeb-Edu"]),
        ({"loss": 3.2870}, ["loss on FineWeb-Edu"]),
        ({"score": 0.2967}, ["HellaSwag"]),
        ({"score": 0.2943}, ["HellaSwag"]),
        ({"tokens": 9}, ["validation tokens"]),
    ],
)
def test_bands_of_openais_weights(options: dict[str, Any], wrong: list[str]) -> None:
    assert failed(gpt2.judge_gpt2(measured(**options))) == wrong


def test_openais_weights_are_evaluated_on_the_first_tokens_of_fineweb_edu(tmp_path: Path) -> None:
    """From the start of its first file, with an end of text before each document."""
    pq.write_table(pa.table({"text": ["Hello world"] * 3 + ["not read"]}), tmp_path / "a.parquet")
    gpt2.write_beginning(tmp_path / "a.parquet", tmp_path, 8)
    manifest = read_manifest(tmp_path)
    [tokens] = open_split(tmp_path, manifest, "val")
    assert tokens.tolist() == [50256, 15496, 995] * 2 + [50256, 15496]
    assert manifest.tokens("val") == 8


def test_evaluation_uses_the_number_of_tokens_of_the_bands(
    train: Callable[..., Any], write_shards: Callable[..., Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(bands, "FINAL_TOKENS", 100)
    write_shards(tmp_path / "data", [700], [300])
    train(tmp_path / "run", "--steps", 1, data=tmp_path / "data")
    quiet = Console(quiet=True)
    found = gpt2.measure(str(tmp_path / "run"), tmp_path / "data", {}, "cpu", quiet)["validation"]
    assert found["tokens"] == 100
