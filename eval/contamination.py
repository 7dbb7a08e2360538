r"""Are test questions in the training data? Exact matches up to spelling, and shared word n-grams.

    python eval/contamination.py --train train.jsonl --test test.jsonl
    python eval/contamination.py --train MetaMathQA-395K.json --test test.jsonl --n 13 --share 0.5 --out overlaps.json

Exact: equal in the normal form of `matrix_llm.data.questions`, which undoes differences in spelling but none in
meaning. Similar: the share of a test question's n-grams that one training row contains. Templates share n-grams too, so
these matches need to be read by a person.

The test side is indexed and the training side read one row at a time: memory does not grow with the training data.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository, not from this folder
    sys.path[0], __package__ = str(Path(__file__).resolve().parents[1]), "eval"

import argparse
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from matrix_llm.base.console import fail
from matrix_llm.base.errors import EvalError
from matrix_llm.base.threads import wait_passively
from matrix_llm.data.questions import FIELDS, NGRAM, QuestionIndex, question_of

from .files import FORMATS, read_rows, write_json
from .text import shorten, visible

SHARE = 0.5
LISTED = 10  # training rows named for one test question
SHOWN = 110  # characters of a question in the printed list


def questions(path: Path, field: str | None = None) -> Iterator[tuple[str, str]]:
    """(name, question) of each row of a file, one at a time.

    The question is the value of `field`, else of the first of FIELDS that has one: text, or messages, of which the
    first user message counts. The name is the row's id, else FILE:NUMBER counted from 1.
    """
    wanted = (field,) if field else FIELDS
    for number, row in enumerate(read_rows(path, columns=(*wanted, "id")), 1):
        text = question_of(row, wanted)
        if text is None:
            names = ", ".join(map(str, row)) or "none"
            raise EvalError(
                f"{path}: row {number} has no text under {' or '.join(wanted)}; its fields are {names}. "
                "Name the question's field with --field, or remove the row."
            )
        yield str(row.get("id") or f"{path.name}:{number}"), text


@dataclass
class Overlap:
    """The training rows that one test question was found in."""

    rows: int = 0
    """Number of such training rows."""
    names: list[str] = field(default_factory=list)
    """Names of the first LISTED of them."""
    share: float = 0.0
    """The largest share of the question's n-grams that one of them contains."""
    closest: str = ""
    """The name of the row with that share."""

    def add(self, name: str, share: float) -> None:
        self.rows += 1
        if len(self.names) < LISTED:
            self.names.append(name)
        if share > self.share:
            self.share, self.closest = share, name


def find_overlaps(
    train: Iterable[tuple[str, str]], test: Iterable[tuple[str, str]], *, n: int = NGRAM, share: float = SHARE
) -> dict[str, Any]:
    """Test questions found in training questions.

    Args:
        train: (name, text) of each training row, read once.
        test: (name, text) of each test question.
        n: words in an n-gram.
        share: a test question is similar to a training row that contains at least this share of its distinct n-grams.

    Returns:
        "exact" and "similar": one entry per test question, with the names of up to LISTED training rows and how many
        there are; an exact one is not repeated under "similar". "train_rows", "test_rows", and "too_short": test
        questions of fewer than n words, which only an exact match can find.

    >>> found = find_overlaps([("a", "What is $1+1$?"), ("b", "What is $1-1$?")], [("t", "what is 1 + 1?")])
    >>> found["exact"]
    [{'test': 't', 'train': ['a'], 'train_rows': 1}]
    """
    if n < 1:
        raise EvalError(f"--n {n} must be 1 or more words; 8 to 13 are usual.")
    if not 0 < share <= 1:
        raise EvalError(f"--share {share} must be above 0 and at most 1.")
    # 1. Index the test side, then read the training side once.
    index = QuestionIndex(test, n)
    exact: dict[int, Overlap] = {}  # by test question
    similar: dict[int, Overlap] = {}
    rows = 0
    for name, text in train:
        rows += 1
        match = index.match(text)
        for question in match.equal:
            exact.setdefault(question, Overlap()).add(name, 1.0)
        for question, part in match.shares.items():
            if part >= share:
                similar.setdefault(question, Overlap()).add(name, part)
    # 2. The result, as it is written to --out
    return {
        "exact": [
            {"test": index.names[question], "train": found.names, "train_rows": found.rows}
            for question, found in sorted(exact.items())
        ],
        "similar": [
            {
                "test": index.names[question],
                "train": found.closest,
                "share": round(found.share, 4),
                "train_rows": found.rows,
            }
            for question, found in sorted(similar.items())
            if question not in exact
        ],
        "n": n,
        "share": share,
        "train_rows": rows,
        "test_rows": len(index.names),
        "too_short": index.too_short,
    }


def describe(result: Mapping[str, Any], texts: Mapping[str, str], *, show: int) -> str:
    """The overlaps as text for a terminal, with at most `show` of each kind; `texts` holds the test questions by
    name.
    """
    n, exact, similar = result["n"], result["exact"], result["similar"]
    share = f"{100 * result['share']:g} %"
    lines = [
        f"{result['test_rows']} test questions against {result['train_rows']} training rows",
        f"exact:   {len(exact)} test questions are training questions, up to how they are written",
        f"similar: {len(similar)} more share at least {share} of their {n}-word sequences with one training row; "
        "read them",
    ]
    if result["too_short"]:
        lines.append(
            f"note: {result['too_short']} test questions have fewer than {n} words: "
            "only an exact match could find them (--n lowers it)"
        )
    entries = {
        "exact": [(each["test"], _exact_entry(each)) for each in exact],
        "similar": [
            (each["test"], f"{each['test']} ~ {each['train']} ({100 * each['share']:.0f} %)")
            for each in sorted(similar, key=lambda each: -each["share"])
        ],
    }
    for title, found in entries.items():
        if found and show > 0:
            lines += ["", f"{title}, {min(show, len(found))} of {len(found)} (--show N)"]
            for name, entry in found[:show]:
                lines += [f"  {visible(entry)}", f"      {shorten(texts[name], SHOWN)}"]
    return "\n".join(lines)


def _exact_entry(each: Mapping[str, Any]) -> str:
    more = f" and {each['train_rows'] - LISTED} more" if each["train_rows"] > LISTED else ""
    return f"{each['test']} = {', '.join(each['train'])}{more}"


def main(arguments: list[str] | None = None) -> int:
    # 1. The options
    parser = argparse.ArgumentParser(prog="eval/contamination.py", description="Find test questions in training data.")
    parser.add_argument("--train", type=Path, nargs="+", required=True, metavar="FILE", help=FORMATS)
    parser.add_argument("--test", type=Path, nargs="+", required=True, metavar="FILE", help=FORMATS)
    parser.add_argument(
        "--field", metavar="NAME", help=f"column of the question in --train (default: the first of {', '.join(FIELDS)})"
    )
    parser.add_argument("--n", type=int, default=NGRAM, help=f"words in an n-gram (default: {NGRAM})")
    parser.add_argument(
        "--share",
        type=float,
        default=SHARE,
        help=f"share of n-grams from which a question is similar (default: {SHARE})",
    )
    parser.add_argument("--show", type=int, default=20, metavar="N", help="overlaps of each kind to list (default: 20)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all overlaps as JSON")
    options = parser.parse_args(arguments)
    # 2. The comparison
    wait_passively()
    started = time.perf_counter()
    try:
        # samples of one problem are one question
        test = list(dict.fromkeys(pair for path in options.test for pair in questions(path)))
        train = (pair for path in options.train for pair in questions(path, options.field))
        result = find_overlaps(train, test, n=options.n, share=options.share)
        if not result["train_rows"] or not result["test_rows"]:
            empty = options.test if not result["test_rows"] else options.train
            raise EvalError(f"{', '.join(map(str, empty))} holds no rows, so there is nothing to compare.")
        # 3. The report, on the terminal and in --out
        print(f"{describe(result, dict(test), show=options.show)}\n\n{time.perf_counter() - started:.1f} s")
        if options.out:
            files = {side: [str(path) for path in getattr(options, side)] for side in ("train", "test")}
            write_json(options.out, {**result, "files": files})
            print(f"{options.out}: all overlaps as JSON")
    except EvalError as error:
        return fail(str(error), 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
