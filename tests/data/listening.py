"""A console whose output a test can inspect."""

import io

from rekindle.observe.console import Console


class _Stream(io.StringIO):
    def __init__(self, output: list[str], terminal: bool) -> None:
        super().__init__()
        self.output, self.terminal = output, terminal

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        if text:
            self.output.append(text if self.terminal else text.removesuffix("\n"))
        return len(text)


def listen(output: list[str], *, terminal: bool = False) -> Console:
    """A console that appends its output to `output`: lines, or for a terminal all characters."""
    return Console(stream=_Stream(output, terminal))
