"""The data sets that a recipe names: one, or several with a weight each.

dataset: data/train.jsonl
dataset: [data/a.jsonl, data/b.csv]
dataset:
  - {path: meta-math/MetaMathQA, weight: 0.5}
  - {path: data/math, split: "train[:1000]", columns: {question: problem, answer: solution}}

eval_dataset: {gsm8k: data/gsm8k/test.jsonl, math: {path: data/math, split: test}}     one loss for each name
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matrix_llm.base.errors import DataError, RecipeError
from matrix_llm.base.values import check_fields, nearest, setting
from matrix_llm.data.forms import CONTEXT, FORMS
from matrix_llm.data.readers import Slice, Source, as_path, local_path, looks_local

# What a recipe may give as a data set
Given = str | dict | list

# Fields that a row may have besides those by which its form is known
OPTIONAL_FIELDS = {"input", "weight", "id", *CONTEXT}


@dataclass
class DatasetEntry:
    """One data set. What it does not say is taken from the settings that hold for all of them."""

    path: str = setting("")
    """A file, a folder, a Hub id, or "builtin"."""
    weight: float = setting(1, above=0, at_most=1000)
    """How often its rows are taken: 0.5 draws half of them, 2 takes each twice."""
    split: str | None = setting(None)
    """A split, or a part of one: "train", "train[:1000]", "train[10%:]"."""
    config: str | None = setting(None)
    """A configuration of a Hub data set or of a folder."""
    revision: str | None = setting(None)
    """Branch, tag or commit of a Hub data set."""
    columns: dict | None = None
    """{our name: theirs} for fields that its rows have under other names."""
    max_rows: int | None = setting(None, at_least=1)
    """Maximum number of rows to read."""
    name: str = field(default="", init=False)
    """The name of a held-out set, under which its loss is logged; empty for one without."""

    def source(self, defaults: Source) -> Source:
        """Its rows, with what it does not say taken from `defaults`."""
        said: dict[str, Any] = {
            "config": self.config,
            "split": self.split,
            "revision": self.revision,
            "max_rows": self.max_rows,
        }
        if self.columns is not None:
            said["columns"] = self.columns
        elif self.path == "builtin":
            said["columns"] = {}  # the generator's rows have our names
        return dataclasses.replace(
            defaults, name=self.path, **{key: value for key, value in said.items() if value is not None}
        )


def read_entries(key: str, given: Given | None, *, may_have_names: bool = False) -> list[DatasetEntry]:
    """The data sets that the setting `key` names, checked as far as they can be without reading them.

    Args:
        may_have_names: a mapping without `path` is {name: data set}, as eval_dataset may be.

    Raises:
        RecipeError: not a data set, or a field of one that does not exist or cannot be used.
    """
    if given is None:
        return []
    if given == {}:
        raise RecipeError(f"{key}={{}} names no data set. Give at least one.")
    if isinstance(given, dict) and "path" not in given and may_have_names:
        return [_named(key, name, each) for name, each in given.items()]
    if isinstance(given, list):
        if not given:
            raise RecipeError(f"{key}=[] names no data set. Give at least one.")
        return [_read_entry(f"{key}[{place}]", each) for place, each in enumerate(given)]
    return [_read_entry(key, given)]


def question_source(name: str) -> Source:
    """The rows of one entry of leakage_check: a path or a Hub id, with a configuration after a colon."""
    source, colon, config = name.partition(":")
    if colon and not Path(name).expanduser().exists():
        return Source(source, config, split="test")
    return Source(name, split="test")


def names_of(given: Given | None) -> list[str]:
    """The paths and Hub ids that a recipe gives, for a model card."""
    if isinstance(given, str):
        return [given]
    if isinstance(given, dict):
        given = [given["path"]] if "path" in given else [*given.values()]
    return [name for each in given or [] for name in names_of(each)]


def map_paths(given: Any, change: Callable[[str], str]) -> Any:
    """`given` with each path changed."""
    if isinstance(given, str):
        return change(given)
    if isinstance(given, list):
        return [map_paths(each, change) for each in given]
    if isinstance(given, dict):
        if "path" not in given:
            return {name: map_paths(each, change) for name, each in given.items()}
        return {**given, "path": map_paths(given["path"], change)}
    return given


def check_columns(where: str, columns: Mapping[Any, Any]) -> None:
    """Refuse a mapping {our name: theirs} that cannot work."""
    known = {name for form in FORMS.values() for name in form.fields} | OPTIONAL_FIELDS
    for ours, theirs in columns.items():
        if not isinstance(ours, str) or not isinstance(theirs, str) or not theirs:
            raise RecipeError(f"{where} has {ours!r}: {theirs!r}, but both must be names. Put them in quotes.")
        if ours not in known:
            raise RecipeError(
                f"{where} has {ours}: {theirs}, but no form of rows has a field {ours!r}. Write `our name: theirs`."
                f"{nearest(ours, known)}"
            )
    theirs = list(columns.values())
    twice = next((name for name in theirs if theirs.count(name) > 1), None)
    if twice is not None:
        names = " and ".join(ours for ours, their in columns.items() if their == twice)
        raise RecipeError(f"{where} gives the column {twice!r} two names, {names}. Keep one.")


def check_exists(where: str, source: Source) -> None:
    """Refuse what can be seen to be unreadable without reading a row; a Hub id is not asked for here.

    Raises:
        RecipeError: there is nothing at the path, it is not of a known format, or its split or configuration is not
            there.
    """
    try:
        Slice.of(source.split)
        if local_path(source.name) is None and looks_local(source.name):
            comma = ". For several data sets, write '[a, b]'" if "," in source.name else ""
            raise DataError(f"nothing at {as_path(source.name).absolute()}. Correct the path{comma}.")
        source.files()
    except DataError as error:
        raise RecipeError(f"{where}={source.name!r}: {error}") from None
    except OSError as error:
        raise RecipeError(
            f"{where}={source.name!r} cannot be read: {error.strerror or error}. Give another path."
        ) from None


def _named(key: str, name: Any, given: Any) -> DatasetEntry:
    if not isinstance(name, str) or not name or not name.replace("_", "").replace("-", "").isalnum():
        raise RecipeError(
            f"{key} has the name {name!r}, but a name is made of letters, digits, - and _. Write {{name: path}}."
        )
    entry = _read_entry(f"{key}[{name!r}]", given)
    entry.name = name
    return entry


def _read_entry(where: str, given: Any) -> DatasetEntry:
    if isinstance(given, str):
        if given.lstrip().startswith(("[", "{")):  # on the command line, what is not YAML stays a text
            raise RecipeError(
                f"{where}={given!r} is not a list of data sets. Write '[a.jsonl, {{path: b.csv, weight: 2}}]'."
            )
        given = {"path": given}
    fields = [each.name for each in dataclasses.fields(DatasetEntry) if each.init]
    if not isinstance(given, dict):
        raise RecipeError(f"{where}={given!r} is not a data set. Give a path, or a mapping with a path.")
    unknown = next((name for name in given if name not in fields), None)
    if unknown is not None:
        raise RecipeError(f"{where} has {unknown!r}, but a data set has {', '.join(fields)}.{nearest(unknown, fields)}")
    if not given.get("path"):
        raise RecipeError(f"{where}={given!r} has no path. Give a file, a folder, a Hub id or builtin.")
    try:
        entry = DatasetEntry(**given)
        check_fields(entry)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None
    if entry.columns:
        check_columns(f"{where}: columns", entry.columns)
    return entry
