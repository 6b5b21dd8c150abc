"""How a run's callbacks follow one another, DeepSpeed's settings by the strategy's name, and how Lightning is asked to train."""

import logging
import signal
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from pytorch_lightning.plugins.environments import LightningEnvironment

import src.training.trainer as trainer_file
from src.errors import NotFinite, UserError
from src.training.checkpoint import SealedFile
from src.training.environment import First
from src.training.inputs import Data
from src.training.metrics import StepMetrics
from src.training.progress import ProgressBar
from src.training.run import train
from src.training.saving import CheckAdapter, SaveAdapters
from src.training.trainer import fit, lightning_strategy, make_callbacks, quiet_lightning
from src.training.watching import HeldOut, ReportWriter, Samples


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("sampled", [False, True])
def test_nothing_of_an_epoch_is_written_before_its_adapter_was_checked(config, tmp_path, held_out, sampled):
    """And the adapter is saved after all that counts lines has written them; the report shows everything."""
    run = config(rlhf_train_file="pairs.save", dpo_beta=0.3, dpo_alpha=0.7, loss="ipo", proj_dir=str(tmp_path))
    samples = Samples(tmp_path, None, None, 8) if sampled else None
    save, callbacks = make_callbacks(run, "base", "x070", 8, Data("held_out.save", [], {}) if held_out else None, samples,
                                     {"template": {"name": "g1"}, "loss_on": "answer"})
    growing = [HeldOut] * held_out + [Samples] * sampled
    order = [StepMetrics, CheckAdapter, *growing, ProgressBar, SaveAdapters, ReportWriter]
    assert [type(callback) for callback in callbacks] == order
    assert save is callbacks[-2] and [type(callback) for callback in save.growing] == growing
    assert save.base_fingerprint == "base" and save.folder == callbacks[-1].folder == tmp_path
    assert save.extra == {"version": "x070", "loss": "ipo", "dpo_beta": 0.3, "dpo_alpha": 0.7, "template": {"name": "g1"},
                          "loss_on": "answer"}


@pytest.mark.parametrize("name, stage, optimizer, parameters", [
    ("deepspeed_stage_1", 1, False, False), ("deepspeed_stage_2", 2, False, False), ("deepspeed_stage_2_offload", 2, True, False),
    ("deepspeed_stage_3", 3, False, False), ("deepspeed_stage_3_offload", 3, True, True),
])
def test_a_deepspeed_strategy_is_what_its_name_says(config, tmp_path, monkeypatch, name, stage, optimizer, parameters):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    settings = lightning_strategy(config(rlhf_train_file="pairs.save", strategy=name, micro_bsz=3)).config
    zero = settings["zero_optimization"]
    assert zero["stage"] == stage and settings["train_micro_batch_size_per_gpu"] == 3
    assert [zero.get(f"offload_{what}", {}).get("device") for what in ("optimizer", "param")] == \
        ["cpu" if optimizer else None, "cpu" if parameters else None]


@pytest.mark.parametrize("name", ["auto", "ddp"])
def test_other_strategies_are_lightnings(config, name):
    assert lightning_strategy(config(rlhf_train_file="pairs.save", strategy=name)) == name


@pytest.mark.parametrize("name", ["pytorch_lightning", "lightning_fabric"])
def test_lightning_gives_no_tips(monkeypatch, name):
    logger = logging.getLogger(name)
    monkeypatch.setattr(logger, "level", logging.INFO)
    quiet_lightning()
    assert not logger.isEnabledFor(logging.WARNING) and logger.isEnabledFor(logging.ERROR)


def test_lightning_leaves_nothing_of_its_own_in_the_folder_or_on_the_screen(config, capfd, tmp_path, monkeypatch, no_pictures):
    monkeypatch.chdir(tmp_path)
    run = config(epoch_steps=1, epoch_count=1)
    train(run, {})
    assert sorted(path.name for path in Path(run.run.proj_dir).iterdir()) == [
        "config.json", "curves.png", "last.ckpt", "metrics.jsonl", "report.html", "rwkv-1.safetensors", "rwkv-final.safetensors"]
    assert not (tmp_path / "lightning_logs").exists() and not (tmp_path / "checkpoints").exists()
    out, err = capfd.readouterr()
    assert out == "" and not [line for line in err.splitlines() if "Trainable params" in line or "Sanity" in line]


@pytest.fixture
def lightning(config, monkeypatch, tmp_path):
    """`lightning(error, rank, **flags)`: the fit of a run whose training may end with an error, by a trainer that only remembers.

    `rank` is of a process that something else has started.
    """
    def fitted(error: BaseException | None = None, rank: int | None = None, **flags) -> MagicMock:
        trainer_file.pl.Trainer.return_value.fit.side_effect = error
        trainer_file.pl.Trainer.return_value.is_global_zero = not rank
        trainer_file.pl.Trainer.return_value.global_step = 3
        environment = First() if rank is None else LightningEnvironment()
        save = SaveAdapters(tmp_path, "", {})
        save.good.append("rwkv-1.safetensors")
        return fit(config(rlhf_train_file="pairs.save", proj_dir=str(tmp_path), **flags), environment, "module", ["callback"],
                   "batches", tmp_path / "last.ckpt", save)

    monkeypatch.setattr("src.training.trainer.pl.Trainer", MagicMock())
    for name in ("Others", "make_loggers", "share_cores"):
        monkeypatch.setattr(trainer_file, name, MagicMock())
    return fitted


def asked() -> dict:
    return trainer_file.pl.Trainer.call_args.kwargs


def test_flags_reach_lightning(lightning, tmp_path):
    trainer = lightning(epoch_count=7, accumulate_grad_batches=3, gradient_clip_val=0.5)
    expected = {"accelerator": "cpu", "devices": 1, "strategy": "auto", "max_epochs": 7, "accumulate_grad_batches": 3,
                "gradient_clip_val": 0.5, "callbacks": ["callback"]}
    assert {name: asked()[name] for name in expected} == expected
    lightning(gradient_clip_val=0, devices=2, accelerator="gpu", strategy="ddp", rank=0)
    expected = {"accelerator": "gpu", "devices": 2, "strategy": "ddp", "gradient_clip_val": None}
    assert {name: asked()[name] for name in expected} == expected
    data = trainer.fit.call_args.kwargs.pop("datamodule")
    assert data.batches == "batches" and trainer.fit.call_args.args == ("module",)
    # Nothing in a checkpoint is ever executed.
    assert trainer.fit.call_args.kwargs == {"ckpt_path": tmp_path / "last.ckpt", "weights_only": True}


def test_what_lightning_must_leave_alone(lightning, tmp_path):
    """The model's precision, each epoch's loader, which of its batches are whose, signals, files, and the screen (it warns of
    runs shorter than its logging interval)."""
    trainer = lightning()
    assert asked()["precision"] == "32-true" and asked()["reload_dataloaders_every_n_epochs"] == 1
    assert asked()["default_root_dir"] == str(tmp_path) and asked()["log_every_n_steps"] == 1
    for name in ("use_distributed_sampler", "logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"):
        assert asked()[name] is False
    assert trainer._signal_connector.register_signal_handlers() is None


@pytest.mark.parametrize("strategy, sealed", [("auto", True), ("ddp", True), ("deepspeed_stage_2", False)])
def test_checkpoints_are_sealed_files_except_deepspeeds(lightning, monkeypatch, strategy, sealed):
    monkeypatch.setattr(trainer_file, "lightning_strategy", MagicMock())
    lightning(strategy=strategy)
    environment, *more = asked()["plugins"]
    assert isinstance(environment, First) and [type(one) for one in more] == [SealedFile] * sealed


def test_loggers_are_the_first_processs(lightning):
    assert lightning().loggers is trainer_file.make_loggers.return_value
    assert lightning(rank=1, devices=2).loggers == []


def test_a_run_on_several_devices_that_nobody_started_starts_the_others(lightning):
    lightning(devices=3)
    (count, port), others = trainer_file.Others.call_args.args, trainer_file.Others.return_value
    assert count == 2 and port == asked()["plugins"][0].main_port > 0
    assert asked()["callbacks"] == [others, "callback"] and others.__enter__.called and others.__exit__.called
    assert trainer_file.share_cores.call_args.args[0].machine.devices == 3
    trainer_file.Others.reset_mock()
    lightning(devices=3, rank=0)
    lightning(devices=1)
    assert not trainer_file.Others.called and asked()["callbacks"] == ["callback"]


def test_divergence_is_explained_with_the_adapters_that_are_good(lightning, tmp_path):
    (tmp_path / "rwkv-1.safetensors").touch()
    with pytest.raises(UserError, match=r"step 4: no loss; training has diverged .* good in .*: rwkv-1\.safetensors"):
        lightning(NotFinite("step 4: no loss"))


def ended(because: BaseException | None) -> SystemExit:
    error = SystemExit(1)
    error.__context__ = because
    return error


def test_ctrl_c_is_no_exit(lightning):
    """Lightning makes SystemExit of it, and ignores the signal from then on."""
    before = signal.getsignal(signal.SIGINT)

    def interrupted(*_, **__):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise ended(KeyboardInterrupt())

    try:
        with pytest.raises(KeyboardInterrupt):
            lightning(interrupted)
        assert signal.getsignal(signal.SIGINT) == before
    finally:
        signal.signal(signal.SIGINT, before)
    for because in (None, ValueError()):
        with pytest.raises(SystemExit):
            lightning(ended(because))
