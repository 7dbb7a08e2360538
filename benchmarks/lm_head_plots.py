"""Tables and plots of what benchmarks/lm_head.py measured, made from its JSON alone, so that no figure is copied by hand."""

import statistics
from pathlib import Path
from typing import Any

Row = dict[str, Any]

OURS, OURS_AGAIN, OURS_CE = (
    "matrix_llm, CE + MCE",
    "matrix_llm, CE + MCE, later micro-batch",
    "matrix_llm, mce_weight 0",
)
PRODUCTS = "three products alone"
TARGETS = {"llemma-cpu": (1.10, 1.2), "qwen-cpu": (1.15, 1.2), "llemma-gpu": (1.10, 1.1), "qwen-gpu": (1.10, 1.1)}
MIB = 2**20


def _seconds(values: list[float]) -> str:
    unit, digits = ("ms", 1000.0) if statistics.median(values) < 0.1 else ("s", 1.0)
    return f"{digits * statistics.median(values):.3g} ({digits * min(values):.3g} to {digits * max(values):.3g}) {unit}"


def _percent(row: Row) -> str:
    return f"{100 * row['value']:.2g} % in the value, {100 * row['gradient']:.2g} % in its gradient in the logits"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _is_peer(name: str) -> bool:
    return name not in (OURS, OURS_AGAIN, OURS_CE, PRODUCTS)


def _best(values: dict[str, float]) -> tuple[str, float]:
    """The peer with the least, and how much that is."""
    peers = {name: value for name, value in values.items() if _is_peer(name)}
    name = min(peers, key=peers.__getitem__)
    return name, peers[name]


def _medians(row: Row) -> dict[str, float]:
    return {name: statistics.median(s) for name, s in row["seconds"].items() if s}


def _memory(rows: list[Row], timed: Row) -> dict[str, Row]:
    kind = timed["kind"].replace("time", "memory")
    mine = [r for r in rows if r["kind"] == kind and r["name"] == timed["name"] and r["shape"] == timed["shape"]]
    return {r["implementation"]: r for r in mine}


def _ratios(rows: list[Row], timed: Row) -> tuple[float, float | None]:
    """Ours over the best peer's, in time and in total memory."""
    times, memory = _medians(timed), _memory(rows, timed)
    totals = {name: float(r["extra"] + r["inputs"]) for name, r in memory.items() if "extra" in r}
    least = totals[OURS] / _best(totals)[1] if OURS in totals and any(map(_is_peer, totals)) else None
    return times[OURS] / _best(times)[1], least


def shape_table(rows: list[Row], timed: Row) -> str:
    times, memory = _medians(timed), _memory(rows, timed)
    totals = {name: float(r["extra"] + r["inputs"]) for name, r in memory.items() if "extra" in r}
    repeats = max(map(len, timed["seconds"].values()))
    flops = 6.0
    for size in timed["shape"][:3]:
        flops *= size
    lines = []
    for name, value in sorted(times.items(), key=lambda item: item[1]):
        row = memory.get(name, {"failed": "not measured"})
        cells = [row.get("failed", ""), "", ""]
        if name in totals:
            ratio = f"{totals[name] / _best(totals)[1]:.2f}" if any(map(_is_peer, totals)) else ""
            cells = [f"{row['extra'] / MIB:,.0f} MiB", f"{totals[name] / MIB:,.0f} MiB", ratio]
        share = f"{100 * times[PRODUCTS] / value:.0f} %" if PRODUCTS in times else ""
        few = f", {len(timed['seconds'][name])} repeats" if len(timed["seconds"][name]) < repeats else ""
        lines.append([name, _seconds(timed["seconds"][name]) + few, f"{value / _best(times)[1]:.2f}", share, *cells])
    n, h, v, dtype, device = timed["shape"]
    head = f"N = {n}, H = {h}, V = {v}, {dtype}, {device}; {repeats} interleaved repeats, median (least to most); "
    head += f"best peer in time: {_best(times)[0]}"
    head += f", in memory: {_best(totals)[0]}." if any(map(_is_peer, totals)) else "."
    if PRODUCTS in times:
        head += f" The products ran at {flops / times[PRODUCTS] / 1e12:.3g} TFLOP/s."
    header = [
        "implementation",
        "forward + backward",
        "x best peer",
        "products' share",
        "extra memory",
        "with inputs",
        "x best peer",
    ]
    absent = "".join(f"\n\nAbsent: {name}, {why}." for name, why in timed["absent"].items())
    return f"{head}\n\n{_table(header, lines)}{absent}"


def accuracy_text(row: Row) -> str:
    stats = ", ".join(f"{name} {value:.3g}" for name, value in row["inputs"].items())
    text = f"Accuracy at the default settings on the same inputs, {row['positions']} positions with CE <= 2: {_percent(row)}"
    text += ". "
    if row["check"]:
        value, gradient = row["check"]
        text += (
            f"The reference itself is {value:.1e} / {gradient:.1e} from `exact` on {row['exact_positions']} positions. "
        )
    return text + f"Inputs: {stats}."


def solver_table(row: Row) -> str:
    times = _medians(row)
    base = times.get("torch, eager") or times[OURS_CE]
    against = "eager CE" if "torch, eager" in times else "ours, mce_weight 0"
    lines = [
        [
            name,
            *(f"{100 * e[key]:.2g}" for key in ("value", "gradient")),
            _seconds(row["seconds"][name]),
            f"{times[name] / base:.2f}",
        ]
        for name, e in row["errors"].items()
    ]
    n, h, v, dtype, device = row["shape"]
    head = f"N = {n}, H = {h}, V = {v}, {dtype}, {device}; errors on {row['positions']} positions with CE <= 2."
    return head + "\n\n" + _table(["solver", "value, %", "logits' gradient, %", "CE + MCE", f"x {against}"], lines)


def step_text(row: Row) -> str:
    s, memory = row["shape"], row["memory"]
    times = _medians(row)
    lines = []
    for weight in ("0", "1"):
        m = memory[weight]
        peak = f"{(m['before'] + m['extra']) / MIB:,.0f} MiB" if "extra" in m else m["failed"]
        lines.append([f"mce_weight {weight}", _seconds(row["seconds"][weight]), peak])
    ratio = ""
    if all("extra" in m for m in memory.values()):
        ratio = f"{(memory['1']['before'] + memory['1']['extra']) / (memory['0']['before'] + memory['0']['extra']):.3f}"
    lines.append(["ratio", f"{times['1'] / times['0']:.3f}", ratio])
    head = f"Llama with {s['layers']} layers, hidden {s['hidden']}, V = {s['vocabulary']}, batch {s['batch']} x {s['length']}, {s['device']}, "
    return head + "gradient checkpointing, AdamW.\n\n" + _table(["", "step", "peak memory"], lines)


def row_text(row: Row) -> str:
    """One row as it is measured, for the console."""
    if row["kind"].endswith("memory"):
        what = (
            row.get("failed")
            or f"{row['extra'] / MIB:,.0f} MiB extra, {(row['extra'] + row['inputs']) / MIB:,.0f} MiB with inputs"
        )
        return f"{row['name']} {row['shape'][:3]}, {row['implementation']}: {what}"
    if row["kind"].endswith("time"):
        return f"{row['name']}: " + shape_table([], row)
    if row["kind"] == "accuracy":
        return f"{row['name']}: " + accuracy_text(row)
    return step_text(row) if row["kind"] == "step" else solver_table(row)


def _machine(data: Row) -> str:
    m = data["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in m["versions"].items())
    dates = sorted({row["date"] for row in data["rows"].values()})
    gpu = f", {m['gpu']}" if m["gpu"] else ""
    return f"Machine: {m['cpu']}, {m['cores']} cores, {m['threads']} threads{gpu}; {versions}; {' to '.join(sorted({dates[0], dates[-1]}))}."


def _sweep_tables(rows: list[Row], letter: str) -> str:
    timed = sorted((r for r in rows if r["kind"] == f"sweep {letter}, time"), key=lambda r: (r["name"], r["shape"]))
    parts = []
    axis = "NHV".index(letter)
    series: dict[tuple[Any, ...], list[Row]] = {}
    for r in timed:
        series.setdefault((r["name"], *r["shape"][:axis], *r["shape"][axis + 1 :]), []).append(r)
    for mine in series.values():
        names = list(dict.fromkeys(n for r in mine for n in r["seconds"]))
        lines = []
        for r in mine:
            memory, cells = _memory(rows, r), [str(r["shape"][axis])]
            for n in names:
                m = memory.get(n, {})
                peak = f"{(m['extra'] + m['inputs']) / MIB:,.0f} MiB" if "extra" in m else "-"
                cells.append(f"{_medians(r)[n]:.3g} s, {peak}" if r["seconds"].get(n) else "-")
            lines.append(cells)
        n, h, v, dtype, device = mine[0]["shape"]
        fixed = f"H = {h}, V = {v}" if letter == "N" else f"N = {n}, H = {h}"
        parts.append(
            f"{fixed}, {dtype}, {device}; median time, peak memory with inputs.\n\n" + _table([letter, *names], lines)
        )
    return "\n\n".join(parts)


def markdown(files: list[Row]) -> str:
    """Every table of docs/performance.md."""
    rows: list[Row] = [row for data in files for row in data["rows"].values()]
    commands = "\n".join(f"    {c}" for c in dict.fromkeys(row["command"] for row in rows))
    parts = ["\n\n".join(_machine(data) for data in files if data["rows"]), commands, "## Against the targets"]
    timed = {r["name"]: r for r in rows if r["kind"] == "time"}
    accurate = {r["name"]: r for r in rows if r["kind"] == "accuracy"}
    lines = []
    for name, (time, memory) in TARGETS.items():
        cells = ["not measured"] * 4
        if name in timed and OURS in timed[name]["seconds"]:
            ratio, least = _ratios(rows, timed[name])
            share = _medians(timed[name])[PRODUCTS] / _medians(timed[name])[OURS]
            cells = [
                f"{ratio:.2f}",
                "not measured" if least is None else f"{least:.2f}",
                f"{100 * share:.0f} %",
                "not measured",
            ]
        if name in accurate:
            cells[3] = f"{100 * accurate[name]['value']:.2g} % / {100 * accurate[name]['gradient']:.2g} %"
        lines.append([name, cells[0], f"{time:.2f}", cells[1], f"{memory:.1f}", *cells[2:]])
    step = next(
        (
            r
            for r in rows
            if r["kind"] == "step"
            and (r["shape"]["layers"], r["shape"]["hidden"], r["shape"]["device"]) == (32, 4096, "cuda")
        ),
        None,
    )
    slower = f"{_medians(step)['1'] / _medians(step)['0']:.3f}" if step else "not measured"
    peak = "not measured"
    if step and all("extra" in m for m in step["memory"].values()):
        peak = f"{sum(step['memory']['1'].values()) / sum(step['memory']['0'].values()):.3f}"
    lines.append(["7B training step", slower, "1.01", peak, "1.02", "", ""])
    header = [
        "shape",
        "time x best peer",
        "target",
        "memory x best peer",
        "target",
        "products' share of the time",
        "error: value / gradient",
    ]
    parts.append(_table(header, lines))
    for row in (r for r in rows if r["kind"] == "time"):
        parts += [f"## {row['name']}", shape_table(rows, row)]
        if row["name"] in accurate:
            parts.append(accuracy_text(accurate[row["name"]]))
    for letter in "NV":
        if text := _sweep_tables(rows, letter):
            parts += [f"## Cost against {letter}", text]
    for row in (r for r in rows if r["kind"].startswith("solvers")):
        parts += [f"## Error against cost: {row['kind'].split(', ')[1]}, {row['name']}", solver_table(row)]
    for row in (r for r in rows if r["kind"] == "step"):
        parts += ["## A whole training step", step_text(row)]
    return "\n\n".join(parts)


def draw(files: list[Row], folder: Path) -> str:
    """lm_head_cost.png (time and memory against N) and lm_head_solvers.png (error against cost), of the rows there are."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from matrix_llm.base.files import atomic_path

    rows: list[Row] = [row for data in files for row in data["rows"].values()]
    written = []

    def save(figure: Any, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / name) as temporary:
            figure.savefig(temporary, dpi=150)
        plt.close(figure)
        written.append(str(folder / name))

    swept = sorted((r for r in rows if r["kind"] == "sweep N, time"), key=lambda r: r["shape"])
    if swept:
        last = swept[-1]["name"]  # one machine's, where the files hold several
        swept = [r for r in swept if r["name"] == last]
        figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
        colours = iter(
            ["#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#bcbd22", "#7f7f7f"]
        )
        for name in dict.fromkeys(n for r in swept for n in r["seconds"]):
            look: Row = {"label": name, "marker": "o", "markersize": 4, "color": next(colours)}
            look |= (
                {"color": "#d62728", "linewidth": 2.5}
                if name == OURS
                else {"color": "black", "ls": ":"}
                if name == PRODUCTS
                else {}
            )
            points = [(r["shape"][0], statistics.median(r["seconds"][name])) for r in swept if r["seconds"].get(name)]
            panels[0].plot(*zip(*points, strict=True), **look)
            peaks = [(r["shape"][0], _memory(rows, r).get(name, {})) for r in swept]
            peaks = [(n, (m["extra"] + m["inputs"]) / MIB) for n, m in peaks if "extra" in m]
            if peaks:
                panels[1].plot(*zip(*peaks, strict=True), **look)
        _, h, v, dtype, device = swept[0]["shape"]
        for panel, label in zip(panels, ("seconds, forward + backward", "peak memory with inputs, MiB"), strict=True):
            panel.set(xscale="log", yscale="log", xlabel="positions N", ylabel=label)
            panel.set_xscale("log", base=2)
            panel.grid(alpha=0.3, which="both")
        panels[0].legend(fontsize=7)
        figure.suptitle(f"LM head and loss, H = {h}, V = {v}, {dtype}, {device}")
        save(figure, "lm_head_cost.png")
    solved = [r for r in rows if r["kind"].startswith("solvers")]
    number = 0
    if solved:
        figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained", sharex=True)
        for row in solved:
            times = _medians(row)
            base = times.get("torch, eager") or times[OURS_CE]
            families: dict[str, list[str]] = {}
            for name in row["errors"] if row is solved[0] else [n for n in row["errors"] if n != "the default"]:
                families.setdefault(name if name == "the default" else _family(name), []).append(name)
            for family, members in families.items():
                star = family == "the default"
                look = {
                    "label": family,
                    "marker": "*" if star else "o",
                    "markersize": 13 if star else 4,
                    "zorder": 3 if star else 2,
                }
                look |= {"color": "black"} if star else {"color": f"C{number % 10}"}
                number += not star
                for panel, key in zip(panels, ("value", "gradient"), strict=True):
                    panel.plot(
                        [times[m] / base for m in members], [100 * row["errors"][m][key] for m in members], **look
                    )
        for panel, label, target in zip(panels, ("value", "gradient in the logits"), (1, 5), strict=True):
            panel.axhline(target, color="grey", ls="--", lw=1)
            panel.set(
                xscale="log", yscale="log", xlabel="time of CE + MCE, in units of eager CE", ylabel=f"error, {label}, %"
            )
            panel.grid(alpha=0.3, which="both")
        panels[1].legend(fontsize=7)
        save(figure, "lm_head_solvers.png")
    return (
        "\n".join(written)
        or "no sweep of N and no solver table in the JSON yet: nothing to draw; measure with --sweep N steps sketch."
    )


def _family(name: str) -> str:
    """Settings joined by a line: all but the number of steps, or all but the width of the sketch.

    >>> _family("top 64, 6 steps"), _family("top 64, 6 steps, sketch 128")
    ('top 64', 'top 64, 6 steps, sketch')
    """
    words = name.split(", ")
    return ", ".join([*words[:-1], "sketch"]) if words[-1].startswith("sketch") else words[0]
