"""Seeded grade-school word problems with step-by-step solutions, in the form of MetaMathQA.

They let a run start without any download: data, tokenizer and a small model can all be made from this file alone.
Each problem comes in one of MetaMathQA's four styles; here `change` with n=3 pens, p=4 dollars, m=20 dollars:

    GSM_AnsAug     Ana buys 3 pens at 4 dollars each and pays with 20 dollars. How many dollars are left?
    GSM_Rephrased  Ana has 20 dollars and buys 3 pens. If each costs 4 dollars, how many dollars remain?
    GSM_SV         Ana buys 3 pens at 4 dollars each and pays with x dollars. 8 dollars are left.
                   What is the value of unknown variable x?
    GSM_FOBAR      Ana buys 3 pens at 4 dollars each and pays with x dollars. How many dollars are left?
                   If we know the answer to the above question is 8, what is the value of unknown variable x?

    The pens cost 3 * 4 = 12 dollars. The change is 20 - 12 = 8 dollars. The answer is: 8      (the first two)
    The pens cost 3 * 4 = 12 dollars. So x = 8 + 12 = 20. The answer is: 20                    (the last two)

Train and test cannot overlap: their people have different names, every query names somebody, and a stable hash of
(family, operands) gives each combination of numbers to one split only. The third split, "new_kinds", has stories of
which no training problem tells (`NEW_KINDS` in stories.py), with the people of the test split. Standard library only.

    python -m matrix_llm.data.wordproblems --count 20000 --seed 0 --split train --out train.jsonl
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import hashlib
import json
import os
import random
from collections.abc import Iterable
from dataclasses import dataclass

from matrix_llm.base.errors import DataError
from matrix_llm.base.files import atomic_path
from matrix_llm.data.stories import FAMILIES, NEW_KINDS, Family

STYLES = ("GSM_AnsAug", "GSM_Rephrased", "GSM_SV", "GSM_FOBAR")
SPLITS = {"train": FAMILIES, "test": FAMILIES, "new_kinds": NEW_KINDS}  # the stories of each
COLUMNS = ("query", "response", "type", "original_question")  # MetaMathQA's, in its order

# fmt: off
NAMES = {
    "train": (
        "Ada", "Adam", "Agnes", "Albert", "Alma", "Amir", "Ana", "Andre", "Anton", "Aria", "Arthur", "Ava", "Basil",
        "Bella", "Ben", "Boris", "Carla", "Carmen", "Carol", "Celia", "Chloe", "Colin", "Conrad", "Cora", "Cyrus",
        "Dan", "Daria", "Delia", "Dennis", "Derek", "Diana", "Dora", "Eddie", "Edgar", "Edith", "Elena", "Elias",
        "Ella", "Eric", "Esther", "Ethan", "Eva", "Felix", "Fiona", "Flora", "Fred", "Gabriel", "Gavin", "Gina",
        "Gita", "Gloria", "Grace", "Greta", "Gustav", "Harold", "Hazel", "Helen", "Henry", "Hilda", "Hugo", "Ida",
        "Igor", "Ines", "Irene", "Iris", "Ivan", "Ivy", "Jana", "Jasper", "Joan", "Joel", "Jonas", "Judith", "Julia",
        "Kara", "Kevin", "Kira", "Kurt", "Lena", "Leo", "Lewis", "Lila", "Linda", "Louis", "Lucas", "Lydia", "Mabel",
        "Marco", "Maria", "Martin", "Maya", "Milan", "Mina", "Miriam", "Nadia", "Neil", "Nina", "Noah", "Nora",
        "Olaf", "Olga", "Omar", "Oscar", "Otto", "Owen", "Paula", "Pedro", "Peter", "Petra", "Quentin", "Ralph",
        "Ramona", "Robin", "Roman", "Rosa", "Ruben", "Ruth", "Sally", "Sam", "Sandra", "Selma", "Silas", "Sofia",
        "Stella", "Sven", "Tara", "Theo", "Thomas", "Tom", "Uma", "Ursula", "Vera", "Vincent", "Viola", "Walter",
        "Wanda", "Will", "Yara", "Yusuf", "Zoe",
    ),
    "test": (
        "Alice", "Bruno", "Clara", "David", "Emma", "Frank", "Hanna", "Jack", "Karl", "Laura", "Marta", "Oliver",
        "Rita", "Simon", "Tina", "Victor", "Anita", "Bernard", "Dalia", "Erik", "Fabian", "Georgia", "Harriet",
        "Isaac", "Jonah", "Kamila", "Lorena", "Marcel", "Nelson", "Oriana", "Pamela", "Roland", "Serena", "Tobias",
        "Valeria", "Xavier",
    ),
}
# fmt: on
THINGS = ("pens", "books", "apples", "cards", "stamps", "cookies", "shells", "stickers")

SMALLEST, LARGEST = 2, 60  # of every operand and result: 2 keeps the plurals right ("1 dollars")
TEST_SHARE = 8  # one combination of numbers in this many belongs to the test split


@dataclass(frozen=True)
class Problem:
    """One row in MetaMathQA's form, and how it was made."""

    query: str
    """The question as it is asked."""
    response: str
    """The solution step by step, ending in MetaMath's "The answer is: "."""
    type: str
    """One of STYLES."""
    original_question: str
    """The question before it was rephrased or turned backwards."""
    answer: str
    """The final answer, a whole number."""
    family: str
    """Name of the family that the story belongs to."""
    operands: tuple[int, ...]
    """The numbers of the story, in the order of the family's `ranges`."""
    unknown: str | None
    """The operand that is replaced by x; None for a forward question."""


def split_of(family: str, operands: tuple[int, ...]) -> str:
    """The split that owns these numbers. A cryptographic hash, since Python's own changes with every process."""
    digest = hashlib.sha256(f"{family}{operands}".encode()).digest()
    return "test" if digest[0] % TEST_SHARE == 0 else "train"


def _apply(left: int, operator: str, right: int) -> int | None:
    """left operator right; None unless it is a whole number from SMALLEST to LARGEST."""
    if operator == "/":
        value, rest = divmod(left, right)
    else:
        value, rest = {"+": left + right, "-": left - right, "*": left * right}[operator], 0
    return value if rest == 0 and SMALLEST <= value <= LARGEST else None


def _draw(family: Family, split: str, rng: random.Random) -> dict[str, int]:
    """Operands that belong to "train" or "test", with all their results. Draws until every result is within bounds."""
    while True:
        values: dict[str, int] = {name: rng.randint(*bounds) for name, bounds in family.ranges.items()}
        if split_of(family.name, tuple(values.values())) != split:
            continue
        for result, left, operator, right in family.steps:
            value = _apply(values[left], operator, values[right])
            if value is None:
                break
            values[result] = value
        else:
            return values


def _solution(family: Family, values: dict[str, int], unknown: str | None, things: str, rng: random.Random) -> str:
    """One sentence per step, each with its equation, then MetaMath's closing line."""
    sentences = []
    for result, left, operator, right in family.inverse[unknown] if unknown else family.steps:
        equation = f"{values[left]} {operator} {values[right]} = {values[result]}"
        if result == unknown:
            sentences.append(f"So x = {equation}.")
        else:
            sentences.append(rng.choice(family.wording[result]).format(equation, things=things))
    return " ".join(sentences) + f"\nThe answer is: {values[unknown or 'result']}"


def _problem(split: str, rng: random.Random) -> Problem:
    # 1. The family, its numbers and its people
    family, style = rng.choice(SPLITS[split]), rng.choice(STYLES)
    owner = split if split in NAMES else "test"  # "new_kinds" has the people of "test"
    values = _draw(family, owner, rng)
    first, second = rng.sample(NAMES[owner], 2)
    words = {name: str(value) for name, value in values.items()}
    words |= {"a": first, "b": second, "things": rng.choice(THINGS)}
    original = f"{family.story} {family.question}".format(**words)

    # 2. The query in the drawn style
    unknown = None
    if style == "GSM_AnsAug":
        query = original
    elif style == "GSM_Rephrased":
        query = rng.choice(family.rephrased).format(**words)
    else:
        unknown = rng.choice(list(family.inverse))
        hidden = {**words, unknown: "x"}
        if style == "GSM_SV":
            query = f"{family.story} {family.statement} What is the value of unknown variable x?".format(**hidden)
        else:
            query = (
                f"{family.story} {family.question} If we know the answer to the above question is {{result}}, "
                "what is the value of unknown variable x?"
            ).format(**hidden)
    return Problem(
        query=query,
        response=_solution(family, values, unknown, words["things"], rng),
        type=style,
        original_question=original,
        answer=words[unknown or "result"],
        family=family.name,
        operands=tuple(values[name] for name in family.ranges),
        unknown=unknown,
    )


def generate(count: int, *, seed: int, split: str = "train") -> list[Problem]:
    """`count` problems, the same for the same arguments on every machine; generate(10) is generate(20)[:10].

    >>> problem = generate(1, seed=0)[0]
    >>> problem.response.endswith(f"The answer is: {problem.answer}")
    True
    """
    if count < 0:
        raise DataError(f"count={count} is negative. Ask for 0 problems or more.")
    if split not in SPLITS:
        raise DataError(f"split={split!r} is unknown. Choose one of {', '.join(SPLITS)}.")
    # One generator per problem, so that the first problems do not depend on how many follow. It is seeded with a text,
    # which Python hashes, so that neighbouring seeds are unrelated.
    return [_problem(split, random.Random(f"{split}/{seed}/{index}")) for index in range(count)]


def write_jsonl(path: str | os.PathLike, problems: Iterable[Problem]) -> None:
    """One JSON object per line with MetaMathQA's columns; an interrupted write leaves the old file as it was."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for problem in problems:
            row = {column: getattr(problem, column) for column in COLUMNS}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m matrix_llm.data.wordproblems",
        description="Write generated word problems as MetaMathQA-style JSONL.",
    )
    parser.add_argument("--count", type=int, required=True, help="number of problems")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", default="train", help=" or ".join(SPLITS))
    parser.add_argument("--out", type=Path, required=True, help="the .jsonl file to write")
    options = parser.parse_args(arguments)
    try:
        problems = generate(options.count, seed=options.seed, split=options.split)
    except DataError as error:
        parser.error(str(error))
    write_jsonl(options.out, problems)
    print(f"{options.out}: {len(problems)} problems, split {options.split}, seed {options.seed}")


if __name__ == "__main__":
    main()
