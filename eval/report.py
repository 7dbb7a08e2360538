"""Generations to scores, scores to a table, a JSON summary and one HTML page. Every score names its convention.

grade_rows -> one verdict for each (row, convention), the only place that grades
summarise  -> the summary of a run, as it stands in OUT/<name>.json
write_report -> OUT/<name>.html: no script, no network, model text shown and never run
score_table -> the same scores as Markdown, for the terminal
"""

from __future__ import annotations

import html
import math
import os
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from eval.answers import CONVENTIONS, Verdict, answers_equal, extract_answer, grade
from eval.files import write_text
from eval.statistics import majority_vote, pass_at_k, wilson_interval

DEFAULT = "verified"
HEAD = ("accuracy", "95 % interval", "correct", "no answer found", "ungraded")
SHOWN_WRONG = 500  # wrong answers on the page
SHOWN_CHARACTERS = 20_000  # of one response

Row = Mapping[str, Any]


def grade_rows(rows: Sequence[Row], *, benchmark: str) -> dict[str, list[Verdict]]:
    """{convention: one verdict a row}. Rows need `response` and `gold`."""
    return {
        convention: [grade(row["response"], row["gold"], benchmark=benchmark, convention=convention) for row in rows]
        for convention in CONVENTIONS
    }


def by_problem(rows: Sequence[Row]) -> dict[str, list[int]]:
    """{problem id: places of its rows, by sample}, in order of first appearance."""
    places: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(row["id"], []).append(place)
    for problem, found in places.items():
        found.sort(key=lambda place: rows[place]["sample"])
        samples = [rows[place]["sample"] for place in found]
        if len(set(samples)) < len(samples):
            raise ValueError(
                f"{problem} has two rows of one sample (samples {samples}): the file was written twice. Generate it again."
            )
    return places


def score(verdicts: Sequence[Sequence[Verdict]]) -> dict[str, Any]:
    """Scores of problems, each with the verdicts of its samples.

    Counts and interval are of the first sample of each problem; `accuracy` is the mean over problems of the share of right samples,
    the same as correct / total with one sample. Ungraded counts as wrong.
    """
    first = [samples[0] for samples in verdicts]
    correct, total = sum(verdict.correct is True for verdict in first), len(first)
    low, high = wilson_interval(correct, total)
    shares = [sum(verdict.correct is True for verdict in samples) / len(samples) for samples in verdicts]
    return {
        "correct": correct,
        "total": total,
        "accuracy": math.fsum(shares) / total,
        "low": low,
        "high": high,
        "extraction_failures": sum(verdict.extracted is None for verdict in first),
        "ungraded": sum(verdict.correct is None for verdict in first),
    }


def summarise(
    rows: Sequence[Row],
    *,
    benchmark: str,
    settings: Mapping[str, Any],
    wall_seconds: float,
    versions: Mapping[str, str],
    **extra: Any,
) -> dict[str, Any]:
    """The summary of a run under all conventions; `extra` (name, limit, generations, ...) is added as it stands.

    Args:
        rows: generations, see eval/run.py; every problem with the same number n of samples.

    With n > 1 there are also pass@k for the powers of two up to n and for n, and the majority vote over all n.
    """
    if not rows:
        raise ValueError("no generations, so there is nothing to score.")
    places = by_problem(rows)
    samples = len(next(iter(places.values())))
    for problem, found in places.items():
        if len(found) != samples:
            raise ValueError(
                f"{problem} has {len(found)} samples, others {samples}: the run is unfinished. Start it again to complete it."
            )
    graded = grade_rows(rows, benchmark=benchmark)
    verified = {problem: [graded[DEFAULT][place] for place in found] for problem, found in places.items()}
    first = {problem: rows[found[0]] for problem, found in places.items()}

    def grouped(field: str) -> dict[str, Any]:
        groups: dict[Any, list[list[Verdict]]] = {}
        for problem, row in first.items():
            if row.get(field) is not None:
                groups.setdefault(row[field], []).append(verified[problem])
        return {str(name): score(groups[name]) for name in sorted(groups)}

    generated = sum(row.get("tokens", 0) for row in rows)
    summary = {
        "benchmark": benchmark,
        "model": settings.get("model"),
        "revision": settings.get("revision"),
        "problems": len(places),
        "samples_per_problem": samples,
        "scores": {
            convention: score([[verdicts[place] for place in found] for found in places.values()])
            for convention, verdicts in graded.items()
        },
        "convention": DEFAULT,
        "by_subject": grouped("subject"),
        "by_level": grouped("level"),
        "truncated": sum(row.get("finish_reason") == "length" for row in rows),
        "stop_hits": sum(row.get("stop_reason") is not None for row in rows),
        "prompt_tokens": sum(row.get("prompt_tokens", 0) for row in rows),
        "generated_tokens": generated,
        "wall_seconds": wall_seconds,
        "tokens_per_second": generated / wall_seconds if wall_seconds > 0 else None,
        "settings": dict(settings),
        "versions": dict(versions),
        "verdicts": {problem: verdicts[0].correct for problem, verdicts in verified.items()},
    }
    if samples > 1:
        right = [sum(verdict.correct is True for verdict in verdicts) for verdicts in verified.values()]
        ks = sorted({2**i for i in range(samples.bit_length()) if 2**i <= samples} | {samples})
        summary["pass_at_k"] = {str(k): math.fsum(pass_at_k(samples, c, k) for c in right) / len(right) for k in ks}
        summary["majority"] = {"k": samples, **_majority(list(verified.values()))}
    return {**summary, **extra}


def _majority(problems: Sequence[Sequence[Verdict]]) -> dict[str, Any]:
    """Scores of the majority answer: the verdict on the first sample that gave it, so that nothing is graded twice."""
    votes = []
    for verdicts in problems:
        winner = majority_vote((verdict.extracted for verdict in verdicts), equal=answers_equal)
        votes.append([next((verdict for verdict in verdicts if verdict.extracted == winner), verdicts[0])])
    return score(votes)


# --- text --------------------------------------------------------------------------------------------------------------


def percent(share: float) -> str:
    """
    >>> percent(0.6922)
    '69.22 %'
    """
    return f"{100 * share:.2f} %"


def visible(text: str) -> str:
    r"""Control, invisible and direction-changing characters spelled out, so that no text can hide or rearrange what is shown.

    Tabs and line feeds stay.

    >>> visible("a\x1b[31m\u202eb\r")
    'a␛[31m⟨U+202E⟩b␍'
    """
    return "".join(
        character if character in "\n\t" or character.isprintable() else _spelled(character) for character in text
    )


def _spelled(character: str) -> str:
    if character < "\x20":
        return chr(0x2400 + ord(character))
    # spaces of other widths are not "printable", but are seen
    return character if unicodedata.category(character) == "Zs" else f"⟨U+{ord(character):04X}⟩"


def score_table(summary: Mapping[str, Any]) -> str:
    """The scores of a summary as Markdown."""
    name = visible(str(summary.get("name", summary["benchmark"])))
    lines = score_lines(summary["scores"])
    for field in ("by_subject", "by_level"):
        if summary.get(field):
            lines += ["", *score_lines(summary[field], f"{field.replace('_', ' ')} ({summary['convention']})")]
    if summary.get("pass_at_k"):
        shares = ", ".join(f"pass@{k} {percent(share)}" for k, share in summary["pass_at_k"].items())
        majority = summary["majority"]
        lines += [
            "",
            f"{shares}; majority of {majority['k']} {percent(majority['accuracy'])} ({summary['convention']})",
        ]
    facts = [
        f"{summary['problems']} problems, samples of each: {summary['samples_per_problem']}",
        f"cut at max_tokens: {summary['truncated']}",
    ]
    if summary["samples_per_problem"] > 1:
        facts.append("interval and counts are of sample 0")
    return "\n".join([f"{name}: {'; '.join(facts)}", "", *lines])


def score_lines(scores: Mapping[str, Any], title: str = "convention") -> list[str]:
    """One line of a Markdown table for each of {name: scores as `score` returns them}."""
    return _table((title, *HEAD), _group_rows(scores))


def _group_rows(groups: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [(visible(str(name)), *_cells(scores)) for name, scores in groups.items()]


def _cells(scores: Mapping[str, Any]) -> tuple[str, ...]:
    interval = f"{100 * scores['low']:.1f} to {100 * scores['high']:.1f}"
    counts = (f"{scores['correct']} / {scores['total']}", str(scores["extraction_failures"]), str(scores["ungraded"]))
    return (percent(scores["accuracy"]), interval, *counts)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown, padded so that it also reads as plain text; the first column left, numbers right."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (head, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = [
        "| " + " | ".join(f"{cell:{'<' if not i else '>'}{widths[i]}}" for i, cell in enumerate(row)) + " |"
        for row in cells
    ]
    rule = "|" + "|".join("-" * (width + 1) + ("-" if not i else ":") for i, width in enumerate(widths)) + "|"
    return [lines[0], rule, *lines[1:]]


# --- page --------------------------------------------------------------------------------------------------------------

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; background: #fff; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; }
th, td { padding: .2rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child, .facts td { text-align: left; }
.facts td, summary, code { overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
.note { color: #555; }
details { border: 1px solid #ddd; border-radius: 6px; padding: .4rem .8rem; margin: .4rem 0; }
summary { cursor: pointer; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f5f5f5; padding: .6rem; }
code { background: #f5f5f5; }
svg { max-width: 100%; height: auto; }
"""


def write_report(path: str | os.PathLike[str], summary: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """One HTML file: scores, a plot with intervals, the settings, and the wrong answers to read."""
    title = f"{summary.get('name', summary['benchmark'])}: {summary.get('model') or 'unnamed model'}"
    default = summary["scores"][summary["convention"]]
    groups = [(field.replace("_", " "), summary[field]) for field in ("by_subject", "by_level") if summary.get(field)]
    body = [
        f"<h1>{_shown(title)}</h1>",
        f"<p><strong>{percent(default['accuracy'])}</strong> right, {default['correct']} of {default['total']} problems "
        f"(95 % interval {percent(default['low'])} to {percent(default['high'])}), convention “{_shown(summary['convention'])}”"
        + (
            f"; accuracy is the mean over {summary['samples_per_problem']} samples, counts and interval are of sample 0."
            if summary["samples_per_problem"] > 1
            else "."
        )
        + "</p>",
        "<h2>By convention</h2>",
        _html_table(("convention", *HEAD), _group_rows(summary["scores"])),
    ]
    for name, scores in groups or [("by convention", summary["scores"])]:
        body += [f"<h2>Accuracy {_shown(name)}</h2>", _plot(scores, f"Accuracy {name}, with 95 % intervals")]
        if groups:
            body.append(_html_table((name, *HEAD), _group_rows(scores)))
    if summary.get("pass_at_k"):
        majority = summary["majority"]
        shares = [(f"pass@{k}", percent(share)) for k, share in summary["pass_at_k"].items()]
        body += [
            "<h2>Several samples</h2>",
            _html_table(
                ("measure", "share"), [*shares, (f"majority of {majority['k']}", percent(majority["accuracy"]))]
            ),
        ]
    body += ["<h2>Run</h2>", _facts(summary), "<h2>Wrong answers</h2>", *_wrong(summary, rows)]
    head_tags = [
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        f"<title>{_shown(title)}</title><style>{STYLE}</style>",
    ]
    page = ["<!doctype html>", '<html lang="en"><head>', *head_tags, "</head><body>", *body, "</body></html>", ""]
    write_text(path, "\n".join(page))


def _shown(text: object) -> str:
    return html.escape(visible(str(text)))


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    titles = "".join(f'<th scope="col">{_shown(cell)}</th>' for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{_shown(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table></div>'


def _plot(groups: Mapping[str, Mapping[str, Any]], title: str) -> str:
    """Horizontal bars from 0 to 100 %, a whisker for the interval, the count at the right."""
    left, width, step, top = 190, 420, 28, 8
    bottom = top + step * len(groups)
    parts = [
        f'<svg viewBox="0 0 760 {bottom + 26}" width="760" role="img" aria-label="{_shown(title)}" font-size="13" fill="#1a1a1a">'
    ]
    for tick in range(0, 101, 25):
        x = left + width * tick / 100
        parts.append(f'<line x1="{x}" x2="{x}" y1="{top}" y2="{bottom}" stroke="#ddd"/>')
        parts.append(f'<text x="{x}" y="{bottom + 18}" text-anchor="middle">{tick} %</text>')
    for row, (name, scores) in enumerate(groups.items()):
        y = top + step * row + step / 2
        low, high, mean = (left + width * scores[key] for key in ("low", "high", "accuracy"))
        label = name if len(name) <= 26 else name[:25] + "…"
        parts.append(f'<text x="{left - 8}" y="{y + 4.5}" text-anchor="end">{_shown(label)}</text>')
        parts.append(f'<rect x="{left}" y="{y - 8}" width="{mean - left:.2f}" height="16" fill="#7fb0d9"/>')
        whisker = f"M{low:.2f} {y - 5}v10M{low:.2f} {y}H{high:.2f}M{high:.2f} {y - 5}v10"
        parts.append(f'<path d="{whisker}" stroke="#1a1a1a" stroke-width="1.5" fill="none"/>')
        parts.append(
            f'<text x="{left + width + 10}" y="{y + 4.5}">{percent(scores["accuracy"])} of {scores["total"]}</text>'
        )
    return "".join(parts) + "</svg>"


def _facts(summary: Mapping[str, Any]) -> str:
    speed = summary.get("tokens_per_second")
    facts = {
        "model": summary.get("model"),
        "problems": summary["problems"],
        "samples of each": summary["samples_per_problem"],
        "cut at max_tokens": summary["truncated"],
        "ended by a stop string": summary["stop_hits"],
        "prompt tokens": summary["prompt_tokens"],
        "generated tokens": summary["generated_tokens"],
        "wall time": f"{summary['wall_seconds']:.1f} s" + (f", {speed:.0f} tokens/s" if speed else ""),
        **{f"setting: {name}": value for name, value in summary["settings"].items() if name != "model"},
        **{f"version: {name}": value for name, value in summary["versions"].items()},
    }
    rows = "".join(f"<tr><td>{_shown(name)}</td><td>{_shown(value)}</td></tr>" for name, value in facts.items())
    return f'<details><summary>Settings, versions and counts</summary><table class="facts">{rows}</table></details>'


def _wrong(summary: Mapping[str, Any], rows: Sequence[Row]) -> list[str]:
    """Sample 0 of every problem that was not found right, at most SHOWN_WRONG."""
    verdicts = summary["verdicts"]
    places = by_problem(rows)
    wrong = [
        rows[places[problem][0]] for problem, correct in verdicts.items() if correct is not True and problem in places
    ]
    if not wrong:
        return ["<p>None.</p>"]
    parts = [f'<p class="note">{len(wrong)} of {len(verdicts)} problems (sample 0)']
    if len(wrong) > SHOWN_WRONG:
        parts[0] += (
            f"; the first {SHOWN_WRONG} are shown, all of them are in {_shown(summary.get('generations', 'the generations file'))}"
        )
    parts[0] += ".</p>"
    for row in wrong[:SHOWN_WRONG]:
        extracted = extract_answer(row["response"], convention=summary["convention"], benchmark=summary["benchmark"])
        kind = [str(row["subject"])] if row.get("subject") else []
        kind += [f"level {row['level']}"] if row.get("level") is not None else []
        kind += ["ungraded: a limit was hit"] if verdicts[row["id"]] is None else []
        kind += ["cut at max_tokens"] if row.get("finish_reason") == "length" else []
        response = row["response"]
        if len(response) > SHOWN_CHARACTERS:
            half = SHOWN_CHARACTERS // 2
            response = (
                f"{response[:half]}\n[... {len(response) - 2 * half} characters left out ...]\n{response[-half:]}"
            )
        given = "no answer found" if extracted is None else f"<code>{_shown(_short(extracted))}</code>"
        parts.append(
            f"<details><summary>{_shown(row['id'])}: {given}, gold <code>{_shown(_short(row['gold']))}</code>"
            + (f' <span class="note">({_shown(", ".join(kind))})</span>' if kind else "")
            + f"</summary><h3>Problem</h3><pre>{_shown(row['problem'])}</pre><h3>Response</h3><pre>{_shown(response)}</pre></details>"
        )
    return parts


def _short(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else text[:limit] + "…"
