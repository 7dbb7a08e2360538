r"""Comparing questions: a normal form that undoes differences in spelling, and an index of test questions by it and by
n-grams.

    index = QuestionIndex([("gsm8k/1", "Ana buys 3 pens ...")])     # the test side, held in memory
    index.match("Ana buys  3 pens ...")                             # training rows, one at a time; none is stored

The normal form undoes differences in spelling (Unicode forms, white space, case, LaTeX spacing, braces, math
delimiters) but none in meaning: signs, digits, points and letters stay. Stripping all punctuation would make 22.5 and
225 equal.

`matrix_llm.data.leakage` and `eval/contamination.py` report what is found. Standard library only.
"""

import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# A row's question is the first of these fields that it has
FIELDS = ("problem", "question", "query", "instruction", "prompt", "messages", "text")
NGRAM = 13  # words, as GPT-3's check used

# --- normal form ------------------------------------------------------------------------------------------------------

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
    "left", "right", "big", "Big", "bigg", "Bigg", "bigl", "bigr", "Bigl", "Bigr", "displaystyle", "textstyle",
    "limits", "quad", "qquad", "thinspace", "enspace", "enskip", "thickspace", "medspace", "negthinspace", "nonumber",
    "nobreak",
}  # fmt: skip
RENAMED = {"dfrac": "frac", "tfrac": "frac", "cfrac": "frac"}
# After a backslash these are spacing or a math delimiter (\$ as well: dollars do not tell questions apart)
SPACES = set(",;:! ()[]$\n\t")
TOKEN = r"([0-9a-zA-Z]|\\[a-zA-Z]+(?![a-zA-Z]))"
FRAC_TWO = re.compile(rf"\\frac\s*(?:{TOKEN}|\{{([^{{}}]*)\}})\s*(?:{TOKEN}|\{{([^{{}}]*)\}})")
ARGUMENT = re.compile(rf"(\\sqrt|[\^_])\s*{TOKEN}")
GROUP = re.compile(r"(?<![a-zA-Z\]}^_\\])\{(\\?[a-zA-Z]+|\d+|[^\w\s{}\\])\}")
# White space matters between two letters, between two digits, and between a command and a letter
SPACE = re.compile(r"(?<=[^\W\d_])\s+(?=[^\W\d_])|(?<=[\d.])\s+(?=\d)|(\s+)")


def normalise(text: str) -> str:
    r"""A form in which two spellings of one question are equal, and two different questions are not.

    >>> normalise(r"Let $x^{2} + \dfrac 12 = \left( 3 \right)\,$.") == normalise(r"let $$x^2+\frac{1}{2}=(3)$$.")
    True
    >>> normalise(r"$\tan 22.5^\circ$") == normalise(r"$\tan 225^\circ$")
    False
    >>> normalise("$z^4 + z^2$") == normalise("$z^4 - z^2$")
    False
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
    """The numbers and words of a normal form, each with the sign before it; other marks do not count for n-grams.

    >>> words(normalise("He has $2.5 = x_1 - 3$ Apples."))
    ['he', 'has', '2.5', '=x', '1', '-3', 'apples']
    """
    for command in ("ne", "le", "ge"):  # \\neq is \\ne under another name
        normal = normal.replace(f"\\{command}q", f"\\{command}")
    return WORD.findall(normal)


def _grams(tokens: list[str], n: int) -> Iterator[tuple[str, ...]]:
    return zip(*(tokens[start:] for start in range(n)), strict=False)


# --- overlaps ---------------------------------------------------------------------------------------------------------


class QuestionIndex:
    """Test questions by normal form and by n-gram, all held in memory.

    A question of fewer than n words has no n-gram: only an equal text matches it. The n-grams are kept as 64-bit
    hashes, so that the 300,000 of GSM8K and MATH take some 50 MB; the chance that two of them collide is below 10^-8.

    >>> index = QuestionIndex([("t", "What is 1 + 1?")], n=3)
    >>> index.match("what is $1+1$?")  # equal, with both of its 3-grams
    Match(equal=[0], shares={0: 1.0})
    >>> index.match("So what is 1 - 1?")
    Match(equal=[], shares={0: 0.5})
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

    def match(self, text: str) -> "Match":
        """The test questions that `text` equals, and those it shares n-grams with."""
        normal = normalise(text)
        counts: dict[int, int] = {}
        owners = self._owners
        for gram in {hash(gram) for gram in _grams(words(normal), self.n)} & owners.keys():
            for index in owners[gram]:
                counts[index] = counts.get(index, 0) + 1
        return Match(self._forms.get(normal, []), {index: count / self.sizes[index] for index, count in counts.items()})


@dataclass(frozen=True)
class Match:
    """What one text has in common with the test questions, which are named by their index."""

    equal: list[int]
    """Questions with the same normal form."""
    shares: dict[int, float]
    """{question: share of its distinct n-grams that the text holds}, above 0."""

    def at_least(self, share: float) -> dict[int, float]:
        """{question: its share, or 1 if equal} for those that are equal or reach `share`."""
        found = {question: part for question, part in self.shares.items() if part >= share}
        return found | dict.fromkeys(self.equal, 1.0)


def question_of(row: Mapping[str, Any], fields: Collection[str] = FIELDS) -> str | None:
    """The text of the first of `fields` that has any; for messages, the first user message.

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
