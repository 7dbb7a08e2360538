"""A diagnosis on the screen: tables at most 100 columns wide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

WIDTH = 96
LONGEST = 17  # characters of a token loss's name in its table
SHOWN_KINDS = ("digits", "operators", "words")  # there: the others have no room
CE_HEADS = {"CE < 0.5": "CE<0.5", "0.5 to 2": "0.5-2", "2 to 5": "2-5", "CE >= 5": ">=5"}
Table = tuple[str, list[str], list[list[str]]]  # title, head, rows


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; the first is aligned left, the others right.

    >>> print(table(["token", "CE"], [["digits", "0.5"]]))
    token    CE
    digits  0.5
    """
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = []
    for row in (head, *rows):
        cells = [cell.ljust(width) if place == 0 else cell.rjust(width) for place, (cell, width) in
                 enumerate(zip(row, widths, strict=True))]  # fmt: skip
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def number(value: float | None, digits: int = 2) -> str:
    """A figure, or "-" where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def percent(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def ratio(value: float | None) -> str:
    """A ratio of norms: two decimals, or two digits where it is too small for them.

    >>> ratio(1.234), ratio(0.00123), ratio(None)
    ('1.23', '0.0012', '-')
    """
    return number(value) if value is None or value == 0 or value >= 0.1 else f"{value:.2g}"


def choice_name(name: str, figures: Mapping[str, Any]) -> str:
    """A choice of token vectors as the recipe spells it."""
    return str(figures["settings"]["mce_embeddings"]) if name == "in use" else name


def group_name(name: str) -> str:
    """A group of positions as it is shown beside others: a range of CE says that it is one.

    >>> group_name("digits"), group_name("2 to 5"), group_name("CE >= 5")
    ('digits', 'CE 2 to 5', 'CE >= 5')
    """
    return f"CE {name}" if name[0].isdigit() else name


def sections(figures: Mapping[str, Any]) -> list[Table]:
    """Every table, for the screen and the page."""
    return [
        _head(figures),
        _nearest(figures),
        _losses(figures),
        *(_forgiven(figures, name) for name in figures["forgiven"]),
        *(_gradients(figures, name) for name in figures["gradients"]),
        _token_losses(figures),
        _solver_by_ce(figures),
        _solver(figures),
    ]


def render(figures: Mapping[str, Any]) -> str:
    """The whole diagnosis as text."""
    parts = ["\n".join(f"{name:<10} {value}" for name, value in facts(figures))]
    parts += [f"{_heading(title)}\n{table(head, rows)}" for title, head, rows in sections(figures) if rows]
    reading = [fill(line, WIDTH, initial_indent="- ", subsequent_indent="  ") for line in figures["reading"]]
    parts.append("# in words\n" + "\n".join(reading))
    each_loss = [
        fill(f"{name}: {line}", WIDTH, initial_indent="- ", subsequent_indent="  ")
        for name, line in token_loss_notes(figures)
    ]
    parts.append("# the token losses in words\n" + "\n".join(each_loss))
    return "\n\n".join(parts)


def _heading(title: str) -> str:
    return "\n".join(fill(line, WIDTH, initial_indent="# ", subsequent_indent="#   ") for line in title.split("\n"))


def facts(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, value): what was measured, and at what cost."""
    model, rows, settings, cost = (figures[key] for key in ("model", "rows", "settings", "cost"))
    solver, seconds = settings["solver"], sum(cost["seconds"].values())
    kept = "the whole vocabulary" if solver["whole_vocabulary"] else f"{solver['top_k']} tokens and moments"
    how = {"krylov": f"krylov, {solver['steps']} steps, {kept}", "taylor": f"taylor, order {solver['order']}"}
    sketch = f", sketch of {solver['sketch_dim']}" if solver["sketch_dim"] else ""
    dropped = sum(rows[key] for key in ("dropped_too_long", "dropped_without_trained_token", "dropped_weight_zero"))
    lines = [
        ("model", f"{model['name']}: {model['architecture']}, {model['parameters'] / 1e6:,.1f} M parameters, "
                  f"{model['vocabulary']:,} tokens of width {model['hidden_width']}"),
        ("rows", f"{rows['dataset']}: {rows['read']:,} read, {dropped:,} dropped, {rows['rows_used']:,} used; "
                 f"template {rows['prompt_template']}"),
        ("positions", f"{rows['positions']:,} of the {rows['trained_positions_in_them']:,} trained ones in these rows"),
        ("MCE", f"weight {settings['mce_weight_shown']:g}, {how.get(solver['name'], solver['name'])}{sketch}, vectors "
                f"{settings['mce_embeddings']}"),
        ("cost", f"{seconds:.0f} s ({cost['cpu_seconds']:.0f} s of CPU time), "
                 f"{cost['peak_memory_gib']:.1f} GiB at the peak, on {cost['device']}"),
    ]  # fmt: skip
    if model["base_of_adapter"]:
        lines.insert(1, ("adapter", f"merged into {model['base_of_adapter']}"))
    return lines + [("not used", line) for line in settings["not_applied"]]


def _head(figures: Mapping[str, Any]) -> Table:
    heads = figures["head"]
    rows = [
        ["mean cosine of two", *(number(each["mean_cosine"], 3) for each in heads.values())],
        ["effective rank", *(f"{each['effective_rank']:.0f} of {each['width']}" for each in heads.values())],
        ["zero", *(str(each["zero_rows"]) for each in heads.values())],
        ["duplicates of another", *(str(each["duplicate_rows"]) for each in heads.values())],
    ]
    names = ("smallest", "5 %", "median", "95 %", "largest")
    for place, name in enumerate(names):
        rows.append([f"norm, {name}", *(number(each["norm_quantiles"][place], 3) for each in heads.values())])
    return "token vectors", ["", *(choice_name(name, figures) for name in heads)], rows


def _nearest(figures: Mapping[str, Any]) -> Table:
    found = figures["head"]["in use"]
    rows = [
        [each["token"]["text"], each["nearest"]["text"], number(each["cosine"], 3)] for each in found["nearest"][:12]
    ]
    title = f"the nearest token of a target: the {len(rows)} closest of {found['nearest_of']} targets"
    return title, ["target", "nearest", "cosine"], rows


def _losses(figures: Mapping[str, Any]) -> Table:
    names = list(figures["head"])
    rows = []
    for groups in figures["loss"].values():
        for name, each in groups.items():
            mce = [number(each["mce"][choice], 3) for choice in names]
            share = [percent(each["share_of_mce"]["in use"])]
            rows.append([group_name(name), str(each["positions"]), percent(each["share_of_positions"]),
                         number(each["ce"], 3), percent(each["share_of_ce"]), *mce, *share])  # fmt: skip
    mce_names = [f"MCE {choice_name(name, figures)}" for name in names]
    head = ["", "positions", "share", "CE", "of all CE", *mce_names, "of all MCE"]
    return "losses, means in nats", head, rows


def _forgiven(figures: Mapping[str, Any], name: str) -> Table:
    found = figures["forgiven"][name]
    spread = ", ".join(f"{percent(share)} {where}" for where, share in found["by_cosine"].items())
    title = (
        f"forgiven with {choice_name(name, figures)}: CE - MCE = {found['nats']:.3f} nats\n"
        f"by |cosine| with the target: {spread}"
    )
    rows = [
        [each["target"]["text"], each["token"]["text"], percent(each["share"], 1), str(each["positions"]),
         number(each["probability"], 3), number(each["cosine"], 3)]
        for each in found["pairs"][:10]
    ]  # fmt: skip
    return title, ["target", "forgiven token", "share", "positions", "probability", "cosine"], rows


def _gradients(figures: Mapping[str, Any], name: str) -> Table:
    weight = figures["settings"]["mce_weight_shown"]
    rows = []
    for groups in figures["gradients"][name].values():
        for group, found in groups.items():
            cells = [group_name(group)]
            for loss in ("mce", "sum"):
                for place in ("hidden", "head"):
                    each = found[loss][place]
                    cells += [number(each["cosine"], 3), number(each["norm_ratio"])]
            rows.append(cells)
    both = "CE+MCE" if weight == 1 else f"CE+{weight:g}MCE"
    head = [""]
    for loss in ("MCE", both):
        for place in ("hidden", "head"):
            head += [f"{loss} {place}", "norm"]
    return f"cosine with CE's gradient and norm against it, with {choice_name(name, figures)}", head, rows


def _token_losses(figures: Mapping[str, Any]) -> Table:
    found, rows = figures["token_losses"], []
    kinds = [name for name in SHOWN_KINDS if name in figures["loss"]["by_kind"]]
    ranges = list(figures["loss"]["by_ce"])
    for each in found["losses"]:
        whole = each["gradients"]["all"]["all"]
        cells = [shown_name(each["name"], found), number(each["value"], 3)]
        for place in ("hidden", "head"):
            cells += [number(whole[place]["cosine"], 3), ratio(whole[place]["norm_ratio"])]
        groups = [each["gradients"]["by_kind"][kind] for kind in kinds] + [
            each["gradients"]["by_ce"][name] for name in ranges
        ]
        rows.append(cells + [percent(group["share_of_gradient"]) for group in groups])
    title = (
        "token losses: mean in nats, cosine with CE's gradient and norm against it, share of its gradient by label\n"
        f"a run with these settings trains {found['own']}"
    )
    head = ["", "value", "hidden", "norm", "head", "norm", *kinds, *(CE_HEADS[name] for name in ranges)]
    return title, head, rows


def shown_name(name: str, found: Mapping[str, Any]) -> str:
    """A token loss in the table: the recipe's own may have a name too long for the screen, and the title says it."""
    if len(name) <= LONGEST:
        return name
    return "the run's" if name == found["own"] else "the run's, no MCE"


def token_loss_notes(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, sentence) of each token loss, then (names, reason) of those that are not shown."""
    found = figures["token_losses"]
    reasons: dict[str, list[str]] = {}
    for name, why in found["left_out"].items():
        reasons.setdefault(why, []).append(name)
    return [*found["reading"].items(), *((", ".join(names), f"not shown: {why}.") for why, names in reasons.items())]


def _solver_by_ce(figures: Mapping[str, Any]) -> Table:
    rows = []
    for name, found in figures["solver"].items():
        for where, each in found["by_ce"].items():
            label = f"{choice_name(name, figures)}, {group_name(where)}"
            rows.append([label, str(each["positions"]), percent(each["value"], 2), percent(each["logits"], 2)])
    return "the solver's mean error, by CE", ["", "positions", "value", "logits' gradient"], rows


def _solver(figures: Mapping[str, Any]) -> Table:
    rows = []
    for name, found in figures["solver"].items():
        exact = found["exact_against_ce"]
        rows.append([choice_name(name, figures), percent(found["sum_of_values"], 2), percent(found["hidden"], 2),
                     percent(found["head"], 2), number(exact["hidden"]["cosine"], 3),
                     number(exact["hidden"]["norm_ratio"])])  # fmt: skip
    checks = "; ".join(
        f"{choice_name(name, figures)}: value {found['reference_value']:.0e}, gradient {found['reference_logits']:.0e} "
        f"from {found['reference_check']}"
        for name, found in figures["solver"].items()
    )
    title = f"the solver's error over all these positions\nreference: 32 steps, whole vocabulary; {checks}"
    head = ["", "sum of MCE", "hidden, whole loss", "head, whole loss", "exact cosine", "exact norm"]
    return title, head, rows
