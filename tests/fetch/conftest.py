"""Shared by the tests of fetch: a tiny model and tokenizer, and a .gguf file of them."""

import pytest

from tests.support.gguf_files import digit_tokenizer, tied_llama, write_gguf


@pytest.fixture(scope="package")
def tokenizer():
    return digit_tokenizer()


@pytest.fixture
def model(tokenizer):
    return tied_llama(len(tokenizer))


@pytest.fixture
def write(tmp_path, model, tokenizer):
    """Write tmp_path/NAME of `model`, whose values become those of the file."""

    def write_file(name="tiny.gguf", **changes):
        return write_gguf(tmp_path / name, model, tokenizer, **changes)

    return write_file


@pytest.fixture
def error(capsys):
    """The one line of a command that failed with exit status 2."""
    from matrix_llm.fetch.command import main

    def fetch(*words):
        capsys.readouterr()
        assert main([str(word) for word in words]) == 2
        shown = capsys.readouterr().err
        lines = [line for line in shown.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, shown
        assert "Traceback" not in shown
        return lines[0]

    return fetch
