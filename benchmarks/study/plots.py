"""Pictures of the report: accuracy differences with their intervals, and curves over training."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from benchmarks.output import save_figure
from benchmarks.study.analysis import Contrast, Row
from benchmarks.study.design import ARMS
from benchmarks.study.tables import LABELS

DIFFERS, NO_DIFFERENCE = "#d62728", "#1f77b4"
CURVES = {
    "curve_ce": "training CE (nats)",
    "curve_rank_head": "effective rank, LM head",
    "curve_rank_hidden": "effective rank, hidden",
}


def draw_contrasts(contrasts: Sequence[Contrast], which: str, path: Path) -> None:
    """One line per contrast: seeds as dots, their mean a diamond, the bootstrap interval thick, the t interval thin."""
    figure = Figure(figsize=(7, 1.2 + 0.45 * len(contrasts)), layout="constrained")
    axes = figure.subplots()
    for place, c in enumerate(reversed(contrasts)):  # the first contrast at the top
        colour = DIFFERS if c.differs else NO_DIFFERENCE
        bootstrap = [100 * bound for bound in c.bootstrap]
        axes.plot(bootstrap, [place, place], color=colour, linewidth=5, alpha=0.35, solid_capstyle="butt")
        if len(c.seeds) > 1:
            axes.plot([100 * c.test.low, 100 * c.test.high], [place, place], color=colour, linewidth=1)
        axes.plot([100 * d for d in c.differences], [place] * len(c.seeds), "o", color=colour, markersize=3)
        axes.plot(100 * c.test.mean, place, "D", color=colour, markersize=6)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(contrasts)), [f"{c.arm} - {c.reference}" for c in reversed(contrasts)])
    axes.set(
        xlabel="accuracy difference, points; dots: seeds, thick: bootstrap 95 %, thin: t 95 %",
        title=LABELS.get(which, which),
    )
    axes.grid(alpha=0.3, axis="x")
    save_figure(figure, path)


def draw_curves(rows: Sequence[Row], path: Path) -> None:
    """Training CE and both effective ranks against steps, one line per arm: the mean over its seeds.

    A curve that no run has gets no panel.
    """
    found = {curve: title for curve, title in CURVES.items() if any(row.get(curve) for row in rows)} or CURVES
    figure = Figure(figsize=(1 + 4 * len(found), 4), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, (curve, title) in zip(panels, found.items(), strict=True):
        for place, arm in enumerate(ARMS):
            steps, means = mean_curve([row for row in rows if row["arm"] == arm.name], curve)
            if steps:
                axes.plot(steps, means, label=arm.name, color=colour_of(place), linewidth=1.4)
        axes.set(xlabel="optimizer step", title=title)
        axes.grid(alpha=0.3)
    if panels[0].lines:
        panels[0].set_yscale("log")
        panels[0].legend(fontsize=8)
    save_figure(figure, path)


def mean_curve(rows: Sequence[Row], curve: str) -> tuple[list[int], list[float]]:
    """Steps, and the mean over the rows at each step that any of them logged."""
    values: dict[int, list[float]] = {}
    for row in rows:
        for step, value in row.get(curve) or []:
            values.setdefault(step, []).append(value)
    steps = sorted(values)
    return steps, [float(np.mean(values[step])) for step in steps]


def colour_of(place: int) -> tuple[float, ...]:
    """The usual ten colours, which tab20 holds at its even places, and after them their light shades."""
    return matplotlib.colormaps["tab20"](2 * place if place < 10 else 2 * place - 19)
