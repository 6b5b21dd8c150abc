"""What is written before the first step and after each epoch, called as the trainer does."""

import signal
from types import SimpleNamespace

import pytest
import torch

import src.training.watching as watching
from src.errors import NotFinite, Stopped, UserError
from src.training.watching import LinesByEpoch, ReportWriter, Samples
from tests.compiled import compiled
from tests.training.outside import lines


class Lines(LinesByEpoch):
    """Notes the steps of its lines; `wrong` is what is wrong with their numbers."""

    wrong = None

    def write(self, trainer, pl_module) -> str | None:
        if self.wrong is None:
            with self.path.open("a") as file:
                file.write(f"{trainer.global_step} ")
        return self.wrong


def trainer(step: int, first: bool = True, told=None, epoch: int = 0) -> SimpleNamespace:
    """At a step of a run; a process other than the first is told by that one."""
    strategy = SimpleNamespace(broadcast=lambda given: given if first else told)
    return SimpleNamespace(global_step=step, is_global_zero=first, strategy=strategy, loggers=[], current_epoch=epoch)


def test_a_line_before_the_first_step_and_after_each_epoch_over_a_resume(tmp_path):
    one = Lines(tmp_path / "lines")
    one.on_train_start(trainer(0), None)
    one.on_train_epoch_end(trainer(4), None)
    resumed = Lines(tmp_path / "lines")
    resumed.load_state_dict(one.state_dict())
    resumed.on_train_start(trainer(4), None)
    resumed.on_train_epoch_end(trainer(8), None)
    assert (tmp_path / "lines").read_text().split() == ["0", "4", "8"] and resumed.steps == [0, 4, 8] and one.steps == [0, 4]


def test_numbers_that_are_not_finite_end_the_run_in_every_process(tmp_path):
    one = Lines(tmp_path / "lines")
    one.wrong = "the loss is not finite"
    for process in (trainer(4), trainer(4, first=False, told="the loss is not finite")):
        with pytest.raises(NotFinite, match="^step 4: the loss is not finite$"):
            one.on_train_epoch_end(process, None)
    assert one.steps == []


def test_only_the_first_process_writes(tmp_path):
    one = Lines(tmp_path / "lines")
    one.on_train_start(trainer(0, first=False), None)
    one.on_train_epoch_end(trainer(4, first=False), None)
    assert one.steps == [0, 4] and not (tmp_path / "lines").exists()


def answers_by(model, tokenizer, tokens, most, ending):
    """In place of the sampler."""
    return [(f"{model(torch.ones(2))[0]:g}", True)]


@compiled
def test_samples_of_a_compiled_model_are_not_compiled_for(tmp_path):
    """A model whose blocks are compiled, as by --compile 1, for which each new length might be a minute."""
    compilations = []

    def backend(graph, example):
        compilations.append(graph)
        return graph

    model = torch.compile(lambda x: x + 1, backend=backend)
    module = SimpleNamespace(model=model, config=SimpleNamespace(steps=SimpleNamespace(compile=True)))
    samples = Samples(tmp_path, (None, [[1]], [{"prompt": "?", "chosen": "!"}], None), answers_by, 5)
    samples.on_train_epoch_end(trainer(4), module)
    assert not compilations
    assert lines(tmp_path / "samples.jsonl") == [
        {"step": 4, "samples": [{"prompt": "?", "chosen": "!", "answer": "2", "complete": True}]}]
    assert model(torch.ones(2))[0] == 2 and compilations  # for training it is


@pytest.fixture
def report(tmp_path, monkeypatch):
    """`report(hook, *given)`: whether that hook of a run of three epochs, which has metrics, writes the report."""
    (tmp_path / "metrics.jsonl").touch()
    monkeypatch.setattr(watching, "write_report", lambda folder: (folder / "report.html").touch())
    module = SimpleNamespace(config=SimpleNamespace(steps=SimpleNamespace(epoch_count=3)))

    def report(hook: str, trainer: SimpleNamespace, *given) -> bool:
        (tmp_path / "report.html").unlink(missing_ok=True)
        getattr(ReportWriter(tmp_path), hook)(trainer, module, *given)
        return (tmp_path / "report.html").exists()

    return report


def test_a_report_after_each_epoch_but_the_last_which_has_its_own(report):
    assert [report("on_train_epoch_end", trainer(4, epoch=epoch)) for epoch in range(3)] == [True, True, False]
    assert not report("on_train_epoch_end", trainer(4, first=False))


@pytest.mark.parametrize(("error", "written"), [
    (Stopped(signal.SIGTERM), True), (KeyboardInterrupt(), True), (UserError("diverged"), False), (MemoryError(), False)])
def test_a_report_where_a_signal_ends_the_run(report, tmp_path, error, written):
    assert report("on_exception", trainer(4), error) == written
    assert not report("on_exception", trainer(4, first=False), error)
    (tmp_path / "metrics.jsonl").unlink()  # no step was done
    assert not report("on_exception", trainer(0), error)


def test_a_report_that_can_not_be_written_ends_no_run(report, monkeypatch, capsys):
    def full(_) -> None:
        raise UserError("report.html: cannot be written")

    monkeypatch.setattr(watching, "write_report", full)
    report("on_train_epoch_end", trainer(4))
    assert capsys.readouterr().err == "warning: report.html: cannot be written\n"
