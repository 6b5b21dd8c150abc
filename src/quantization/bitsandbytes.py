"""The package bitsandbytes, imported when it is first needed: that takes seconds, and who needs none of it need not have it."""

import functools
import logging
from types import ModuleType

from src.errors import UserError


@functools.cache
def load_bitsandbytes(what: str, instead: str) -> ModuleType:
    """The package. Raises UserError, naming `what` needs it and what does without, where it is missing or cannot be loaded."""
    # On some CPUs the import warns that an optional package with a faster 4-bit product is missing, which is not used here.
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import bitsandbytes
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(f"{what} needs the package bitsandbytes, which cannot be loaded ({error}); "
                        f"install requirements.txt, or take {instead}, which does without") from error
    finally:
        logger.setLevel(level)
    return bitsandbytes
