"""A console whose output a test can read."""

import io

from rekindle.observe.console import Console


class _Stream(io.StringIO):
    def __init__(self, said: list[str], terminal: bool) -> None:
        super().__init__()
        self.said, self.terminal = said, terminal

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        if text:
            self.said.append(text if self.terminal else text.removesuffix("\n"))
        return len(text)


def listen(said: list[str], *, terminal: bool = False) -> Console:
    """A console that adds what it prints to `said`: lines, or for a terminal all characters."""
    return Console(stream=_Stream(said, terminal))
