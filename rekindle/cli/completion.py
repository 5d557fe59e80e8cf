"""Completion for shells, generated from the parser by shtab."""

import argparse
from pathlib import Path
from typing import Any

from rekindle import recipes

SHELLS = ("bash", "zsh", "tcsh")


class PrintCompletion(argparse.Action):
    """Print the completion script of a shell, and exit."""

    def __call__(self, parser: argparse.ArgumentParser, _: Any, shell: Any, __: Any = None) -> None:
        import shtab  # here, since no other command needs it

        _describe(parser, {Path: shtab.FILE})
        print(shtab.complete(parser, shell))
        parser.exit()


def _describe(parser: argparse.ArgumentParser, kinds: dict[Any, Any]) -> None:
    """Let shtab complete file names and recipe names."""
    for action in parser._actions:
        if isinstance(action.choices, dict):  # the subcommands
            for inner in action.choices.values():
                _describe(inner, kinds)
        elif action.dest == "recipe":
            action.choices = list(recipes.RECIPES)
        elif action.type in kinds:
            action.complete = kinds[action.type]  # type: ignore[attr-defined]
