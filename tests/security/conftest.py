"""Models on disk, for the attacks."""

import pytest


@pytest.fixture
def model(tiny_llama, tiny_tokenizer, tmp_path):
    """A tiny Llama with its tokenizer in a folder, which each test may damage."""
    folder = tmp_path / "model"
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder
