"""A command or flag that does not exist is one line with a suggestion."""

from collections.abc import Callable

import pytest

from rekindle.cli.hints import EXPLAINED, OTHER_NAMES
from rekindle.cli.parser import make_parser

TRAIN = ["train", "demo", "--data", "x", "--out", "y"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], "there is no command 'trian': did you mean train?"),
        (["generate"], "there is no command 'generate': use demo, prepare, train"),
        ([*TRAIN, "--lr", "1"], "has no --lr: did you mean --optim.lr?"),
        ([*TRAIN, "--lr=1"], "has no --lr: did you mean --optim.lr?"),
        ([*TRAIN, "--n_layer", "1"], "has no --n_layer: did you mean --model.n-layer?"),
        ([*TRAIN, "--batch-size", "4"], "--micro-batch sets the rows of one forward pass"),
        ([*TRAIN, "--seq_len", "4"], "did you mean --batch.length?"),
        ([*TRAIN, "--dtype", "bfloat16"], "did you mean --precision?"),
        ([*TRAIN, "--resume"], "to resume a run, run the same command again"),
        ([*TRAIN, "--step", "4"], "did you mean --steps"),  # no silent abbreviation
        (["sample", "x", "--max-new-tokens", "4"], "did you mean --tokens?"),
        (["sample", "x", "--wandb", "1"], "see `rekindle sample --help`"),
        (["sample", "x", "some", "text"], "takes no argument 'some'"),
        (["train", "demp", "--data", "x", "--out", "y"], "no recipe 'demp': did you mean demo"),
        (["train", "demo", "--data", "x"], "`rekindle train` needs --out"),
        ([*TRAIN, "--steps", "ten"], "--steps: 'ten' is not a whole number"),
        ([*TRAIN, "--optim.lr", "high"], "--optim.lr: 'high' is not a number"),
        (["prepare", "--layout", "x"], "--layout: invalid choice: 'x'"),
    ],
)
def test_a_mistake_gets_a_suggestion(
    refuses: Callable[..., str], arguments: list[str], words: str
) -> None:
    refuses(arguments, words)


def test_suggested_flags_exist() -> None:
    """A flag that is renamed must be renamed in the suggestions too."""
    _, parsers = make_parser()
    flags = {name for parser in parsers.values() for name in parser._option_string_actions}
    assert set(OTHER_NAMES) <= flags
    words = {w.strip(",") for text in EXPLAINED.values() for w in text.split()}
    assert {word for word in words if word.startswith("--")} <= flags
    others = [name for names in OTHER_NAMES.values() for name in names]
    assert len(others) == len(set(others))


def test_no_command_prints_the_help(rekindle: Callable) -> None:
    outcome = rekindle()
    assert outcome.status == 2
    assert "usage: rekindle" in outcome.err
