"""What every script does around its work: errors exit with code 2, signals stop it cleanly.

Light to import, so that it already handles Ctrl-C while the script's own imports run, which take seconds.
"""

import errno
import io
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from types import CodeType, FrameType
from typing import Any

from src.console import say
from src.errors import SIGNALS, Stopped, UserError, out_of_memory, signal_behind

# Seconds after which a signal is raised that could not be raised before, or is raised again where some code swallowed it.
AGAIN_AFTER = 0.1
# Seconds within which a second signal counts as a repeat of the first.
SAME_WITHIN = 1.0
# Variables that Lightning reads when it is imported.
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
# The file of the code that imports, as a frame has it.
IMPORT = "<frozen importlib._bootstrap>"


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Run a script's `main(arguments)`; an error that the user can fix becomes one line on stderr and exit code 2.

    A signal becomes one line and exit code 128 + its number.
    """
    lost = _keep_streams()
    received = _catch_signals(main.__code__)
    try:
        _prepare_surroundings()
        _quiet()
        main(sys.argv[1:])
    except BaseException as error:
        _release_signals()
        if received:  # code in between may have replaced its exception
            sys.exit(_fail(*_ended_by(received[0])))
        message = _message(error)
        if message is None:
            raise
        sys.exit(_fail(message, 2))
    _release_signals()
    sys.stdout.flush()
    if lost:
        sys.exit(_fail(f"the output on stdout could not be written ({lost[0]}); send it elsewhere", 2))


def check_ranks() -> None:
    """Raises UserError for a malformed rank variable, which makes the import of Lightning fail."""
    for name in RANKS:
        try:
            int(os.environ.get(name, 0))
        except ValueError:
            raise UserError(f"the environment variable {name} is {os.environ[name][:80]!r}, but has to be the number of a "
                            "process; unset it") from None


def _prepare_surroundings() -> None:
    """Raises UserError where the current folder was removed: torch can't be imported then."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError("the current folder is gone; cd to another one") from None
    # Every file is loaded with weights_only anyway, and where TORCH_FORCE_WEIGHTS_ONLY_LOAD is set too torch refuses to load any.
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)


def _message(error: BaseException) -> str | None:
    """The message for an error that the user can fix; None for any other."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    if whose := out_of_memory(error):
        return f"the {whose}'s memory is full; take a smaller batch, a quantized base, or a smaller model"
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.filename or 'a file'}: {error.strerror}"
    return None


def _fail(message: str, code: int) -> int:
    say(f"error: {message}")
    return code


def _ended_by(number: int) -> tuple[str, int]:
    what = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
    return f"{what}; what was finished is saved", 128 + number


def _catch_signals(main: CodeType) -> list[int]:
    """Turn signals into `Stopped`, so that files are closed, temporaries removed and locks released on the way out.

    An ignored signal stays ignored: nohup ignores SIGHUP, a shell SIGINT for background jobs. A second signal ends the process at
    once, unless it comes within a second: the terminal and a launcher may both deliver the same one.

    Returns a list that gets the number of the signal received.
    """
    received: list[int] = []
    first = 0.0

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if received:
            if time.monotonic() - first > SAME_WITHIN:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        first = time.monotonic()
        received.append(number)
        signal.signal(signal.SIGALRM, end)
        signal.setitimer(signal.ITIMER_REAL, AGAIN_AFTER, AGAIN_AFTER)
        end(number, frame)

    def end(_: int, frame: FrameType | None) -> None:
        names = _callers(frame, main)
        if names[-1:] == [IMPORT]:  # the script's own imports, before any work: packages swallow an exception there, or abort
            message, code = _ended_by(received[0])
            os.write(2, f"error: {message}\n".encode())
            os._exit(code)
        if IMPORT not in names and not signal_behind(sys.exception()):
            raise Stopped(received[0])

    for number in SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, stop)
    return received


def _release_signals() -> None:
    """From here on there is nothing to clean up, and a signal ends the process."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number in SIGNALS:
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)


def _callers(frame: FrameType | None, main: CodeType) -> list[str]:
    """The files of the running code, innermost first, without `main` and its callers."""
    names = []
    while frame is not None and frame.f_code is not main:
        names.append(frame.f_code.co_filename)
        frame = frame.f_back
    return names


class _Kept(io.FileIO):
    """A standard stream that discards its text once it can't be written: a closed pipe or a full disk ends no run.

    `lost` gets the reason, except for a closed pipe.
    """

    def __init__(self, number: int, lost: list[str]):
        super().__init__(number, "w", closefd=False)
        self.lost = lost

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno != errno.EPIPE:
                self.lost.append(error.strerror or str(error))
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(data)


def _keep_streams() -> list[str]:
    """Standard streams that can always be written, in any terminal encoding.

    A stream that is closed from the start (`2>&-`) becomes /dev/null: otherwise the next file opened would get its number, and
    libraries' messages would go into that file.

    Returns a list that gets the reason when a script's result could not be written to stdout.
    """
    lost: list[str] = []
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):  # a program that imports this may have put its own there
            raw = _Kept(number, lost if number == 1 else [])
            setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw), encoding=stream.encoding if stream else "utf-8",
                                                errors="backslashreplace", line_buffering=number == 2 or raw.isatty()))
    return lost


def _quiet() -> None:
    """Silence messages of third-party packages that users can't act on."""
    packages = "pytorch_lightning|lightning_fabric|lightning_utilities|torchmetrics|deepspeed|bitsandbytes|wandb"
    warnings.filterwarnings("ignore", module=rf"({packages}).*")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch.*")
    for name in ("pytorch_lightning", "lightning.pytorch", "DeepSpeed", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
