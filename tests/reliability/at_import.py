"""`python -m tests.reliability.at_import NUMBER MODULES SCRIPT FLAGS...`: run a script that gets a signal as it imports.

The signal comes at so many imports after the script has begun to take signals, which is the same moment on every machine.
`MODULES` 0 sends none, and tells on stdout how many there are.
"""

import os
import runpy
import signal
import sys


def main(number: int, modules: int, script: str) -> None:
    count = 0

    def on_import(event: str, _: tuple) -> None:
        nonlocal count
        if event == "import" and signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
            count += 1
            if count == modules:
                os.kill(os.getpid(), number)

    sys.addaudithook(on_import)
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        if not modules:
            print(count)


if __name__ == "__main__":
    number, modules, script = sys.argv[1:4]
    sys.argv = sys.argv[3:]
    main(int(number), int(modules), script)
