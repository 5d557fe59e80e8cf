"""The exceptions that the command line turns into a line and an exit status."""

LONGEST = 900  # characters


class UserError(Exception):
    """What is wrong, where, and what to do. The command line prints it and exits with status 2.

    It is one line, and no long one, whatever a file that it quotes from holds.
    """

    def __init__(self, said: str) -> None:
        said = " ".join(said.splitlines())
        super().__init__(said if len(said) < LONGEST else f"{said[:LONGEST]} ...")


class Stopped(Exception):
    """A signal asked the run to stop, and all it has done is saved. The exit status is 128 and the
    signal's number, as a shell has it."""

    def __init__(self, signal: int, said: str) -> None:
        super().__init__(said)
        self.status = 128 + signal


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: Python's, a GPU's, or of PyTorch on a CPU."""
    name = type(error).__name__
    return (
        isinstance(error, MemoryError)
        or name == "OutOfMemoryError"
        or ("can't allocate memory" in str(error))
    )
