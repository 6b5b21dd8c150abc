"""Where a run's numbers go beside its own files: wandb, online or offline, and TensorBoard.

wandb never stops a training: without network, or where the server refuses, the run is logged offline, and where wandb does not
work at all, the run continues without it. Each of these is reported by one line on stderr, which takes the place of wandb's own.
"""

import logging
import os
import re
import secrets
import shlex
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger

from src.console import say
from src.files import atomic_write, regular_file
from src.training.config import TrainConfig

# Holds the id of the run on wandb, which a resumed run continues.
WANDB_ID_FILE = "wandb-run-id"
# Seconds that the server has to accept the user's credentials, to start the run, and at its end to take what is not uploaded yet.
LOGIN_TIMEOUT, INIT_TIMEOUT, FINISH_TIMEOUT = 8.0, 20.0, 30.0
# Seconds of waiting after which a line says what for.
SLOW = 2.0


def make_loggers(config: TrainConfig) -> list[Logger]:
    """What `--wandb` and `--tensorboard` ask for; for the first process only, since the others log nothing."""
    found: list[Logger | None] = []
    if config.wandb:
        found.append(_wandb_logger(config))
    if config.tensorboard:
        from pytorch_lightning.loggers import TensorBoardLogger

        found.append(TensorBoardLogger(config.proj_dir, name="tensorboard", version="", default_hp_metric=False))
    return list(filter(None, found))


class WandbLogger(Logger):
    """Sends the numbers of each step to a wandb run that has started."""

    def __init__(self, run: Any, sync: str):
        super().__init__()
        self._run, self._sync = run, sync
        run.define_metric("trainer/global_step")
        run.define_metric("*", step_metric="trainer/global_step", step_sync=True)

    @property
    def name(self) -> str:
        return self._run.project

    @property
    def version(self) -> str:
        return self._run.id

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Nothing to do: the run was started with the configuration."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._guarded(lambda: self._run.log({**metrics, "trainer/global_step": step}), "the run continues without it")

    def finalize(self, status: str) -> None:
        with _said_if_slow("uploading the last numbers"):
            self._guarded(lambda: self._run.finish(exit_code=0 if status == "success" else 1),
                          f"upload what is missing later with: {self._sync}")
        self._run = None

    def _guarded(self, call: Callable[[], None], what_now: str) -> None:
        if self._run is None:
            return
        try:
            call()
        except Exception as error:  # of whatever kind, it must not end a training
            _say(f"failed ({_short(error)}); {what_now}")
            self._run = None


def _wandb_logger(config: TrainConfig) -> Logger | None:
    if os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on"):
        _say("off, since WANDB_DISABLED is set")
        return None
    import wandb

    # Carries wandb's own telemetry, whose failures it would report at the end of the run.
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
    try:
        try:
            mode = _set_up(wandb).mode
        except wandb.UsageError as error:  # a key with white space around it, which it refuses even offline
            if os.environ.pop("WANDB_API_KEY", None) is None:
                raise
            return _begin(wandb, config, _short(error))
        if mode == "disabled":
            _say("off, since its mode is set to disabled")
            return None
        return _begin(wandb, config, "its mode is set so" if mode in ("offline", "dryrun") else None)
    except Exception as error:  # an invalid setting, a folder that can't be written, its service, ...
        _say(f"can't be used ({_short(error)}); the run continues without it, and its numbers are in {config.proj_dir}")
        return None


def _set_up(wandb: Any) -> Any:
    """wandb's settings from the user's environment and files, read once a process, with its own lines off."""
    return wandb.setup(settings=wandb.Settings(silent=True)).settings


def _why_offline(wandb: Any) -> str | None:
    """Why the run can't be logged online; None where the server accepts the user's credentials."""
    started = time.monotonic()
    try:
        if not wandb.login(prompt=False, verify=False):
            return "nobody is logged in"
        started = time.monotonic()
        wandb.Api(timeout=LOGIN_TIMEOUT)  # asks the server whose credentials they are
    except wandb.Error as error:
        # The same error for a refusal, which has a reason and comes early, and for no answer.
        in_time = time.monotonic() - started < 0.9 * LOGIN_TIMEOUT
        return _short(error) if in_time else f"{_set_up(wandb).base_url} does not answer"
    return None


def _begin(wandb: Any, config: TrainConfig, why_offline: str | None) -> Logger:
    """Start the run, or continue it; offline with `why_offline`, else online where that works."""
    folder = Path(config.proj_dir)
    run_id = _set_up(wandb).run_id or _run_id(folder / WANDB_ID_FILE, config.resume)
    before = set(folder.glob("wandb/*"))

    def init(mode: str) -> Any:
        limits = {"init_timeout": INIT_TIMEOUT, "finish_timeout": FINISH_TIMEOUT, "finish_timeout_raises": True}
        entity, _, project = config.wandb.rpartition("/")
        return wandb.init(entity=entity or None, project=project, dir=str(folder), id=run_id, resume="allow", mode=mode,
                          config=asdict(config), settings=wandb.Settings(silent=True, **limits))

    run = None
    if why_offline is None:
        with _said_if_slow(f"waiting for {_set_up(wandb).base_url}"):
            why_offline = _why_offline(wandb)
            try:
                run = init("online") if why_offline is None else None
            except Exception as error:  # a project that is another's, a server that broke down meanwhile, ...
                why_offline = _short(error)
                wandb.teardown()  # or its service holds the id for the attempt that failed
                _set_up(wandb)
                for path in set(folder.glob(f"wandb/run-*-{run_id}*")) - before:
                    shutil.rmtree(path, ignore_errors=True)  # what was begun there holds nothing
    run = run or init("offline")
    sync = f"wandb sync {_pieces(Path(run.dir).parent, run_id)}"
    _say(run.url if why_offline is None else f"offline, since {why_offline}; upload the run later with: {sync}")
    return WandbLogger(run, sync)


def _pieces(piece: Path, run_id: str) -> str:
    """The folder of what this process logs, or with what was logged before a resume the pattern of all."""
    kind = piece.name.partition("run-")[0] + "run-"
    several = len(list(piece.parent.glob(f"{kind}*-{run_id}*"))) > 1
    return f"{shlex.quote(str(piece.parent))}/{kind}*-{run_id}*" if several else shlex.quote(str(piece))


def _run_id(path: Path, resume: bool) -> str:
    """The id in `path` where the run is resumed; else a new one, which is written there."""
    regular_file(path)  # or a pipe would be waited for
    if resume and path.exists():
        found = path.read_text(encoding="utf-8", errors="replace").strip()
        if re.fullmatch(r"[\w-]+", found):
            return found
        _say(f"{path} holds no run id, so this is another run on wandb")
    # Not of the generators that --seed sets, which would give the same id to every run.
    new = secrets.token_hex(8)
    with atomic_write(path, "w", encoding="utf-8") as file:
        file.write(new + "\n")
    return new


@contextmanager
def _said_if_slow(line: str) -> Iterator[None]:
    timer = threading.Timer(SLOW, _say, (line,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _say(line: str) -> None:
    say(f"wandb: {line}")


def _short(error: Exception) -> str:
    """An error's message on one line, without what pydantic adds for programmers."""
    text = " ".join(str(error).partition(" [type=")[0].split()) or type(error).__name__
    return text.rstrip(".") if len(text) <= 200 else text[:197] + "..."
