"""A run's folder at the start: config.json is written for a new run, and checked for a resumed one."""

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from src.adapters.files import read_adapter
from src.checked_json import BadJson, parse_json
from src.console import say, short
from src.data.templates import CLASSIC
from src.data.thinking import LOSS_ON
from src.errors import UserError
from src.files import atomic_write, json_text, regular_file, remove_temporaries
from src.run_files import (
    CONFIG_FILE,
    CURVES_FILE,
    FINAL_FILE,
    GROWING,
    METRICS_FILE,
    REPORT_FILE,
    RESUME_FILE,
    check_lines,
    keep_lines,
    report_gaps,
)
from src.settings import defaults, flat, free_on_resume, input_files
from src.training.checkpoint import check_checkpoint, tidy, will_be_there
from src.training.config import TrainConfig
from src.training.loggers import WANDB_ID_FILE

# Names of the files that a run writes whole, as a pattern.
WHOLE = "|".join([*map(re.escape, (CONFIG_FILE, *GROWING, RESUME_FILE, REPORT_FILE, CURVES_FILE, WANDB_ID_FILE)),
                  r"rwkv-(?:[0-9]+|final)\.(?:safetensors|state\.pth)"])


def prepare_folder(folder: Path, config: TrainConfig, facts: dict[str, Any], derived: dict[str, Any],
                   shapes: dict[str, tuple[int, ...]]) -> Path | None:
    """Write config.json, or check a run to be resumed and cut it back to its checkpoint; the caller holds the folder's lock.

    Args:
        facts: what a resumed run must have in common with the run before it, like the flags that are not free.
        derived: what follows from those, for readers of config.json.
        shapes: of the trained tensors, by name.

    Returns:
        The checkpoint to resume from, None for a fresh start.

    Raises:
        UserError: the folder already holds a run and --resume is not 1, or its run is a different one or damaged. Nothing has
            been written then.
    """
    for path in (*(folder / name for name in (CONFIG_FILE, *GROWING)), *sorted(folder.glob("rwkv-*"))):
        regular_file(path)
    tidy(folder)
    path, checkpoint = folder / CONFIG_FILE, folder / RESUME_FILE
    known = json.loads(json_text(flat(config) | facts, path))
    steps, expected = 0, {}
    if config.run.resume and checkpoint.exists():
        _check_config(path, known)
        record = check_checkpoint(checkpoint, shapes, config.machine.strategy.startswith("deepspeed"),
                                  lambda: _last_good(folder))
        steps, expected = record["step"], {METRICS_FILE: list(range(1, record["step"] + 1))} | record["lines"]
        for name in GROWING:
            check_lines(folder / name)  # all of them before any is cut
    else:
        _check_fresh(folder, config.run.resume)
    remove_temporaries(folder, WHOLE)
    for name in GROWING:
        # Of a run that was interrupted before its first checkpoint no line stays, not even that of step 0.
        found = keep_lines(folder / name, steps or -1)
        report_gaps(folder / name, found, expected.get(name, found))
    if steps:
        return checkpoint
    text = json_text(known | derived, path, indent=2)
    with atomic_write(path, "w", encoding="utf-8") as file:
        file.write(text)
    return None


def resume_file(config: TrainConfig) -> Path | None:
    """The checkpoint that processes other than the first resume from; the first may be tidying the folder meanwhile."""
    folder = Path(config.run.proj_dir)
    return folder / RESUME_FILE if config.run.resume and will_be_there(folder) else None


def check_inputs(folder: Path, config: TrainConfig) -> None:
    """Refuse input files that the run would overwrite."""
    for flag, path in input_files(config):
        for place in (path.resolve(), path.parent.resolve() / path.name):  # the file itself, and a link to it
            if place.parent == folder.resolve() and re.fullmatch(WHOLE, place.name):
                raise UserError(f"{flag}: {path} would be overwritten, since the run writes a file of this name into --proj_dir; "
                                "choose another --proj_dir")


def _check_config(path: Path, known: dict[str, Any]) -> None:
    try:
        before = parse_json(path.read_bytes(), {str: object})
    except (OSError, BadJson) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path} is missing or damaged ({reason}), so --resume 1 can't check the run's settings; "
                        "choose another --proj_dir") from None
    # A run that is older than a flag behaved as that flag's default; one from before templates had names was classic.
    before = defaults(TrainConfig) | {"template_fingerprint": CLASSIC.fingerprint, "loss_on": LOSS_ON[0]} | before
    # Pairs have the loss_on of their .save, whose sha256 is compared; older runs wrote the flag's default.
    free = {*free_on_resume(TrainConfig), *(() if known["sft"] else ("loss_on",))}
    for name, value in known.items():
        if name not in free and before.get(name) != value:
            was, now = short(str(before.get(name))), short(str(value))
            raise UserError(f"--resume 1: {name} was {was} in {path.parent} and is {now} now; a resumed run must keep it")


def _check_fresh(folder: Path, resume: bool) -> None:
    """Refuse to start where something would be lost; report a `--resume 1` that starts at the first step."""
    adapters = sorted(path.name for path in folder.glob("rwkv-*.safetensors"))
    if resume and (len(adapters) > 1 or (folder / FINAL_FILE).exists()):
        raise UserError(f"{folder / RESUME_FILE} is missing, so --resume 1 can't continue after {adapters[-1]}; choose another "
                        "--proj_dir")
    there = sorted(path.name for path in folder.iterdir() if path.is_file() and re.fullmatch(WHOLE, path.name))
    config = folder / CONFIG_FILE
    if not resume and {METRICS_FILE, RESUME_FILE, FINAL_FILE} & set(there):
        raise UserError(f"{folder} already holds a run; resume it with --resume 1, or choose another --proj_dir")
    try:
        ours = not config.exists() or "proj_dir" in parse_json(config.read_bytes(), {str: object})
    except (OSError, BadJson):
        ours = resume
    if not ours or (there and not config.exists()):
        # Of these names config.json is the first.
        raise UserError(f"{folder / there[0]}: belongs to no run and would be overwritten; choose another --proj_dir")
    if resume:
        say(f"note: no effect: --resume 1 ({folder} has no {RESUME_FILE} to resume from, so the run starts at its first step)")


def _last_good(folder: Path) -> str | None:
    """The adapter of the last epoch whose file can be read."""
    numbered = [(int(found[1]), path) for path in folder.glob("rwkv-*.safetensors")
                if (found := re.fullmatch(r"rwkv-([0-9]{1,18})\.safetensors", path.name))]
    for _, path in sorted(numbered, reverse=True):
        with suppress(UserError):
            read_adapter(path)
            return str(path)
    return None
