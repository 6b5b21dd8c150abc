"""The event file of TensorBoard, read by TensorBoard."""

import os
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import src.training.loggers as loggers
from src.training.loggers import TensorBoardLogger, make_loggers


def test_each_number_is_there_at_once_with_its_step_and_time(tmp_path):
    folder = tmp_path / "run" / "tensorboard"
    logger = TensorBoardLogger(folder)
    begun = time.time()
    for step in (1, 2):
        logger.log_metrics({"loss": step / 4, "eval/margin": -1.5}, step=step)
        events = EventAccumulator(str(folder)).Reload()
        assert [(event.step, event.value) for event in events.Scalars("loss")] == [(n, n / 4) for n in range(1, step + 1)]
    assert {*events.Tags()["scalars"]} == {"loss", "eval/margin"} and events.Scalars("eval/margin")[1].value == -1.5
    assert begun - 1 <= events.Scalars("loss")[0].wall_time <= time.time() + 1
    assert events.file_version == 2.0
    logger.finalize("success")


def test_a_run_that_goes_on_has_a_second_file(tmp_path, monkeypatch):
    for step in (1, 2):
        monkeypatch.setattr(loggers.os, "getpid", lambda step=step: step)
        logger = TensorBoardLogger(tmp_path)
        logger.log_metrics({"loss": 0.5}, step=step)
        logger.finalize("success")
    assert len(list(tmp_path.iterdir())) == 2


def test_its_file_is_closed_at_the_end(tmp_path):
    def next_number() -> int:
        os.close(number := os.open(os.devnull, os.O_RDONLY))
        return number

    before = next_number()
    logger = TensorBoardLogger(tmp_path)
    assert next_number() != before
    logger.finalize("success")
    assert next_number() == before


@pytest.mark.parametrize("there", [False, True])
def test_it_is_in_the_run_s_folder_or_left_out_with_a_line(config, tmp_path, capsys, there):
    run = config(tensorboard=True)
    if there:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "tensorboard").touch()
    made = make_loggers(run)
    assert [logger.name for logger in made] == ([] if there else ["TensorBoard"])
    if there:
        assert capsys.readouterr().err == (f"TensorBoard: can't be used (File exists); the run continues without it, and its "
                                           f"numbers are in {run.run.proj_dir}\n")
    else:
        assert len(list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*"))) == 1
        made[0].finalize("success")
