"""The table of the token losses, made from the JSON alone."""

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.lm_head.losses import GROUPS
from benchmarks.lm_head.names import CE, OURS_CE
from benchmarks.output import markdown_table

Row = dict[str, Any]
HEADER = ["loss", "implementation", "forward + backward", "x our CE", "target", "extra memory"]


def times_our_ce(row: Row, name: str) -> float:
    """Median over the repeats of a call's time divided by that of our own CE in the same repeat."""
    pairs = zip(row["seconds"][name], row["seconds"][OURS_CE], strict=False)
    return statistics.median(seconds / of_ce for seconds, of_ce in pairs)


def memory_text(rows: Sequence[Row], timed: Row, name: str) -> str:
    same = {key: timed[key] for key in ("name", "shape", "loss")} | {"kind": "token loss memory"}
    found = [row for row in rows if same.items() <= row.items() and row["implementation"] == name]
    if not found:
        return "not measured"
    return found[0].get("failed") or f"{found[0]['extra'] / 2**20:,.0f} MiB"


def group_lines(rows: Sequence[Row], timed: Row) -> list[list[str]]:
    """Lines of one group: ours first, then the others, the fastest first. Our CE is a line of its own group alone."""
    label = timed["loss"]
    names = [name for name in timed["seconds"] if label == CE or name != OURS_CE]
    peers = sorted((name for name in names[1:]), key=lambda name: times_our_ce(timed, name))
    lines = []
    for name in [names[0], *peers]:
        seconds = timed["seconds"][name]
        middle, low, high = (f(seconds) for f in (statistics.median, min, max))
        target = GROUPS[label].target if name == names[0] else None
        lines.append([
            label, name, f"{middle:.3g} ({low:.3g} to {high:.3g}) s", f"{times_our_ce(timed, name):.3f}",
            "" if target is None else f"{target:.2f}", memory_text(rows, timed, name),
        ])  # fmt: skip
    lines += [[label, name, why, "", "", ""] for name, why in timed["absent"].items()]
    return lines


def losses_table(rows: Sequence[Row], name: str) -> str:
    """Every group measured at the shape of that name."""
    timed = [row for row in rows if row["kind"] == "token loss time" and row["name"] == name]
    timed.sort(key=lambda row: list(GROUPS).index(row["loss"]))
    n, h, v, dtype, device = timed[0]["shape"]
    repeats = sorted({len(seconds) for row in timed for seconds in row["seconds"].values()})
    busy = max(row["busy_elsewhere"] for row in timed)
    head = (
        f"N = {n}, H = {h}, V = {v}, {dtype}, {device}; {' or '.join(map(str, repeats))} interleaved repeats of each "
        f"loss's group with our own CE, median (least to most); other processes kept at most {busy:.2f} cores busy."
    )
    lines = [line for row in timed for line in group_lines(rows, row)]
    return f"{head}\n\n{markdown_table(HEADER, lines)}"


def group_text(row: Row) -> str:
    """One group as it is measured, for the console."""
    parts = [f"{name} {times_our_ce(row, name):.3f}" for name in row["seconds"]]
    return f"{row['loss']}: {', '.join(parts)} (others busy: {row['busy_elsewhere']:.2f} cores)"


def memory_line(row: Row) -> str:
    """One measurement of memory, for the console."""
    found = row.get("failed") or f"{row['extra'] / 2**20:,.0f} MiB extra"
    return f"{row['loss']}, {row['implementation']}: {found}"
