"""Pictures of what was measured, made from the JSON alone."""

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.lm_head.names import OURS, PRODUCTS
from benchmarks.lm_head.tables import MIB, Row, ce_seconds, median_seconds, memory_rows, total_memory
from benchmarks.output import save_figure

PEERS = ["#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#bcbd22", "#7f7f7f"]
LOOKS: dict[str, Row] = {OURS: {"color": "#d62728", "linewidth": 2.5}, PRODUCTS: {"color": "black", "ls": ":"}}
DEFAULT = "the default"  # a solver's settings


def draw(files: Sequence[Row], folder: Path) -> list[Path]:
    """Draw lm_head_cost.png and lm_head_solvers.png, as far as there are rows for them; returns what was written."""
    rows: list[Row] = [row for data in files for row in data["rows"].values()]
    swept = sorted((row for row in rows if row["kind"] == "sweep N, time"), key=lambda row: row["shape"])
    solved = [row for row in rows if row["kind"].startswith("solvers")]
    written = []
    if swept:
        last = swept[-1]["name"]  # one machine's, where the files hold several
        written.append(folder / "lm_head_cost.png")
        save_figure(draw_cost(rows, [row for row in swept if row["name"] == last]), written[-1], dpi=150)
    if solved:
        written.append(folder / "lm_head_solvers.png")
        save_figure(draw_solvers(solved), written[-1], dpi=150)
    return written


def draw_cost(rows: Sequence[Row], swept: Sequence[Row]) -> Figure:
    """Time and memory against N, a line for each implementation.

    Args:
        rows: all rows, among them those of the memory.
        swept: rows of the time, in order of N.
    """
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, 2)
    names = list(dict.fromkeys(name for row in swept for name in row["seconds"]))
    for name, colour in zip(names, itertools.cycle(PEERS)):
        look = {"label": name, "marker": "o", "markersize": 4, "color": colour, **LOOKS.get(name, {})}
        timed = [row for row in swept if row["seconds"].get(name)]
        seconds = [statistics.median(row["seconds"][name]) for row in timed]
        panels[0].plot([row["shape"][0] for row in timed], seconds, **look)
        totals = {row["shape"][0]: total_memory(memory_rows(rows, row)) for row in swept}
        peaks = {n: total[name] / MIB for n, total in totals.items() if name in total}
        if peaks:
            panels[1].plot(list(peaks), list(peaks.values()), **look)
    for panel, label in zip(panels, ("seconds, forward + backward", "peak memory with inputs, MiB"), strict=True):
        panel.set(xscale="log", yscale="log", xlabel="positions N", ylabel=label)
        panel.set_xscale("log", base=2)
        panel.grid(alpha=0.3, which="both")
    panels[0].legend(fontsize=7)
    _, h, v, dtype, device = swept[0]["shape"]
    figure.suptitle(f"LM head and loss, H = {h}, V = {v}, {dtype}, {device}")
    return figure


def draw_solvers(solved: Sequence[Row]) -> Figure:
    """Error against cost, a line for each family of settings, the default as a star."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True)
    number = 0
    for row in solved:
        times = median_seconds(row)
        families: dict[str, list[str]] = {}
        for name in row["errors"]:
            if name != DEFAULT or row is solved[0]:  # every row has it, and one star is enough
                families.setdefault(family_of(name), []).append(name)
        for family, members in families.items():
            if family == DEFAULT:
                look: Row = {"marker": "*", "markersize": 13, "zorder": 3, "color": "black"}
            else:
                look = {"marker": "o", "markersize": 4, "zorder": 2, "color": f"C{number % 10}"}
                number += 1
            costs = [times[member] / ce_seconds(times) for member in members]
            for panel, key in zip(panels, ("value", "gradient"), strict=True):
                panel.plot(costs, [100 * row["errors"][m][key] for m in members], label=family, **look)
    for panel, label, target in zip(panels, ("value", "gradient in the logits"), (1, 5), strict=True):
        panel.axhline(target, color="grey", ls="--", lw=1)
        panel.set(
            xscale="log", yscale="log", xlabel="time of CE + MCE, in units of eager CE", ylabel=f"error, {label}, %"
        )
        panel.grid(alpha=0.3, which="both")
    panels[1].legend(fontsize=7)
    return figure


def family_of(name: str) -> str:
    """Settings joined by a line: all but the number of steps, or all but the width of the sketch.

    >>> family_of("top 64, 6 steps"), family_of("top 64, 6 steps, sketch 128")
    ('top 64', 'top 64, 6 steps, sketch')
    """
    words = name.split(", ")
    return ", ".join([*words[:-1], "sketch"]) if words[-1].startswith("sketch") else words[0]
