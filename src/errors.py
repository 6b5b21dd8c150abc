"""The exceptions that mean "the user can mend this", and how to tell that memory ran out."""

import signal

# What asks a process to end, and leaves it time to.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGXCPU, signal.SIGUSR1)


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


# Of PyTorch on a CPU: an allocation that fails, a size that no memory has; of CUDA's libraries, which have errors of their own.
_NO_MEMORY = {
    "can't allocate memory": "machine", "not enough memory": "machine", "Storage size calculation overflowed": "machine",
    "out of memory": "device", "CUBLAS_STATUS_ALLOC_FAILED": "device"}


def out_of_memory(error: BaseException) -> str | None:
    """Whose memory ran out, "machine" or "device"; None for any other error. PyTorch has no one kind of error for it."""
    if isinstance(error, MemoryError):
        return "machine"
    if type(error).__name__ == "OutOfMemoryError":  # torch's, by name, since whoever asks need not have imported torch
        return "device"
    if not isinstance(error, RuntimeError):
        return None
    return next((whose for words, whose in _NO_MEMORY.items() if words in str(error)), None)
