"""A run as its user sees it: files, going on after a kill, refusals in one line."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from eval.generate.options import Options
from eval.generate.run import evaluate, main
from eval.generate.run_files import ROW_FIELDS, RunFiles
from eval.generate.transformers_engine import TransformersEngine
from matrix_llm.base.errors import EvalError
from tests.support.paths import ROOT

ROW = dict.fromkeys(ROW_FIELDS, "text") | {"sample": 0, "level": None, "prompt_tokens": 1, "tokens": 1}
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_tokenizer, tiny_llama):
    path = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    (path / "recipe.yaml").write_text("prompt_template: plain\n")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "test.jsonl"
    rows = [
        {"question": f"Mia has {n} pens{' and more' * (n % 4)}. How many?", "answer": f"so\n#### {n}"}
        for n in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def run(model, data, tmp_path, capsys):
    """Runs gsm8k in this process: run("--limit", 3) -> exit code, stdout, stderr."""

    def call(*extra):
        given = {
            "--model": model,
            "--data": data,
            "--output_dir": tmp_path / "out",
            "--engine": "transformers",
            "--batch_size": 4,
        }
        given |= {"--max_tokens": 8} | dict(zip(extra[::2], extra[1::2], strict=False))
        arguments = [
            str(part) for flag, value in given.items() for part in ((flag,) if value is True else (flag, value))
        ]
        code = main("gsm8k", "test", arguments)
        out, err = capsys.readouterr()
        return code, out, [line for line in err.splitlines() if line.startswith("error:")]

    call.folder = tmp_path / "out"
    call.rows = lambda: [json.loads(line) for line in (tmp_path / "out/gsm8k.jsonl").read_text().splitlines()]
    return call


def command(model, data, out, *extra):
    script = [
        sys.executable,
        str(ROOT / "eval/gsm8k.py"),
        "--model",
        str(model),
        "--data",
        str(data),
        "--output_dir",
        str(out),
    ]
    return [*script, "--engine", "transformers", "--batch_size", "4", *extra]


def test_a_run_leaves_its_four_files(run):
    code, out, _ = run("--limit", 10)
    assert code == 0
    assert sorted(path.name for path in run.folder.iterdir()) == [
        "gsm8k.html",
        "gsm8k.json",
        "gsm8k.jsonl",
        "gsm8k.settings.json",
    ]
    rows = run.rows()
    assert [row["id"] for row in rows] == [f"gsm8k/test/{n}" for n in range(10)]
    assert all(tuple(row) == ROW_FIELDS for row in rows)
    assert [row["gold"] for row in rows] == [str(n) for n in range(10)]
    summary = json.loads((run.folder / "gsm8k.json").read_text())
    assert (summary["benchmark"], summary["name"], summary["problems"], summary["limit"]) == ("gsm8k", "gsm8k", 10, 10)
    assert set(summary["scores"]) == {"metamath", "llemma", "minerva", "strict", "flexible", "verified"}
    assert summary["generated_tokens"] == sum(row["tokens"] for row in rows)
    assert summary["settings"]["prompt"] == "plain"
    assert summary["versions"]["transformers"]
    assert summary["generations"] == "gsm8k.jsonl"
    assert "recipe.yaml says prompt_template: plain" in out
    assert all(f"gsm8k{suffix}" in out for suffix in (".jsonl", ".json", ".html"))
    scores = out[out.index("gsm8k: 10 problems") :]
    assert "| verified" in scores
    assert "=>" not in scores  # they are the last that is printed, and whole


def test_a_second_run_generates_only_what_is_missing(run):
    run("--limit", 6)
    first = run.rows()
    stamp = [dict(row, response=f"kept {row['sample']}") for row in first]
    (run.folder / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in stamp))
    code, out, _ = run("--limit", 10)
    assert code == 0
    assert "6 of 10 samples are on file already" in out
    assert [row["response"] for row in run.rows()][:6] == ["kept 0"] * 6
    assert len(run.rows()) == 10
    code, out, _ = run("--limit", 3)
    assert code == 0
    assert json.loads((run.folder / "gsm8k.json").read_text())["problems"] == 3
    assert len(run.rows()) == 10, "a smaller limit must not throw generations away"


def test_a_run_that_is_complete_does_not_load_the_model(run, monkeypatch):
    run("--limit", 5)
    monkeypatch.setattr(TransformersEngine, "load", lambda *_, **__: pytest.fail("loaded"))
    assert run("--limit", 5)[0] == 0


def test_a_torn_last_line_is_generated_again(run):
    run("--limit", 8)
    whole = (run.folder / "gsm8k.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    for torn in (lines[5][:40], lines[5][:-1], lines[5][:40] + b"\n"):
        (run.folder / "gsm8k.jsonl").unlink()
        (run.folder / "gsm8k.partial.jsonl").write_bytes(b"".join(lines[:5]) + torn)
        code, out, _ = run("--limit", 8)
        assert code == 0
        assert "cut off" in out
        assert "5 of 8 samples" in out
        assert (run.folder / "gsm8k.jsonl").read_bytes() == whole
        assert not (run.folder / "gsm8k.partial.jsonl").exists()


def test_a_torn_line_leaves_the_file_before_the_next_row_is_added(tmp_path):
    row = json.dumps(ROW).encode() + b"\n"
    files = RunFiles(tmp_path, "gsm8k")
    files.partial.write_bytes(row * 2 + row[:20])
    files.cut_torn_line()
    assert len(list(files.read_rows())) == 2
    with files.appending() as file:
        file.append(ROW)
    assert files.partial.read_bytes() == row * 3


def test_a_broken_line_in_the_middle_is_refused(run):
    run("--limit", 4)
    path = run.folder / "gsm8k.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"{}\n" + lines[2])
    code, _, errors = run("--limit", 4)
    assert code == 1
    assert "line 2" in errors[0]


def test_a_corrected_gold_counts_and_its_text_is_not_generated_again(run, tmp_path, monkeypatch):
    rows = [{"question": f"Mia has {n} pens?", "answer": str(n)} for n in range(3)]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("--data", path)[0] == 0
    rows[1] |= {"answer": "777", "type": "new"}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(TransformersEngine, "load", lambda *_, **__: pytest.fail("generated again"))
    code, out, _ = run("--data", path)
    assert code == 0
    assert "1 rows on file had another gold" in out
    kept = [json.loads(line) for line in (run.folder / "gsm8k_own.jsonl").read_text().splitlines()]
    assert [(row["gold"], row["subject"]) for row in kept] == [("0", None), ("777", "new"), ("2", None)]


@pytest.mark.parametrize(("field", "value"), [("id", ["a"]), ("sample", True), ("response", None), ("tokens", "9")])
def test_a_row_on_file_with_a_field_of_another_type_is_refused(tmp_path, field, value):
    files = RunFiles(tmp_path, "gsm8k")
    files.generations.write_text(json.dumps(ROW) + "\n")
    assert list(files.read_rows()) == [ROW]
    files.generations.write_text(json.dumps(ROW | {field: value}) + "\n")
    with pytest.raises(EvalError, match=r"line 1, is not a generation.*--overwrite"):
        list(files.read_rows())


@pytest.mark.parametrize("text", ["null", "[]", "{"])
def test_settings_that_are_no_object_do_not_pass_for_none(tmp_path, text):
    files = RunFiles(tmp_path, "gsm8k")
    files.settings.write_text(text)
    with pytest.raises(EvalError, match=r"gsm8k.settings.json .*--overwrite"):
        files.read_settings()


def test_rows_of_another_prompt_are_not_reused_but_counted(run):
    run("--limit", 6)
    whole = (run.folder / "gsm8k.jsonl").read_bytes()
    rows = run.rows()
    rows[2]["prompt_sha256"] = "0" * 64
    rows[4]["id"] = "unknown"
    (run.folder / "gsm8k.jsonl").write_text(
        "".join(json.dumps(dict(row, response="old")) + "\n" for row in (rows[2], rows[4], dict(rows[5], sample=1)))
    )
    _, out, _ = run("--limit", 6)
    assert "3 rows on file have another prompt, problem or sample" in out
    assert (run.folder / "gsm8k.jsonl").read_bytes() == whole


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (("--max_tokens", 9), "max_tokens: 8 then, 9 now"),
        (("--temperature", 0.7), "temperature: 0.0 then, 0.7 now"),
        (("--prompt", "alpaca"), "prompt: 'plain' then, 'alpaca' now"),
        (("--dtype", "bfloat16"), "dtype: 'float32' then, 'bfloat16' now"),
    ],
)
def test_a_changed_setting_is_named_and_refused(run, extra, named):
    run("--limit", 2)
    before = (run.folder / "gsm8k.jsonl").read_bytes()
    code, _, errors = run("--limit", 2, *extra)
    assert (code, len(errors)) == (1, 1)
    assert named in errors[0]
    assert "--overwrite" in errors[0]
    assert (run.folder / "gsm8k.jsonl").read_bytes() == before
    assert run("--limit", 2, *extra, "--overwrite", True)[0] == 0


def test_other_weights_are_another_setting(run, model, tmp_path, tiny_tokenizer):
    run("--limit", 2)
    torch.manual_seed(1)
    other = LlamaForCausalLM(LlamaForCausalLM.from_pretrained(model).config)
    other.save_pretrained(tmp_path / "other")
    tiny_tokenizer.save_pretrained(tmp_path / "other")
    code, _, errors = run("--limit", 2, "--model", tmp_path / "other", "--prompt", "plain")
    assert code == 1
    assert "revision: 'sampled-sha256:" in errors[0]
    moved = tmp_path / "moved"
    moved.symlink_to(model)
    assert run("--limit", 2, "--model", moved)[0] == 0, "the same weights under another path are the same model"


def test_samples_of_a_problem_stand_together(run):
    code, _, _ = run("--limit", 3, "--n", 4, "--temperature", 1.0)
    assert code == 0
    assert [(row["id"], row["sample"]) for row in run.rows()] == [
        (f"gsm8k/test/{n}", sample) for n in range(3) for sample in range(4)
    ]
    assert len({row["response"] for row in run.rows()}) > 6
    summary = json.loads((run.folder / "gsm8k.json").read_text())
    assert (summary["problems"], summary["samples_per_problem"]) == (3, 4)
    assert set(summary["pass_at_k"]) == {"1", "2", "4"}
    assert all(len(verdicts) == 4 for verdicts in summary["verdicts"].values())


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--n", 2), "--temperature 0 would draw the same text"),
        (("--limit", 0), "--limit 0 must be 1 or more"),
        (("--top_p", 0), "--top_p 0.0 must be above 0"),
        (("--model", "./nowhere"), "no such folder"),
        (("--data", "nowhere.jsonl"), "does not exist"),
        (("--prompt", "minerva_4shot"), "cannot ask gsm8k"),
        (("--prompt", "chat"), "no chat template"),
        (("--prompt", "gsm8k_8shot"), "no room for a response is left"),
        (("--data_parallel", 2), "need vLLM"),
        (("--output_dir", "/dev/null/x"), "Give another --output_dir"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(run, extra, message):
    code, _, errors = run("--limit", 2, *extra)
    assert (code, len(errors)) == (1, 1)
    assert message in errors[0]


def test_weights_that_do_not_fit_the_config_are_one_line(run, model, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in model.iterdir():
        if file.is_file():
            (broken / file.name).write_bytes(file.read_bytes())
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"hidden_size": 32, "model_type": "unheard_of"}))
    code, _, errors = run("--limit", 2, "--model", broken)
    assert (code, len(errors)) == (1, 1)
    assert "cannot be loaded" in errors[0]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here to play a full disk")
def test_a_full_disk_is_one_line(run):
    run.folder.mkdir()
    (run.folder / "gsm8k.settings.json").unlink(missing_ok=True)
    (run.folder / "gsm8k.partial.jsonl").symlink_to("/dev/full")
    code, _, errors = run("--limit", 2)
    assert (code, len(errors)) == (1, 1)
    assert "disk is full" in errors[0]


def test_two_runs_into_the_same_files_are_refused(run):
    fcntl = pytest.importorskip("fcntl")
    run.folder.mkdir()
    with (run.folder / "gsm8k.partial.jsonl").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        (run.folder / "gsm8k.settings.json").write_text("{}")
        code, _, errors = run("--limit", 2, "--overwrite", True)
    assert code == 1
    assert "another run" in errors[0]


def test_a_model_in_memory_can_be_measured(data, tmp_path, tiny_tokenizer, tiny_llama):
    engine = TransformersEngine(tiny_llama(), tiny_tokenizer, batch_size=8)
    options = Options(model="step 10", data=str(data), limit=4, prompt="plain", max_tokens=8, output_dir=str(tmp_path))
    summary = evaluate("gsm8k", options, engine=engine)
    assert (summary["model"], summary["revision"], summary["problems"]) == ("step 10", "in memory", 4)
    before = (tmp_path / "gsm8k.jsonl").read_bytes()
    with torch.no_grad():
        engine.model.lm_head.weight.neg_()
    evaluate("gsm8k", options, engine=engine)
    assert (tmp_path / "gsm8k.jsonl").read_bytes() != before, "rows of earlier weights must not be reused"
    with pytest.raises(EvalError, match="give output_dir and prompt"):
        evaluate("gsm8k", Options(model="step 10", data=str(data)), engine=engine)


def test_the_minerva_stop_stays_in_the_response(data, tmp_path, tiny_tokenizer, monkeypatch):
    """The grading rule of that prompt looks for "I hope"; the engine may not eat it."""
    said = "Final Answer: The final answer is $7$. I hope it is correct.\n\nProblem:\nNext"
    ids = iter([*tiny_tokenizer(said, add_special_tokens=False)["input_ids"], *[1] * 50])

    class Parrot(torch.nn.Module):
        """Says `said`, whatever it is asked."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.config = LlamaConfig()
            self.generation_config = GenerationConfig()
            self.dtype = torch.float32

        def generate(self, input_ids, stopping_criteria, **_):
            rows = input_ids
            while not stopping_criteria(rows, None).all():
                rows = torch.cat([rows, torch.tensor([[next(ids)]])], dim=1)
            return rows

    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps({"problem": "3+4?", "solution": r"\boxed{7}"}) + "\n")
    options = Options(model="parrot", data=str(path), prompt="minerva_4shot", output_dir=str(tmp_path / "out"))
    summary = evaluate("math", options, engine=TransformersEngine(Parrot(), tiny_tokenizer))
    row = json.loads((tmp_path / "out/math.jsonl").read_text())
    assert row["response"].endswith("I hope it is correct.")
    assert (row["finish_reason"], row["stop_reason"]) == ("stop", "I hope it is correct.")
    assert summary["scores"]["minerva"]["correct"] == summary["scores"]["llemma"]["correct"] == 1


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(model, data, tmp_path):
    options = ("--n", "2", "--temperature", "0.8", "--max_tokens", "120")
    quiet = {"cwd": tmp_path, "env": ENVIRONMENT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    straight = subprocess.run(command(model, data, tmp_path / "a", *options), **quiet, check=False)
    assert straight.returncode == 0, straight.stdout

    partial = tmp_path / "b/gsm8k.partial.jsonl"
    killed = subprocess.Popen(command(model, data, tmp_path / "b", *options), **quiet)
    deadline = time.monotonic() + 120
    while killed.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            if partial.read_bytes().count(b"\n") >= 9:
                break
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL, "it was done before it could be killed"
    with partial.open("ab") as file:
        file.write(b'{"id": "gsm8k/te')  # what a kill in the middle of a write leaves
    kept = partial.read_bytes().count(b"\n")
    assert 9 <= kept < 80

    resumed = subprocess.run(command(model, data, tmp_path / "b", *options), **quiet, check=False)
    assert resumed.returncode == 0, resumed.stdout
    assert f"{kept} of 80 samples are on file already" in resumed.stdout
    for name in ("gsm8k.jsonl", "gsm8k.settings.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("script", ["gsm8k", "hendrycks_math"])
def test_scripts_start_from_another_folder_with_the_standard_library_intact(script, tmp_path):
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['{script}', '--help']\n"
        f"sys.path.insert(0, {str(ROOT / 'eval')!r})\n"  # as python eval/x.py does
        f"try: runpy.run_path({str(ROOT / 'eval' / (script + '.py'))!r}, run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "import ssl, math, statistics\n"
        "assert ssl.SSLContext and math.pi and statistics.mean([1])\n"
        f"assert not statistics.__file__.startswith({str(ROOT)!r})\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "--model" in result.stdout
    plain = subprocess.run(
        [sys.executable, str(ROOT / f"eval/{script}.py"), "--model", "./nowhere"],
        cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (plain.returncode, plain.stderr) == (1, "error: --model ./nowhere: no such folder.\n")
