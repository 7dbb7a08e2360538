"""The base model of a run, where that is a folder: its name on the Hub, its licence, and where its weights are from.

`matrix-llm fetch` leaves a record in the folder that it writes. A card names the model by that record, since a path on
one machine says nothing to anybody else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from matrix_llm.base.files import parse_json
from matrix_llm.base.safe_yaml import LONGEST, read_yaml
from matrix_llm.publish.finished_run import CARD

RECORD = "fetched.json"  # what `matrix-llm fetch` writes, last of all


@dataclass(frozen=True)
class BaseModel:
    """What a card says about the base model."""

    name: str | None
    """user/name on the Hub where that is known, else the name or the folder that the recipe gives; None: no base."""
    note: str
    """How its weights differ from those on the Hub, as a sentence; "" where they do not, or nothing is known."""
    licence: str | None
    """As the folder states it; None: it does not, or the base is not a folder."""


def find_base_model(given: str | None) -> BaseModel:
    """What is known of the base model of a recipe.

    Args:
        given: the recipe's model_name_or_path.

    >>> find_base_model("user/name").name
    'user/name'
    """
    folder = Path(given) if given else None
    if folder is None or not folder.is_dir():
        return BaseModel(given, "", None)
    record = _read_record(folder)
    licence = licence_in(folder) or _text(record, "licence")
    return BaseModel(_text(record, "repo") or given, _note(record), licence)


def licence_in(folder: Path) -> str | None:
    """The licence that a folder's README.md states."""
    card = folder / CARD
    try:
        if not card.is_file() or card.stat().st_size > LONGEST:
            return None
        header = re.match(
            r"\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", card.read_text(encoding="utf-8"), re.DOTALL
        )
        found = read_yaml(header[1]) if header else None
    except (OSError, ValueError, yaml.YAMLError):  # a file or front matter that cannot be read states nothing
        return None
    licence = found.get("license") if isinstance(found, dict) else None
    return licence if isinstance(licence, str) else None


def _read_record(folder: Path) -> Mapping[str, Any]:
    try:
        record = parse_json((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not fetched, or a record that says nothing
        return {}
    return record if isinstance(record, dict) else {}


def _text(record: Mapping[str, Any], key: str) -> str | None:
    value = record.get(key)
    return value if isinstance(value, str) and value else None


def _note(record: Mapping[str, Any]) -> str:
    file, package, kinds = (_text(record, key) for key in ("gguf", "package", "stored_as"))
    if file is None:
        return ""
    origin = f"the file {file}" + (f" in the package {package}" if package else "")
    rounded = f", where they are rounded to {kinds}" if kinds else ""
    return f"The base weights are those of {origin}{rounded}; they differ from the original."
