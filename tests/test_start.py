"""docs/start.md as a newcomer follows it: every command of the page, in its order, as a process in one empty folder.

The Hub is the tests' own server on loopback, which holds tiny random models under the names that the page uses.
"""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest

from tests.support.chat_templates import PLAIN_TEMPLATE
from tests.support.hub_server import TOKEN, FakeHub, Repository
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "start.md").read_text(encoding="utf-8")
MODELS = ("Qwen/Qwen2.5-1.5B-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct")
HERE = {  # what a machine without a GPU, and a test that must end soon, add to a command of the page
    "train": ["--use_cpu", "--bf16", "false", "--report_to", "none"],
    "eval": ["--engine", "transformers", "--max_tokens", "8"],
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An empty folder with the page's rows in it."""
    folder = tmp_path_factory.mktemp("start")
    rows = "".join(blocks("json"))
    (folder / "my.jsonl").write_text(rows, encoding="utf-8")
    (folder / "test.jsonl").write_text(rows, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def environment(folder, tiny_llama, tiny_tokenizer):
    """Of a process that reaches the tests' Hub and no other."""
    model = folder / "on_the_hub"
    tiny_llama(1024).save_pretrained(model)
    tokenizer = type(tiny_tokenizer).from_pretrained(_saved(tiny_tokenizer, model))
    tokenizer.chat_template = PLAIN_TEMPLATE
    tokenizer.save_pretrained(model)
    hub = FakeHub()
    for name in MODELS:
        repository = hub.repositories[name] = Repository(private=False)
        repository.branches["main"] |= {path.name: path.read_bytes() for path in model.iterdir()}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    ours = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1"}
    search = os.pathsep.join(filter(None, [str(ROOT), inherited.get("PYTHONPATH")]))
    return {**inherited, **ours, "NO_PROXY": "*", "no_proxy": "*", "PYTHONPATH": search}, hub


def _saved(tokenizer, folder) -> str:
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_the_page_has_commands_for_each_of_its_steps():
    assert [shlex.split(command)[1] for command in COMMANDS] == [
        "plan", "train", "merge", "eval", "eval", "compare", "hub", "train", "eval",
    ]  # fmt: skip


@pytest.mark.slow
def test_every_command_of_the_page_works(folder, environment):
    environment, hub = environment
    for command in COMMANDS:
        program, name, *arguments = shlex.split(command)
        assert program == "matrix-llm"
        done = subprocess.run(
            [sys.executable, "-m", "matrix_llm", name, *arguments, *HERE.get(name, [])],
            cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        if name == "plan":
            assert "TRAINED|" in done.stdout
    assert (folder / "runs/mine/adapter_model.safetensors").is_file()
    assert (folder / "runs/mine-merged/model.safetensors").is_file()
    assert json.loads((folder / "runs/mine-merged/eval/gsm8k.json").read_text())["problems"] == 4
    assert "adapter_model.safetensors" in hub.repositories["user/name"].branches["main"]
