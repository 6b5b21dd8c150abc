"""A process that another one started ends with it, whatever ends that: light to import, so that it holds from the start."""

import os
import sys
import threading
from collections.abc import Sequence

# An option of the interpreter, which only the process that is started so can see, and none that it starts itself.
_OPTION = "started"


def command_to_follow(command: Sequence[str]) -> list[str]:
    """The command of the same script, to be started with a pipe as its stdin that nothing is ever written to."""
    return [sys.executable, "-X", _OPTION, *command]


def is_follower() -> bool:
    """Whether this process was started so."""
    return _OPTION in sys._xoptions


def follow_starter() -> None:
    """End this process once the other end of that pipe is closed; does nothing in a process that was not started so."""

    def follow() -> None:
        os.read(0, 1)  # comes back when the process that holds the other end is gone
        os._exit(1)

    if is_follower():
        threading.Thread(target=follow, daemon=True).start()
