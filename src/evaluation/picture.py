"""The curves of a run over its optimizer steps, as one PNG and as SVGs for its report."""

import io
import math
import re
from pathlib import Path
from typing import Any

from src.files import atomic_write
from src.run_files import read_lines

# Numbers by name, one a line of their file.
Columns = dict[str, list[float]]

# Each picture: its title, then what is drawn in it where the run has it: column, label, colour, dots for held-out pairs.
PANELS = (
    ("preferred: share of pairs with margin > 0",
     ("pref_accuracy", "each step", "#a5c8e4", False), ("pref_percentage", "pref-percentage", "tab:blue", False),
     ("accuracy", "held out", "black", True)),
    ("losses (nats)",
     ("dpo_loss", "DPO", "tab:red", False), ("preference_loss", "preference", "tab:red", False),
     ("sft_loss", "SFT, per token of chosen", "tab:green", False),
     ("dpo_loss", "DPO, held out", "tab:red", True), ("preference_loss", "preference, held out", "tab:red", True),
     ("sft_loss", "SFT, held out", "tab:green", True)),
    ("rewards (β · nats)",
     ("reward_chosen", "chosen", "tab:green", False), ("reward_rejected", "rejected", "tab:red", False),
     ("margin", "margin", "tab:purple", False), ("margin", "margin, held out", "black", True)),
    ("learning rate", ("lr", "highest of the layers", "tab:orange", False)),
    ("gradient norm, before clipping", ("grad_norm", "gradient norm", "tab:brown", False)),
    ("speed", ("tokens_per_s", "tokens a second", "tab:gray", False)),
)
CURVES = 3  # of them are in the PNG
# More points than a screen has columns are drawn as the means of so many groups.
MOST_POINTS = 1000
# What is beyond, matplotlib finds no scale for; no run has it, but a file may.
LARGEST = 1e100


def draw_curves(steps: Columns, held_out: Columns, output: Path) -> None:
    """Write `output`, a PNG, unless there is nothing to draw.

    Args:
        steps: metrics.jsonl by column, one value a line.
        held_out: eval.jsonl likewise.
    """
    # Takes a second to import, and the scripts that never draw need not wait for it.
    from matplotlib.figure import Figure

    panels = [panel for panel in PANELS[:CURVES] if _drawn(panel, steps, held_out)]
    if not panels:
        return
    figure = Figure(figsize=(13 / 3 * len(panels), 3.8), layout="constrained", dpi=110)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw(axes, panel, steps, held_out)
    with atomic_write(output) as file:
        figure.savefig(file, format="png")


def curve_svgs(steps: Columns, held_out: Columns) -> list[str]:
    """The same curves and a few more, each an `<svg>` element that stands in HTML without naming anything outside of it."""
    import matplotlib
    from matplotlib.figure import Figure

    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    svgs = []
    for number, panel in enumerate(PANELS):
        if not _drawn(panel, steps, held_out):
            continue
        # Text stays text; a salt of its own keeps the ids of one drawing apart from another's and every report the same.
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": str(number), "svg.id": f"curve-{number}"}):
            figure = Figure(figsize=(5, 3.3), layout="constrained")
            _draw(figure.subplots(), panel, steps, held_out)
            drawing = io.StringIO()
            figure.savefig(drawing, format="svg", metadata=nothing, transparent=True)
        svg = drawing.getvalue()
        svgs.append(re.sub(r'\s+xmlns(:xlink)?="[^"]*"', "", svg[svg.index("<svg"):]))
    return svgs


def _drawn(panel: tuple, steps: Columns, held_out: Columns) -> bool:
    return any(column in (held_out if dots else steps) for column, _, _, dots in panel[1:])


def _draw(axes: Any, panel: tuple, steps: Columns, held_out: Columns) -> None:
    axes.set_title(panel[0], fontsize=10)
    for column, label, colour, dots in panel[1:]:
        values = held_out if dots else steps
        if column in values:
            axes.plot(thinned(values["step"]), thinned(values[column]), "o--" if dots else "-", color=colour, label=label,
                      linewidth=1.2, markersize=4)
    if "share" in panel[0]:
        axes.set_ylim(-0.02, 1.02)
    axes.ticklabel_format(axis="y", scilimits=(-3, 5))
    axes.set_xlabel("optimizer step")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, framealpha=0.5)


def thinned(values: list[float]) -> list[float]:
    """At most MOST_POINTS means of neighbours. NaN, where there is no value, and what is beyond LARGEST has no part in them."""
    size = -(-len(values) // MOST_POINTS)
    groups = [[value for value in values[start:start + size] if abs(value) <= LARGEST] for start in range(0, len(values), size)]
    return [sum(group) / len(group) if group else math.nan for group in groups]


def read_columns(path: Path) -> Columns:
    """Those of a .jsonl of numbers; none where there is no file. Raises UserError where it is damaged."""
    return columns(read_lines(path))


def columns(rows: list[dict[str, float]]) -> Columns:
    """Lines of numbers by name, NaN where a line lacks one; nothing where there is no line."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [float(row.get(name, math.nan)) for row in rows] for name in names}
