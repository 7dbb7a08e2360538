"""A diagnosis as one HTML page: plots, tables and the reading, without scripts or network.

The layout is in page.html.jinja; here is what its plots show. Jinja escapes every value: tokens are foreign text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from matrix_llm.diagnose.text import (
    choice_name,
    facts,
    group_name,
    number,
    percent,
    sections,
    shown_name,
    token_loss_notes,
)

COLOURS = ("#1f77b4", "#d62728", "#2ca02c")
LEFT, RIGHT, LENGTH, TOP, THICK = 150, 90, 430, 24, 13  # pixels: labels, counts, longest bar, first bar, one bar


@dataclass(frozen=True)
class Bar:
    """One horizontal bar, in pixels."""

    y: float
    """Its upper edge."""
    x: float
    """Its left end."""
    width: float
    """Its length."""
    colour: str
    """Its series."""
    figure: str
    """The value in words, to its right."""


@dataclass(frozen=True)
class Plot:
    """Groups of horizontal bars, a bar for each series."""

    title: str
    """What is shown."""
    series: list[tuple[str, str]]
    """(name, colour) of each series, in order."""
    labels: list[tuple[float, str]]
    """(middle, name) of each group."""
    bars: list[Bar]
    """From top to bottom."""
    zero: float
    """Where the bars start."""
    width: int = LEFT + LENGTH + RIGHT
    """Of the picture, in pixels."""

    @property
    def height(self) -> float:
        return max(bar.y for bar in self.bars) + THICK + 8


def draw_bars(
    title: str, groups: Mapping[str, Sequence[float | None]], series: Sequence[str], *, in_percent: bool = False
) -> Plot:
    """Bars from zero; negative ones go to the left. A value of None has no bar, and is shown as "-".

    Args:
        groups: {name: a value for each series}.
        in_percent: how the values are written.
    """
    values = [value for each in groups.values() for value in each if value is not None]
    low, high = min([0.0, *values]), max([0.0, *values])
    scale = LENGTH / (high - low) if high > low else 0.0
    zero, y = LEFT - low * scale, float(TOP)
    labels, bars = [], []
    for name, each in groups.items():
        labels.append((y + THICK * len(each) / 2 + 4, name))
        for value, colour in zip(each, COLOURS, strict=False):
            length = abs(value or 0.0) * scale
            figure = percent(value, 1) if in_percent else number(value, 3)
            bars.append(Bar(y, zero - length if (value or 0) < 0 else zero, length, colour, figure))
            y += THICK
        y += 7
    return Plot(title, list(zip(series, COLOURS, strict=False)), labels, bars, zero)


def plots(figures: Mapping[str, Any]) -> list[Plot]:
    """The page's plots, in order."""
    choices = list(figures["gradients"])
    names = [choice_name(name, figures) for name in choices]
    loss, gradients = figures["loss"], figures["gradients"]
    where = [(kind, group) for kind in ("by_kind", "by_ce") for group in loss[kind]]
    shares = {
        group_name(group): (each["share_of_positions"], each["share_of_ce"], each["share_of_mce"]["in use"])
        for group, each in loss["by_ce"].items()
    }
    means = {group_name(group): (loss[kind][group]["ce"], *loss[kind][group]["mce"].values()) for kind, group in where}
    found = [
        draw_bars("Shares by cross-entropy", shares, ["positions", "CE", f"MCE {names[0]}"], in_percent=True),
        draw_bars("Mean loss in nats", means, ["CE", *(f"MCE {name}" for name in names)]),
    ]
    for place, title in (("hidden", "hidden states"), ("head", "LM head's weight")):
        cosines = {
            group_name(group): [gradients[choice][kind][group]["mce"][place]["cosine"] for choice in choices]
            for kind, group in [("all", "all"), *where]
        }
        found.append(draw_bars(f"Cosine of MCE's gradient with CE's, {title}", cosines, names))
    losses = figures["token_losses"]["losses"][1:]  # CE is what they are compared with
    for what, title in (("cosine", "cosine with CE's gradient"), ("norm_ratio", "norm against CE's gradient")):
        measured = {
            shown_name(each["name"], figures["token_losses"]): [
                each["gradients"]["all"]["all"][place][what] for place in ("hidden", "head")
            ]
            for each in losses
        }
        found.append(draw_bars(f"Token losses: {title}", measured, ["hidden states", "LM head's weight"]))
    cosine_ranges = figures["forgiven"]["in use"]["by_cosine"]
    forgiven = {
        where: [figures["forgiven"][choice]["by_cosine"][where] for choice in choices] for where in cosine_ranges
    }
    found.append(draw_bars("What is forgiven, by |cosine| with the target", forgiven, names, in_percent=True))
    return found


def _heading(title: str) -> str:
    return title[0].upper() + title[1:].replace("\n", "; ")


def render_page(figures: Mapping[str, Any]) -> str:
    """The page of `diagnosis.diagnose`'s object."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("matrix_llm.diagnose", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("page.html.jinja").render(
        title=f"Diagnosis of {figures['model']['name']}",
        reading=figures["reading"],
        facts=facts(figures),
        plots=plots(figures),
        sections=[(_heading(title), head, rows) for title, head, rows in sections(figures) if rows],
        notes=token_loss_notes(figures),
        seconds=figures["cost"]["seconds"],
        versions=figures["versions"],
    )
