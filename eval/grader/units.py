r"""Amounts with units: 250 cents is $2.50, 5 m is not 5 cm, and 2 hours 30 minutes is not 2.

A unit that only one side gives is not compared: MATH writes both 15 and 15\text{ cm}^2.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from .text import read_rational

KINDS: dict[str, dict[str, Fraction]] = {
    "length": {
        "mm millimeter millimetre": Fraction(1, 1000), "cm centimeter centimetre": Fraction(1, 100),
        "m meter metre": Fraction(1), "km kilometer kilometre": Fraction(1000), "in inch inches": Fraction(254, 10_000),
        "ft foot feet": Fraction(3048, 10_000), "yd yard": Fraction(9144, 10_000), "mi mile": Fraction(1609344, 1000),
    },
    "mass": {
        "mg milligram": Fraction(1, 1000), "g gram": Fraction(1), "kg kilogram": Fraction(1000),
        "oz ounce": Fraction(45359237, 1_600_000), "lb pound": Fraction(45359237, 100_000),
    },
    "time": {
        "s sec second": Fraction(1), "min minute": Fraction(60), "h hr hour": Fraction(3600), "day": Fraction(86_400),
        "week": Fraction(604_800),
    },
    "money": {"cent": Fraction(1, 100), "dollar": Fraction(1)},
    "volume": {"ml milliliter millilitre": Fraction(1, 1000), "l liter litre": Fraction(1)},
}  # fmt: skip
TABLE = {
    name: (kind, size)
    for kind, units in KINDS.items()
    for names, size in units.items()
    for word in names.split()
    for name in (word, word + "s")
}
NAMES = "|".join(sorted(TABLE, key=len, reverse=True))
NUMBER = r"-?(?:\d[\d,]{0,30}(?:\.\d{1,30})?|\.\d{1,30})(?: ?/ ?\d{1,30})?"
PART = re.compile(rf"({NUMBER}) ?(?:(square|sq\.?|cubic) )?({NAMES})\.?(?:\^\{{?([23])\}}?)?(?![a-zA-Z])", re.I)
DOLLARS = re.compile(rf"-? ?\$ ?({NUMBER})")
FONT = re.compile(r"\\(?:text|mbox|mathrm|textrm|rm)(?![a-zA-Z]) ?|[{}~]|\\[,;:! ]")


@dataclass(frozen=True)
class Amount:
    """A number of one kind of unit."""

    size: Fraction
    """In the unit of its kind with size 1, to the power."""
    kind: str
    """The kind of unit."""
    power: int
    """2 for areas, 3 for volumes."""
    readings: tuple[Fraction, ...]
    """The bare numbers that it may be written as, in each unit that it mentions."""


def read_amount(text: str) -> Amount | None:
    r"""A number with a unit, or several that add up; None for anything else.

    >>> read_amount(r"2\text{ hours }30\text{ minutes}").readings
    (Fraction(5, 2), Fraction(150, 1))
    >>> read_amount(r"\$2.50") == read_amount("2.5 dollars"), read_amount("5 apples")
    (True, None)
    """
    if len(text) > 200:
        return None
    text = re.sub(r"\s+", " ", FONT.sub(" ", text.replace("{,}", ",").replace(r"\!", ""))).strip(" .")
    text = re.sub(r" ?\^ ?", "^", text)
    money = DOLLARS.fullmatch(text.replace("\\", ""))
    if money:
        value = read_rational(money.group(1))
        return None if value is None else _amount([(-value if text[0] == "-" else value, "money", Fraction(1), 1)])
    parts = []
    place = 0
    while found := PART.match(text, place):
        number = read_rational(found.group(1))
        kind, size = TABLE.get(found.group(3), TABLE[found.group(3).lower()])
        power = {"square": 2, "cubic": 3}.get((found.group(2) or "").lower(), 2 if found.group(2) else 1)
        power = int(found.group(4)) if found.group(4) else power
        if number is None:
            return None
        parts.append((number, kind, size, power))
        place = found.end()
        between = re.compile(r",? ?(?:and )?").match(text, place)
        place = between.end() if between else place
    return _amount(parts) if parts and place == len(text) else None


def _amount(parts: list[tuple[Fraction, str, Fraction, int]]) -> Amount | None:
    _, kind, _, power = parts[0]
    if any((part[1], part[3]) != (kind, power) for part in parts):
        return None
    total = sum((number * size**power for number, _, size, _ in parts), Fraction(0))
    return Amount(total, kind, power, tuple(total / size**power for _, _, size, _ in parts))
