r"""Are test questions in the training data? Equal up to how they are written, or sharing word n-grams. Standard library only.

Exact: equal after `normalise`, which undoes differences of writing (Unicode forms, white space, case, LaTeX spacing, braces, math
delimiters) and none of meaning: signs, digits, points and letters stay. Stripping all punctuation would call 22.5 and 225 the same.
Similar: the share of a test question's n-grams that one training row holds. Templates share n-grams too, so these are to be read.

    index = QuestionIndex([("gsm8k/1", "Ana buys 3 pens ...")])     # the test side, held in memory
    index.match("Ana buys  3 pens ...")                             # one training row after another: nothing of it is kept
"""

import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

FIELDS = (
    "problem",
    "question",
    "query",
    "instruction",
    "prompt",
    "messages",
    "text",
)  # the first that a row holds is its question
NGRAM = 13  # words, as GPT-3's check used
SHARE = 0.5
LISTED = 20  # training rows described in a report

# --- normal form -------------------------------------------------------------------------------------------------------

SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n", strict=True))
SUPERSCRIPT = re.compile(f"[{''.join(SUPERSCRIPTS)}]+")  # before NFKC, which makes "x²" into "x2"
VULGAR_FRACTION = re.compile(r"(?<=\d)(?=[¼-¾⅐-⅞])")  # NFKC makes "2½" into "21⁄2"
SAME = str.maketrans(
    "\u2212\u2010\u2011\u2013\u2019\u2018\u201c\u201d\u2044", "----''\"\"/"
)  # minus, hyphens, quotes, fraction slash
INVISIBLE = re.compile("[\u00ad\u200b-\u200d\u2060\ufeff]")
# One pass from the left, so that the line break in `\\[2pt]` is not read as the delimiter `\[`
COMMAND = re.compile(r"\\(?:([a-zA-Z]+)\*?|(.))|[$~]|([A-Z]+)", re.S)
DROPPED = {
    "left", "right", "big", "Big", "bigg", "Bigg", "bigl", "bigr", "Bigl", "Bigr", "displaystyle", "textstyle", "limits", "quad", "qquad",
    "thinspace", "enspace", "enskip", "thickspace", "medspace", "negthinspace", "nonumber", "nobreak",
}  # fmt: skip
RENAMED = {"dfrac": "frac", "tfrac": "frac", "cfrac": "frac"}
SPACES = set(
    ",;:! ()[]$\n\t"
)  # after a backslash: spacing, or a math delimiter (\$ as well: dollars do not tell questions apart)
TOKEN = r"([0-9a-zA-Z]|\\[a-zA-Z]+(?![a-zA-Z]))"
FRAC_TWO = re.compile(rf"\\frac\s*(?:{TOKEN}|\{{([^{{}}]*)\}})\s*(?:{TOKEN}|\{{([^{{}}]*)\}})")
ARGUMENT = re.compile(rf"(\\sqrt|[\^_])\s*{TOKEN}")
GROUP = re.compile(r"(?<![a-zA-Z\]}^_\\])\{(\\?[a-zA-Z]+|\d+|[^\w\s{}\\])\}")
# White space has a meaning between two letters, between two digits, and between a command and a letter (which is two letters)
SPACE = re.compile(r"(?<=[^\W\d_])\s+(?=[^\W\d_])|(?<=[\d.])\s+(?=\d)|(\s+)")


def normalise(text: str) -> str:
    r"""The form in which two writings of one question are equal, and two questions are not.

    >>> normalise(r"Let $x^{2} + \dfrac 12 = \left( 3 \right)\,$.") == normalise(r"let $$x^2+\frac{1}{2}=(3)$$.")
    True
    >>> normalise(r"$\tan 22.5^\circ$") == normalise(r"$\tan 225^\circ$"), normalise("$z^4 + z^2$") == normalise("$z^4 - z^2$")
    (False, False)
    """
    if not text.isascii():
        text = SUPERSCRIPT.sub(
            lambda run: "^{" + "".join(SUPERSCRIPTS[character] for character in run.group()) + "}", text
        )
        text = unicodedata.normalize("NFKC", VULGAR_FRACTION.sub(" ", text)).translate(SAME)
        text = INVISIBLE.sub("", text)
        text = "".join(character.lower() if character > "\x7f" else character for character in text)
    text = COMMAND.sub(_command, text)
    if "\\" in text or "{" in text or "^" in text or "_" in text:
        text = FRAC_TWO.sub(
            lambda found: f"\\frac{{{found[1] or found[2] or ''}}}{{{found[3] or found[4] or ''}}}", text
        )
        text = ARGUMENT.sub(r"\1{\2}", text)
        text = GROUP.sub(r"\1", text)
    return SPACE.sub(lambda found: "" if found[1] else " ", text.strip())


def _command(found: re.Match[str]) -> str:
    name, sign, capitals = found.groups()
    if capitals:
        return capitals.lower()
    if name:  # \Delta is not \delta: commands keep their case
        return " " if name in DROPPED else "\\" + RENAMED.get(name, name)
    return " " if sign is None or sign in SPACES else found.group()


WORD = re.compile(r"[-+=<>]?(?:\d+(?:[.,]\d+)*|[^\W\d_]+)")


def words(normal: str) -> list[str]:
    """Numbers and runs of letters of a normal form, each with the sign before it; other marks do not count for n-grams.

    >>> words(normalise("He has $2.5 = x_1 - 3$ Apples."))
    ['he', 'has', '2.5', '=x', '1', '-3', 'apples']
    """
    for command in ("ne", "le", "ge"):  # \\neq is \\ne under another name
        normal = normal.replace(f"\\{command}q", f"\\{command}")
    return WORD.findall(normal)


def _grams(tokens: list[str], n: int) -> Iterator[tuple[str, ...]]:
    return zip(*(tokens[start:] for start in range(n)), strict=False)


# --- overlaps ----------------------------------------------------------------------------------------------------------


class QuestionIndex:
    """Test questions by normal form and by n-gram. A question of fewer than n words has no n-gram: only an equal text matches it.

    n-grams are kept as 64-bit hashes: 300,000 of them (GSM8K and MATH) take some 50 MB; two differing ones meet once in 10^13.

    >>> index = QuestionIndex([("t", "What is 1 + 1?")], n=3)
    >>> index.match("what is $1+1$?")  # equal, with both of its 3-grams
    ([0], {0: 2})
    >>> index.match("So what is 1 - 1?")
    ([], {0: 1})
    """

    def __init__(self, questions: Iterable[tuple[str, str]], n: int = NGRAM) -> None:
        self.n = n
        self.names: list[str] = []
        self.sizes: list[int] = []  # distinct n-grams of each question
        self._forms: dict[str, list[int]] = {}
        self._owners: dict[int, list[int]] = {}
        for index, (name, text) in enumerate(questions):
            self.names.append(name)
            normal = normalise(text)
            self._forms.setdefault(normal, []).append(index)
            grams = {hash(gram) for gram in _grams(words(normal), n)}
            self.sizes.append(len(grams))
            for gram in grams:
                self._owners.setdefault(gram, []).append(index)

    @property
    def too_short(self) -> int:
        return sum(not size for size in self.sizes)

    def match(self, text: str) -> tuple[list[int], dict[int, int]]:
        """The questions equal to `text`, and how many distinct n-grams each question shares with it."""
        normal = normalise(text)
        counts: dict[int, int] = {}
        owners = self._owners
        for gram in {hash(gram) for gram in _grams(words(normal), self.n)} & owners.keys():
            for index in owners[gram]:
                counts[index] = counts.get(index, 0) + 1
        return self._forms.get(normal, []), counts


def question_of(row: Mapping[str, Any], fields: Collection[str] = FIELDS) -> str | None:
    """The text under the first of `fields` that holds any; of messages, the first user message.

    >>> question_of({"question": " ", "problem": "1 + 1?"})
    '1 + 1?'
    """
    for value in (row.get(name) for name in fields):
        if isinstance(value, list):
            value = next(
                (each.get("content") for each in value if isinstance(each, Mapping) and each.get("role") == "user"),
                None,
            )
        if isinstance(value, str) and value.strip():
            return value
    return None


@dataclass
class LeakageReport:
    """Which training rows hold test questions. `leaked` are those at or above `share`, or equal; `touched` share any n-gram."""

    sources: list[str]
    n: int
    share: float
    test_questions: int
    too_short: int  # test questions of fewer than n words
    rows: int = 0
    touched: int = 0
    exact: int = 0
    leaked: list[int] = field(default_factory=list)  # row ids, as in the error messages of training
    questions: int = 0  # test questions that some leaked row holds
    examples: list[dict[str, Any]] = field(default_factory=list)

    def lines(self) -> list[str]:
        return [
            f"leakage: {self.rows:,} training rows against {self.test_questions:,} test questions of {', '.join(self.sources)}",
            f"leakage: {len(self.leaked):,} rows hold one of {self.questions:,} test questions: {self.exact:,} are equal to it, "
            f"{len(self.leaked) - self.exact:,} share at least {100 * self.share:g} % of its {self.n}-word sequences "
            f"({self.touched:,} rows share any)",
            *(
                f"leakage: row {each['row']} {'=' if each['exact'] else '~'} {each['test']} ({100 * each['share']:.0f} %)"
                for each in self.examples[:5]
            ),
        ]


def find_leaks(rows: Iterable[str], index: QuestionIndex, sources: list[str], share: float = SHARE) -> LeakageReport:
    """Training rows whose question is a test question, or holds at least `share` of one's distinct n-grams.

    >>> report = find_leaks(["1 + 2?", "what is $1+1$?"], QuestionIndex([("t", "What is 1 + 1?")]), ["t.jsonl"])
    >>> report.leaked, report.exact, report.examples
    ([1], 1, [{'row': 1, 'test': 't', 'exact': True, 'share': 1.0}])
    """
    report = LeakageReport(sources, index.n, share, len(index.names), index.too_short)
    found: set[int] = set()
    for row, text in enumerate(rows):
        report.rows += 1
        equal, counts = index.match(text)
        if not equal and not counts:
            continue
        report.touched += bool(counts)
        shares = {question: count / index.sizes[question] for question, count in counts.items()} | dict.fromkeys(
            equal, 1.0
        )
        leaked = {question: part for question, part in shares.items() if question in equal or part >= share}
        if not leaked:
            continue
        report.leaked.append(row)
        report.exact += bool(equal)
        found |= leaked.keys()
        if len(report.examples) < LISTED:
            best = max(leaked, key=lambda question: (question in equal, leaked[question]))
            report.examples.append(
                {"row": row, "test": index.names[best], "exact": bool(equal), "share": round(leaked[best], 4)}
            )
    report.questions = len(found)
    return report
