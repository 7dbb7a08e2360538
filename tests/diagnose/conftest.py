"""A tiny model in a folder with rows to diagnose it on, and one diagnosis of them."""

import json

import pytest

from matrix_llm.diagnose.command import main
from tests.support.tiny import tiny_model

ROWS = [{"query": f"What is {n} plus {n}?", "response": f"It is {n} + {n} = {2 * n}."} for n in range(40)]
OPTIONS = ["--prompt_template", "plain", "--use_cpu", "--bf16", "false"]


@pytest.fixture(scope="package")
def folder(tmp_path_factory, tiny_tokenizer):
    """A model with a soft cap on its logits, its tokenizer, and rows.jsonl."""
    folder = tmp_path_factory.mktemp("diagnose")
    tiny_model("gemma2", vocab_size=300, bos_token_id=0, eos_token_id=1, pad_token_id=2).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return folder


@pytest.fixture(scope="package")
def diagnosed(folder):
    """The folder with diagnosis.json and diagnosis.html, and the object."""
    words = [str(folder), str(folder / "rows.jsonl"), *OPTIONS, "--out", str(folder / "out"), "--positions", "100000"]
    assert main(words) == 0
    return folder / "out", json.loads((folder / "out" / "diagnosis.json").read_text())
