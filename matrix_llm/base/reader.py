"""The strict reader of a flat YAML recipe with command-line overrides: names, types and ranges, checked against dataclasses.

>>> from dataclasses import dataclass
>>> @dataclass
... class Training:
...     learning_rate: float = 1e-3
>>> Settings({"training": Training}).overrides(["--learning-rate", "2e-5"])
{'learning_rate': 2e-05}
"""

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from matrix_llm.base.errors import RecipeError
from matrix_llm.base.values import WORDS, alternatives, check_value, nearest


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, which YAML readers otherwise let win in silence."""

    def construct_mapping(self, node, deep=False):
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if key in seen:
                raise RecipeError(
                    f"{self.name} line {line}: {key!r} is given twice, first on line {seen[key]}. Keep one."
                )
            seen[key] = line
        return super().construct_mapping(node, deep)


class Settings:
    """The settings that a recipe may hold: the fields of some dataclasses, whose names do not overlap.

    Args:
        parts: a name for each dataclass.
        hints: for names that are no setting but are often tried, what to write instead.
    """

    def __init__(self, parts: Mapping[str, type], hints: Mapping[str, str] | None = None) -> None:
        self._hints = hints or {}
        self._types: dict[str, Any] = {
            name: hint for part in parts.values() for name, hint in typing.get_type_hints(part).items()
        }
        self._fields = {f.name: (part, f) for part, cls in parts.items() for f in dataclasses.fields(cls) if f.init}
        self._parts = tuple(parts)

    def read(self, path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
        """The checked settings of a recipe file, with the overrides of the command line.

        Raises:
            RecipeError: no such file, no YAML, a name that is no setting, a value of another type or out of range.
        """
        return {**self._read_yaml(path), **self.overrides(overrides)}

    def split(self, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """The settings of each part, as keyword arguments for its dataclass."""
        return {part: {k: v for k, v in settings.items() if self._fields[k][0] == part} for part in self._parts}

    def _check_name(self, key: Any, where: str) -> None:
        if key in self._fields:
            return
        if key in self._hints:
            raise RecipeError(f"{where}: {key!r} is not a setting: {self._hints[key]}.")
        nested = (
            " A recipe is one flat mapping: use a comment for a section."
            if key in (*self._parts, "train", "loss")
            else ""
        )
        raise RecipeError(f"{where}: {key!r} is not a setting.{nested or nearest(key, self._fields)}")

    def _check(self, key: str, value: Any, where: str, from_text: bool) -> Any:
        return check_value(key, value, where, from_text, annotation=self._types[key], setting=self._fields[key][1])

    def _read_yaml(self, path: Path) -> dict[str, Any]:
        if not path.is_file():
            beside = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
            there = f" Recipes in that folder: {', '.join(beside)}.{nearest(path.name, beside)}" if beside else ""
            raise RecipeError(f"no recipe at {path.absolute()}.{there}")
        loader = _StrictLoader(path.read_text(encoding="utf-8"))
        loader.name = str(path)
        try:
            root = loader.get_single_node()
            values = loader.construct_document(root) if root is not None else None
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            raise RecipeError(
                f"{path} line {mark.line + 1 if mark else '?'}: this is not YAML: {error.problem or error.context}."
            ) from None
        except yaml.YAMLError as error:
            raise RecipeError(f"{path}: this is not YAML: {error}.") from None
        if not isinstance(values, dict):
            what = "is empty" if values is None else f"holds {WORDS.get(type(values), type(values).__name__)}"
            raise RecipeError(f"{path} {what}, but a recipe is one flat mapping of settings, `key: value` a line.")
        settings = {}
        assert root is not None  # values came from it
        for (key_node, _), (key, value) in zip(root.value, values.items(), strict=True):
            where = f"{path} line {key_node.start_mark.line + 1}"
            self._check_name(key, where)
            settings[key] = self._check(key, value, where, from_text=False)
        return settings

    def overrides(self, words: Sequence[str]) -> dict[str, Any]:
        """["--learning-rate", "1e-4", "--packing"] -> {"learning_rate": 1e-4, "packing": True}"""
        settings = {}
        words = list(words)
        while words:
            flag = words.pop(0)
            if not flag.startswith("--"):
                raise RecipeError(
                    f"on the command line: {flag!r} belongs to no setting. Write --key value, or --key=value."
                )
            name, equals, value = flag[2:].partition("=")
            key = name.replace("-", "_")
            self._check_name(key, "on the command line")
            if not equals and words and not words[0].startswith("--"):
                value, equals = words.pop(0), "="
            if not equals and bool not in alternatives(self._types[key]):
                raise RecipeError(f"on the command line: --{name} has no value. Write --{name} value.")
            settings[key] = self._check(key, value if equals else "true", "on the command line", from_text=True)
        return settings


def find_beside(path: str, recipe: Path) -> str:
    """A relative path as seen from the current directory, or else from the repository that holds the recipe."""
    if not Path(path).expanduser().exists():
        for folder in recipe.absolute().parents:
            if (folder / "pyproject.toml").exists() or (folder / ".git").exists():
                return str(folder / path) if (folder / path).exists() else path
    return path
