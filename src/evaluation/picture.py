"""A run's curves over its optimizer steps, as one PNG and as SVGs for its report."""

import io
import math
import re
from pathlib import Path
from typing import Any

from src.files import atomic_write
from src.run_files import read_lines

# Numbers by name, one value for each line of the file.
Columns = dict[str, list[float]]

# Each panel: its title, then its curves (column, label, colour, dots for held-out pairs), drawn if the run has the column.
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
    ("KL to the base (nats)", ("kl", "each step", "tab:blue", False), ("kl", "held out", "black", True)),
    ("learning rate", ("lr", "highest of the layers", "tab:orange", False)),
    ("gradient norm, before clipping", ("grad_norm", "gradient norm", "tab:brown", False)),
    ("speed", ("tokens_per_s", "tokens a second", "tab:gray", False)),
)
CURVES = 3  # the PNG has the first of them
# More points than this, about a screen's columns, are drawn as means of groups.
MOST_POINTS = 1000
# matplotlib finds no scale for larger values; no run has them, but a file may.
LARGEST = 1e100


def draw_curves(steps: Columns, held_out: Columns, output: Path) -> None:
    """Write `output`, a PNG, unless there is nothing to draw.

    Args:
        steps: metrics.jsonl by column, one value a line.
        held_out: eval.jsonl likewise.
    """
    # Takes a second to import, which scripts that never draw should not pay.
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
    """The same curves and a few more, each an `<svg>` element for HTML that refers to nothing outside of it."""
    import matplotlib
    from matplotlib.figure import Figure

    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    svgs = []
    for number, panel in enumerate(PANELS):
        if not _drawn(panel, steps, held_out):
            continue
        # Text stays text. A fixed salt for each drawing keeps ids distinct within a page and the same in every report.
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
    """At most MOST_POINTS means of neighbours, without NaN, which stands for a missing value, and values beyond LARGEST."""
    size = -(-len(values) // MOST_POINTS)
    groups = [[value for value in values[start:start + size] if abs(value) <= LARGEST] for start in range(0, len(values), size)]
    return [sum(group) / len(group) if group else math.nan for group in groups]


def read_columns(path: Path) -> Columns:
    """The columns of a .jsonl of numbers; empty if there is no file. Raises UserError if it is damaged."""
    return columns(read_lines(path))


def columns(rows: list[dict[str, float]]) -> Columns:
    """Lines of numbers as columns by name, NaN where a line lacks one."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [float(row.get(name, math.nan)) for row in rows] for name in names}
