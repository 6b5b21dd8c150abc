"""The curves of a run as one PNG: pref-percentage, losses and rewards over the optimizer steps."""

import json
from pathlib import Path

from src.errors import UserError
from src.files import atomic_write


def draw_curves(metrics_file: Path, eval_file: Path, output: Path) -> None:
    """Read metrics.jsonl and, where it exists, eval.jsonl; write `output`, a PNG."""
    # Takes a second to import, and the scripts that never draw need not wait for it.
    from matplotlib.figure import Figure

    steps = _columns(metrics_file)
    held_out = _columns(eval_file) if eval_file.exists() else {}
    figure = Figure(figsize=(13, 3.8), layout="constrained", dpi=110)
    share, losses, rewards = figure.subplots(1, 3)

    share.set_title("preferred: share of pairs with margin > 0")
    share.plot(steps["step"], steps["pref_accuracy"], color="tab:blue", alpha=0.25, label="each step")
    share.plot(steps["step"], steps["pref_percentage"], color="tab:blue", label="pref-percentage")
    share.set_ylim(-0.02, 1.02)
    losses.set_title("losses (nats)")
    losses.plot(steps["step"], steps["dpo_loss"], color="tab:red", label="DPO")
    losses.plot(steps["step"], steps["sft_loss"], color="tab:green", label="SFT, per token of chosen")
    rewards.set_title("rewards (β · nats)")
    rewards.plot(steps["step"], steps["reward_chosen"], color="tab:green", label="chosen")
    rewards.plot(steps["step"], steps["reward_rejected"], color="tab:red", label="rejected")
    rewards.plot(steps["step"], steps["margin"], color="tab:purple", label="margin")
    if held_out:
        share.plot(held_out["step"], held_out["accuracy"], "o--", color="black", label="held out")
        losses.plot(held_out["step"], held_out["dpo_loss"], "o--", color="tab:red", label="DPO, held out")
        losses.plot(held_out["step"], held_out["sft_loss"], "o--", color="tab:green", label="SFT, held out")
        rewards.plot(held_out["step"], held_out["margin"], "o--", color="black", label="margin, held out")
    for axes in (share, losses, rewards):
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    with atomic_write(output) as file:
        figure.savefig(file, format="png")


def _columns(path: Path) -> dict[str, list[float]]:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return {name: [row[name] for row in rows] for name in rows[0]}
    except (ValueError, LookupError, TypeError):
        raise UserError(f"{path}: is damaged, so its curves can't be drawn; choose another --proj_dir") from None
