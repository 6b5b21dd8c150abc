"""What every script does around its work: errors that exit with code 2, signals that stop it well.

Light to import, so that Ctrl-C in a script's first seconds, which its own imports take, finds this at work already.
"""

import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence

from src.console import say
from src.errors import Stopped, UserError, out_of_memory


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Run a script's `main(arguments)`; what the user can mend becomes one line on stderr and exit code 2.

    A signal becomes one line too, and exit code 128 + its number.
    """
    _keep_streams()
    try:
        _catch_signals()
        _quiet()
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(_fail(" ".join(str(error).split()), 2))
    except (Stopped, KeyboardInterrupt) as error:
        number = error.number if isinstance(error, Stopped) else signal.SIGINT
        what = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
        sys.exit(_fail(f"{what}; what was finished is saved", 128 + number))
    except Exception as error:
        if out_of_memory(error):
            on_device = type(error).__name__ == "OutOfMemoryError"
            sys.exit(_fail("the device's memory is full; take a smaller batch, a quantized base, or --grad_cp 1" if on_device else
                           "the machine's memory is full; take a smaller batch or a smaller model", 2))
        if isinstance(error, OSError) and error.errno is not None:
            sys.exit(_fail(f"{error.filename or 'a file'}: {error.strerror}", 2))
        raise


def _fail(message: str, code: int) -> int:
    say(f"error: {message}")
    return code


def _catch_signals() -> None:
    """Turn signals into `Stopped`, so that files are closed, temporaries removed and locks given back on the way out.

    One that is ignored stays so: nohup ignores SIGHUP, a shell SIGINT for what it runs in the background.
    """

    def stop(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
        raise Stopped(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, stop)


class _Kept(io.FileIO):
    """A standard stream that goes nowhere once it can't be written: a closed pipe or a full disk under a log costs no work."""

    def write(self, data: bytes) -> int:
        try:
            return super().write(data)
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(data)


def _keep_streams() -> None:
    """Standard streams that can always be written, in whatever encoding the terminal has.

    A stream that is closed from the start (`2>&-`) becomes /dev/null: the next file opened would get its number, and what
    libraries report would go into that file.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):  # not one that a program which imports this has put there
            raw = _Kept(number, "w", closefd=False)
            setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw), encoding=stream.encoding if stream else "utf-8",
                                                errors="backslashreplace", line_buffering=number == 2 or raw.isatty()))


def _quiet() -> None:
    """Silence what third-party packages say that users can't act on."""
    packages = "pytorch_lightning|lightning_fabric|lightning_utilities|torchmetrics|deepspeed|bitsandbytes|wandb"
    warnings.filterwarnings("ignore", module=rf"({packages}).*")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch.*")
    for name in ("pytorch_lightning", "lightning.pytorch", "DeepSpeed", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
