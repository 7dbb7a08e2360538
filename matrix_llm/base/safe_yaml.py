"""YAML from files that others may have written: what it costs is bounded by what the file says it holds.

An alias is a few letters, and stands for all that it names: nine lines of lists of aliases hold a billion values.
"""

from __future__ import annotations

from typing import Any

import yaml

LONGEST = 2**20  # characters of a file of settings
MOST = 100_000  # values, once every alias is written out
DIGITS = 1000  # of a number; Python writes no more than 4,300


class UnboundedError(yaml.YAMLError):
    """The text stands for more than it should."""


def check_text(text: str) -> None:
    """Refuse a text that would take minutes to read.

    Raises:
        UnboundedError: it is longer than a file of settings.
    """
    if len(text) > LONGEST:
        raise UnboundedError(f"it has {len(text):,} characters, and a file of settings at most {LONGEST:,}")


def check_size(root: yaml.Node | None) -> None:
    """Refuse what stands for more than MOST values, or holds itself, before any value is made of it.

    Raises:
        UnboundedError: says which of the two.
    """
    sizes: dict[int, int | None] = {}  # of each node with all that it holds; None while it is being counted

    def size(node: yaml.Node) -> int:
        if id(node) in sizes:
            known = sizes[id(node)]
            if known is None:
                raise UnboundedError("a value holds itself. Write it without an alias")
            return known
        sizes[id(node)] = None
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            inner = [each for pair in node.value for each in pair]
        elif isinstance(node, yaml.SequenceNode):
            inner = node.value
        elif len(node.value) > DIGITS and node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float"):
            raise UnboundedError(f"a number has {len(node.value):,} digits, and at most {DIGITS:,} are read")
        total = sizes[id(node)] = 1 + sum(size(each) for each in inner)
        if total > MOST:
            raise UnboundedError(f"its aliases stand for more than {MOST:,} values. Write out what is meant")
        return total

    if root is not None:
        size(root)


def read_yaml(text: str, loader_class: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """The value of a YAML text.

    Raises:
        yaml.YAMLError: the text is not YAML, or stands for too much; no other error, whatever the text is.

    >>> read_yaml("a: &x [1, 2]\\nb: *x")
    {'a': [1, 2], 'b': [1, 2]}
    """
    check_text(text)
    try:
        loader = loader_class(text)
        try:
            root = loader.get_single_node()
            check_size(root)
            return None if root is None else loader.construct_document(root)
        finally:
            loader.dispose()
    except RecursionError:
        raise UnboundedError("a value is nested too deeply") from None
    except (ValueError, TypeError, AttributeError, OverflowError) as error:  # a date or a number that there is not
        raise UnboundedError(str(error)) from None
