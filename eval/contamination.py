r"""Are test questions in the training data? Exact matches up to how they are written, and shared word n-grams.

    python eval/contamination.py --train train.jsonl --test shared/data/math/test.jsonl
    python eval/contamination.py --train MetaMathQA-395K.json --test test.jsonl --n 13 --share 0.5 --out overlaps.json

Exact: equal after `normalise`, which undoes differences of writing (Unicode forms, white space, case, LaTeX spacing, braces, math
delimiters) and none of meaning: signs, digits, points and letters stay. Stripping all punctuation would call 22.5 and 225 the same.
Similar: the share of a test question's n-grams that one training row holds. Templates share n-grams too, so these are to be read.

The test side is indexed and the training side read one row at a time: memory does not grow with the training data.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import re
import time
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from eval.files import write_json
from eval.report import visible
from matrix_llm.base.errors import EvalError

FIELDS = (
    "problem",
    "question",
    "query",
    "instruction",
    "prompt",
    "messages",
)  # the first that a row holds is its question
NGRAM = 13  # words, as GPT-3's check used
SHARE = 0.5
LISTED = 10  # training rows named for one test question
CHUNK = 1 << 20

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


# --- overlaps ----------------------------------------------------------------------------------------------------------


def find_overlaps(
    train: Iterable[tuple[str, str]], test: Iterable[tuple[str, str]], *, n: int = NGRAM, share: float = SHARE
) -> dict[str, Any]:
    """Test questions found in training questions.

    Args:
        train: (name, text) of each training row, read once.
        test: (name, text) of each test question.
        n: words in an n-gram.
        share: a test question is similar to a training row that holds at least this share of its distinct n-grams.

    Returns:
        "exact" and "similar": one entry a test question, with the names of up to LISTED training rows and how many there are;
        an exact one is not repeated under "similar". "train_rows", "test_rows", and "too_short": test questions of fewer than n
        words, which only an exact match can find.

    >>> found = find_overlaps([("a", "What is $1+1$?"), ("b", "What is $1-1$?")], [("t", "what is 1 + 1?")])
    >>> found["exact"]
    [{'test': 't', 'train': ['a'], 'train_rows': 1}]
    """
    if n < 1:
        raise EvalError(f"--n {n} is no number of words: it must be 1 or more. Usual are 8 to 13.")
    if not 0 < share <= 1:
        raise EvalError(f"--share {share} must be above 0 and at most 1.")
    names: list[str] = []
    forms: dict[str, list[int]] = {}  # normal form -> test questions
    owners: dict[tuple[str, ...], list[int]] = {}  # n-gram -> test questions
    sizes: list[int] = []  # distinct n-grams of each test question
    for index, (name, text) in enumerate(test):
        names.append(name)
        normal = normalise(text)
        forms.setdefault(normal, []).append(index)
        grams = set(_grams(words(normal), n))
        sizes.append(len(grams))
        for gram in grams:
            owners.setdefault(gram, []).append(index)

    exact: dict[int, list[Any]] = {}  # test question -> [how many training rows, names of the first]
    similar: dict[int, list[Any]] = {}  # test question -> [how many, largest share, name of that row]
    rows = 0
    for name, text in train:
        rows += 1
        normal = normalise(text)
        for index in forms.get(normal, ()):
            found = exact.setdefault(index, [0, []])
            found[0] += 1
            if len(found[1]) < LISTED:
                found[1].append(name)
        counts: dict[int, int] = {}
        for gram in {gram for gram in _grams(words(normal), n) if gram in owners}:
            for index in owners[gram]:
                counts[index] = counts.get(index, 0) + 1
        for index, count in counts.items():
            if count >= share * sizes[index]:
                best = similar.setdefault(index, [0, 0.0, name])
                best[0] += 1
                if count / sizes[index] > best[1]:
                    best[1:] = count / sizes[index], name
    return {
        "exact": [
            {"test": names[index], "train": exact[index][1], "train_rows": exact[index][0]} for index in sorted(exact)
        ],
        "similar": [
            {
                "test": names[index],
                "train": similar[index][2],
                "share": round(similar[index][1], 4),
                "train_rows": similar[index][0],
            }
            for index in sorted(similar)
            if index not in exact
        ],
        "n": n,
        "share": share,
        "train_rows": rows,
        "test_rows": len(names),
        "too_short": sum(not size for size in sizes),
    }


def _grams(tokens: list[str], n: int) -> Iterator[tuple[str, ...]]:
    return zip(*(tokens[start:] for start in range(n)), strict=False)


# --- files -------------------------------------------------------------------------------------------------------------


def questions(path: Path, field: str | None = None) -> Iterator[tuple[str, str]]:
    """(name, question) of each row of a .jsonl, .json (a list, or one object a line) or .parquet file, one at a time.

    The question is what stands under `field`, else under the first of FIELDS that holds any: a text, or messages, of which the first
    user message counts. The name is the row's id, else FILE:NUMBER counted from 1.
    """
    wanted = (field,) if field else FIELDS
    for number, row in enumerate(_rows(path, wanted), 1):
        if not isinstance(row, Mapping):
            raise EvalError(f"{path}: row {number} is a {type(row).__name__}, not an object with named fields.")
        text = next(filter(None, (_text(row.get(name)) for name in wanted)), None)
        if text is None:
            names = ", ".join(map(str, row)) or "none"
            raise EvalError(
                f"{path}: row {number} has no text under {' or '.join(wanted)}; its fields are {names}. "
                "Name the question's field with --field, or remove the row."
            )
        yield str(row.get("id") or f"{path.name}:{number}"), text


def _text(value: Any) -> str | None:
    if isinstance(value, list):
        users = (each.get("content") for each in value if isinstance(each, Mapping) and each.get("role") == "user")
        value = next(users, None)
    return value if isinstance(value, str) and value.strip() else None


def _rows(path: Path, wanted: tuple[str, ...]) -> Iterator[Any]:
    if not path.is_file():
        raise EvalError(
            f"{path} {'is a folder' if path.is_dir() else 'does not exist'}. Give a .jsonl, .json or .parquet file."
        )
    if path.suffix == ".parquet":
        yield from _parquet(path, wanted)
        return
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            head = file.read(CHUNK)
            if head.lstrip()[:1] == "[":
                yield from _array(path, head, file)
                return
            file.seek(0)
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield json.loads(line)
                    except ValueError as error:
                        raise EvalError(
                            f"{path}, line {number}, is not JSON ({error}). Repair or remove that line."
                        ) from None
    except UnicodeDecodeError:
        raise EvalError(f"{path} is not UTF-8 text. Give a .jsonl, .json or .parquet file, not compressed.") from None


def _array(path: Path, buffer: str, file: Any) -> Iterator[Any]:
    """The values of one JSON list, decoded one by one from CHUNK characters at a time."""
    decoder, place, ended, count = json.JSONDecoder(), buffer.index("[") + 1, False, 1
    while True:
        while place < len(buffer) and buffer[place] in " \t\r\n,":
            place += 1
        if buffer[place : place + 1] == "]":
            return
        try:
            value, end = decoder.raw_decode(buffer, place)
        except ValueError as error:
            if ended:
                raise EvalError(
                    f"{path} is no whole JSON list: value {count} breaks off or has a fault ({error}). Repair the file."
                ) from None
            more = file.read(max(CHUNK, len(buffer) - place))  # doubling: a value longer than a chunk stays linear
            buffer, place, ended = buffer[place:] + more, 0, not more
        else:
            yield value
            place, count = end, count + 1


def _parquet(path: Path, wanted: tuple[str, ...]) -> Iterator[Any]:
    """Rows with the columns that are wanted and the id; with all columns if none is, so that a message can name them."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            known = [name for name in names if name in wanted]
            columns = [*known, "id"] if "id" in names else known
            for batch in file.iter_batches(batch_size=1000, columns=columns if known else names):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise EvalError(
            f"{path} cannot be read as parquet ({str(error).splitlines()[0]}). Download it again."
        ) from None


def describe(result: Mapping[str, Any], texts: Mapping[str, str], *, show: int) -> str:
    """The overlaps as text for a terminal; `texts` holds the test questions by name."""
    n, share, total = result["n"], result["share"], result["test_rows"]
    exact, similar = result["exact"], result["similar"]
    lines = [
        f"{total} test questions against {result['train_rows']} training rows",
        f"exact:   {len(exact)} test questions are training questions, up to how they are written",
        f"similar: {len(similar)} more share at least {100 * share:g} % of their {n}-word sequences with one training row; read them",
    ]
    if result["too_short"]:
        lines.append(
            f"note: {result['too_short']} test questions have fewer than {n} words: only an exact match could find them (--n lowers it)"
        )
    for title, found in (("exact", exact), ("similar", sorted(similar, key=lambda each: -each["share"]))):
        if found and show > 0:
            lines += ["", f"{title}, {min(show, len(found))} of {len(found)} (--show N)"]
        for each in found[: max(show, 0)]:
            train = ", ".join(each["train"]) if title == "exact" else f"{each['train']} ({100 * each['share']:.0f} %)"
            more = (
                f" and {each['train_rows'] - LISTED} more" if title == "exact" and each["train_rows"] > LISTED else ""
            )
            question = " ".join(texts[each["test"]].split())
            lines.append(
                visible(f"  {each['test']} = {train}{more}" if title == "exact" else f"  {each['test']} ~ {train}")
            )
            lines.append(visible(f"      {question if len(question) <= 110 else question[:109] + '…'}"))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="eval/contamination.py", description="Find test questions in training data.")
    parser.add_argument(
        "--train", type=Path, nargs="+", required=True, metavar="FILE", help=".jsonl, .json or .parquet"
    )
    parser.add_argument("--test", type=Path, nargs="+", required=True, metavar="FILE", help=".jsonl, .json or .parquet")
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
    started = time.perf_counter()
    try:
        test = [pair for path in options.test for pair in questions(path)]
        train = (pair for path in options.train for pair in questions(path, options.field))
        result = find_overlaps(train, test, n=options.n, share=options.share)
        if not result["train_rows"] or not result["test_rows"]:
            empty = options.test if not result["test_rows"] else options.train
            raise EvalError(f"{', '.join(map(str, empty))} holds no rows, so there is nothing to compare.")
        print(f"{describe(result, dict(test), show=options.show)}\n\n{time.perf_counter() - started:.1f} s")
        if options.out:
            files = {side: [str(path) for path in getattr(options, side)] for side in ("train", "test")}
            write_json(options.out, {**result, "files": files})
            print(f"{options.out}: all overlaps as JSON")
    except EvalError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
