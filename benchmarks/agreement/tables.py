"""The rows behind a page of scores, and the tables made from these rows alone.

A row of a run holds no question and no response: the problem's place, the gold answer, a hash of the text, and what
each rule found. A row of a difference holds a few characters of the two responses from where they part.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from benchmarks.agreement.answers import Answer, Answers, Found
from benchmarks.agreement.compare import compare_rules, compare_texts
from benchmarks.agreement.tokens import Reader
from eval.statistics import wilson_interval

Row = dict[str, Any]
HARNESS = ("harness strict-match", "harness flexible-extract")
RULES = (*HARNESS, "llemma", "strict", "flexible", "verified")
COMPARED = ("flexible", "verified")  # conventions whose verdicts are compared between two texts


def make_rows(runs: Mapping[str, Answers], reader: Reader | None = None) -> list[Row]:
    """One row for each answer of each run, then one for each difference between the texts of two runs.

    Args:
        runs: {name: answers}, all to one set of problems.
        reader: the model, which then tells how near the other token was where two texts part.
    """
    rows = [_run_row(name, answer) for name, answers in runs.items() for _, answer in sorted(answers.items())]
    prompts = {one.prompt_sha256: one.prompt for answers in runs.values() for one in answers.values() if one.prompt}
    for first, second in combinations(runs, 2):
        for difference in compare_texts(runs[first], runs[second]):
            a, b = runs[first][difference.index], runs[second][difference.index]
            row: Row = {"pair": [first, second], "i": difference.index, "kind": difference.kind}
            row |= {"first": difference.first, "second": difference.second}
            prompt = prompts.get(a.prompt_sha256)  # the harness keeps it, we keep its hash
            if reader is not None and prompt and difference.kind in ("another token", "another end"):
                parting = reader.parting(prompt, a.text, b.text)
                row |= {"tokens": parting.tokens, "gap": round(parting.gap, 6), "top_two": parting.top_two}
            rows.append(row)
    return rows


def _run_row(name: str, answer: Answer) -> Row:
    found = {rule: [one.answer, int(one.correct)] for rule, one in answer.found.items() if rule in RULES}
    digest = hashlib.sha256(answer.text.encode("utf-8", "backslashreplace")).hexdigest()[:12]
    return {"run": name, "i": answer.index, "gold": answer.gold, "text": digest, "cut": answer.cut, **found}


def _runs(rows: Sequence[Row]) -> dict[str, dict[int, Row]]:
    runs: dict[str, dict[int, Row]] = {}
    for row in rows:
        if "run" in row:
            runs.setdefault(row["run"], {})[row["i"]] = row
    return runs


def score_table(rows: Sequence[Row]) -> str:
    """Accuracy of each run by the rules of its own program, with Wilson's 95 % interval."""
    lines = ["| run | rule | correct | accuracy | 95 % interval | no answer found |", "|---|---|---|---|---|---|"]
    for name, run in _runs(rows).items():
        rules = [rule for rule in RULES if all(rule in row for row in run.values())]
        for rule in [rule for rule in rules if rule in HARNESS] or rules:
            found = [row[rule] for row in run.values()]
            correct, total = sum(one[1] for one in found), len(found)
            low, high = wilson_interval(correct, total)
            nothing = sum(one[0] is None for one in found)
            accuracy = f"{correct / total:.1%} | {low:.1%} to {high:.1%}"
            lines.append(f"| {name} | {rule} | {correct} / {total} | {accuracy} | {nothing} |")
    return "\n".join(lines)


def text_table(rows: Sequence[Row]) -> str:
    """How often two runs wrote the same text, why not, and whether the verdict on the two texts is the same."""
    runs = _runs(rows)
    lines = [
        f"| runs | problems | same text | differences | {' | '.join(f'same verdict, {name}' for name in COMPARED)} |",
        "|---|---|---|---|" + "---|" * len(COMPARED),
    ]
    for first, second in combinations(runs, 2):
        both = sorted(runs[first].keys() & runs[second].keys())
        kinds = Counter(row["kind"] for row in rows if row.get("pair") == [first, second])
        same = sum(runs[first][i]["text"] == runs[second][i]["text"] for i in both)
        told = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()) or "none"
        verdicts = [sum(runs[first][i][name][1] == runs[second][i][name][1] for i in both) for name in COMPARED]
        lines.append(f"| {first} / {second} | {len(both)} | {same} | {told} | {' | '.join(map(str, verdicts))} |")
    return "\n".join(lines)


def rule_table(rows: Sequence[Row]) -> str:
    """How often a filter of the harness and a convention of ours agree on the harness's own texts, and why not."""
    lines = ["| texts of | filter | convention | same verdict | differences |", "|---|---|---|---|---|"]
    for name, run in _runs(rows).items():
        for agreement in compare_rules({i: _answer(row) for i, row in run.items()}):
            kinds = Counter(kind for _, kind in agreement.disagreements)
            told = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()) or "none"
            theirs = agreement.theirs.removeprefix("harness ")
            lines.append(f"| {name} | {theirs} | {agreement.ours} | {agreement.same} / {agreement.total} | {told} |")
    return "\n".join(lines)


def _answer(row: Row) -> Answer:
    found = {rule: Found(row[rule][0], bool(row[rule][1])) for rule in RULES if rule in row}
    return Answer(row["i"], row["gold"], "", "", row["cut"], found)


def parting_table(rows: Sequence[Row]) -> str:
    """How near the two likeliest tokens were where two texts part: their largest and median gap in the logits."""
    lines = ["| runs | partings | largest gap | median gap | one of the top two |", "|---|---|---|---|---|"]
    pairs = list(dict.fromkeys(tuple(row["pair"]) for row in rows if "gap" in row))
    for pair in pairs:
        here = [row for row in rows if row.get("pair") == list(pair) and "gap" in row]
        gaps = sorted(row["gap"] for row in here)
        near = sum(row["top_two"] for row in here)
        lines.append(
            f"| {' / '.join(pair)} | {len(gaps)} | {gaps[-1]:.1e} | {gaps[len(gaps) // 2]:.1e} | {near} / {len(gaps)} |"
        )
    return "\n".join(lines) if pairs else ""


def all_tables(rows: Sequence[Row]) -> str:
    tables = (score_table(rows), text_table(rows), parting_table(rows), rule_table(rows))
    return "\n\n".join(table for table in tables if table)
