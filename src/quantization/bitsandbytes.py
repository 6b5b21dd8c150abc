"""The package bitsandbytes, imported on first use: the import takes seconds, and the package is optional."""

import functools
import logging
from types import ModuleType

from src.errors import UserError


@functools.cache
def load_bitsandbytes(what: str, instead: str) -> ModuleType:
    """The package. Raises UserError, naming `what` needs it and an alternative (`instead`), if it can't be loaded."""
    # On some CPUs the import warns that an optional package is missing, whose faster 4-bit product is not used here.
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import bitsandbytes
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(f"{what} needs the package bitsandbytes, which cannot be loaded ({error}); "
                        f"install requirements.txt, or take {instead}, which does not need it") from error
    finally:
        logger.setLevel(level)
    return bitsandbytes
