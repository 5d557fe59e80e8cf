"""The exceptions that the command line turns into a one-line message and an exit status."""

LONGEST = 900  # characters


class UserError(Exception):
    """What is wrong, where, and what to do. The command line prints it and exits with status 2.

    The message is joined into one line and truncated, since it may quote the content of a file.
    """

    def __init__(self, message: str) -> None:
        message = " ".join(message.splitlines())
        super().__init__(message if len(message) < LONGEST else f"{message[:LONGEST]} ...")


class Stopped(Exception):
    """The run stopped because of a signal, after saving its progress. The exit status is 128 plus
    the signal number, the convention of shells."""

    def __init__(self, signal: int, message: str) -> None:
        super().__init__(message)
        self.status = 128 + signal


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means out of memory: in Python, on a GPU, or in PyTorch on a CPU."""
    name = type(error).__name__
    return (
        isinstance(error, MemoryError)
        or name == "OutOfMemoryError"
        or ("can't allocate memory" in str(error))
    )
