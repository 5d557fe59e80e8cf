"""A recipe in a TOML file: a named recipe and the numbers that differ."""

from collections.abc import Callable
from pathlib import Path

import pytest

from rekindle import recipes, storage
from rekindle.recipes.files import read_recipe

FAST = 'base = "demo-fast"\n'


def customized(path: Path) -> recipes.Recipe:
    return recipes.customized(*read_recipe(path))


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return path


def test_the_numbers_of_a_file(tmp_path: Path) -> None:
    recipe = customized(
        write(
            tmp_path,
            'base = "demo"\nsteps = 9\nprompt = "é"\n[optim]\nlr = 1\n[model]\nn_layer = 3',
        )
    )
    assert (recipe.name, recipe.steps, recipe.prompt) == ("mine", 9, "é")
    assert (recipe.optim.lr, recipe.model.n_layer) == (1.0, 3)
    assert isinstance(recipe.optim.lr, float)
    demo = recipes.get_recipe("demo")
    assert recipe.optim.beta2 == demo.optim.beta2
    assert recipe.batch == demo.batch


def test_rules_follow_the_steps_of_a_file_unless_it_gives_their_numbers(tmp_path: Path) -> None:
    """Muon's rates and warm-up depend on the number of steps."""
    expected = recipes.with_steps(recipes.get_recipe("demo-fast"), 75)
    short = customized(write(tmp_path, FAST + "steps = 75"))
    assert (short.optim, short.schedule) == (expected.optim, expected.schedule)
    given = customized(write(tmp_path, FAST + "steps = 75\n[optim]\nlr = 0.5"))
    assert given.optim.lr == 0.5
    assert given.optim.weight_decay == expected.optim.weight_decay


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps = 9", 'add base = "gpt2-124m"'),
        ('base = "demi"', "there is no recipe 'demi'"),
        ('base = "demo"\nstep = 9', "has no step: did you mean steps"),
        ('base = "demo"\n[optim]\nmomentum = 0.9', "has no optim.momentum"),
        ('base = "demo"\nsteps = 1.5', "steps is 1.5, but must be a whole number"),
        ('base = "demo"\nsteps = true', "steps is True, but must be a whole number"),
        ('base = "demo"\nprompt = 1', "prompt is 1, but must be a string"),
        ('base = "demo"\nmodel = 1', "has no model"),
        ('base = "demo"\nsteps =', "cannot be read as TOML"),
        ('base = "demo"\nsteps = -1', "--steps must be at least 0"),
        ('base = "demo"\n[model]\nn_head = 3', "n-embd 128 is not a multiple of --model.n-head 3"),
    ],
)
def test_mistakes_in_a_file(
    tmp_path: Path, refuses: Callable[..., str], text: str, words: str
) -> None:
    path = write(tmp_path, text)
    refuses(["train", path, "--data", tmp_path / "data", "--out", tmp_path / "run"], words)


def test_training_from_a_file_and_resuming(
    tmp_path: Path, shard_set: Path, rekindle: Callable, one_thread: None
) -> None:
    """Flags override the file, and a run keeps the numbers that followed from its first steps."""
    path = write(
        tmp_path,
        FAST + "steps = 75\n[model]\nn_layer = 1\nn_embd = 16\nhead_size = 8\nblock_size = 32\n"
        "value_embeddings = 0\n[batch]\ntokens = 64\nlength = 16",
    )
    out = tmp_path / "run"
    train = ["train", path, "--data", shard_set, "--out", out, "--device", "cpu", "--no-compile"]
    assert rekindle(*train, "--steps", 4).status == 0
    recipe = storage.read_json(out / "run.json")["recipe"]
    assert (recipe["steps"], recipe["name"], recipe["model.n_embd"]) == (4, "mine", 16)
    assert recipe["optim.weight_decay"] == 4 / (0.06 * 4)
    outcome = rekindle(*train, "--steps", 6)
    assert outcome.status == 0, outcome.err
    assert (out / "checkpoints" / "step-000006").is_dir()
