"""The console command: fast help, arguments and exit status that pass through, one line for what does not exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from matrix_llm import cli
from tests.support.paths import ROOT

HELP = """
import sys
from matrix_llm.cli import main

for words in sys.argv[1:]:
    try:
        assert main([*words.split(), "--help"]) == 0
    except SystemExit as end:  # argparse
        assert not end.code
assert not {"torch", "transformers", "datasets"} & set(sys.modules)
"""
WITH_HELP = ["", "train", "plan", "demo", "pretrain", "eval", "eval gsm8k", "eval math", "compare", "regrade"]
WITH_HELP += ["fetch", "merge", "diagnose", "hub", "hub push", "checkpoints", "checkpoints consolidate"]


def commands(table=cli.COMMANDS, name=""):
    for word, command in table.items():
        yield from commands(command.commands, f"{word} ") if command.commands else [(f"{name}{word}", command)]


def test_the_help_of_every_command_is_there_without_loading_torch(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    shown = subprocess.run(
        [sys.executable, "-c", HELP, *WITH_HELP],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    for words in WITH_HELP:
        assert f"usage: matrix-llm {words}".strip() in shown.stdout
    assert all(f"  {name} " in shown.stdout for name in cli.COMMANDS)


def test_the_installation_page_names_every_command():
    page = (ROOT / "docs/install.md").read_text(encoding="utf-8")
    table = " ".join(line for line in page.splitlines() if line.startswith("|"))
    assert [name for name in cli.COMMANDS if not re.search(rf"`(matrix-llm )?{name}[ `]", table)] == []


@pytest.mark.parametrize(("name", "command"), list(commands()), ids=lambda each: each if isinstance(each, str) else "")
def test_every_command_has_a_main(name, command, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert callable(cli.load_main(command.module))


@pytest.mark.parametrize(
    ("words", "module", "given"),
    [
        (["train", "r.yaml", "--run_name", "a b", "--seed=1", ""], "matrix_llm.train", None),
        (["plan", "r.yaml", "--seed", "1"], "matrix_llm.train", ["r.yaml", "--seed", "1", "--dry_run"]),
        (["demo", "--seed", "1"], "matrix_llm.train", [str(ROOT / "recipes/tiny.yaml"), "--seed", "1"]),
        (["demo"], "matrix_llm.train", [str(ROOT / "recipes/tiny.yaml")]),
        (["pretrain", "r.yaml", "--dry_run"], "matrix_llm.ssl.pretrain", None),
        (["compare", "--json", "-h"], "eval.compare", None),
        (["checkpoints"], "matrix_llm.checkpoints", []),
        (["eval", "math", "--model", "-x"], "eval.hendrycks_math", ["--model", "-x"]),
    ],
)
@pytest.mark.parametrize("status", [0, 1, 2, 130])
def test_arguments_and_exit_status_pass_through(words, module, given, status, monkeypatch):
    calls = []
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(cli, "load_main", lambda name: lambda arguments: calls.append((name, arguments)) or status)
    assert cli.main(words) == status
    assert calls == [(module, words[1:] if given is None else given)]
    assert sys.argv[1:] == calls[0][1]  # what reads them there finds the same


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "'trian' is not a command. Did you mean train"),
        (["pre-train", "r.yaml"], "Did you mean pretrain"),
        (["checkpoint", "check"], "Did you mean checkpoints"),
        (["eval", "gsm9k"], "matrix-llm eval: 'gsm9k' is not a command. Did you mean gsm8k"),
        (["recipes/tiny.yaml"], "Commands: train, "),
        (["--dry_run"], "'--dry_run' is not a command"),
        ([""], "'' is not a command"),
    ],
)
def test_a_command_that_does_not_exist_is_one_line_with_the_nearest(words, message, capsys):
    assert cli.main(words) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert message in shown


@pytest.mark.parametrize("words", [[], ["eval"], ["train"], ["plan"], ["pretrain"]])
def test_a_command_that_lacks_a_word_shows_its_usage_and_fails(words, capsys):
    assert cli.main(words) == 2
    assert capsys.readouterr().out.startswith("usage: matrix-llm")


def test_a_reader_that_leaves_early_gets_no_traceback():
    command = [sys.executable, "-m", "matrix_llm", "--help"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode != 0


def test_another_eval_in_the_current_folder_is_not_taken_for_ours(tmp_path):
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "__init__.py").write_text("raise SystemExit('wrong eval')")
    shown = subprocess.run(
        [sys.executable, "-m", "matrix_llm", "compare", "--help"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (shown.returncode, shown.stderr) == (0, "")


@pytest.mark.slow
def test_accelerate_launches_the_command_as_a_module(tmp_path):
    accelerate = str(Path(sys.executable).with_name("accelerate"))
    launch = ["launch", "--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no"]
    recipe = ["--max_steps", "1", "--builtin_rows", "64", "--builtin_eval_rows", "4", "--accuracy_rows", "0"]
    shown = subprocess.run(
        [accelerate, *launch, "--dynamo_backend", "no", "-m", "matrix_llm", "train", "tiny", *recipe],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr[-4000:]
    assert (tmp_path / "runs/tiny/model.safetensors").is_file()
