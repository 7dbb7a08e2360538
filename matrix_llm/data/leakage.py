"""Which training rows contain test questions: equal up to spelling, or sharing many of a question's word
n-grams.

Templates share n-grams too, so rows found by n-grams need to be read by a person. The comparison itself is in
`matrix_llm.data.questions`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from matrix_llm.data.questions import FIELDS, QuestionIndex, question_of

__all__ = ["FIELDS", "LeakageReport", "QuestionIndex", "find_leaks", "question_of"]

SHARE = 0.5
LISTED = 20  # training rows described in a report


@dataclass
class LeakageReport:
    """Which training rows contain test questions."""

    sources: list[str]
    """The test sets, as the recipe names them."""
    n: int
    """Words in an n-gram."""
    share: float
    """A row with at least this share of a question's n-grams counts as leaked; above 0, at most 1."""
    test_questions: int
    """Number of test questions."""
    too_short: int
    """Test questions of fewer than n words: only an equal row can be found."""
    rows: int = 0
    """Training rows read."""
    touched: int = 0
    """Rows that share any n-gram."""
    exact: int = 0
    """Rows equal to a test question."""
    leaked: list[int] = field(default_factory=list)
    """Row ids, as in the error messages of training, of rows that are equal or at or above `share`."""
    questions: int = 0
    """Test questions that at least one leaked row contains."""
    rows_of_each: list[int] = field(default_factory=list)
    """Training rows read from each data set, in the order of the recipe; row ids count through all of them."""
    examples: list[dict[str, Any]] = field(default_factory=list)
    """For the first LISTED leaked rows: the row, the test question it shares most with, and how much."""

    def lines(self) -> list[str]:
        return [
            f"leakage: {self.rows:,} training rows against {self.test_questions:,} test questions of "
            f"{', '.join(self.sources)}",
            f"leakage: {len(self.leaked):,} rows hold one of {self.questions:,} test questions: "
            f"{self.exact:,} are equal to it, "
            f"{len(self.leaked) - self.exact:,} share at least {100 * self.share:g} % of its {self.n}-word sequences "
            f"({self.touched:,} rows share any)",
            *(
                f"leakage: row {each['row']} {'=' if each['exact'] else '~'} {each['test']} "
                f"({100 * each['share']:.0f} %)"
                for each in self.examples[:5]
            ),
        ]


def find_leaks(rows: Iterable[str], index: QuestionIndex, sources: list[str], share: float = SHARE) -> LeakageReport:
    """Training rows whose question is a test question, or contains at least `share` of one's distinct n-grams.

    >>> report = find_leaks(["1 + 2?", "what is $1+1$?"], QuestionIndex([("t", "What is 1 + 1?")]), ["t.jsonl"])
    >>> report.leaked, report.exact, report.examples
    ([1], 1, [{'row': 1, 'test': 't', 'exact': True, 'share': 1.0}])
    """
    report = LeakageReport(sources, index.n, share, len(index.names), index.too_short)
    found: set[int] = set()
    for row, text in enumerate(rows):
        report.rows += 1
        match = index.match(text)
        report.touched += bool(match.shares)
        leaked = match.at_least(share)
        if not leaked:
            continue
        report.leaked.append(row)
        report.exact += bool(match.equal)
        found |= leaked.keys()
        if len(report.examples) < LISTED:
            best = max(leaked, key=lambda question: (question in match.equal, leaked[question]))
            report.examples.append(
                {"row": row, "test": index.names[best], "exact": bool(match.equal), "share": round(leaked[best], 4)}
            )
    report.questions = len(found)
    return report
