"""A step's line in metrics.jsonl by hand: two processes that see the same, a clock that the test sets, gradients of norm 5."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from pytorch_lightning.strategies import DeepSpeedStrategy

from src.errors import NotFinite
from src.training.metrics import StepMetrics, not_finite_numbers, peak_memory
from tests.training.outside import lines

PREFERENCES = ("dpo_loss", "sft_loss", "reward_chosen", "reward_rejected")


class Run:
    """A run as the callback sees it, in the first of two processes."""

    def __init__(self, folder, monkeypatch, strategy=None):
        self.now, self.sent = 100.0, []
        monkeypatch.setattr("src.training.metrics.time", SimpleNamespace(monotonic=lambda: self.now))
        both = SimpleNamespace(reduce=lambda x, reduce_op: x * {"sum": 2, "mean": 1}[reduce_op])
        logger = SimpleNamespace(log_metrics=lambda numbers, step: self.sent.append((step, dict(numbers))))
        self.trainer = SimpleNamespace(global_step=0, is_global_zero=True, loggers=[logger], strategy=strategy or both)
        model = torch.nn.Linear(2, 1)
        self.weight = model.weight
        self.set_gradient(3, 4)
        self.module = SimpleNamespace(model=model, device=torch.device("cpu"), objective=SimpleNamespace(loss_name="dpo_loss"))
        self.optimizer = SimpleNamespace(param_groups=[{"lr": 1e-3}, {"lr": 3e-3}, {"lr": 2e-3}])
        self.folder, self.metrics = folder, StepMetrics(folder)

    def set_gradient(self, *values: float) -> None:
        self.weight.grad = torch.tensor([values], dtype=torch.float32)

    def begin(self) -> None:
        self.metrics.on_train_start(self.trainer, self.module)
        self.metrics.on_train_epoch_start(self.trainer, self.module)

    def micro_batch(self, seconds: float, share: float, tokens: int, **losses: list[float]) -> None:
        self.now += seconds
        self.module.last_losses = {name: torch.tensor(values) for name, values in losses.items()}
        self.module.last_share, self.module.last_tokens = share, tokens
        self.metrics.on_before_backward(self.trainer, self.module, None)

    def pairs(self, seconds: float, share: float, tokens: int, margins: list[float]) -> None:
        """All their losses are 1, and twice as much."""
        self.micro_batch(seconds, share, tokens, margin=margins, loss=[2.0] * len(margins),
                         **{name: [1.0] * len(margins) for name in PREFERENCES})

    def step(self) -> None:
        self.metrics.on_before_optimizer_step(self.trainer, self.module, self.optimizer)
        self.trainer.global_step += 1
        self.end_batch()

    def end_batch(self) -> None:
        self.metrics.on_train_batch_end(self.trainer, self.module, None, None, 0)

    def lines(self) -> list[dict]:
        path = self.folder / "metrics.jsonl"
        return lines(path) if path.exists() else []


@pytest.fixture
def run(tmp_path, monkeypatch):
    return Run(tmp_path, monkeypatch)


def test_means_are_over_the_steps_pairs_and_rates_count_those_of_all_processes(run):
    run.begin()
    run.pairs(1.0, 1 / 6, 10, [3.0, 0.0])
    run.end_batch()
    assert not run.lines()  # no step is done yet
    run.pairs(3.0, 1 / 6, 7, [-1.0])
    run.step()
    [line] = run.lines()
    assert line.pop("peak_memory_bytes") > 10**6
    assert line == pytest.approx({
        "step": 1, "loss": 2.0, "dpo_loss": 1.0, "sft_loss": 1.0, "reward_chosen": 1.0, "reward_rejected": 1.0,
        "margin": 2 / 3, "pref_accuracy": 1 / 3, "pref_percentage": 0.9 * 0.5 + 0.1 / 3, "lr": 3e-3, "grad_norm": 5.0,
        "tokens_per_s": 34 / 4, "pairs_per_s": 6 / 4, "elapsed_s": 4.0})
    [(step, sent)] = run.sent
    assert step == 1 and sent.keys() == {*line, "peak_memory_bytes"} and sent["tokens_per_s"] == line["tokens_per_s"]


def test_a_steps_numbers_and_time_are_its_own(run):
    """Neither what the step before had, nor the evaluation between two epochs, nor a batch that only keeps a process busy."""
    run.begin()
    run.pairs(1.0, 1 / 4, 10, [1.0, 1.0])
    run.step()
    run.pairs(2.0, 1 / 2, 5, [-1.0])
    run.pairs(2.0, 0.0, 1000, [7.0])
    run.step()
    run.now += 50
    run.metrics.on_train_epoch_start(run.trainer, run.module)
    run.pairs(1.0, 1 / 2, 5, [0.5])
    run.step()
    first, second, third = run.lines()
    assert [line["step"] for line in (first, second, third)] == [1, 2, 3]
    assert [line["margin"] for line in (first, second, third)] == pytest.approx([1.0, -1.0, 0.5])
    assert [line["pairs_per_s"] for line in (first, second, third)] == pytest.approx([4.0, 2 / 4, 2.0])
    assert [line["tokens_per_s"] for line in (first, second, third)] == pytest.approx([20.0, 10 / 4, 10.0])
    assert [line["elapsed_s"] for line in (first, second, third)] == pytest.approx([1.0, 5.0, 56.0])


def test_a_resume_counts_on(tmp_path, run, monkeypatch):
    assert run.metrics.state_dict()["elapsed_s"] == 0  # a run that is saved before its first step
    run.begin()
    run.pairs(8.0, 1 / 2, 10, [1.0])
    run.step()
    state = json.loads(json.dumps(run.metrics.state_dict()))
    again = Run(tmp_path, monkeypatch)
    again.metrics.load_state_dict(state)
    again.trainer.global_step = 1
    again.begin()
    again.end_batch()  # no step is done yet
    again.pairs(2.0, 1 / 2, 10, [1.0])
    again.step()
    assert [line["step"] for line in again.lines()] == [1, 2]
    assert again.lines()[1]["elapsed_s"] == 10.0
    assert again.lines()[1]["pref_percentage"] == pytest.approx(0.9 * (0.9 * 0.5 + 0.1) + 0.1)


def test_texts_have_no_preferences(run):
    run.begin()
    run.micro_batch(2.0, 1 / 8, 12, loss=[1.0, 2.0, 3.0, 6.0], sft_loss=[1.0, 2.0, 3.0, 6.0])
    run.step()
    [line] = run.lines()
    assert line.keys() == {"step", "loss", "sft_loss", "lr", "grad_norm", "tokens_per_s", "peak_memory_bytes", "elapsed_s"}
    assert line["loss"] == line["sft_loss"] == 3.0 and line["tokens_per_s"] == 12.0


def test_sums_are_in_float64(run):
    """float32 has no odd numbers from 2^24 on."""
    run.begin()
    losses = [2.0 ** 24, 1.0]
    run.micro_batch(2.0, 0.5, 12, loss=losses, sft_loss=losses)
    run.step()
    assert run.lines()[0]["loss"] == 2.0 ** 24 + 1


def test_only_the_first_process_writes(run):
    run.trainer.is_global_zero = False
    run.begin()
    run.pairs(2.0, 1 / 2, 10, [1.0])
    run.step()
    assert not run.lines() and not run.sent and run.metrics.last["step"] == 1


@pytest.mark.parametrize("norm, told", [(2.5, 2.5), (None, 0.0)])
def test_deepspeed_tells_the_gradients_norm_after_the_step(tmp_path, monkeypatch, norm, told):
    class Strategy(DeepSpeedStrategy):
        deepspeed_engine = SimpleNamespace(get_global_grad_norm=lambda: norm)

        def __init__(self):
            pass

        def reduce(self, x, reduce_op):
            return x

    run = Run(tmp_path, monkeypatch, Strategy())
    run.weight.grad = None  # it hides them
    run.begin()
    run.pairs(2.0, 1.0, 10, [1.0])
    run.step()
    assert run.lines()[0]["grad_norm"] == told


@pytest.mark.parametrize("loss, gradient, words", [
    (math.nan, 1.0, "step 1: the loss is not finite"), (1.0, math.inf, "step 1: the gradient is not finite and was not applied"),
    (1.0, math.nan, "step 1: the gradient is not finite and was not applied"),
])
def test_no_step_is_taken_with_numbers_that_are_not_finite(run, loss, gradient, words):
    run.begin()
    run.micro_batch(1.0, 1.0, 2, loss=[loss], sft_loss=[1.0])
    run.set_gradient(gradient, 0)
    with pytest.raises(NotFinite, match=words):
        run.step()
    assert run.trainer.global_step == 0 and not run.lines()


def test_nor_is_a_line_written_with_one(run):
    run.begin()
    run.micro_batch(1.0, 1.0, 2, loss=[1.0], sft_loss=[math.inf])
    with pytest.raises(NotFinite, match="step 1: sft_loss is not finite"):
        run.step()
    assert not run.lines()


def test_names_of_what_is_not_finite():
    assert not_finite_numbers({"loss": 1.0, "margin": -2.0}) is None
    assert not_finite_numbers({"loss": math.nan, "margin": 1.0}) == "loss is"
    assert not_finite_numbers({"loss": math.nan, "margin": -math.inf}) == "loss, margin are"


def test_peak_memory_is_in_bytes(monkeypatch):
    """Of getrusage, which counts in kilobytes except on macOS; of a GPU, what torch's allocator has given out."""
    monkeypatch.setattr("src.training.metrics.resource.getrusage", lambda who: SimpleNamespace(ru_maxrss=3))
    for platform, expected in (("linux", 3 * 1024), ("darwin", 3)):
        monkeypatch.setattr("src.training.metrics.sys.platform", platform)
        assert peak_memory(torch.device("cpu")) == expected
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: 70 + device.index)
    assert peak_memory(torch.device("cuda", 1)) == 71
