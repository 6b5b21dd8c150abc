"""The files in a run's folder, by name; and those that grow by a JSON object a line: each line is appended whole, read within
limits, and cut off if it is after the step where a run is resumed.
"""

import io
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from src.checked_json import BadJson, parse_json
from src.console import say
from src.errors import UserError
from src.files import append_whole, atomic_write, json_text, regular_file, remedy

CONFIG_FILE = "config.json"
REPORT_FILE = "report.html"
CURVES_FILE = "curves.png"
RESUME_FILE = "last.ckpt"
FINAL_FILE = "rwkv-final.safetensors"
METRICS_FILE = "metrics.jsonl"
EVAL_FILE = "eval.jsonl"
SAMPLES_FILE = "samples.jsonl"
GROWING = (METRICS_FILE, EVAL_FILE, SAMPLES_FILE)

# The fields of config.json besides the run's settings.
FACTS = ("base_fingerprint", "rlhf_train_sha256", "eval_sha256", "tokenizer_sha256", "template_fingerprint",
         "layer_profile_rows", "base",
         "trained_parameters", "total_steps", "train_data", "eval_data")

_NUMBERS = {"step": int, str: float}
_SHAPES = {SAMPLES_FILE: {"step": int, "samples": [{"prompt": str, "chosen": str, "answer": str, "complete": bool}]}}
# A message names at most this many gaps, the first ones.
_NAMED = 4


def append_line(path: Path, values: dict[str, Any]) -> None:
    """Append a whole line or nothing; raises UserError if writing fails or a number is not finite."""
    text = json_text(values, path)
    regular_file(path)
    try:
        with path.open("ab", buffering=0) as file:
            append_whole(file.fileno(), text.encode() + b"\n", sync=False)
    except OSError as error:
        raise _refused(path, error) from error


def sync_lines(folder: Path) -> None:
    """Sync the appended lines, so that they survive a power cut; raises UserError if that fails."""
    for path in (folder / name for name in GROWING if (folder / name).exists()):
        try:
            with path.open("ab") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise _refused(path, error) from error


def _refused(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be written ({error.strerror}); {remedy(error)}, then continue with --resume 1")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines' values; none if there is no file.

    Raises UserError, naming the line, if a line is not as a run writes it.
    """
    return [values for _, values in _lines(path)]


def check_lines(path: Path) -> None:
    """Raises UserError if the file is damaged; a last line without its end, as a kill leaves it, is accepted."""
    _lines(path, whole=True)


def keep_lines(path: Path, last_step: int) -> list[int]:
    """Drop the lines of steps after `last_step`, which a resumed run writes again, and a last line without its end.

    Returns the steps of the lines left. Raises UserError if the file is damaged, and leaves it as it is.
    """
    lines = _lines(path, whole=True)
    kept = [(line, values["step"]) for line, values in lines if values["step"] <= last_step]
    text = b"".join(line for line, _ in kept)
    if path.exists() and len(text) != path.stat().st_size:
        with atomic_write(path) as file:
            file.write(text)
    return [step for _, step in kept]


def report_gaps(path: Path, steps: Sequence[int], expected: Iterable[int]) -> None:
    """Report in one line what is wrong with a file's steps; the run continues.

    Args:
        steps: in the file's order.
        expected: those that the run has written there.
    """
    lacking = sorted(set(expected) - set(steps))
    twice = sorted(step for step, times in Counter(steps).items() if times > 1)
    wrong = [f"lacks {_ranges(lacking)}"] if lacking else []
    wrong += [f"has {_ranges(twice)} more than once"] if twice else []
    wrong += ["has steps out of order"] if any(a > b for a, b in zip(steps, steps[1:], strict=False)) else []
    if wrong:
        say(f"warning: {path}: {', '.join(wrong)}; the run continues, and its report and curves show the lines that are there")


def _lines(path: Path, whole: bool = False) -> list[tuple[bytes, dict[str, Any]]]:
    """Each line with its values; with `whole` only lines that have their end."""
    regular_file(path)  # reading a pipe would block
    try:
        text = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    lines = []
    for number, line in enumerate(io.BytesIO(text), 1):
        if whole and not line.endswith(b"\n"):
            break
        try:
            lines.append((line, parse_json(line, _SHAPES.get(path.name, _NUMBERS))))
        except BadJson as error:
            raise UserError(f"{path}: line {number} is damaged ({error}); remove that line, or choose another "
                            "--proj_dir") from None
    return lines


def _ranges(steps: list[int]) -> str:
    """Such as "steps 3-5, 9"."""
    runs = [[step for _, step in group] for _, group in groupby(enumerate(steps), lambda pair: pair[1] - pair[0])]
    words = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs[:_NAMED]]
    return f"step{'s' * (len(steps) > 1)} {', '.join(words)}" + (f" and {len(runs) - _NAMED} more" if len(runs) > _NAMED else "")
