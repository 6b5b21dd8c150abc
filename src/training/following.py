"""A started process ends with its starter, however that ends. Light to import, so that it takes effect at once."""

import os
import sys
import threading
from collections.abc import Sequence

# An interpreter option, unlike an environment variable, is not inherited by processes that the started one starts itself.
_OPTION = "started"


def command_to_follow(command: Sequence[str]) -> list[str]:
    """The command that runs the same script; start it with a pipe as stdin, and write nothing to that."""
    return [sys.executable, "-X", _OPTION, *command]


def is_follower() -> bool:
    """Whether this process was started by `command_to_follow`."""
    return _OPTION in sys._xoptions


def follow_starter() -> None:
    """End this process once the other end of that pipe is closed; does nothing in a process that is no follower."""

    def follow() -> None:
        os.read(0, 1)  # returns when the process at the other end is gone
        os._exit(1)

    if is_follower():
        threading.Thread(target=follow, daemon=True).start()
