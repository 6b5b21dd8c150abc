"""The exceptions that mean "the user can mend this", and how to tell that memory ran out."""

import signal

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class UserError(Exception):
    """Bad input: the message is one line that names the file, row or flag and says what to do.

    Every script prints it as `error: ...` on stderr and exits with code 2 (see `src/cli/run.py`).
    """


class NotFinite(UserError):
    """A model or a file gave NaN or infinity where only finite numbers are of use; the message names which."""


class Stopped(BaseException):
    """A signal asked the process to end: Ctrl-C, or what a scheduler, a closed terminal or `kill` sends.

    No `Exception`, so that nothing on its way up takes it for a failure of its own.
    """

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


# Of PyTorch on a CPU: an allocation that fails, a size that no memory has.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed")


def out_of_memory(error: BaseException) -> bool:
    """Whether the machine or the device had no more memory; PyTorch has no error of its own for the former."""
    # torch.OutOfMemoryError by name, since whoever asks need not have imported torch.
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY))
