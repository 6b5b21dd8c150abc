"""wandb and TensorBoard: one line about what becomes of them, and never the end of a training; wandb: one id for a run and what
continues it."""

import errno
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import src.training.loggers as loggers
from src.errors import UserError
from src.training.loggers import make_loggers
from src.training.run import train
from tests.settings import changed

KEY = "0123456789" * 4  # of the form that wandb takes


@pytest.fixture(autouse=True)
def stranger(monkeypatch, tmp_path):
    """Nobody is logged in, and wandb, which reads its surroundings once a process, reads them in this test."""
    for name in ("API_KEY", "MODE", "DISABLED", "BASE_URL", "RUN_ID", "PROJECT", "IDENTITY_TOKEN_FILE", "SILENT"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setattr(loggers, "SLOW", 600.0)  # or a loaded machine would decide which lines there are
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.fixture
def logged(config, capfd):
    """`logged(**changes)` -> what stderr said of a logger that began and ended, and the folders it left."""

    def logged(**changes) -> tuple[str, list[str]]:
        run = config(wandb="a project", **changes)
        capfd.readouterr()
        for logger in make_loggers(run):
            logger.log_metrics({"loss": 1.0}, step=1)
            logger.finalize("success")
        return capfd.readouterr().err, sorted(path.name for path in Path(run.run.proj_dir).glob("wandb/*run-*-*"))

    return logged


def offline(said: str, folders: list[str], why: str, folder: Path) -> None:
    """One line, which says why and names the one folder that is there."""
    assert len(folders) == 1 and folders[0].startswith("offline-run-")
    assert said == f"wandb: offline, since {why}; upload the run later with: wandb sync {folder / folders[0]}\n"


def test_with_no_account_a_run_is_logged_offline(config, logged):
    offline(*logged(), "nobody is logged in", Path(config().run.proj_dir, "wandb"))


def test_the_run_that_goes_on_has_its_id_and_a_new_one_another(config, logged):
    logged()
    said, both = logged(resume=True)
    (run_id,) = {name.split("-")[3] for name in both}
    assert len(both) == 2 and f"wandb sync {config().run.proj_dir}/wandb/offline-run-*-{run_id}*\n" in said
    _, folders = logged()  # begun anew, as where the first was broken off before its first step
    assert len({name.split("-")[3] for name in folders}) == 2
    said, elsewhere = logged(resume=True, proj_dir=config().run.proj_dir + "2")
    assert run_id not in elsewhere[0] and "id" not in said  # there was no run there to go on with


def test_a_damaged_id_is_told_and_replaced(config, logged):
    logged()
    Path(config().run.proj_dir, "wandb-run-id").write_text("../x\n")
    said, both = logged(resume=True)
    assert "wandb-run-id holds no run id" in said.splitlines()[0] and len(said.splitlines()) == 2
    assert len({name.split("-")[3] for name in both}) == 2
    _, all_ = logged(resume=True)
    assert len({name.split("-")[3] for name in all_}) == 2


def test_an_id_that_is_a_pipe_is_not_waited_for(config, capfd):
    Path(config().run.proj_dir).mkdir()
    os.mkfifo(Path(config().run.proj_dir, "wandb-run-id"))
    for resume in (False, True):
        assert make_loggers(config(wandb="a project", resume=resume)) == []
        assert "wandb-run-id: cannot be written, since a pipe has this name" in capfd.readouterr().err


def test_without_a_network_it_takes_seconds(config, logged, monkeypatch):
    monkeypatch.setattr(loggers, "LOGIN_TIMEOUT", 1.0)
    monkeypatch.setattr(loggers, "SLOW", 0.0)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # where nothing listens
    started = time.monotonic()
    said, folders = logged()
    assert time.monotonic() - started < 60  # a loaded machine's; by itself wandb takes two minutes
    waiting, line, *rest = said.splitlines(keepends=True)
    assert waiting == "wandb: waiting for http://127.0.0.1:9\n" and rest in ([], ["wandb: uploading the last numbers\n"])
    offline(line, folders, "http://127.0.0.1:9 does not answer", Path(config().run.proj_dir, "wandb"))


def test_a_server_that_refuses_is_told_with_its_reason(config, logged, monkeypatch):
    class Refuses(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            body = b'{"errors": [{"message": "user is not logged in"}]}'
            self.send_response(401)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    monkeypatch.setattr(loggers, "LOGIN_TIMEOUT", 60.0)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuses)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", url)
    try:
        said, folders = logged()
    finally:
        server.shutdown()
    offline(said, folders, f"Failed to verify credentials with {url}: user is not logged in",
            Path(config().run.proj_dir, "wandb"))


@pytest.mark.parametrize(("key", "why"), [
    ("short", "WANDB_API_KEY invalid: API key must have 40+ characters, has 5"),
    (KEY + " ", "API key cannot start or end with whitespace"),
])
def test_a_key_of_the_wrong_form(config, logged, monkeypatch, key, why):
    monkeypatch.setenv("WANDB_API_KEY", key)
    offline(*logged(), why, Path(config().run.proj_dir, "wandb"))


def test_a_run_that_the_server_will_not_have_is_logged_offline_under_its_id(config, logged, monkeypatch):
    monkeypatch.setattr(loggers, "_why_offline", lambda _: None)  # as if the key were good
    monkeypatch.setattr(loggers, "INIT_TIMEOUT", 1.0)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    said, folders = logged()
    assert len(folders) == 1 and folders[0].startswith("offline-run-") and said.count("\n") == 1
    assert folders[0].endswith(Path(config().run.proj_dir, "wandb-run-id").read_text().strip())


@pytest.mark.parametrize(("name", "value", "said"), [
    ("WANDB_MODE", "disabled", "off, since its mode is set to disabled"),
    ("WANDB_DISABLED", "true", "off, since WANDB_DISABLED is set"),
])
def test_who_wants_none_gets_none(logged, monkeypatch, name, value, said):
    monkeypatch.setenv(name, value)
    assert logged() == (f"wandb: {said}\n", [])


def test_who_wants_it_offline_with_a_key_gets_it_offline(config, logged, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", "offline")
    offline(*logged(), "its mode is set to offline", Path(config().run.proj_dir, "wandb"))


@pytest.mark.parametrize(("asked", "folder", "label"), [({"wandb": "a project"}, "wandb", "wandb: "),
                                                         ({"tensorboard": True}, "tensorboard", "TensorBoard: ")])
def test_where_it_cannot_write_the_run_continues_without_it(config, capfd, asked, folder, label):
    run = config(epoch_count=1, epoch_steps=1, **asked)
    Path(run.run.proj_dir).mkdir()
    Path(run.run.proj_dir, folder).touch()
    train(run, {})
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith(label)]
    assert len(said) == 1 and "can't be used" in said[0] and "the run continues without it" in said[0]
    assert Path(run.run.proj_dir, "rwkv-final.safetensors").exists()


def test_tensorboard_on_a_disk_that_fills_up_is_one_line(config, capfd, monkeypatch):
    """A step's numbers are written at once, by this process's own thread, so that a failure is caught where it happens."""
    write_all, written = loggers.write_all, []

    def full(descriptor, data):
        written.append(data)
        if len(written) > 2:  # the file's head, and the first step
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_all(descriptor, data)

    monkeypatch.setattr(loggers, "write_all", full)
    run = config(epoch_count=1, epoch_steps=4, tensorboard=True)
    train(run, {})
    said = [line for line in capfd.readouterr().err.splitlines() if "TensorBoard" in line]
    assert said == ["TensorBoard: failed (No space left on device); the run continues without it"]
    assert len(written) == 3 and Path(run.run.proj_dir, "rwkv-final.safetensors").exists()
    events = EventAccumulator(str(Path(run.run.proj_dir, "tensorboard"))).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1]


def test_a_run_of_the_trainer_ends_its_own_and_only_it(config, monkeypatch):
    """A second run in the same process is a run of its own, and one that diverged is marked as failed."""
    codes = []
    finish = wandb.Run.finish
    monkeypatch.setattr(wandb.Run, "finish", lambda run, exit_code: codes.append(exit_code) or finish(run, exit_code=exit_code))
    run = config(epoch_count=1, epoch_steps=1, wandb="a project")
    train(run, {})
    with pytest.raises(UserError, match="diverged"):
        train(changed(run, proj_dir=run.run.proj_dir + "2", lr_init=1e38, lr_final=1e38, warmup_steps=0), {})
    assert codes == [0, 1] and wandb.run is None
    first, second = (next(Path(run.run.proj_dir + which).glob("wandb/offline-run-*")).name for which in ("", "2"))
    assert first.split("-")[3] != second.split("-")[3]
