"""Files that are damaged, odd or made up end in one line, and what was good before them is used."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from eval.files import read_rows
from eval.gsm8k import main as evaluate
from eval.report.scores import summarise
from matrix_llm.base.errors import EvalError, PushError
from matrix_llm.checkpoints import main as checkpoints
from matrix_llm.data.cache import BUILDING, cached_folder
from matrix_llm.publish.client import HubClient
from matrix_llm.publish.command import main as hub
from matrix_llm.run.checkpoint_files import MANIFEST, last_sound_checkpoint, read_manifest, what_is_damaged
from matrix_llm.train import main as train
from tests.support.finished_run import write_run
from tests.support.paths import ROOT
from tests.support.tiny import TINY

LONG, DEEP = "9" * 5000, "[" * 100_000


def errors_of(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize(
    "content", [LONG, DEEP, "[1, 2]", '"x"', "{", "\x00", f'{{"a": {LONG}}}'], ids=lambda each: each[:9]
)
@pytest.mark.parametrize("name", ["results.json", "metrics.jsonl", "eval/gsm8k.json"])
def test_a_file_of_a_run_that_is_no_object_is_one_line_or_passed_over(name, content, tmp_path, capsys):
    run = write_run(tmp_path)
    (run / name).write_text(content)
    status = hub(["card", str(run)])
    assert status in (0, 2)
    assert len(errors_of(capsys)) == (status == 2)


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("content", [LONG, DEEP, f'[{{"a": {LONG}}}]', f'{{"a": {DEEP}}}'], ids=lambda each: each[:9])
def test_problems_with_long_numbers_or_deep_brackets_are_one_line(content, suffix, tmp_path):
    file = tmp_path / f"problems{suffix}"
    file.write_text(content)
    with pytest.raises(EvalError, match="problems"):
        list(read_rows(file))


@pytest.mark.parametrize("place", ["/dev/null", "/dev/null/x", "a file", "x" * 300])
def test_an_output_folder_that_cannot_be_one_is_one_line(place, model, tmp_path, capsys):
    if place == "a file":
        place = str(tmp_path / "file")
        Path(place).write_text("")
    few = ("--prompt", "plain", "--data", "builtin", "--limit", "1", "--max_tokens", "2", "--engine", "transformers")
    assert evaluate(["--model", str(model), "--output_dir", place, *few]) == 1
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(TINY))
    assert train([str(tmp_path / "recipe.yaml"), "--output_dir", place]) == 2
    assert len(errors_of(capsys)) == 2


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [DEEP, f'{{"vocab_size": {LONG}}}', "[]", "{"], ids=lambda each: each[:9])
def test_a_model_with_such_a_file_is_one_line(name, content, model, tmp_path, capsys):
    (model / name).write_text(content)
    few = ("--prompt", "plain", "--data", "builtin", "--limit", "1", "--max_tokens", "2", "--engine", "transformers")
    status = evaluate(["--model", str(model), "--output_dir", str(tmp_path / "scores"), *few])
    recipe = {k: v for k, v in TINY.items() if k not in ("model_config", "tokenizer_vocab_size")}
    settings = {
        "model_name_or_path": str(model),
        "output_dir": str(tmp_path / "run"),
        "builtin_rows": 4,
        "max_steps": 1,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, **settings}))
    bad = (status != 0) + (train([str(tmp_path / "recipe.yaml")]) != 0)
    assert len(errors_of(capsys)) == bad


# ----------------------------------------------------------------------------------------------------------- subjects


def test_subjects_of_every_type_are_grouped_or_refused_before_anything_is_generated(model, tmp_path, capsys):
    few = (
        "--prompt",
        "plain",
        "--max_tokens",
        "2",
        "--engine",
        "transformers",
        "--output_dir",
        str(tmp_path / "scores"),
    )
    problems = [
        {"question": f"{n}?", "answer": "1", "type": kind} for n, kind in enumerate(["a", 3, 2.5, None, True, ""])
    ]
    file = tmp_path / "mixed.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in problems))
    for _ in range(2):  # again from what is on file
        assert evaluate(["--model", str(model), "--data", str(file), *few]) == 0
    for odd in ({"x": 1}, ["a"]):
        file.write_text(json.dumps({"question": "1?", "answer": "1", "subject": odd}) + "\n")
        assert evaluate(["--model", str(model), "--data", str(file), "--overwrite", *few]) == 1
        assert "subject" in errors_of(capsys)[0]


def test_rows_on_file_with_subjects_and_levels_of_every_type_are_scored():
    odd = ["b", 3, ["x"], {"y": 1}, 1.5, True, None, "3"]
    rows = [
        {"id": str(n), "sample": 0, "gold": "1", "response": "The answer is: 1", "subject": kind, "level": kind}
        for n, kind in enumerate(odd)
    ]
    summary = summarise(rows, benchmark="gsm8k", settings={}, wall_seconds=1.0, versions={})
    assert sum(each["total"] for each in summary["by_subject"].values()) >= 6


# -------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    "arguments", [["check", "nowhere"], ["consolidate", "nowhere", "out"], ["consolidate", ".", "out"]]
)
def test_the_checkpoint_command_prints_one_line(arguments, tmp_path):
    command = [sys.executable, "-m", "matrix_llm.checkpoints", *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    "manifest",
    [[], {"files": []}, {"files": {"a": "b"}, "processes": 1}, {"files": {}}, {"files": {"../x": 1}, "processes": 1},
     {"files": {"a\0b": 1}, "processes": 1}, {"files": {"/etc/hostname": 1}, "processes": "1"}, "x", None],
    ids=str,
)  # fmt: skip
def test_a_manifest_that_is_none_is_said_to_be(manifest, tmp_path, capsys):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / MANIFEST).write_text(json.dumps(manifest))
    assert read_manifest(tmp_path / "checkpoint-1") == {}
    assert checkpoints(["check", str(tmp_path)]) == 1
    assert "manifest.json cannot be read" in capsys.readouterr().out


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A run of three steps with a checkpoint of each, which has not finished, and its recipe."""
    folder = tmp_path_factory.mktemp("interrupted")
    settings = {"output_dir": str(folder / "run"), "max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**TINY, "builtin_rows": 16, **settings}))
    assert train([str(folder / "recipe.yaml")]) == 0
    for name in ("model.safetensors", "README.md"):
        (folder / "run" / name).unlink()
    shutil.copy(folder / "run" / "results.json", folder / "run" / "results.partial.json")
    return folder


def zeros(path):
    path.write_bytes(bytes(path.stat().st_size))


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def cut_and_padded(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))


@pytest.mark.parametrize("damage", [zeros, flipped, cut_and_padded])
@pytest.mark.parametrize(
    "name", ["optimizer.pt", "model.safetensors", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
)
def test_a_damaged_file_of_the_right_size_is_found(name, damage, interrupted, tmp_path):
    checkpoint = tmp_path / "checkpoint-3"
    shutil.copytree(interrupted / "run" / "checkpoint-3", checkpoint)
    assert what_is_damaged(checkpoint) is None
    damage(checkpoint / name)
    assert name in what_is_damaged(checkpoint)
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    (checkpoint / MANIFEST).write_text(json.dumps({k: v for k, v in manifest.items() if k != "checksums"}))
    if name.endswith((".pt", ".pth")):  # without checksums, as older versions saved: by the file's own
        assert name in what_is_damaged(checkpoint)


def test_a_run_resumes_from_the_last_checkpoint_that_is_whole(interrupted, capsys):
    run = interrupted / "run"
    cut_and_padded(run / "checkpoint-3" / "optimizer.pt")
    recipe = str(interrupted / "recipe.yaml")
    assert train([recipe, "--resume_from_checkpoint", str(run / "checkpoint-3")]) == 2
    assert "checkpoint-3' is damaged: optimizer.pt" in errors_of(capsys)[0]
    assert train([recipe, "--resume_from_checkpoint", "true"]) == 0
    shown = capsys.readouterr().out
    assert "checkpoint-3 is damaged: optimizer.pt" in shown
    assert json.loads((run / "results.json").read_text())["resumed_from"] == "checkpoint-2"
    assert (run / "damaged-checkpoint-3").is_dir()
    assert last_sound_checkpoint(run) == run / "checkpoint-3"  # trained again


# -------------------------------------------------------------------------------------------------- the cache, the Hub

BUILD = """
import sys, time
from pathlib import Path
from matrix_llm.data.cache import cached_folder

def build(folder):
    (folder / "half").write_text("half")
    print("building", flush=True)
    time.sleep(60)

cached_folder(Path(sys.argv[1]), "rows-a", build)
"""


def test_what_a_killed_build_left_is_removed_by_the_next_and_a_living_one_is_left_alone(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed, living = (
        subprocess.Popen([sys.executable, "-c", BUILD, str(tmp_path)], env=env, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    )
    try:
        for each in (killed, living):
            assert each.stdout.readline() == "building\n"
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert len(list(tmp_path.glob(f"{BUILDING}*"))) == 2
        cached_folder(tmp_path, "rows-b", lambda folder: (folder / "x").write_text("x"))
        left = list(tmp_path.glob(f"{BUILDING}*"))
        assert len(left) == 1
        assert (left[0] / "half").is_file()
    finally:
        for each in (killed, living):
            each.kill()
            each.communicate()
    time.sleep(0.1)
    cached_folder(tmp_path, "rows-c", lambda folder: None)
    assert not list(tmp_path.glob(f"{BUILDING}*"))


ODD = [
    {}, [], None, "x", {"name": None}, {"name": 3}, {"name": {"x": 1}}, {"name": ""},
    {"name": "user", "auth": "x"}, {"name": "user", "auth": {"accessToken": []}}, {"name": "user", "orgs": 3},
    {"name": "user", "orgs": ["a", {"x": 1}, None], "auth": {"accessToken": {"role": "write"}}},
]  # fmt: skip


@pytest.mark.parametrize("answer", ODD, ids=str)
def test_an_odd_answer_about_the_token_is_one_line(answer, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    client = HubClient("user/x", "hf_token")
    monkeypatch.setattr(client.api, "whoami", lambda: answer)
    if isinstance(answer, dict) and answer.get("name") == "user":
        assert client.check_token() == "user"
    else:
        with pytest.raises(PushError, match="whose token"):
            client.check_token()
