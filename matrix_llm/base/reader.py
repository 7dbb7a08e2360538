"""The strict reader of a recipe: one flat YAML file, and `--key value` overrides, checked against dataclasses.

>>> from dataclasses import dataclass
>>> @dataclass
... class Training:
...     learning_rate: float = 1e-3
>>> Settings({"training": Training}).read_overrides(["--learning-rate", "2e-5"])
{'learning_rate': 2e-05}
"""

import dataclasses
import os
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from matrix_llm.base.console import say
from matrix_llm.base.errors import RecipeError, one_line
from matrix_llm.base.safe_yaml import UnboundedError, check_size, check_text
from matrix_llm.base.values import YamlLoader, alternatives, check_value, nearest, type_name

COMMAND_LINE = "on the command line"
_PACKAGE = Path(__file__).resolve().parents[1]
SHIPPED = _PACKAGE if (_PACKAGE / "recipes").is_dir() else _PACKAGE.parent
"""The folder of recipes/ and ds_configs/: the package where it is installed, the repository in a checkout."""


class Settings:
    """The settings that a recipe may hold: the fields of several dataclasses, whose names do not overlap.

    Args:
        parts: a name for each dataclass, such as {"model": ModelArguments}.
        hints: what to write instead of names that people often try but that do not exist.
    """

    def __init__(self, parts: Mapping[str, type], hints: Mapping[str, str] | None = None) -> None:
        self._parts = tuple(parts)
        self._hints = hints or {}
        self._fields = {f.name: f for cls in parts.values() for f in dataclasses.fields(cls) if f.init}
        self._part_of = {f.name: part for part, cls in parts.items() for f in dataclasses.fields(cls) if f.init}
        self._annotations = {
            name: annotation for cls in parts.values() for name, annotation in typing.get_type_hints(cls).items()
        }

    @property
    def names(self) -> list[str]:
        """The names of all settings."""
        return list(self._fields)

    def read(self, path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
        """The checked settings of a recipe file, with the overrides of the command line.

        Raises:
            RecipeError: the file cannot be read or is not a flat YAML mapping; a name that does not exist; a value of
                another type, out of range or not among the choices.
        """
        return {**self._read_file(path), **self.read_overrides(overrides)}

    def read_overrides(self, words: Sequence[str]) -> dict[str, Any]:
        """["--learning-rate", "1e-4", "--packing"] -> {"learning_rate": 1e-4, "packing": True}"""
        settings = {}
        remaining = list(words)
        while remaining:
            # 1. --key, with dashes or underscores
            flag = remaining.pop(0)
            if not flag.startswith("--"):
                raise RecipeError(f"{COMMAND_LINE}: {flag!r} belongs to no setting. Write --key value, or --key=value.")
            name, equals, word = flag[2:].partition("=")
            key = name.replace("-", "_")
            self._check_name(key, COMMAND_LINE)
            # 2. its value: after the equals sign, or the next word, or true
            if not equals:
                if remaining and not remaining[0].startswith("--"):
                    word = remaining.pop(0)
                elif bool in alternatives(self._annotations[key]):
                    word = "true"
                else:
                    raise RecipeError(f"{COMMAND_LINE}: --{name} has no value. Write --{name} value.")
            settings[key] = self._check_value(key, word, COMMAND_LINE, from_text=True)
        return settings

    def split(self, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """The settings of each part, as keyword arguments for its dataclass."""
        return {part: {k: v for k, v in settings.items() if self._part_of[k] == part} for part in self._parts}

    def _read_file(self, path: Path) -> dict[str, Any]:
        settings = {}
        for line, key, value in _parse_yaml(path):
            where = f"{path} line {line}"
            self._check_name(key, where)
            settings[key] = self._check_value(key, value, where)
        return settings

    def _check_name(self, key: Any, where: str) -> None:
        if key in self._fields:
            return
        if key in self._hints:
            way_out = f": {self._hints[key]}."
        elif key in (*self._parts, "train", "loss"):
            way_out = ". A recipe is one flat mapping: use a comment for a section."
        else:
            way_out = f".{nearest(key, self._fields)}"
        raise RecipeError(f"{where}: {key!r} is not a setting{way_out}")

    def _check_value(self, key: str, value: Any, where: str, *, from_text: bool = False) -> Any:
        try:
            return check_value(key, value, self._fields[key], self._annotations[key], from_text=from_text)
        except RecipeError as error:
            raise RecipeError(f"{where}: {error}") from None


# -------------------------------------------------------------------------------------------------------------- YAML


class _StrictLoader(YamlLoader):
    """YamlLoader that refuses two kinds of keys: one given twice, of which YAML readers silently take the last,
    and a list or a mapping, which cannot be a Python dictionary key."""

    def construct_mapping(self, node, deep=False):
        first_line: dict[Any, int] = {}
        for key_node, _ in node.value:
            line = _line(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                kind = "list" if isinstance(key_node, yaml.SequenceNode) else "mapping"
                raise RecipeError(f"{self.name} line {line}: a {kind} cannot be a key. Write `key: value`.")
            key = self.construct_object(key_node, deep=True)
            if key in first_line:
                raise RecipeError(
                    f"{self.name} line {line}: {key!r} is given twice, first on line {first_line[key]}. Keep one."
                )
            first_line[key] = line
        return super().construct_mapping(node, deep)


# No setting takes a date, and PyYAML raises a bare ValueError for one like 2026-13-01. A date stays the text it is.
_StrictLoader.add_constructor("tag:yaml.org,2002:timestamp", lambda _, node: node.value)


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _parse_yaml(path: Path) -> list[tuple[int, Any, Any]]:
    """Line, key and value of each entry of the mapping in a YAML file."""
    # 1. The root node, which knows its line numbers, and the value it represents
    text = _read_text(path)
    try:
        check_text(text)
        loader = _StrictLoader(text)
        loader.name = str(path)
        root = loader.get_single_node()
        check_size(root)
        values = loader.construct_document(root) if root is not None else None
    except UnboundedError as error:
        raise RecipeError(f"{path}: {error}.") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        code = f"U+{ord(text[error.position]):04X}"
        raise RecipeError(f"{path} line {line}: the character {code} is not allowed in YAML. Remove it.") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path} line {mark.line + 1}" if mark else str(path)
        raise RecipeError(f"{place}: this is not YAML: {error.problem or error.context}.") from None
    except RecursionError:
        raise RecipeError(f"{path}: a value is nested too deeply. Write fewer brackets.") from None
    except RecipeError:
        raise
    except ValueError as error:  # of a number or a tag that spells none
        raise RecipeError(f"{path}: this is not YAML: {one_line(error)}.") from None

    # 2. Both must be one mapping
    if not isinstance(root, yaml.MappingNode) or not isinstance(values, dict):
        found = "is empty" if values is None else f"holds {type_name(type(values))}"
        raise RecipeError(f"{path} {found}, but a recipe is one flat mapping: write one `key: value` on each line.")
    return [(_line(node), *entry) for (node, _), entry in zip(root.value, values.items(), strict=True)]


def _read_text(path: Path) -> str:
    if not path.exists() or path.is_dir():
        folder = path if path.is_dir() else path.parent
        names = sorted(file.name for file in folder.glob("*.y*ml"))
        found = f"{path.absolute()} is a folder, not a recipe." if path.is_dir() else f"no recipe at {path.absolute()}."
        there = f" Recipes in that folder: {', '.join(names)}.{nearest(path.name, names)}" if names else ""
        raise RecipeError(f"{found}{there or ' Give the path of a .yaml file.'}")
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        byte = f"0x{error.object[error.start]:02x}"
        raise RecipeError(f"{path} line {line}: byte {byte} is not UTF-8 text. Save the file as UTF-8.") from None
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}. Give a readable .yaml file.") from None


# ------------------------------------------------------------------------------------------------------------- paths


def find_recipe(name: str | Path, folder: str = "recipes") -> Path:
    """The file at path `name` or, if there is none, the shipped recipe of that name.

    A recipe shipped in `folder` goes by its path (recipes/tiny.yaml), its file's name, or its bare name (tiny).

    Raises:
        RecipeError: a bare name, or a path into a folder without recipes, that no shipped recipe has.
    """
    path = Path(os.path.expanduser(name))  # as below
    if path.is_absolute() or (path.exists() and not path.is_dir()):
        return path
    shipped = {file.stem: file for file in (SHIPPED / folder).glob("*.yaml")}
    names = {word: file for stem, file in shipped.items() for word in (stem, file.name, f"{folder}/{file.name}")}
    if path.as_posix() in names:
        path = names[path.as_posix()]
        say(f"=> recipe           {path}, shipped with matrix_llm")
        return path
    if not path.exists() and (not path.suffix or not any(path.parent.glob("*.y*ml"))):
        raise RecipeError(
            f"no recipe at {path.absolute()}, and none of that name is shipped.{nearest(path.stem, shipped)} "
            f"Give the path of a .yaml file, or one of {', '.join(sorted(shipped))}."
        )
    return path


def find_from_repository(path: str, recipe: Path) -> str:
    """Resolve a relative path from the current folder or, if it does not exist there, from the recipe's repository.

    Files of ds_configs/ and recipes/ are then looked for among the shipped ones.
    """
    try:
        is_here = Path(os.path.expanduser(path)).exists()  # Path.expanduser would raise for a ~ that stands for nobody
    except OSError:  # longer than a path can be
        return path
    if is_here:
        return path
    if _PACKAGE not in recipe.resolve().parents:  # a repository around an installed package is somebody else's
        for folder in recipe.absolute().parents:
            if (folder / "pyproject.toml").exists() or (folder / ".git").exists():
                if (folder / path).exists():
                    return str(folder / path)
                break
    is_shipped = path.startswith(("ds_configs/", "recipes/")) and (SHIPPED / path).exists()
    return str(SHIPPED / path) if is_shipped else path
