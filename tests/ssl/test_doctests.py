"""The examples in the docstrings of the image side are true."""

import doctest
import importlib
import pkgutil

import pytest

import matrix_llm.ssl

MODULES = sorted(
    module.name for module in pkgutil.walk_packages(matrix_llm.ssl.__path__, "matrix_llm.ssl.") if not module.ispkg
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_are_true(name):
    found = doctest.testmod(importlib.import_module(name))
    assert found.failed == 0
