"""The exceptions that users can fix, and the test for running out of memory."""

import signal

# Signals that ask a process to end, and leave it time to.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGXCPU, signal.SIGUSR1)


class UserError(Exception):
    """Bad input: the message is one line that names the file, row or flag and says what to do.

    Every script prints it as `error: ...` on stderr and exits with code 2 (see `src/cli/run.py`).
    """


class NotFinite(UserError):
    """A model or a file gave NaN or infinity where numbers must be finite; the message names which."""


class Stopped(BaseException):
    """A signal asked the process to end: Ctrl-C, or the signal of a scheduler, a closed terminal or `kill`.

    Not an `Exception`, so that no handler of failures catches it.
    """

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


def signal_behind(error: BaseException | None) -> Stopped | None:
    """The signal that an error is, or during whose handling it was raised; None for any other."""
    while error is not None and not isinstance(error, Stopped):
        error = error.__context__
    return error


# Messages of PyTorch on a CPU, for a failed allocation and an impossible size; and of CUDA's libraries, which raise their own.
_NO_MEMORY = {
    "can't allocate memory": "machine", "not enough memory": "machine", "Storage size calculation overflowed": "machine",
    "out of memory": "device", "CUBLAS_STATUS_ALLOC_FAILED": "device"}


def out_of_memory(error: BaseException) -> str | None:
    """Whose memory ran out, "machine" or "device"; None for any other error. PyTorch has no single exception for it."""
    if isinstance(error, MemoryError):
        return "machine"
    if type(error).__name__ == "OutOfMemoryError":  # torch's, by name, since the caller may not have imported torch
        return "device"
    if not isinstance(error, RuntimeError):
        return None
    return next((whose for words, whose in _NO_MEMORY.items() if words in str(error)), None)
