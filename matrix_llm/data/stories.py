"""The stories of the generated word problems: texts whose numbers vary, with the steps that solve them.

`FAMILIES` are the kinds that the splits "train" and "test" of wordproblems.py draw from. `NEW_KINDS` are never trained
on: other stories, with other wordings of the steps, for a score on problems of a kind that the model has not seen.
Standard library only.
"""

from dataclasses import dataclass

Step = tuple[str, str, str, str]  # (result, left, operator, right); the names are operands or earlier results


@dataclass(frozen=True)
class Family:
    """A story whose numbers vary. Texts are format strings over the operands, {result}, {a}, {b} (people), {things}."""

    name: str
    """Its name, which also enters the hash that decides the split."""
    ranges: dict[str, tuple[int, int]]
    """Inclusive bounds of each operand."""
    story: str
    """The sentences that give the numbers."""
    question: str
    """`story` + `question` is the original question."""
    statement: str
    """The question turned into a statement, for GSM_SV."""
    rephrased: tuple[str, ...]
    """Complete questions that say the same in other words."""
    steps: tuple[Step, ...]
    """From the operands to `result`."""
    inverse: dict[str, tuple[Step, ...]]
    """For each operand that may become x: the steps from the others and `result` back to it."""
    wording: dict[str, tuple[str, ...]]
    """Sentences for each intermediate result; {} is its equation. They read correctly forwards and backwards."""


FAMILIES = (
    Family(
        name="change",
        ranges={"n": (2, 9), "p": (2, 9), "m": (10, 60)},
        story="{a} buys {n} {things} at {p} dollars each and pays with {m} dollars.",
        question="How many dollars are left?",
        statement="{result} dollars are left.",
        rephrased=("{a} has {m} dollars and buys {n} {things}. If each costs {p} dollars, how many dollars remain?",),
        steps=(("cost", "n", "*", "p"), ("result", "m", "-", "cost")),
        inverse={
            "m": (("cost", "n", "*", "p"), ("m", "result", "+", "cost")),
            "p": (("cost", "m", "-", "result"), ("p", "cost", "/", "n")),
        },
        wording={
            "cost": ("The {things} cost {} dollars.", "The price of all {things} is {} dollars."),
            "result": ("The change is {} dollars.", "This leaves {} dollars."),
        },
    ),
    Family(
        name="share",
        ranges={"f": (2, 40), "g": (2, 40), "n": (2, 9)},
        story="{a} has {f} {things}, gets {g} more and shares all equally among {n} friends.",
        question="How many {things} does each friend get?",
        statement="Each friend gets {result} {things}.",
        rephrased=("With {f} {things} and {g} new ones, {a} makes {n} equal piles. How many {things} are in a pile?",),
        steps=(("total", "f", "+", "g"), ("result", "total", "/", "n")),
        inverse={
            "f": (("total", "result", "*", "n"), ("f", "total", "-", "g")),
            "n": (("total", "f", "+", "g"), ("n", "total", "/", "result")),
        },
        wording={
            "total": ("There are {} {things}.", "The total is {} {things}."),
            "result": ("Each share is {} {things}.", "One part is {} {things}."),
        },
    ),
    Family(
        name="more",
        ranges={"f": (2, 28), "d": (2, 40)},
        story="{a} has {f} {things} and {b} has {d} more than that.",
        question="How many {things} do they have together?",
        statement="Together they have {result} {things}.",
        rephrased=("{b} owns {d} more {things} than {a}, who owns {f}. How many {things} do both own in total?",),
        steps=(("second", "f", "+", "d"), ("result", "f", "+", "second")),
        inverse={"d": (("second", "result", "-", "f"), ("d", "second", "-", "f"))},
        wording={
            "second": ("The second person has {} {things}.", "The other one has {} {things}."),
            "result": ("Together they have {} {things}.", "In total this makes {} {things}."),
        },
    ),
    Family(
        name="fewer",
        ranges={"f": (4, 50), "d": (2, 40)},
        story="{a} has {f} {things} and {b} has {d} fewer than that.",
        question="How many {things} do they have together?",
        statement="Together they have {result} {things}.",
        rephrased=("{b} owns {d} fewer {things} than {a}, who owns {f}. How many {things} do both own in total?",),
        steps=(("second", "f", "-", "d"), ("result", "f", "+", "second")),
        inverse={"d": (("second", "result", "-", "f"), ("d", "f", "-", "second"))},
        wording={
            "second": ("The second person has {} {things}.", "The other one has {} {things}."),
            "result": ("Together they have {} {things}.", "In total this makes {} {things}."),
        },
    ),
    Family(
        name="travel",
        ranges={"v": (2, 12), "t": (2, 9), "w": (2, 40)},
        story="{a} cycles {v} miles per hour for {t} hours and then walks {w} miles.",
        question="How many miles is that in all?",
        statement="That is {result} miles in all.",
        rephrased=(
            "After {t} hours on a bicycle at {v} miles per hour, {a} walks {w} miles more. "
            "How long is the whole way in miles?",
        ),
        steps=(("ride", "v", "*", "t"), ("result", "ride", "+", "w")),
        inverse={
            "w": (("ride", "v", "*", "t"), ("w", "result", "-", "ride")),
            "v": (("ride", "result", "-", "w"), ("v", "ride", "/", "t")),
        },
        wording={
            "ride": ("The ride is {} miles.", "The bicycle covers {} miles."),
            "result": ("The whole way is {} miles.", "All in all this is {} miles."),
        },
    ),
    Family(
        name="savings",
        ranges={"s": (2, 12), "t": (2, 9), "g": (2, 40)},
        story="{a} has {g} dollars and saves {s} dollars a week for {t} weeks.",
        question="How many dollars are there then?",
        statement="Then there are {result} dollars.",
        rephrased=(
            "For {t} weeks {a} puts {s} dollars a week into a box that held {g} dollars. "
            "How many dollars are in the box now?",
        ),
        steps=(("saved", "s", "*", "t"), ("result", "g", "+", "saved")),
        inverse={
            "g": (("saved", "s", "*", "t"), ("g", "result", "-", "saved")),
            "t": (("saved", "result", "-", "g"), ("t", "saved", "/", "s")),
        },
        wording={
            "saved": ("The savings are {} dollars.", "Saving brings {} dollars."),
            "result": ("Now there are {} dollars.", "The sum is {} dollars."),
        },
    ),
    Family(
        name="boxes",
        ranges={"n": (2, 9), "p": (2, 9), "k": (2, 9), "q": (2, 9)},
        story="{a} packs {n} boxes of {p} {things} and {k} bags of {q} {things}.",
        question="How many {things} is that?",
        statement="That is {result} {things}.",
        rephrased=(
            "There are {p} {things} in a box and {q} in a bag. {a} buys {n} boxes and {k} bags. "
            "How many {things} is that?",
        ),
        steps=(("boxed", "n", "*", "p"), ("bagged", "k", "*", "q"), ("result", "boxed", "+", "bagged")),
        inverse={"p": (("bagged", "k", "*", "q"), ("boxed", "result", "-", "bagged"), ("p", "boxed", "/", "n"))},
        wording={
            "boxed": ("The boxes hold {} {things}.", "In the boxes are {} {things}."),
            "bagged": ("The bags hold {} {things}.", "In the bags are {} {things}."),
            "result": ("Together they hold {} {things}.", "In total this makes {} {things}."),
        },
    ),
    Family(
        name="trade",
        ranges={"f": (4, 60), "g": (2, 40), "h": (2, 40)},
        story="{a} had {f} {things}, gave away {g} and then found {h}.",
        question="How many {things} are there now?",
        statement="Now there are {result} {things}.",
        rephrased=(
            "From a box of {f} {things}, {a} takes out {g} and later puts in {h}. How many {things} does it hold?",
        ),
        steps=(("kept", "f", "-", "g"), ("result", "kept", "+", "h")),
        inverse={
            "h": (("kept", "f", "-", "g"), ("h", "result", "-", "kept")),
            "f": (("kept", "result", "-", "h"), ("f", "kept", "+", "g")),
        },
        wording={
            "kept": ("Before the last change there were {} {things}.", "In between there were {} {things}."),
            "result": ("Now there are {} {things}.", "In the end there are {} {things}."),
        },
    ),
    Family(
        name="times",
        ranges={"f": (2, 12), "k": (2, 9), "g": (2, 40)},
        story="{a} has {f} {things}. {b} had {k} times as many, but lost {g}.",
        question="How many {things} are left?",
        statement="{result} {things} are left.",
        rephrased=("{b} had {k} times the {f} {things} of {a} before losing {g}. How many {things} does that leave?",),
        steps=(("many", "f", "*", "k"), ("result", "many", "-", "g")),
        inverse={
            "g": (("many", "f", "*", "k"), ("g", "many", "-", "result")),
            "k": (("many", "result", "+", "g"), ("k", "many", "/", "f")),
        },
        wording={
            "many": ("At first there were {} {things}.", "The start was {} {things}."),
            "result": ("What remains is {} {things}.", "After the loss it is {} {things}."),
        },
    ),
    Family(
        name="reading",
        ranges={"p": (2, 12), "t": (2, 9), "m": (10, 60)},
        story="{a} reads {p} pages a day for {t} days. The book has {m} pages.",
        question="How many pages are left?",
        statement="There are {result} pages left.",
        rephrased=("A book has {m} pages. How many are left once {a} has read {p} pages a day for {t} days?",),
        steps=(("read", "p", "*", "t"), ("result", "m", "-", "read")),
        inverse={
            "m": (("read", "p", "*", "t"), ("m", "result", "+", "read")),
            "t": (("read", "m", "-", "result"), ("t", "read", "/", "p")),
        },
        wording={
            "read": ("The pages read are {}.", "Reading covers {} pages."),
            "result": ("The rest is {} pages.", "Still to read are {} pages."),
        },
    ),
)

NEW_KINDS = (
    Family(
        name="garden",
        ranges={"r": (2, 9), "c": (2, 9), "w": (2, 40)},
        story="{a} plants {r} rows of {c} tulips, but {w} of the tulips wither.",
        question="How many tulips bloom?",
        statement="{result} tulips bloom.",
        rephrased=("In the garden of {a}, {w} of the tulips die. There were {r} rows of {c}. How many tulips live?",),
        steps=(("planted", "r", "*", "c"), ("result", "planted", "-", "w")),
        inverse={
            "w": (("planted", "r", "*", "c"), ("w", "planted", "-", "result")),
            "c": (("planted", "result", "+", "w"), ("c", "planted", "/", "r")),
        },
        wording={
            "planted": ("The rows hold {} tulips.", "The tulips planted are {}."),
            "result": ("In bloom are {} tulips.", "The others are {} tulips."),
        },
    ),
    Family(
        name="voucher",
        ranges={"p": (10, 50), "h": (2, 30), "v": (2, 30)},
        story="{a} chooses a coat for {p} dollars and a hat for {h} dollars, and has a voucher of {v} dollars.",
        question="How many dollars are still to pay?",
        statement="There are {result} dollars still to pay.",
        rephrased=(
            "With a voucher of {v} dollars, {a} buys a hat for {h} dollars and a coat for {p} dollars. "
            "What is the rest of the bill in dollars?",
        ),
        steps=(("price", "p", "+", "h"), ("result", "price", "-", "v")),
        inverse={
            "v": (("price", "p", "+", "h"), ("v", "price", "-", "result")),
            "h": (("price", "result", "+", "v"), ("h", "price", "-", "p")),
        },
        wording={
            "price": ("Coat and hat cost {} dollars.", "The bill is {} dollars."),
            "result": ("To pay are {} dollars.", "With the voucher it is {} dollars."),
        },
    ),
    Family(
        name="ages",
        ranges={"f": (4, 30), "d": (2, 20), "k": (2, 20)},
        story="{a} is {f} years old, and {b} is {d} years older.",
        question="How old will {b} be in {k} years?",
        statement="In {k} years, {b} will be {result} years old.",
        rephrased=("{b} was born {d} years before {a}, who is {f}. What will be the age of {b} {k} years from now?",),
        steps=(("older", "f", "+", "d"), ("result", "older", "+", "k")),
        inverse={
            "d": (("older", "result", "-", "k"), ("d", "older", "-", "f")),
            "f": (("older", "result", "-", "k"), ("f", "older", "-", "d")),
        },
        wording={
            "older": ("The older one is {} years old.", "Today the age is {} years."),
            "result": ("Later the age is {} years.", "By then it is {} years."),
        },
    ),
    Family(
        name="lawns",
        ranges={"n": (2, 9), "e": (2, 12), "k": (2, 9)},
        story="{a} mows {n} lawns for {e} dollars each and splits the money evenly among {k} helpers.",
        question="How many dollars does each helper get?",
        statement="Each helper gets {result} dollars.",
        rephrased=("The {k} helpers of {a} share the pay for {n} lawns at {e} dollars. How much is that for each?",),
        steps=(("earned", "n", "*", "e"), ("result", "earned", "/", "k")),
        inverse={
            "e": (("earned", "result", "*", "k"), ("e", "earned", "/", "n")),
            "k": (("earned", "n", "*", "e"), ("k", "earned", "/", "result")),
        },
        wording={
            "earned": ("The lawns bring {} dollars.", "The pay is {} dollars."),
            "result": ("A helper gets {} dollars.", "For each one it is {} dollars."),
        },
    ),
    Family(
        name="typing",
        ranges={"v": (2, 12), "w": (2, 12), "t": (2, 9)},
        story="{a} types {v} lines a minute and {b} types {w} lines a minute. Both type for {t} minutes.",
        question="How many lines do they type together?",
        statement="Together they type {result} lines.",
        rephrased=(
            "Two people type for {t} minutes: {b} at {w} lines a minute and {a} at {v}. "
            "How many lines are there at the end?",
        ),
        steps=(("both", "v", "+", "w"), ("result", "both", "*", "t")),
        inverse={
            "t": (("both", "v", "+", "w"), ("t", "result", "/", "both")),
            "v": (("both", "result", "/", "t"), ("v", "both", "-", "w")),
        },
        wording={
            "both": ("A minute brings {} lines.", "In a minute the two type {} lines."),
            "result": ("The text has {} lines.", "All minutes bring {} lines."),
        },
    ),
)
