"""What is asked of wandb, and what is said, with a stand-in for its package; test_loggers.py has the package itself."""

import logging
import random
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import src.training.loggers as loggers
from src.settings import flat
from src.training.loggers import WandbLogger, make_loggers

HUNG = 30.0  # seconds after which what takes a moment will not happen any more, however busy the machine
URL = "https://wandb.example"


class Error(Exception):
    """wandb's own."""


class UsageError(Error):
    """wandb's, for settings that it can't use."""


class Run:
    """What `wandb.init` gives; keeps what it is given."""

    def __init__(self, folder: Path, url: str):
        folder.mkdir(parents=True)
        self.dir, self.url = str(folder / "files"), url
        self.axes, self.logged, self.exit_code = {}, [], None

    def define_metric(self, name: str, step_metric: str | None = None, step_sync: bool | None = None) -> None:
        self.axes[name] = (step_metric, step_sync)

    def log(self, values: dict) -> None:
        self.logged.append(values)

    def finish(self, exit_code: int | None = None) -> None:
        assert self.exit_code is None
        self.exit_code = exit_code


class Wandb:
    """The package, where a user is logged in and the server answers at once; as chatty as the original."""

    errors = SimpleNamespace(UsageError=UsageError, Error=Error)
    Error = Error

    def __init__(self, clock: SimpleNamespace):
        self.clock, self.mode, self.run_id, self.logged_in, self.wrong_key = clock, "online", None, True, None
        self.login_takes = self.answer_takes = 0.0
        self.refuses = self.refuses_run = None  # errors of the server
        self.runs, self.begun, self.pieces = [], [], 0

    def Settings(self, **values) -> dict:
        return values

    def setup(self, settings: dict | None = None) -> SimpleNamespace:
        self._chat(settings)
        if self.wrong_key and "WANDB_API_KEY" in loggers.os.environ:
            raise UsageError(self.wrong_key)
        return SimpleNamespace(settings=SimpleNamespace(mode=self.mode, run_id=self.run_id, base_url=URL))

    def login(self, verify: bool = True, prompt: bool = True) -> bool:
        assert not prompt, "would wait for somebody at the keyboard"
        assert not verify, "would wait for the server as long as it likes"
        self.clock.now += self.login_takes
        return self.logged_in

    def Api(self, timeout: float = 60.0) -> None:
        self.clock.now += min(self.answer_takes, timeout)
        if self.refuses or self.answer_takes > timeout:
            raise Error(self.refuses or "failed to verify credentials")

    def init(self, mode: str, dir: str, id: str, settings: dict | None = None, **more) -> Run:
        self._chat(settings)
        self.pieces += 1
        kind = {"online": "run", "offline": "offline-run"}[mode]
        run = Run(Path(dir, "wandb", f"{kind}-2026010{self.pieces}-{id}"), f"{URL}/{id}")
        self.begun.append({"mode": mode, "dir": dir, "id": id, "settings": settings} | more)
        if mode == "online" and self.refuses_run:
            raise self.refuses_run
        self.runs.append(run)
        return run

    def teardown(self) -> None:
        self.begun.append("teardown")

    @staticmethod
    def _chat(settings: dict | None) -> None:
        if not (settings or {}).get("silent"):
            print("wandb: a lot of advice", file=sys.stderr)


@pytest.fixture
def wandb(monkeypatch):
    """The stand-in, imported in place of the package; nothing of the environment is about wandb."""
    for name in [name for name in loggers.os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(loggers, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setitem(sys.modules, "wandb", wandb := Wandb(clock))
    level = logging.getLogger("opentelemetry").level
    yield wandb
    logging.getLogger("opentelemetry").setLevel(level)


@pytest.fixture
def begun(wandb, config, capsys):
    """`begun(**changes)`: the one logger of --wandb, or None, and what was said."""
    def begin(**changes) -> tuple[WandbLogger | None, str]:
        made = make_loggers(config(**{"wandb": "a project"} | changes))
        assert len(made) <= 1
        return (made[0] if made else None), capsys.readouterr().err

    return begin


def test_nobody_who_has_not_asked_gets_a_logger(wandb, config):
    assert make_loggers(config()) == [] and not wandb.begun and not Path(config().run.proj_dir).exists()


@pytest.mark.parametrize(("flag", "entity", "project"), [
    ("a project", None, "a project"), ("somebody/a project", "somebody", "a project")])
def test_what_a_run_online_is_begun_with(wandb, begun, config, flag, entity, project):
    logger, said = begun(wandb=flag)
    run_id = Path(config().run.proj_dir, "wandb-run-id").read_text().rstrip("\n")
    assert said == f"wandb: {URL}/{run_id}\n"
    settings = {"silent": True, "init_timeout": loggers.INIT_TIMEOUT, "finish_timeout": loggers.FINISH_TIMEOUT,
                "finish_timeout_raises": True}
    assert wandb.begun == [{"mode": "online", "entity": entity, "project": project, "dir": config().run.proj_dir, "id": run_id,
                            "resume": "allow", "config": flat(config(wandb=flag)), "settings": settings}]
    assert logger.name == "wandb"


def test_numbers_have_the_optimizer_s_step_as_their_axis(wandb, begun):
    """Under the name that Lightning's own logger gives it, so that runs compare."""
    logger, _ = begun()
    logger.log_metrics({"loss": 0.5, "lr": 1e-3}, step=3)
    run, = wandb.runs
    assert run.axes == {"trainer/global_step": (None, None), "*": ("trainer/global_step", True)}
    assert run.logged == [{"loss": 0.5, "lr": 1e-3, "trainer/global_step": 3}]


@pytest.mark.parametrize(("status", "code"), [("success", 0), ("failed", 1)])
def test_its_end_is_told_and_it_logs_nothing_afterwards(wandb, begun, capsys, status, code):
    logger, _ = begun()
    logger.finalize(status)
    logger.log_metrics({"loss": 0.5}, step=4)
    logger.finalize(status)
    assert wandb.runs[0].exit_code == code and wandb.runs[0].logged == [] and capsys.readouterr().err == ""


def test_a_failure_is_told_once_and_ends_the_logging(wandb, begun, monkeypatch, capsys):
    logger, _ = begun()
    calls = []

    def fails(values: dict) -> None:
        calls.append(values)
        raise Error("the service\nis gone.")

    wandb.runs[0].log = fails
    for step in (1, 2):
        logger.log_metrics({"loss": 0.5}, step=step)
    assert capsys.readouterr().err == "wandb: failed (the service is gone); the run continues without it\n" and len(calls) == 1


def test_uploads_that_fail_at_the_end_can_be_made_later(wandb, begun, capsys):
    logger, _ = begun()
    wandb.runs[0].finish = lambda exit_code: (_ for _ in ()).throw(TimeoutError())
    logger.finalize("success")
    folder = Path(wandb.runs[0].dir).parent
    assert capsys.readouterr().err == (f"wandb: failed (TimeoutError); upload what is missing later with: wandb sync {folder}\n")


@pytest.fixture
def said(monkeypatch):
    """All that is said of a wait of 10 ms; `said.wait()` waits until there is something."""
    class Said(list):
        def wait(self, *_, **__) -> None:
            end = time.monotonic() + HUNG
            while not self and time.monotonic() < end:
                time.sleep(0.001)

    monkeypatch.setattr(loggers, "SLOW", 0.01)
    monkeypatch.setattr(loggers, "say", (said := Said()).append)
    return said


def test_a_long_upload_is_told(wandb, begun, said):
    logger, _ = begun()
    said.clear()
    wandb.runs[0].finish = said.wait
    logger.finalize("success")
    assert said == ["wandb: uploading the last numbers"]


def test_a_long_wait_for_the_server_is_told(wandb, begun, said, monkeypatch):
    monkeypatch.setattr(wandb, "Api", said.wait)
    begun()
    assert said[0] == f"wandb: waiting for {URL}" and len(said) == 2


def test_a_short_wait_is_not(wandb, begun, monkeypatch):
    monkeypatch.setattr(loggers, "SLOW", 2 * HUNG)
    logger, _ = begun()
    logger.finalize("success")
    waiting = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    for thread in waiting:
        thread.join(HUNG)
    assert not [thread for thread in waiting if thread.is_alive()]


# Offline


def offline(wandb, said: str, why: str) -> None:
    """One run, whose folder is named to be uploaded later."""
    assert wandb.begun[-1]["mode"] == "offline" and len(wandb.runs) == 1
    assert said == f"wandb: offline, since {why}; upload the run later with: wandb sync {Path(wandb.runs[0].dir).parent}\n"


def test_where_nobody_is_logged_in(wandb, begun):
    wandb.logged_in = False
    offline(wandb, begun()[1], "nobody is logged in")


@pytest.mark.parametrize(("login_takes", "answer_takes", "why"), [
    (0.0, 1.0, "no such user"), (100.0, 1.0, "no such user"), (0.0, 100.0, f"{URL} does not answer")])
def test_a_refusal_is_told_apart_from_no_answer(wandb, begun, login_takes, answer_takes, why):
    """The same error comes for both; a server has `LOGIN_TIMEOUT` seconds to answer, however long a login takes."""
    wandb.login_takes, wandb.answer_takes, wandb.refuses = login_takes, answer_takes, "no such user."
    offline(wandb, begun()[1], why)
    assert wandb.clock.now == 1000 + login_takes + min(answer_takes, loggers.LOGIN_TIMEOUT)


@pytest.mark.parametrize("mode", ["offline", "dryrun"])
def test_who_wants_it_offline(wandb, begun, mode):
    wandb.mode = mode
    offline(wandb, begun()[1], "its mode is set to offline")


def test_a_run_that_the_server_refuses_begins_offline_and_leaves_nothing_of_the_attempt(wandb, begun, config):
    folder = Path(config().run.proj_dir, "wandb")
    run_id = "1a2b"
    (folder / f"run-20251231-{run_id}").mkdir(parents=True)  # of the run that is resumed
    Path(config().run.proj_dir, "wandb-run-id").write_text(f"{run_id}\n")
    wandb.refuses_run = Error("403: somebody else's project")
    _, said = begun(resume=True)
    offline(wandb, said, "403: somebody else's project")
    assert [step if step == "teardown" else step["mode"] for step in wandb.begun] == ["online", "teardown", "offline"]
    assert {step["id"] for step in wandb.begun if step != "teardown"} == {run_id}
    assert sorted(path.name for path in folder.iterdir()) == [f"offline-run-20260102-{run_id}", f"run-20251231-{run_id}"]


def test_what_an_attempt_left_may_be_gone_already(wandb, begun, monkeypatch):
    wandb.refuses_run = Error("403")
    monkeypatch.setattr(loggers.os, "rmdir", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError(2, "gone")))
    offline(wandb, begun()[1], "403")


def test_all_pieces_of_a_resumed_run_are_named_for_the_upload(wandb, begun, config, tmp_path):
    wandb.mode, folder = "offline", tmp_path / "my run"
    folder.mkdir()
    (folder / "wandb-run-id").write_text("run-7\n")  # has a part of a folder's name
    one, two, three = (begun(proj_dir=str(folder), resume=True)[1] for _ in range(3))
    assert one.endswith(f" wandb sync '{folder}/wandb/offline-run-20260101-run-7'\n")
    assert two == three and two.endswith(f" wandb sync '{folder}/wandb'/offline-run-*-run-7*\n")


# None


@pytest.mark.parametrize("value", ["1", "true", "True", "yes", "on"])
def test_who_has_disabled_it_gets_none(wandb, begun, monkeypatch, value):
    monkeypatch.setenv("WANDB_DISABLED", value)
    assert begun() == (None, "wandb: off, since WANDB_DISABLED is set\n") and not wandb.begun


@pytest.mark.parametrize("value", ["", "0", "false"])
def test_who_has_not_gets_one(wandb, begun, monkeypatch, value):
    monkeypatch.setenv("WANDB_DISABLED", value)
    assert begun()[0] is not None


def test_whose_mode_is_disabled_gets_none(wandb, begun):
    wandb.mode = "disabled"
    assert begun() == (None, "wandb: off, since its mode is set to disabled\n") and not wandb.begun


def test_a_key_that_wandb_can_not_use_is_no_key(wandb, begun, monkeypatch):
    """wandb refuses it even offline."""
    monkeypatch.setenv("WANDB_API_KEY", " key")
    wandb.wrong_key = "a key can't begin with a space."
    offline(wandb, begun()[1], "a key can't begin with a space")
    assert "WANDB_API_KEY" not in loggers.os.environ


@pytest.mark.parametrize("error", [UsageError("a setting is wrong"), OSError(13, "Permission denied"), RuntimeError()])
def test_what_does_not_work_at_all_is_told_in_a_line_and_left_out(wandb, begun, config, monkeypatch, error):
    monkeypatch.setattr(wandb, "setup", lambda settings: (_ for _ in ()).throw(error))
    why = {UsageError: "a setting is wrong", RuntimeError: "RuntimeError"}.get(type(error), "Permission denied")
    assert begun() == (None, f"wandb: can't be used ({why}); the run continues without it, and its numbers are in "
                             f"{config().run.proj_dir}\n")


def test_its_telemetry_tells_of_no_failure(wandb, begun, capsys):
    begun()
    logging.getLogger("opentelemetry.exporter").error("can't reach the server")
    assert capsys.readouterr().err == ""


# The run's id


@pytest.fixture
def ids(wandb, begun, config):
    """`ids(**changes)`: the id of a run begun with them, and what was said of ids."""
    def begin(**changes) -> tuple[str, str]:
        _, said = begun(**changes)
        return wandb.begun[-1]["id"], "".join(line for line in said.splitlines() if "run id" in line)

    return begin


def test_a_resumed_run_is_the_same_run_and_any_other_is_another(ids, config):
    random.seed(0)
    first, _ = ids()
    assert ids(resume=True) == (first, "")
    random.seed(0)  # as every run of one --seed does
    second, said = ids()
    assert second != first and said == "" and ids(resume=True) == (second, "")
    assert Path(config().run.proj_dir, "wandb-run-id").read_text() == second + "\n"


def test_an_id_of_the_user_s_own_is_used(wandb, ids, config):
    wandb.run_id = "mine"
    assert ids() == ("mine", "") and not Path(config().run.proj_dir, "wandb-run-id").exists()


@pytest.mark.parametrize("content", [b"", b"../x\n", b"two words\n", b"\xff\xfe\n"])
def test_a_damaged_id_is_told_and_replaced(ids, config, content):
    path = Path(config().run.proj_dir, "wandb-run-id")
    path.parent.mkdir()
    path.write_bytes(content)
    found, said = ids(resume=True)
    assert said.startswith(f"wandb: {path} holds no run id") and path.read_text() == found + "\n"
    assert ids(resume=True) == (found, "")


@pytest.mark.parametrize(("error", "told"), [
    (OSError(28, "No space left on device", "a/file"), "No space left on device"),
    (OSError("of another kind."), "of another kind"),
    (ValueError("1 validation error\n  project: too long [type=value_error, input='x']"), "1 validation error project: too long"),
    (RuntimeError(), "RuntimeError"), (ValueError("x" * 300), "x" * 197 + "..."),
])
def test_errors_are_told_in_a_line_without_what_is_for_programmers(error, told):
    assert loggers._short(error) == told
