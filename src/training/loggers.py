"""Where a run's numbers go besides its own files: wandb, online or offline, and TensorBoard.

Neither ever stops a run. Without network, or if the server refuses, wandb logs offline; if one of the two does not work at all,
the run continues without it. Each of these is reported in one line on stderr, in place of the package's own messages.
"""

import io
import logging
import os
import re
import secrets
import shlex
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger

from src.console import say, short
from src.files import atomic_write, regular_file, write_all
from src.settings import flat
from src.training.config import TrainConfig

# Holds the id of the run on wandb, which a resumed run continues.
WANDB_ID_FILE = "wandb-run-id"
# Seconds that the server has to accept the user's credentials, to start the run, and to take the remaining uploads at its end.
LOGIN_TIMEOUT, INIT_TIMEOUT, FINISH_TIMEOUT = 8.0, 20.0, 30.0
# Seconds of waiting after which a line says what it waits for.
SLOW = 2.0


def make_loggers(config: TrainConfig) -> list[Logger]:
    """The loggers of `--wandb` and `--tensorboard`; for the first process only, since the others log nothing."""
    wanted = [(config.run.wandb, _wandb_logger), (config.run.tensorboard, _tensorboard_logger)]
    return [logger for asked, make in wanted if asked and (logger := make(config)) is not None]


class GuardedLogger(Logger):
    """A logger whose first failure is one line on stderr; after that it logs nothing."""

    def __init__(self, label: str):
        super().__init__()
        self._label, self._works = label, True

    @property
    def name(self) -> str:
        return self._label

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Nothing to do: they are in the run's config.json, and wandb's run was started with them."""

    def guarded(self, call: Callable[[], Any], what_now: str) -> None:
        if not self._works:
            return
        try:
            call()
        except Exception as error:  # no failure to log may end a run
            say(f"{self._label}: failed ({_short(error)}); {what_now}")
            self._works = False


class WandbLogger(GuardedLogger):
    """Sends the numbers of each step to a wandb run that has started."""

    def __init__(self, run: Any, sync: str):
        super().__init__("wandb")
        self._run, self._sync = run, sync
        run.define_metric("trainer/global_step")
        run.define_metric("*", step_metric="trainer/global_step", step_sync=True)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.guarded(lambda: self._run.log({**metrics, "trainer/global_step": step}), "the run continues without it")

    def finalize(self, status: str) -> None:
        with _said_if_slow("uploading the last numbers"):
            self.guarded(lambda: self._run.finish(exit_code=0 if status == "success" else 1),
                         f"upload what is missing later with: {self._sync}")
        self._works = False


class TensorBoardLogger(GuardedLogger):
    """Appends the numbers of each step to an event file, each record whole and at once.

    torch's SummaryWriter writes from a thread, whose failure is a traceback of its own and comes steps later.
    """

    def __init__(self, folder: Path):
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        super().__init__("TensorBoard")
        self._Event, self._Summary, self._RecordWriter = Event, Summary, RecordWriter
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard finds files by this form of name, and sorts a run's files by it.
        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("ab")
        self._append(file_version="brain.Event:2")

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        values = [self._Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self.guarded(lambda: self._append(step=step, summary=self._Summary(value=values)), "the run continues without it")

    def finalize(self, status: str) -> None:
        self._file.close()

    def _append(self, **event: Any) -> None:
        record = io.BytesIO()
        self._RecordWriter(record).write(self._Event(wall_time=time.time(), **event).SerializeToString())
        write_all(self._file.fileno(), record.getvalue())


def _tensorboard_logger(config: TrainConfig) -> Logger | None:
    try:
        return TensorBoardLogger(Path(config.run.proj_dir, "tensorboard"))
    except Exception as error:  # its folder can't be written, another version has other modules, ...
        _not_used("TensorBoard", error, config)
        return None


def _not_used(label: str, error: Exception, config: TrainConfig) -> None:
    say(f"{label}: can't be used ({_short(error)}); the run continues without it, and its numbers are in {config.run.proj_dir}")


def _wandb_logger(config: TrainConfig) -> Logger | None:
    if os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on"):
        _say("off, since WANDB_DISABLED is set")
        return None
    import wandb

    # wandb's telemetry would report its failures at the end of the run.
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
    try:
        try:
            mode = _set_up(wandb).mode
        except wandb.errors.UsageError as error:  # a key with white space around it, refused even offline
            if os.environ.pop("WANDB_API_KEY", None) is None:
                raise
            return _begin(wandb, config, _short(error))
        if mode == "disabled":
            _say("off, since its mode is set to disabled")
            return None
        return _begin(wandb, config, "its mode is set to offline" if mode in ("offline", "dryrun") else None)
    except Exception as error:  # an invalid setting, a folder that can't be written, its service, ...
        _not_used("wandb", error, config)
        return None


def _set_up(wandb: Any) -> Any:
    """wandb's settings from the user's environment and files, read once a process, with its own messages off."""
    return wandb.setup(settings=wandb.Settings(silent=True)).settings


def _why_offline(wandb: Any) -> str | None:
    """Why the run can't be logged online; None where the server accepts the user's credentials."""
    started = time.monotonic()
    try:
        if not wandb.login(prompt=False, verify=False):
            return "nobody is logged in"
        started = time.monotonic()
        wandb.Api(timeout=LOGIN_TIMEOUT)  # queries the server for the owner of the credentials
    except wandb.Error as error:
        # The same error comes for a refusal, early and with a reason, and for no answer.
        in_time = time.monotonic() - started < 0.9 * LOGIN_TIMEOUT
        return _short(error) if in_time else f"{_set_up(wandb).base_url} does not answer"
    return None


def _begin(wandb: Any, config: TrainConfig, why_offline: str | None) -> Logger:
    """Start the run, or continue it: offline if `why_offline` is given, else online where that works."""
    folder = Path(config.run.proj_dir)
    run_id = _set_up(wandb).run_id or _run_id(folder / WANDB_ID_FILE, config.run.resume)
    before = set(folder.glob("wandb/*"))

    def init(mode: str) -> Any:
        limits = {"init_timeout": INIT_TIMEOUT, "finish_timeout": FINISH_TIMEOUT, "finish_timeout_raises": True}
        entity, _, project = config.run.wandb.rpartition("/")
        return wandb.init(entity=entity or None, project=project, dir=str(folder), id=run_id, resume="allow", mode=mode,
                          config=flat(config), settings=wandb.Settings(silent=True, **limits))

    run = None
    if why_offline is None:
        with _said_if_slow(f"waiting for {_set_up(wandb).base_url}"):
            why_offline = _why_offline(wandb)
            try:
                run = init("online") if why_offline is None else None
            except Exception as error:  # somebody else's project, a server that has broken down since, ...
                why_offline = _short(error)
                wandb.teardown()  # or its service keeps the id for the failed attempt
                _set_up(wandb)
                for path in set(folder.glob(f"wandb/run-*-{run_id}*")) - before:
                    shutil.rmtree(path, ignore_errors=True)  # the failed attempt left it empty
    run = run or init("offline")
    sync = f"wandb sync {_pieces(Path(run.dir).parent, run_id)}"
    _say(run.url if why_offline is None else f"offline, since {why_offline}; upload the run later with: {sync}")
    return WandbLogger(run, sync)


def _pieces(piece: Path, run_id: str) -> str:
    """The folder that this process logs to, or a pattern for all of them if the run was resumed."""
    kind = piece.name.partition("run-")[0] + "run-"
    several = len(list(piece.parent.glob(f"{kind}*-{run_id}*"))) > 1
    return f"{shlex.quote(str(piece.parent))}/{kind}*-{run_id}*" if several else shlex.quote(str(piece))


def _run_id(path: Path, resume: bool) -> str:
    """The id in `path` if the run is resumed; else a new one, which is written there."""
    regular_file(path)  # opening a pipe would block
    if resume and path.exists():
        found = path.read_text(encoding="utf-8", errors="replace").strip()
        if re.fullmatch(r"[\w-]+", found):
            return found
        _say(f"{path} holds no run id, so this is another run on wandb")
    # The generators that --seed sets would give every run the same id.
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
    """An error's message on one line, without the additions of pydantic and errno that are for programmers."""
    message = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return short(" ".join(message.partition(" [type=")[0].split()).rstrip(".") or type(error).__name__, 200)
