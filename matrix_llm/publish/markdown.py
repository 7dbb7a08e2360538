"""Rendering of the model cards: jinja2 templates, and filters that make foreign text safe in Markdown.

Whatever comes from a recipe, a folder's name or a result file passes through one of the filters, so that a `|` cannot
break a table, "```" cannot end a code block, and `<` cannot start HTML. Escaping for HTML would be wrong here: the Hub
reads README.md as Markdown.

>>> text("a|b <i>"), code("a`b")
('a\\\\|b \\\\<i>', '``a`b``')
"""

from __future__ import annotations

import json
import re
from typing import Any

import jinja2

from matrix_llm.base.text import visible


def text(value: Any) -> str:
    """Plain words in a sentence, a heading or a table cell: on one line, with Markdown's own characters escaped."""
    escaped = re.sub(r"([\\`*|<\[@&~])", r"\\\1", _one_line(value))
    return re.sub(r"(?i)(:)(?=//)|(?<=\bwww)(\.)", r"\\\1\2", escaped)  # addresses would become links of their own


def code(value: Any) -> str:
    """A code span."""
    content = _one_line(value)
    ticks = _longer_than_any_ticks_in(content, at_least=1)
    padding = " " if content.startswith("`") or content.endswith("`") else ""
    return f"{ticks}{padding}{content}{padding}{ticks}"


def fenced(value: str, language: str) -> str:
    """A code block."""
    fence = _longer_than_any_ticks_in(value, at_least=3)
    return f"{fence}{language}\n{value.strip()}\n{fence}"


def quoted(value: str) -> str:
    """A string literal of Python, on one line."""
    return json.dumps(value, ensure_ascii=False)


def percent(share: float) -> str:
    """A share of 1 as a percentage with one decimal: 0.75 is "75.0"."""
    return f"{100 * share:.1f}"


def _one_line(value: Any) -> str:
    return visible(" ".join(str(value).split()))


def _longer_than_any_ticks_in(value: str, at_least: int) -> str:
    longest = max(map(len, re.findall("`+", value)), default=0)
    return "`" * max(at_least, longest + 1)


TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("matrix_llm.publish"),
    autoescape=False,  # Markdown, not HTML
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
TEMPLATES.filters |= {"text": text, "code": code, "fenced": fenced, "quoted": quoted, "percent": percent}
