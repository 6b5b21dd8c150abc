"""A run's folder at the start: config.json written for a new run, or what a resumed one must agree with."""

import json
import warnings
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import torch

from src.errors import UserError
from src.files import atomic_write, json_text
from src.training.callbacks import METRICS_FILE
from src.training.config import TrainConfig
from src.training.report import CONFIG_FILE
from src.training.saving import RESUME_FILE

# What may differ between a run and its continuation: none of it changes a number beyond rounding. The two files may have
# moved; that they are the same is told by fingerprint and sha256.
FREE_ON_RESUME = ("accelerator", "compile", "epoch_save", "eval_file", "grad_cp", "load_model", "notes", "proj_dir", "resume",
                  "rlhf_train_file", "sample_tokens", "samples", "strategy", "tensorboard", "train_data_file", "wandb")


def prepare_folder(folder: Path, config: TrainConfig, facts: dict[str, Any], told: dict[str, Any]) -> Path | None:
    """Write config.json, or check it on a resume; returns the checkpoint to go on from, None for a fresh start.

    Args:
        facts: what a resumed run must have in common with the run before it, as the flags that are not free.
        told: what follows from those, for the reader.

    Raises:
        UserError: the folder already holds a run and --resume is not 1, or the run that it holds was another.
    """
    path, checkpoint = folder / CONFIG_FILE, folder / RESUME_FILE
    known = json.loads(json_text(asdict(config) | facts, path))
    if (folder / METRICS_FILE).exists() and not config.resume:
        raise UserError(f"{folder} already holds a run; go on with it by --resume 1, or choose another --proj_dir")
    if config.resume and checkpoint.exists():
        try:
            before = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            raise UserError(f"{path} is missing or damaged, so --resume 1 can't check what it goes on with; "
                            "choose another --proj_dir") from None
        # A run from before there was a flag had what is that flag's default.
        before = {field.name: field.default for field in fields(TrainConfig) if field.default is not MISSING} | before
        for name, value in known.items():
            if name not in FREE_ON_RESUME and before.get(name) != value:
                raise UserError(f"--resume 1: {name} was {_short(before.get(name))} in {folder} and is {_short(value)} now; "
                                "a resumed run goes on unchanged")
        _check_resume_file(checkpoint)
        return checkpoint
    text = json_text(known | told, path, indent=2)
    with atomic_write(path, "w", encoding="utf-8") as file:
        file.write(text)
    return None


def _check_resume_file(path: Path) -> None:
    """Refuse a file that Lightning would fail on, before anything is written. DeepSpeed's checkpoints are folders of its own."""
    if path.is_dir():
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch.load(path, map_location="cpu", weights_only=True)
        whole = {"state_dict", "optimizer_states", "random_state"} <= found.keys()
    except Exception:  # foreign bytes make the restricted unpickler fail in every way there is
        whole = False
    if not whole:
        raise UserError(f"{path}: is damaged or no file of train.py, so --resume 1 can't go on with it; "
                        "choose another --proj_dir")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
