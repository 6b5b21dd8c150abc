"""A run's folder on one page, report.html: made only from the files of the folder, so it can be made again at any time.

The page is self-contained: no script, and no font, picture or address outside of it. Its template escapes every text.
"""

import math
import shlex
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any

from src.checked_json import BadJson, parse_json
from src.errors import UserError
from src.evaluation.picture import columns, curve_svgs, read_columns
from src.files import atomic_write
from src.preference.loss import LOSSES, is_of_thumbs
from src.run_files import (
    CONFIG_FILE,
    CURVES_FILE,
    EVAL_FILE,
    FACTS,
    FINAL_FILE,
    METRICS_FILE,
    REPORT_FILE,
    RESUME_FILE,
    SAMPLES_FILE,
    read_lines,
)

# The fields of config.json that the page computes with; others are shown as they are.
_CONFIG = {"load_model": str, "base_fingerprint": object, "precision": object, "layer_profile_rows?": [{"layer": str}],
           "base?": {str: object}, "train_data?": (dict, None), "eval_data?": (dict, None), "trained_parameters?": int,
           "total_steps?": (int, None)}
TEMPLATE = Path(__file__).with_name("report.template.html")
# Held-out measures in words, in the table's order; any other comes last under its own name.
MEASURES = {
    "accuracy": "preference accuracy (margin > 0; ties count half)", "margin": "mean margin",
    "policy_accuracy": "the model itself finds the good answer likelier", "sft_loss": "nats a token of the good answers",
    "dpo_loss": "DPO loss", "preference_loss": "preference loss", "loss": "loss, all of it",
    "reward_chosen": "reward, chosen", "reward_rejected": "reward, rejected", "kl": "KL to the base, nats",
}
# Parameters of losses, as the papers write them.
SYMBOLS = {"beta": "β", "gamma": "γ", "label_smoothing": "ε", "desirable_weight": "λ of thumbs up",
           "undesirable_weight": "λ of thumbs down"}
OF_THUMBS = {"accuracy": "thumbs whose reward is on the right side of the KL (ties count half)",
             "margin": "mean reward of thumbs up minus that of thumbs down", "sft_loss": "nats a token of answers thumbed up",
             "reward_chosen": "reward, thumbs up", "reward_rejected": "reward, thumbs down"}
UNMEASURED = ("step", "pairs", "tokens", "texts")
FILES = {
    CONFIG_FILE: "the run's settings, and the base's fingerprint", METRICS_FILE: "a line for each optimizer step",
    EVAL_FILE: "held-out numbers before the first step and after each epoch",
    SAMPLES_FILE: "answers before the first step and after each epoch", CURVES_FILE: "the curves as a picture",
    FINAL_FILE: "the adapter at the end", RESUME_FILE: "what --resume 1 needs", "wandb": "wandb's files",
    "tensorboard": "TensorBoard's files",
}


def write_report(folder: Path) -> None:
    """Write report.html from a run's config.json, metrics.jsonl and, where they exist, eval.jsonl and samples.jsonl.

    Raises:
        UserError: one of them is missing or damaged, or writing fails.
    """
    # Always installed, since torch needs it; slow to import, which other scripts should not pay.
    from jinja2 import Environment, StrictUndefined, TemplateError
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"measure": measure, "change": change, "setting": setting, "count": count}
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    try:
        config = parse_json((folder / CONFIG_FILE).read_bytes(), _CONFIG)
        samples, held_out = read_lines(folder / SAMPLES_FILE), read_lines(folder / EVAL_FILE)
        metrics = read_columns(folder / METRICS_FILE)
        page = template.render(
            name=folder.resolve().name, objective=objective(config),
            written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"), config=config,
            flags={name: value for name, value in config.items() if name not in FACTS},
            profile=profile_rows(config.get("layer_profile_rows", [])), facts=facts(config, metrics, held_out),
            held_out=held_out, measures=measures(held_out),
            samples=paired(samples), last=samples[-1]["step"] if samples else 0,
            done=int(max((*metrics.get("step", ()), *(row["step"] for row in (*held_out, *samples))), default=0)),
            total=config.get("total_steps"),
            figures=list(map(Markup, curve_svgs(metrics, columns(held_out)))), files=list_files(folder),
            merge=None if not (folder / FINAL_FILE).exists() else shlex.join((
                "python", "merge.py", "--base", config["load_model"], "--adapter", str(folder / FINAL_FILE),
                "--output", str(folder / "merged.pth"))))
    except UserError as error:
        raise UserError(f"{folder}: {REPORT_FILE} can't be made ({error})") from None
    except BadJson as error:
        raise UserError(f"{folder}: {REPORT_FILE} can't be made, since {CONFIG_FILE} is damaged ({error})") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, TemplateError):
        raise UserError(f"{folder}: {REPORT_FILE} can't be made, since a file of the run is missing or damaged") from None
    with atomic_write(folder / REPORT_FILE, "w", encoding="utf-8", errors="replace") as file:
        file.write(page)


def objective(config: dict[str, Any]) -> str | None:
    """What the run learns from, in words; None where config.json does not say it."""
    name = str(config.get("loss", "dpo"))
    if name not in LOSSES or config.get("sft"):
        return None
    loss = LOSSES[name]
    numbers = {SYMBOLS.get(parameter, parameter): config.get(of.name) for parameter, of in loss.settings.items()}
    words = ", ".join(f"{symbol} = {setting(value)}" for symbol, value in numbers.items() if value)
    share = setting(config.get(loss.sft_share.name)) if loss.sft_share else "all"
    answer = "answer with a thumb up" if is_of_thumbs(name) else "chosen answer"
    on = f"prompt and {answer}" if config.get("sft_on_prompt") else f"the {answer}"
    return f"{name.upper()} with {words}, and {share} of the SFT loss on {on}"


def facts(config: dict[str, Any], metrics: dict[str, list[float]], held_out: list[dict[str, float]]) -> list[tuple[str, str]]:
    """The figures at the top of the page, as name and value."""
    shown = []
    for name, words in (("accuracy", "held-out accuracy"), ("margin", "held-out margin")):
        if held_out and name in held_out[0] and name in held_out[-1]:
            values = dict.fromkeys((measure(held_out[0][name], name), measure(held_out[-1][name], name)))
            shown.append((words, " → ".join(values)))
    metrics = {name: list(filter(math.isfinite, values)) for name, values in metrics.items()}
    if "pref_percentage" in metrics:
        shown.append(("pref-percentage", f"{metrics['pref_percentage'][-1]:.1%}"))
    if "trained_parameters" in config:
        shown.append(("trained parameters", f"{config['trained_parameters']:,}"))
    if "elapsed_s" in metrics:
        shown.append(("time", clock(metrics["elapsed_s"][-1])))
    for name, words in (("pairs_per_s", "pairs a second"), ("tokens_per_s", "tokens a second")):
        if name in metrics:
            usual = sorted(metrics[name])[len(metrics[name]) // 2]
            shown.append((words, f"{usual:,.0f}" if usual >= 100 else f"{usual:.2g}"))
    if "peak_memory_bytes" in metrics:
        shown.append(("memory at the peak", f"{max(metrics['peak_memory_bytes']) / 2**30:.2f} GiB"))
    return shown


def measures(held_out: list[dict[str, float]]) -> dict[str, str]:
    """The measures that every evaluation has, by name, in words."""
    everywhere = [name for name in (held_out or [{}])[0] if name not in UNMEASURED and all(name in row for row in held_out)]
    order = list(MEASURES)
    words = MEASURES | (OF_THUMBS if "kl" in everywhere else {})
    return {name: words.get(name, name.replace("_", " "))
            for name in sorted(everywhere, key=lambda name: order.index(name) if name in order else len(order))}


def paired(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last answers, each with the first one to the same prompt, as "before" (None where there is none)."""
    if not samples:
        return []
    before = {} if samples[0]["step"] else {sample["prompt"]: sample for sample in samples[0]["samples"]}
    after = samples[-1]["samples"] if samples[-1]["step"] else []
    if not after:
        return [{**sample, "before": sample, "after": None} for sample in samples[0]["samples"]]
    return [{**sample, "before": before.get(sample["prompt"]), "after": sample} for sample in after]


def profile_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Consecutive layers with equal settings as one row; without columns that no layer uses."""
    used = [name for name in (rows or [{}])[0] if name == "layer" or any(row[name] for row in rows)]
    merged = []
    for same, group in groupby(rows, lambda row: {name: row[name] for name in used if name != "layer"}):
        layers = [row["layer"] for row in group]
        merged.append({"layer": layers[0] if len(layers) == 1 else f"{layers[0]} – {layers[-1]}", **same})
    return merged


def list_files(folder: Path) -> list[tuple[str, str]]:
    """The run's files, each with a description."""
    present = [(name, what) for name, what in FILES.items() if (folder / name).exists()]
    adapters = sorted(path.name for path in folder.glob("rwkv-*.safetensors") if path.name != FINAL_FILE)
    return present + [(name, "the adapter after that epoch") for name in adapters]


def measure(value: float, name: str) -> str:
    """A held-out number as text."""
    text = f"{value:.1%}" if "accuracy" in name else f"{value:.4f}" if "loss" in name else f"{value:+.4f}"
    return text.replace("-", "−")


def change(value: float, name: str) -> str:
    return (f"{value * 100:+.1f} points" if "accuracy" in name else f"{value:+.4f}").replace("-", "−")


def setting(value: Any) -> str:
    """A setting as written on a command line."""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float):
        return f"{value:g}"
    return "–" if value is None or value == "" or value == [] else ", ".join(value) if isinstance(value, list) else str(value)


def count(value: int, one: str, many: str = "") -> str:
    return f"{value:,} {one if value == 1 else many or one + 's'}"


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
