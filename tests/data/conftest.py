"""Rows in a file, a recipe on them, and a cache of their own for each test."""

import json

import datasets
import pytest

from matrix_llm.config import load_recipe
from matrix_llm.run import prepare
from tests.support.tiny import TINY


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "matrix_llm"


@pytest.fixture
def rows(tmp_path):
    """rows(n, **planted) writes n rows, with the given queries at given places, and returns the path."""

    def write(count=40, planted=None):
        path = tmp_path / "rows.jsonl"
        queries = {i: f"{i} + {i}?" for i in range(count)} | (planted or {})
        path.write_text(
            "".join(
                json.dumps({"query": queries[i], "response": f"The answer is: {2 * i}"}) + "\n" for i in range(count)
            )
        )
        return str(path)

    return write


@pytest.fixture
def recipe(tmp_path, tiny_tokenizer, rows):
    """recipe(key=value) loads a recipe on rows() with a saved tokenizer."""
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")

    def load(**changes):
        settings = {
            **TINY, "tokenizer_vocab_size": None, "tokenizer_name_or_path": str(tmp_path / "tokenizer"),
            "output_dir": str(tmp_path / "run"), **changes,
        }  # fmt: skip
        settings.setdefault("dataset", "builtin")
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
        return load_recipe(path)

    return load


@pytest.fixture
def tokenised(monkeypatch):
    """The names of the sets that were tokenised, rather than found."""
    names = []
    original = prepare.tokenise
    monkeypatch.setattr(prepare, "tokenise", lambda *a, name, **k: names.append(name) or original(*a, name=name, **k))
    return names
