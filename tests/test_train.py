"""The command line as a user meets it: a run from start to finish, its bad inputs, its dry run and its resumption."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from matrix_llm.base.files import read_jsonl
from matrix_llm.model.tokenizer import train_tokenizer
from matrix_llm.run.run_folder import NON_FINITE
from matrix_llm.train import main
from tests.support.checkpoints import save_llama
from tests.support.engines import free_port
from tests.support.paths import ROOT
from tests.support.sentences import SENTENCES
from tests.support.tiny import TINY


@pytest.fixture
def recipe(tmp_path):
    def write(**changes):
        path = tmp_path / "recipe.yaml"
        settings = {**TINY, "output_dir": str(tmp_path / "run"), **changes}
        path.write_text(yaml.safe_dump({k: v for k, v in settings.items() if v is not None}))
        return str(path)

    return write


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_a_run_leaves_everything_it_promises(recipe, tmp_path, capsys):
    path = recipe(
        eval_dataset="builtin",
        builtin_eval_rows=8,
        eval_strategy="steps",
        eval_steps=2,
        accuracy_rows=4,
        accuracy_max_new_tokens=4,
    )
    assert main([path, "--learning_rate", "2e-3"]) == 0
    out = tmp_path / "run"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert len(tokenizer) == model.get_input_embeddings().num_embeddings
    assert model.generate(**tokenizer("Question: 1", return_tensors="pt"), max_new_tokens=2).shape[1] > 2
    assert yaml.safe_load((out / "recipe.yaml").read_text())["learning_rate"] == 2e-3  # overrides are in
    entries = read_jsonl(out / "metrics.jsonl")
    assert [e["step"] for e in entries if "loss" in e] == [1, 2, 3, 4]
    assert all(e["loss"] == pytest.approx(e["ce"] + e["mce"], rel=1e-5) for e in entries if "loss" in e)
    assert [e["step"] for e in entries if "eval_ce" in e][:2] == [2, 4]
    assert (out / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    results = json.loads((out / "results.json").read_text())
    assert results["accuracy_after"]["total"] == 4
    assert results["steps"] == 4
    card = (out / "README.md").read_text()
    assert "matrix-cross-entropy" in card
    assert "greedy accuracy after training, 4 held-out problems" in card
    assert not [p for p in out.iterdir() if p.name.startswith(".") or "partial" in p.name]
    shown = capsys.readouterr().out
    assert "effective batch  4 x 1 accumulation x 1 processes = 4 rows" in shown
    assert "64 of 64 rows kept" in shown


def test_dry_run_plans_and_stops(recipe, tmp_path, capsys):
    assert main([recipe(gradient_accumulation_steps=2), "--dry_run"]) == 0
    shown = capsys.readouterr().out
    for words in (
        "effective batch  4 x 2",
        "optimizer steps  4",
        "ZeRO-3",
        "masked |",
        "TRAINED|",
        "The answer is:",
        "CE + 1 x MCE",
        "max_steps: 4",
    ):
        assert words in shown, words
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "arguments", "words"),
    [
        ({"mce_wieght": 1.0}, [], "mce_weight"),
        ({"max_steps": "ten"}, [], "max_steps"),
        ({}, ["--max_steps", "-5"], "max_steps"),
        ({"dataset": "./missing.jsonl"}, [], "missing.jsonl"),
        ({"learning_rate": -1.0}, [], "learning_rate"),
        ({"mce_solver": "lanczos"}, [], "krylov"),
        ({}, ["--mce_embeddings", "./none.safetensors"], "none.safetensors"),
        ({}, ["--resume_from_checkpoint", "/nowhere"], "/nowhere"),
    ],
)
def test_a_bad_setting_is_one_line_and_leaves_nothing(recipe, tmp_path, capsys, changes, arguments, words):
    assert main([recipe(**changes), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert words in captured.err
    assert "Traceback" not in captured.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments", [[], ["--dry_run"]])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_kwargs"),
        ({"optim": "sgd", "optim_args": "momentm=0.9"}, "momentm"),
        ({"report_to": "nonsense"}, "report_to='nonsense'"),
        ({"attn_implementation": "sdpaa"}, "Did you mean sdpa"),
        ({"packing": True, "max_length": "null"}, "packing"),
        ({"model_config": {"model_type": "lama"}}, "Did you mean llama"),
        ({"router_aux_loss_coef": 0.1}, "router_aux_loss_coef"),
    ],
)
def test_what_can_be_known_is_refused_before_rows_are_read(recipe, capsys, monkeypatch, changes, words, arguments):
    monkeypatch.setattr("matrix_llm.run.prepare.prepare_data", lambda *a, **k: pytest.fail("rows were read"))
    overrides = [word for key, value in changes.items() if value == "null" for word in (f"--{key}", "null")]
    assert main([recipe(**{k: v for k, v in changes.items() if v != "null"}), *overrides, *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_plan_says_what_this_machine_lacks(recipe, capsys, monkeypatch):
    monkeypatch.setattr("transformers.trainer_optimizer.is_bitsandbytes_available", lambda: False)
    assert main([recipe(optim="paged_adamw_8bit"), "--dry_run"]) == 0
    assert "=> a run on this machine would be refused: optim='paged_adamw_8bit'" in capsys.readouterr().out
    assert main([recipe(optim="paged_adamw_8bit")]) == 2


def test_what_was_done_to_the_rows_is_not_asked_of_trl_again(recipe, tmp_path):
    """assistant_only_loss and chat_template_path shape the rows; TRL would look for them in rows of token ids."""
    (tmp_path / "template.txt").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert main([recipe(output_dir=str(tmp_path / "plain"))]) == 0
    changes = {"assistant_only_loss": True, "chat_template_path": str(tmp_path / "template.txt")}
    assert main([recipe(output_dir=str(tmp_path / "asked"), **changes)]) == 0
    losses = [[e.get("loss") for e in read_jsonl(tmp_path / run / "metrics.jsonl")] for run in ("plain", "asked")]
    assert losses[0] == losses[1]
    assert "m.content" in AutoTokenizer.from_pretrained(tmp_path / "asked").chat_template


@pytest.mark.parametrize(
    ("row", "key", "value"),
    [
        ({"text": "Two is even."}, "assistant_only_loss", True),
        ({"text": "Two is even."}, "completion_only_loss", True),
        ({"messages": [{"role": "user", "content": "2?"}, {"role": "assistant", "content": "Even."}]},
         "assistant_only_loss", False),
    ],
)  # fmt: skip
def test_a_setting_that_says_something_else_than_what_is_trained_is_refused(
    recipe, tmp_path, capsys, tiny_tokenizer, row, key, value
):
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 4)
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }}</s>{% endfor %}"
    template += "{% if add_generation_prompt %}assistant:{% endif %}"
    (tmp_path / "chat.jinja").write_text(template)
    settings = {"dataset": str(tmp_path / "rows.jsonl"), "chat_template_path": str(tmp_path / "chat.jinja")}
    settings |= {"tokenizer_vocab_size": None, "tokenizer_name_or_path": str(tmp_path / "tokenizer")}
    assert main([recipe(**settings, **{key: value})]) == 2
    assert f"{key}={value}" in capsys.readouterr().err
    assert main([recipe(**settings, max_steps=1)]) == 0


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ('{"query": "a", "response": "b"}\n{"query": "c", "response": "d"}\n{"query": "e", \n', "line 3"),
        ('{"query": "a", "response": "b"}\n{"query": "c"}\n', "line 2"),
        ("", "no rows"),
        ('{"query": "a", "response": null}\n', "line 1"),
        ('["a"]\n', "line 1"),
    ],
)
def test_bad_data_is_one_line_with_file_and_line(recipe, tmp_path, capsys, lines, words):
    data = tmp_path / "rows.jsonl"
    data.write_text(lines)
    assert main([recipe(dataset=str(data))]) == 2
    error = capsys.readouterr().err
    assert "rows.jsonl" in error
    assert words in error
    assert not (tmp_path / "run").exists()


def test_rows_too_long_are_counted_and_shown(recipe, tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    rows = [{"query": "a", "response": "The answer is: 1"}] * 8 + [
        {"query": "7 1 " * 200, "response": "The answer is: 2"}
    ]
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert main([recipe(dataset=str(data), max_steps=1)]) == 0
    assert "1 rows dropped, longer than max_length" in capsys.readouterr().out


def test_an_earlier_run_is_never_written_over(recipe, tmp_path, capsys):
    path = recipe(max_steps=1)
    assert main([path]) == 0
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    assert main([path]) == 2
    assert "finished run" in capsys.readouterr().err
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before


def test_resuming_without_a_checkpoint_starts_from_the_beginning_and_says_so(recipe, tmp_path, capsys):
    (tmp_path / "run" / "checkpoint-7").mkdir(parents=True)  # a kill left this before trainer_state.json was written
    assert main([recipe(max_steps=1), "--resume_from_checkpoint", "true"]) == 0
    assert "no complete checkpoint" in capsys.readouterr().out
    assert (tmp_path / "run" / "model.safetensors").is_file()


class Killed(BaseException):
    """Stands for the end of the process: nothing in the program catches it."""


@pytest.mark.parametrize("others", [{}, {"mce_embeddings": "centred", "mce_top_k": 16}], ids=["", "centred"])
def test_a_resumed_run_ends_with_the_weights_of_an_unbroken_one(others, recipe, tmp_path, capsys, monkeypatch):
    saved = {"save_strategy": "steps", "save_steps": 2, **others}
    assert main([recipe(**saved, output_dir=str(tmp_path / "whole"))]) == 0
    expected = weights(tmp_path / "whole")

    from matrix_llm.trainer import MatrixTrainer

    step = MatrixTrainer.training_step

    def killed_at_step_4(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise Killed
        return step(self, *args, **kwargs)

    path = recipe(**saved)
    monkeypatch.setattr(MatrixTrainer, "training_step", killed_at_step_4)
    with pytest.raises(Killed):
        main([path])
    monkeypatch.undo()
    assert (tmp_path / "run" / "checkpoint-2").is_dir()

    assert main([path]) == 2  # not in silence
    assert "--resume_from_checkpoint true" in capsys.readouterr().err
    assert main([path, "--resume_from_checkpoint", "true", "--learning_rate", "5e-3"]) == 2
    assert "learning_rate: 0.001 then, 0.005 now" in capsys.readouterr().err
    assert main([path, "--resume_from_checkpoint", "true"]) == 0
    for name, value in weights(tmp_path / "run").items():
        assert torch.equal(value, expected[name]), name
    steps = [e["step"] for e in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "loss" in e]
    assert steps == [1, 2, 3, 4]


@pytest.mark.parametrize("others", [{}, {"dtype": "float16", "mce_weight": 0}])
def test_a_run_that_diverges_leaves_a_note_until_it_goes_on(recipe, tmp_path, capsys, others):
    path, note = recipe(save_strategy="steps", save_steps=1, **others), tmp_path / "run" / NON_FINITE
    assert main([path, "--learning_rate", "1e25", "--lr_scheduler_type", "constant", "--max_grad_norm", "0"]) == 1
    assert "The optimizer has not stepped" in note.read_text()
    assert note.read_text().strip() in capsys.readouterr().err
    shutil.rmtree(tmp_path / "run")
    note.parent.mkdir()
    note.write_text("left by an earlier one")
    assert main([path, "--resume_from_checkpoint", "true"]) == 0
    assert not note.exists()


@pytest.mark.slow
def test_the_script_runs_from_another_folder_and_leaves_the_standard_ssl_alone(recipe, tmp_path):
    """With matrix_llm/ first on sys.path, matrix_llm/ssl would hide the standard ssl and break every HTTPS client."""
    copy = tmp_path / "copy" / "matrix_llm"
    shutil.copytree(ROOT / "matrix_llm", copy)
    (copy / "ssl").mkdir(exist_ok=True)
    (copy / "ssl" / "__init__.py").write_text("")  # stands in for the image side, whether or not it is there
    probe = "\nimport ssl; ssl.SSLContext; print('standard ssl')\n"
    script = copy / "train.py"
    script.write_text(script.read_text().replace("\nimport json\n", probe + "import json\n", 1))
    done = subprocess.run(
        [sys.executable, str(script), "--help"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "standard ssl" in done.stdout

    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_processes",
        "1",
        "--num_machines",
        "1",
        "--cpu",
    ]
    command += [
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        str(ROOT / "matrix_llm" / "train.py"),
        recipe(max_steps=1),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "model.safetensors").is_file()


@pytest.mark.slow
def test_importing_the_package_needs_torch_alone():
    probe = (
        "import sys, matrix_llm, matrix_llm.mce, matrix_llm.information\n"
        "heavy = {'transformers', 'trl', 'datasets', 'peft', 'accelerate', 'deepspeed', 'vllm'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_accuracy_during_training_is_logged_and_changes_no_weight(recipe, tmp_path):
    assert main([recipe(accuracy_rows=0, output_dir=str(tmp_path / "without"))]) == 0
    measured = {"accuracy_rows": 6, "accuracy_steps": 2, "accuracy_max_new_tokens": 4}
    assert main([recipe(**measured, output_dir=str(tmp_path / "with"))]) == 0
    entries = [json.loads(line) for line in (tmp_path / "with" / "metrics.jsonl").read_text().splitlines()]
    found = [entry for entry in entries if "accuracy" in entry]
    assert [entry["step"] for entry in found][:2] == [2, 4]
    losses = [entry for entry in entries if "loss" in entry]
    assert [entry["step"] for entry in losses] == [1, 2, 3, 4]  # none is lost to the entry beside it
    assert all("ce" in entry for entry in losses)
    assert all(entry["accuracy_low"] <= entry["accuracy"] <= entry["accuracy_high"] for entry in found)
    for name, tensor in weights(tmp_path / "without").items():
        assert torch.equal(tensor, weights(tmp_path / "with")[name]), name


def test_a_server_that_is_not_there_is_refused_before_rows_are_read(recipe, capsys):
    address = f"http://127.0.0.1:{free_port()}"
    assert main([recipe(accuracy_rows=4, accuracy_engine=address)]) == 2
    shown = capsys.readouterr()
    assert f"accuracy_engine='{address}': the vLLM server" in shown.err
    assert "rows kept" not in shown.out


def test_accuracy_steps_without_rows_is_refused(recipe, capsys):
    assert main([recipe(accuracy_rows=0, accuracy_steps=5)]) == 2
    assert "accuracy_steps=5" in capsys.readouterr().err


def test_the_recipes_eos_token_ends_the_rows_and_is_saved_everywhere_and_the_old_one_is_not(recipe, tmp_path):
    """It pads as well here: the labels of real ends are trained all the same."""
    from matrix_llm.trainer import MatrixTrainer

    tokenizer = train_tokenizer(SENTENCES, 300)
    tokenizer.save_pretrained(tmp_path / "base")
    save_llama(tmp_path / "base", rows=300, max_position_embeddings=256, eos_token_id=1)
    batches, original = [], MatrixTrainer.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        batches.append(inputs["labels"].clone())
        return original(self, model, inputs, *args, **kwargs)

    base = {"model_config": None, "tokenizer_vocab_size": None, "model_name_or_path": str(tmp_path / "base")}
    changes = {**base, "eos_token": "<pad>", "pad_token": "<pad>", "max_steps": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MatrixTrainer, "compute_loss", compute_loss)
        assert main([recipe(**changes)]) == 0
    assert [(labels == 2).sum().item() for labels in batches] == [4]  # one for each row, and none for its padding
    assert not (batches[0] == 1).any()
    run = tmp_path / "run"
    saved = AutoTokenizer.from_pretrained(run)
    assert (saved.eos_token, saved.pad_token, len(saved)) == ("<pad>", "<pad>", 300)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((run / name).read_text())["eos_token_id"] == 2
    assert main([recipe(**{**changes, "eos_token": "<pa>", "output_dir": str(tmp_path / "other")})]) == 2


@pytest.mark.parametrize("too_long", ["drop", "truncate"])
def test_rows_longer_than_a_learned_position_table_are_counted_and_do_not_reach_it(too_long, recipe, tmp_path, capsys):
    config = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 1, "n_positions": 160}
    assert main([recipe(model_config=config)]) == 2
    assert "max_length=256, but the model has 160 positions" in capsys.readouterr().err
    assert main([recipe(model_config=config, too_long=too_long, max_length=None)]) == 0
    shown = capsys.readouterr().out
    assert "=> max_length       160, the number of positions of the model, instead of 1024" in shown
    assert "of 64 rows kept" in shown


@pytest.mark.parametrize("options", [["--dry_run"], ["--dry_run", "--use_peft"], []], ids=" ".join)
def test_the_configuration_of_the_base_model_is_read_once(options, recipe, tmp_path, monkeypatch, tiny_tokenizer):
    """Checks, rows, tokenizer, plan and weights share it: on the Hub, each reading is a request."""
    base = save_llama(tmp_path / "base", rows=300, max_position_embeddings=256)
    tiny_tokenizer.save_pretrained(base)
    read, read_from = [], PreTrainedConfig.get_config_dict.__func__

    def counted(cls, name, **kwargs):
        read.append(str(name))
        return read_from(cls, name, **kwargs)

    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", classmethod(counted))
    path = recipe(
        model_name_or_path=base,
        model_config=None,
        tokenizer_vocab_size=None,
        accuracy_rows=2,
        accuracy_max_new_tokens=4,
    )
    assert main([path, *options]) == 0
    assert read.count(base) == 1, read
