"""What every script does around its work: flags that fail in one line, errors that exit with code 2."""

import argparse
import logging
import sys
import warnings
from collections.abc import Callable, Sequence

import torch

from src.errors import UserError

DATA_FORMATS = "CSV, TSV, JSONL, JSON, Parquet or Arrow, also compressed (.gz, .bz2, .xz, .zst)"
SKIP_BAD_ROWS = ("1: leave out rows that can't be used, with a count and a list beside the output, instead of refusing the file")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Tells each flag's default, where there is one to tell."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, "") else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse that takes no abbreviations and tells a wrong flag in one line."""

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False, formatter_class=_Help)

    def flags(self) -> set[str]:
        return {flag for action in self._actions for flag in action.option_strings}

    def error(self, message: str) -> None:
        raise UserError(f"{message} (see --help)")


def zero_or_one(text: str) -> bool:
    """This family's way to switch a thing: `--flag 1`, `--flag 0`."""
    if text not in ("0", "1"):
        raise argparse.ArgumentTypeError(f"takes 0 or 1, not {text!r}")
    return text == "1"


def positive(text: str) -> int:
    return _integer(text, 1)


def not_negative(text: str) -> int:
    return _integer(text, 0)


def seed(text: str) -> int:
    """What every random generator in use takes."""
    value = _integer(text, 0)
    if value >= 2**32:
        raise argparse.ArgumentTypeError(f"takes a whole number below 2^32, not {text!r}")
    return value


def _integer(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"takes a whole number from {least} on, not {text!r}")
    return value


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Run a script's `main(arguments)`; what the user can mend becomes one line on stderr and exit code 2."""
    _quiet()
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(_fail(" ".join(str(error).split()), 2))
    except torch.OutOfMemoryError:
        sys.exit(_fail("the device's memory is full; take a smaller batch, a quantized base, or --grad_cp 1", 2))
    except MemoryError:
        sys.exit(_fail("the machine's memory is full; take a smaller batch or a smaller model", 2))
    except OSError as error:
        if error.errno is None:
            raise
        sys.exit(_fail(f"{error.filename or 'a file'}: {error.strerror}", 2))
    except KeyboardInterrupt:
        sys.exit(_fail("interrupted; what was finished is saved", 130))


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


def _quiet() -> None:
    """Silence what third-party packages say that users can't act on."""
    packages = "pytorch_lightning|lightning_fabric|lightning_utilities|torchmetrics|deepspeed|bitsandbytes|wandb"
    warnings.filterwarnings("ignore", module=rf"({packages}).*")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch.*")
    for name in ("pytorch_lightning", "lightning.pytorch", "DeepSpeed", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
