"""How a run's callbacks follow one another, and DeepSpeed's settings by the strategy's name."""

import logging
from pathlib import Path

import pytest

from src.training.inputs import Data
from src.training.metrics import StepMetrics
from src.training.progress import ProgressBar
from src.training.saving import CheckAdapter, SaveAdapters
from src.training.trainer import lightning_strategy, make_callbacks, quiet_lightning
from src.training.watching import HeldOut, ReportWriter, Samples


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("sampled", [False, True])
def test_nothing_of_an_epoch_is_written_before_its_adapter_was_checked(config, tmp_path, held_out, sampled):
    """And the adapter is saved after all that counts lines has written them; the report shows everything."""
    run = config(rlhf_train_file="pairs.save", dpo_beta=0.3, dpo_alpha=0.7, loss="ipo", proj_dir=str(tmp_path))
    samples = Samples(tmp_path, None, None, 8) if sampled else None
    save, callbacks = make_callbacks(run, "base", "x070", 8, Data("held_out.save", [], {}) if held_out else None, samples)
    growing = [HeldOut] * held_out + [Samples] * sampled
    order = [StepMetrics, CheckAdapter, *growing, ProgressBar, SaveAdapters, ReportWriter]
    assert [type(callback) for callback in callbacks] == order
    assert save is callbacks[-2] and [type(callback) for callback in save.growing] == growing
    assert save.base_fingerprint == "base" and save.folder == callbacks[-1].folder == tmp_path
    assert save.extra == {"version": "x070", "loss": "ipo", "dpo_beta": 0.3, "dpo_alpha": 0.7}


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
    from src.training.run import train

    monkeypatch.chdir(tmp_path)
    run = config(epoch_steps=1, epoch_count=1)
    train(run, {})
    assert sorted(path.name for path in Path(run.run.proj_dir).iterdir()) == [
        "config.json", "curves.png", "last.ckpt", "metrics.jsonl", "report.html", "rwkv-1.safetensors", "rwkv-final.safetensors"]
    assert not (tmp_path / "lightning_logs").exists() and not (tmp_path / "checkpoints").exists()
    out, err = capfd.readouterr()
    assert out == "" and not [line for line in err.splitlines() if "Trainable params" in line or "Sanity" in line]
