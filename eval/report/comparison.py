"""Two runs compared, as text for a terminal: what eval/compare.py prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..text import percent, shorten, visible
from .table import interval


def describe(result: Mapping[str, Any], *, show: int, repeats: int = 10_000) -> str:
    """The comparison, with at most `show` of the flipped problems.

    Args:
        result: of `eval.compare.compare`.
        repeats: draws of its bootstrap.
    """
    title = f"{result['benchmark']}, convention {result['convention']}, {result['problems']} problems"
    lines = [title, "", *_runs(result), "", *_tests(result, repeats), "", _reading(result)]
    lines += [f"note: {note}" for note in result["notes"]]
    lines += _warnings(result)
    if result["flipped"] and show > 0:
        lines += ["", *_flipped(result, show)]
    return "\n".join(lines)


def _runs(result: Mapping[str, Any]) -> list[str]:
    lines = [
        "|   |  accuracy |  95 % interval | correct | samples | ungraded | run |",
        "|---|----------:|---------------:|--------:|--------:|---------:|-----|",
    ]
    for name in "ab":
        side = result[name]
        ends = interval(side["low"], side["high"])
        run = visible(f"{side['summary']}" + (f" ({side['model']})" if side["model"] else ""))
        counts = f"{side['correct']:>7} | {side['samples']:>7} | {side['ungraded']:>8}"
        lines.append(f"| {name.upper()} | {percent(side['accuracy']):>9} | {ends:>14} | {counts} | {run} |")
    return lines


def _tests(result: Mapping[str, Any], repeats: int) -> list[str]:
    ends = f"{_points(result['difference_low'])} to {_points(result['difference_high'])}"
    return [
        f"B - A           {_points(result['difference'])} points, 95 % {ends} (paired bootstrap, {repeats} draws)",
        *(_several_samples(result) if result["test"] == "sign flips" else _one_sample(result)),
    ]


def _one_sample(result: Mapping[str, Any]) -> list[str]:
    flips = result["only_a"] + result["only_b"]
    detectable = "no difference: too few problems flip for a test at 5 %"
    if result["minimum_detectable_difference"] is not None:
        points = 100 * result["minimum_detectable_difference"]
        detectable = (
            f"a true difference of {points:.2f} points has an 80 % chance to be found, "
            f"while {percent(flips / result['problems'])} flip"
        )
    alone = f"A alone right on {result['only_a']}, B alone on {result['only_b']}"
    return [
        f"exact McNemar   p = {_p(result['p'])}: {flips} problems flip, "
        f"{alone} (both {result['both']}, neither {result['neither']})",
        f"unpaired        p = {_p(result['unpaired_p'])} (what the two accuracies alone would say)",
        f"detectable      {detectable}",
    ]


def _several_samples(result: Mapping[str, Any]) -> list[str]:
    equal = result["problems"] - result["a_better"] - result["b_better"]
    return [
        f"sign-flip test  p = {_p(result['p'])}: A right more often on {result['a_better']} problems, "
        f"B on {result['b_better']}, both as often on {equal}"
    ]


def _reading(result: Mapping[str, Any]) -> str:
    test = "McNemar" if result["test"] == "exact McNemar" else "sign-flip"
    if result["p"] >= 0.05:
        return f"=> no difference beyond chance ({test} p >= 0.05); that is not the same as equal, see the interval"
    better, worse = ("B", "A") if result["difference"] > 0 else ("A", "B")
    return f"=> {better} is better than {worse} beyond chance on these problems ({test} p < 0.05)"


def _warnings(result: Mapping[str, Any]) -> list[str]:
    lines = []
    for kind, effect in (
        ("settings", "so the difference is not of the model alone"),
        ("versions", "which may move single answers"),
    ):
        differing = result[f"{kind}_that_differ"]
        if differing:
            listed = "; ".join(f"{name}: {_brief(x)} and {_brief(y)}" for name, (x, y) in differing.items())
            lines.append(f"warning: {kind} differ, {effect}: {listed}")
    return lines


def _flipped(result: Mapping[str, Any], show: int) -> list[str]:
    flips = result["flipped"]
    lines = [f"flipped problems, {min(show, len(flips))} of {len(flips)} (--show N)"]
    for flip in flips[:show]:
        problem = f"; {_brief(flip['problem'], 100)}" if flip["problem"] else ""
        who = f"{flip['right']} alone is right"
        if result["test"] == "sign flips":
            who = f"right in {percent(flip['share_a'])} of A's samples, {percent(flip['share_b'])} of B's"
        lines.append(f"  {visible(flip['id'])}: {who}{problem}")
        if flip["generations"]:
            answers = f"A answers {_brief(flip['answer_a'])}; B answers {_brief(flip['answer_b'])}"
            lines.append(f"      gold {_brief(flip['gold'])}; {answers}")
    return lines


def _points(share: float) -> str:
    return f"{100 * share:+.2f}"


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.1e}"


def _brief(value: Any, limit: int = 60) -> str:
    """The first line of a value."""
    return "nothing" if value is None else shorten(str(value).strip().split("\n", 1)[0], limit)
