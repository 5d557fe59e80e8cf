"""The named recipes. Flags override their numbers.

Imports no torch. Sources: [lecture] "Let's reproduce GPT-2 (124M)", karpathy/build-nanogpt;
[GPT-3] Brown et al. 2020, table 2.1 and appendix B; [sweep] garg-aayush/building-from-scratch;
[ours] docs/wikipedia-on-a-laptop.md and benchmarks/LOG.md; [track 3] modded-nanogpt's plain
architecture.
"""

import dataclasses
from difflib import get_close_matches
from typing import Any

from rekindle.errors import UserError
from rekindle.model.gpt2_config import SIZES, GPT2Config
from rekindle.model.modern_config import ModernConfig
from rekindle.optim.adamw_config import AdamWConfig
from rekindle.optim.muon_config import MuonConfig, warmup_steps
from rekindle.recipes.base import Batch, Recipe, Schedule, override


def _fast(name: str, about: str, model: ModernConfig, steps: int, **numbers: Any) -> Recipe:
    """A recipe of the modern model: learning rates, warm-up and momentum follow from its width and
    steps. Gradients are not clipped, since the size of Muon's update does not depend on theirs."""
    return Recipe(
        name=name,
        about=about,
        model=model,
        optim=MuonConfig.by_rule(model.n_embd, steps),
        schedule=Schedule("linear", warmup=warmup_steps(steps), final=0.0, cooldown=0.6),
        steps=steps,
        grad_clip=0.0,
        **numbers,
    )


def by_rules(recipe: Recipe) -> Recipe:
    """The recipe with the hyperparameters that follow from its width and steps derived again."""
    if not isinstance(recipe.optim, MuonConfig):
        return recipe
    schedule = dataclasses.replace(recipe.schedule, warmup=warmup_steps(recipe.steps))
    optim = MuonConfig.by_rule(recipe.model.n_embd, recipe.steps)
    return dataclasses.replace(recipe, schedule=schedule, optim=optim)


def with_steps(recipe: Recipe, steps: int) -> Recipe:
    """The recipe with another number of steps, and the hyperparameters that follow from it."""
    return by_rules(dataclasses.replace(recipe, steps=steps))


def customized(
    recipe: Recipe, changes: dict[str, Any], steps_at_start: int | None = None
) -> Recipe:
    """The recipe with the numbers in `changes`, by dotted name.

    Hyperparameters that follow from the model's width and the steps are derived again, unless
    `changes` contains them. A run that has started keeps those of its `steps_at_start`. Raises
    `UserError`, which names the flags.
    """
    ruled = ("optim.", "schedule.")
    first = {name: value for name, value in changes.items() if not name.startswith(ruled)}
    changed = override(recipe, first)
    started = dataclasses.replace(changed, steps=steps_at_start or changed.steps)
    if started.steps != recipe.steps or started.model != recipe.model:
        changed = dataclasses.replace(by_rules(started), steps=changed.steps)
    return override(changed, {k: v for k, v in changes.items() if k.startswith(ruled)})


_LECTURE = Recipe(
    name="gpt2-124m",
    about="GPT-2 124M as in the lecture: 10B tokens in its order (--layout lecture)",
    batch=Batch(order="lecture"),
)

RECIPES = {
    recipe.name: recipe
    for recipe in (
        _LECTURE,
        dataclasses.replace(
            _LECTURE,
            name="gpt2-124m-tuned",
            about="the same with a global shuffle and 3 times the learning rate",
            batch=Batch(order="shuffled"),
            optim=AdamWConfig(lr=1.8e-3),  # 3.005 instead of 3.08 at the end [sweep]
        ),
        Recipe(
            name="gpt2-medium",
            about="GPT-2 355M with GPT-3 Medium's learning rate",
            model=SIZES["gpt2-medium"],
            optim=AdamWConfig(lr=3e-4),  # [GPT-3] table 2.1
        ),
        Recipe(
            name="gpt2-large",
            about="GPT-2 774M with GPT-3 Large's learning rate",
            model=SIZES["gpt2-large"],
            optim=AdamWConfig(lr=2.5e-4),  # [GPT-3] table 2.1
        ),
        Recipe(
            name="gpt2-xl",
            about="GPT-2 1558M with GPT-3 XL's learning rate and batch",
            model=SIZES["gpt2-xl"],
            optim=AdamWConfig(lr=2e-4),  # [GPT-3] table 2.1
            batch=Batch(tokens=1_048_576),  # [GPT-3] table 2.1: 1M
            schedule=Schedule(warmup=358),  # the same 375M tokens
            steps=9_537,  # the same 10 billion tokens
        ),
        _fast(
            "gpt2-124m-fast",
            "the modern model with Muon; predicted to reach GPT-2's loss after 1.7B tokens",
            ModernConfig(),
            steps=3_250,  # a prediction, from [track 3]
        ),
        Recipe(
            name="gpt2-10m",
            about="a GPT-2 with 10M parameters that trains in 10 to 15 minutes on 2 CPU cores",
            model=GPT2Config(n_layer=6, n_head=5, n_embd=160, block_size=256),
            batch=Batch(tokens=8_192, length=256),
            optim=AdamWConfig(lr=3e-3),  # [ours]
            schedule=Schedule(warmup=30),
            steps=300,
            eval_every=50,
            eval_tokens=262_144,
            checkpoint_every=50,
        ),
        _fast(
            "demo-fast",
            "a byte-level modern model for `rekindle demo` on a CPU",
            ModernConfig(n_layer=4, n_embd=128, head_size=32, block_size=128, value_embeddings=2),
            steps=300,
            batch=Batch(tokens=4_096, length=128),
            eval_every=100,
            eval_tokens=131_072,
            checkpoint_every=100,
            tokenizer="bytes",
            prompt="The ",
        ),
        Recipe(
            name="demo",
            about="a byte-level GPT-2, small enough for a CPU",
            model=GPT2Config(n_layer=4, n_head=4, n_embd=128, block_size=128),
            batch=Batch(tokens=4_096, length=128),
            optim=AdamWConfig(lr=3e-3),  # [ours]
            schedule=Schedule(warmup=50),
            steps=600,
            eval_every=200,
            eval_tokens=131_072,
            checkpoint_every=200,
            tokenizer="bytes",
            prompt="The ",
        ),
        Recipe(
            name="demo-gpu",
            about="a larger byte-level GPT-2 for `rekindle demo` on a GPU",
            model=GPT2Config(n_layer=6, n_head=6, n_embd=384, block_size=256),
            batch=Batch(tokens=65_536, length=256),
            optim=AdamWConfig(lr=2e-3),
            schedule=Schedule(warmup=50),
            steps=600,
            eval_every=200,
            eval_tokens=1_048_576,
            checkpoint_every=200,
            tokenizer="bytes",
            prompt="The ",
        ),
    )
}


def get_recipe(name: str) -> Recipe:
    """The recipe called `name`. Raises `UserError` with the nearest names."""
    if name not in RECIPES:
        near = get_close_matches(name, RECIPES, n=3, cutoff=0.4)
        advice = f"did you mean {' or '.join(near)}?" if near else f"use {', '.join(RECIPES)}"
        raise UserError(f"there is no recipe {name!r}: {advice}")
    return RECIPES[name]
