"""Arguments of the command line made from dataclass fields."""

import argparse
from collections.abc import Iterable
from typing import Any

from rekindle.flags import Flag

METAVARS = {int: "N", float: "X", str: "TEXT"}


def add_flags(parser: Any, flags: Iterable[Flag]) -> None:
    """Offer each flag with its help and, if it has one, its default."""
    for flag in flags:
        about = flag.help.replace("%", "%%")
        if flag.default is not None:
            about += f" (default: {flag.default})".replace("%", "%%")
        how: dict[str, Any] = {"type": flag.type, "metavar": METAVARS.get(flag.type)}
        if flag.type is bool:
            how = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(
            flag.spelling, dest=flag.name, default=argparse.SUPPRESS, help=about, **how
        )


def given(options: argparse.Namespace, flags: Iterable[Flag]) -> dict[str, Any]:
    """The values of those flags that were given, by name."""
    named = vars(options)
    return {flag.name: named[flag.name] for flag in flags if flag.name in named}
