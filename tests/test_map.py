"""tests/README.md leads to tests that exist, and so do the paths of tests in the other pages."""

import ast
import re
from pathlib import Path

import pytest

from tests.support.paths import ROOT

TESTS = ROOT / "tests"
MAP = (TESTS / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def functions_of(path: Path) -> set[str]:
    """The test functions of a file; none if there is no such file."""
    if not path.is_file():
        return set()
    return {node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)}


def test_every_test_that_the_map_names_exists():
    named = re.findall(r"`([^`\s]+)::([^`\s]+)`", MAP)
    assert len(named) > 50
    assert [f"{file}::{name}" for file, name in named if name not in functions_of(TESTS / file)] == []


def test_every_test_file_is_in_the_map():
    """By its own name, or in a folder that has a table."""
    folders = set(re.findall(r"^## `(\w+)/`", MAP, re.MULTILINE))
    paths = [path.relative_to(TESTS) for path in sorted(TESTS.rglob("test_*.py"))]
    missing = [str(p) for p in paths if p.parts[0] not in folders and f"`{p}" not in MAP]
    assert missing == []


def test_no_test_file_imports_another():
    found = {str(p.relative_to(TESTS)): p.read_text(encoding="utf-8") for p in sorted(TESTS.rglob("*.py"))}
    importing = re.compile(r"^(?:from|import) tests\.(?:\w+\.)?test_", re.MULTILINE)
    assert [name for name, text in found.items() if importing.search(text)] == []


ROOMS = [path for path in sorted((ROOT / "matrix_llm").glob("*/__init__.py")) if path.parent.name != "ssl"]


@pytest.mark.parametrize("room", ROOMS, ids=lambda path: path.parent.name)
def test_the_docstring_of_a_room_names_each_of_its_modules(room):
    said = ast.get_docstring(ast.parse(room.read_text(encoding="utf-8")))
    assert not re.search("^(<<<<|====|>>>>)", said, re.MULTILINE)  # left by a merge
    modules = [path.stem for path in sorted(room.parent.glob("*.py")) if path != room]
    assert [name for name in modules if not re.search(rf"\b{name}\b", said)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_into_tests_that_a_page_names_exists(page):
    named = set(re.findall(r"\btests/[\w/.]+", page.read_text(encoding="utf-8")))
    assert [path for path in sorted(named) if not (ROOT / path.rstrip(".")).exists()] == []
