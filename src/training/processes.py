"""A run on several devices has one process for each: the first starts the others, which end with it however it ends.

Only the first takes signals, writes the folder and prints; of the others, only direct output of C++ libraries reaches the
terminal. Lightning could start the others too, but on a signal it exchanges messages with processes that may no longer listen,
and the run hangs.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.environments import ClusterEnvironment

from src.console import say
from src.errors import SIGNALS, UserError
from src.training.config import TrainConfig
from src.training.environment import First
from src.training.following import command_to_follow, follow_starter

# Seconds that a failing process other than the first waits before it prints its error. An error of all processes is printed by
# the first, which ends the others in this time.
PATIENCE = 5.0
# Seconds that the first process goes without an answer after another has ended; then it gives up.
ANSWER_TIMEOUT = 30.0


def starts_others(config: TrainConfig, environment: ClusterEnvironment) -> bool:
    """Whether this process has to start the others, because no launcher or scheduler does."""
    return config.machine.devices > 1 and isinstance(environment, First)


def check_can_start_others(config: TrainConfig) -> None:
    """Raises UserError if the others would not run the same script: from a notebook, each would be another kernel."""
    main = sys.modules["__main__"]
    file, as_module = getattr(main, "__file__", None), getattr(main, "__spec__", None)
    words = filter(os.path.exists, sys.orig_argv[1:])
    if not (file and (as_module or any(os.path.samefile(word, file) for word in words))):
        raise UserError(f"--devices {config.machine.devices}: every device needs a process of its own, and only a script can "
                        "start them; run train.py, or take --devices 1 here")


def share_cores(config: TrainConfig) -> None:
    """On a CPU each process takes its part of the cores, unless the user has set a number of threads."""
    if config.machine.devices > 1 and config.machine.accelerator == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // config.machine.devices))


class Others(pl.Callback):
    """The processes that this one started; a context manager that ends them, as does an exception in training."""

    def __init__(self, count: int, port: int):
        self.count, self.port = count, port
        self.processes: list[subprocess.Popen] = []
        self.failed: str | None = None
        self.over = threading.Event()

    def __enter__(self) -> "Others":
        place = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.port), "NODE_RANK": "0",
                              "WORLD_SIZE": str(self.count + 1)}
        # They inherit the mask: only the first process handles signals, and then ends the others.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            for rank in range(1, self.count + 1):
                self.processes.append(subprocess.Popen(command_to_follow(sys.orig_argv[1:]), stdin=subprocess.PIPE,
                                                       env=place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, *_: Any) -> None:
        if error is None:
            for process in self.processes:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(ANSWER_TIMEOUT)
        self.end(error)
        if self.failed and isinstance(error, Exception):
            raise UserError(self.failed) from error

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.end(exception)

    def end(self, error: BaseException | None) -> None:
        """End them, after checking whether a failure of theirs made this process fail."""
        if self.over.is_set():
            return
        self.over.set()
        if isinstance(error, Exception) and not isinstance(error, UserError):
            until = time.monotonic() + 2 * PATIENCE
            while (failed := self._failed()) is None and time.monotonic() < until:
                time.sleep(0.1)
            self.failed = failed
        for process in self.processes:
            process.kill()
            process.communicate()  # closes its stdin, and waits for it

    def _failed(self) -> str | None:
        for rank, process in enumerate(self.processes, 1):
            if code := process.poll():
                how = f"exit code {code}" if code > 0 else signal.Signals(-code).name
                return f"process {rank} of the run ended with {how}; what was finished is saved, continue with --resume 1"
        return None

    def _watch(self) -> None:
        """On GPUs a process waits for messages even from one that has ended, so give up after a while."""
        while not self.over.wait(1.0):
            if (failed := self._failed()) is not None and not self.over.wait(ANSWER_TIMEOUT):
                say(f"error: {failed}")
                for process in self.processes:
                    process.kill()
                os._exit(2)


@contextmanager
def quiet() -> Iterator[None]:
    """Wraps the work of a process other than the first: Python prints nothing, except an error of this process's own.

    File descriptor 2 stays open, so C++ libraries still reach the terminal.
    """
    follow_starter()  # for scripts that have not called it at their start
    try:
        with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere), redirect_stdout(nowhere):
            yield
    except Exception:
        time.sleep(PATIENCE)
        raise
