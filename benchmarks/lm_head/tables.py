"""Tables of what was measured, made from the JSON alone, so that no figure is copied by hand."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.lm_head.loss_tables import group_text, losses_table, memory_line
from benchmarks.lm_head.names import EAGER, OURS, OURS_AGAIN, OURS_CE, PRODUCTS
from benchmarks.output import markdown_table

Row = dict[str, Any]
MIB = 2**20
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Target:
    """At most this many times the best peer's."""

    time: float
    """Largest ratio of times."""
    memory: float
    """Largest ratio of peak memories."""


TARGETS = {
    "llemma-cpu": Target(1.10, 1.2),
    "qwen-cpu": Target(1.15, 1.2),
    "llemma-gpu": Target(1.10, 1.1),
    "qwen-gpu": Target(1.10, 1.1),
}


# --- reading rows ----------------------------------------------------------------------------------------------------


def median_seconds(row: Row) -> dict[str, float]:
    return {name: statistics.median(seconds) for name, seconds in row["seconds"].items() if seconds}


def memory_rows(rows: Sequence[Row], timed: Row) -> dict[str, Row]:
    """{implementation: its memory row} of the same sweep and shape as the timed row."""
    same = {"kind": timed["kind"].replace("time", "memory"), "name": timed["name"], "shape": timed["shape"]}
    return {row["implementation"]: row for row in rows if same.items() <= row.items()}


def total_bytes(row: Row) -> int | None:
    """Peak memory with the inputs; None if the measurement failed."""
    return row["extra"] + row["inputs"] if "extra" in row else None


def total_memory(memory: dict[str, Row]) -> dict[str, float]:
    return {name: float(total) for name, row in memory.items() if (total := total_bytes(row)) is not None}


def is_peer(name: str) -> bool:
    return name not in (OURS, OURS_AGAIN, OURS_CE, PRODUCTS)


def best_peer(values: dict[str, float]) -> str | None:
    """The peer with the least of something; None without a peer."""
    return min(filter(is_peer, values), key=values.__getitem__, default=None)


def shape_text(row: Row) -> str:
    n, h, v, dtype, device = row["shape"]
    return f"N = {n}, H = {h}, V = {v}, {dtype}, {device}"


def seconds_text(values: Sequence[float]) -> str:
    unit, scale = ("ms", 1000.0) if statistics.median(values) < 0.1 else ("s", 1.0)
    middle, low, high = (scale * f(values) for f in (statistics.median, min, max))
    return f"{middle:.3g} ({low:.3g} to {high:.3g}) {unit}"


def mib_text(size: float) -> str:
    return f"{size / MIB:,.0f} MiB"


# --- one row ---------------------------------------------------------------------------------------------------------


def shape_table(rows: Sequence[Row], timed: Row) -> str:
    """Time and memory of every implementation at one shape, the fastest first."""
    times, memory = median_seconds(timed), memory_rows(rows, timed)
    totals = total_memory(memory)
    fastest, smallest = best_peer(times), best_peer(totals)
    repeats = max(map(len, timed["seconds"].values()))

    lines = []
    for name, value in sorted(times.items(), key=lambda item: item[1]):
        seconds = timed["seconds"][name]
        few = f", {len(seconds)} repeats" if len(seconds) < repeats else ""
        slower = f"{value / times[fastest]:.2f}" if fastest else ""
        share = f"{100 * times[PRODUCTS] / value:.0f} %" if PRODUCTS in times else ""
        cells = [memory.get(name, {"failed": NOT_MEASURED}).get("failed", ""), "", ""]
        if name in totals:
            larger = f"{totals[name] / totals[smallest]:.2f}" if smallest else ""
            cells = [mib_text(memory[name]["extra"]), mib_text(totals[name]), larger]
        lines.append([name, seconds_text(seconds) + few, slower, share, *cells])

    head = f"{shape_text(timed)}; {repeats} interleaved repeats, median (least to most); best peer in time: {fastest}"
    head += f", in memory: {smallest}." if smallest else "."
    if PRODUCTS in times:
        n, h, v = timed["shape"][:3]
        head += f" The products ran at {6.0 * n * h * v / times[PRODUCTS] / 1e12:.3g} TFLOP/s."
    time_header = ["implementation", "forward + backward", "x best peer", "products' share"]
    table = markdown_table([*time_header, "extra memory", "with inputs", "x best peer"], lines)
    absent = "".join(f"\n\nAbsent: {name}, {why}." for name, why in timed["absent"].items())
    return f"{head}\n\n{table}{absent}"


def accuracy_text(row: Row) -> str:
    errors = f"{100 * row['value']:.2g} % in the value, {100 * row['gradient']:.2g} % in its gradient in the logits"
    text = f"Accuracy at the default settings on the same inputs, {row['positions']} positions with CE <= 2: {errors}. "
    if row["check"]:
        value, gradient = row["check"]
        text += (
            f"The reference itself is {value:.1e} / {gradient:.1e} from `exact` on {row['exact_positions']} positions. "
        )
    return text + f"Inputs: {', '.join(f'{name} {value:.3g}' for name, value in row['inputs'].items())}."


def ce_seconds(times: dict[str, float]) -> float:
    """Of CE alone, which costs of solvers are compared with: eager, or ours where eager does not fit."""
    return times.get(EAGER) or times[OURS_CE]


def solver_table(row: Row) -> str:
    times = median_seconds(row)
    lines = []
    for name, error in row["errors"].items():
        errors = [f"{100 * error[key]:.2g}" for key in ("value", "gradient")]
        lines.append([name, *errors, seconds_text(row["seconds"][name]), f"{times[name] / ce_seconds(times):.2f}"])
    against = "eager CE" if EAGER in times else "ours, mce_weight 0"
    head = f"{shape_text(row)}; errors on {row['positions']} positions with CE <= 2."
    table = markdown_table(["solver", "value, %", "logits' gradient, %", "CE + MCE", f"x {against}"], lines)
    return f"{head}\n\n{table}"


def step_peaks(row: Row) -> dict[str, int]:
    """Peak bytes of a training step by weight, where they could be measured."""
    return {weight: m["before"] + m["extra"] for weight, m in row["memory"].items() if "extra" in m}


def step_text(row: Row) -> str:
    s, times, peaks = row["shape"], median_seconds(row), step_peaks(row)
    lines = []
    for weight in ("0", "1"):
        peak = mib_text(peaks[weight]) if weight in peaks else row["memory"][weight]["failed"]
        lines.append([f"mce_weight {weight}", seconds_text(row["seconds"][weight]), peak])
    ratio = f"{peaks['1'] / peaks['0']:.3f}" if len(peaks) == 2 else ""
    lines.append(["ratio", f"{times['1'] / times['0']:.3f}", ratio])
    head = (
        f"Llama with {s['layers']} layers, hidden {s['hidden']}, V = {s['vocabulary']}, "
        f"batch {s['batch']} x {s['length']}, {s['device']}, gradient checkpointing, AdamW."
    )
    return f"{head}\n\n{markdown_table(['', 'step', 'peak memory'], lines)}"


def row_text(row: Row) -> str:
    """One row as it is measured, for the console."""
    if row["kind"].startswith("token loss"):
        return group_text(row) if row["kind"].endswith("time") else memory_line(row)
    if row["kind"].endswith("memory"):
        total = total_bytes(row)
        what = row["failed"] if total is None else f"{mib_text(row['extra'])} extra, {mib_text(total)} with inputs"
        return f"{row['name']} {row['shape'][:3]}, {row['implementation']}: {what}"
    if row["kind"].endswith("time"):
        return f"{row['name']}: {shape_table([], row)}"
    if row["kind"] == "accuracy":
        return f"{row['name']}: {accuracy_text(row)}"
    return step_text(row) if row["kind"] == "step" else solver_table(row)


# --- all rows --------------------------------------------------------------------------------------------------------


def machine_text(data: Row) -> str:
    m = data["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in m["versions"].items())
    dates = sorted({row["date"] for row in data["rows"].values()})
    gpu = f", {m['gpu']}" if m["gpu"] else ""
    days = " to ".join(sorted({dates[0], dates[-1]}))
    return f"Machine: {m['cpu']}, {m['cores']} cores, {m['threads']} threads{gpu}; {versions}; {days}."


def targets_table(rows: Sequence[Row]) -> str:
    """Ours against the best peer and the targets, at every shape that has one, and the training step of a 7B model."""
    timed = {row["name"]: row for row in rows if row["kind"] == "time"}
    accurate = {row["name"]: row for row in rows if row["kind"] == "accuracy"}
    lines = []
    for name, target in TARGETS.items():
        slower = larger = share = error = NOT_MEASURED
        if name in timed and OURS in timed[name]["seconds"]:
            times, totals = median_seconds(timed[name]), total_memory(memory_rows(rows, timed[name]))
            fastest, smallest = best_peer(times), best_peer(totals)
            slower = f"{times[OURS] / times[fastest]:.2f}" if fastest else NOT_MEASURED
            larger = f"{totals[OURS] / totals[smallest]:.2f}" if smallest and OURS in totals else NOT_MEASURED
            share = f"{100 * times[PRODUCTS] / times[OURS]:.0f} %"
        if name in accurate:
            error = f"{100 * accurate[name]['value']:.2g} % / {100 * accurate[name]['gradient']:.2g} %"
        lines.append([name, slower, f"{target.time:.2f}", larger, f"{target.memory:.1f}", share, error])

    slower = larger = NOT_MEASURED
    for row in rows:
        if row["kind"] == "step" and {"layers": 32, "hidden": 4096, "device": "cuda"}.items() <= row["shape"].items():
            times, peaks = median_seconds(row), step_peaks(row)
            slower = f"{times['1'] / times['0']:.3f}"
            larger = f"{peaks['1'] / peaks['0']:.3f}" if len(peaks) == 2 else NOT_MEASURED
            break
    lines.append(["7B training step", slower, "1.01", larger, "1.02", "", ""])
    header = ["shape", "time x best peer", "target", "memory x best peer", "target"]
    return markdown_table([*header, "products' share of the time", "error: value / gradient"], lines)


def sweep_tables(rows: Sequence[Row], letter: str) -> str:
    """Time and memory against N or V, one table for each combination of the other sizes; "" without such rows."""
    axis = "NHV".index(letter)
    timed = sorted((r for r in rows if r["kind"] == f"sweep {letter}, time"), key=lambda r: (r["name"], r["shape"]))
    series: dict[tuple[Any, ...], list[Row]] = {}
    for row in timed:
        others = (row["name"], *row["shape"][:axis], *row["shape"][axis + 1 :])
        series.setdefault(others, []).append(row)

    parts = []
    for same in series.values():
        names = list(dict.fromkeys(name for row in same for name in row["seconds"]))
        lines = []
        for row in same:
            times, totals = median_seconds(row), total_memory(memory_rows(rows, row))
            cells = [
                f"{times[name]:.3g} s, {mib_text(totals[name]) if name in totals else '-'}" if name in times else "-"
                for name in names
            ]
            lines.append([str(row["shape"][axis]), *cells])
        n, h, v, dtype, device = same[0]["shape"]
        fixed = f"H = {h}, V = {v}" if letter == "N" else f"N = {n}, H = {h}"
        head = f"{fixed}, {dtype}, {device}; median time, peak memory with inputs."
        parts.append(f"{head}\n\n{markdown_table([letter, *names], lines)}")
    return "\n\n".join(parts)


def markdown(files: Sequence[Row]) -> str:
    """Every table of docs/performance.md.

    Args:
        files: the parsed JSON files.
    """
    rows: list[Row] = [row for data in files for row in data["rows"].values()]
    accurate = {row["name"]: row for row in rows if row["kind"] == "accuracy"}
    commands = "\n".join(f"    {command}" for command in dict.fromkeys(row["command"] for row in rows))
    machines = "\n\n".join(machine_text(data) for data in files if data["rows"])
    parts = [machines, commands]
    if any(not row["kind"].startswith("token loss") for row in rows):
        parts += ["## Against the targets", targets_table(rows)]
    for row in rows:
        if row["kind"] == "time":
            parts += [f"## {row['name']}", shape_table(rows, row)]
            if row["name"] in accurate:
                parts.append(accuracy_text(accurate[row["name"]]))
    for name in dict.fromkeys(row["name"] for row in rows if row["kind"] == "token loss time"):
        parts += [f"## The token losses, {name}", losses_table(rows, name)]
    for letter in "NV":
        if text := sweep_tables(rows, letter):
            parts += [f"## Cost against {letter}", text]
    for row in rows:
        if row["kind"].startswith("solvers"):
            sweep = row["kind"].removeprefix("solvers, ")
            parts += [f"## Error against cost: {sweep}, {row['name']}", solver_table(row)]
    for row in rows:
        if row["kind"] == "step":
            parts += ["## A whole training step", step_text(row)]
    return "\n\n".join(parts)
