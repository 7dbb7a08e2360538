"""Accuracy by another engine during training: of the weights that the log names, and never in the way of training."""

import errno
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from eval.generate.generation import Decoding, Request
from eval.generate.models import locate
from eval.generate.server_engine import ServerEngine
from eval.gsm8k import main as evaluate
from matrix_llm.base.errors import EvalError, RecipeError
from matrix_llm.base.files import read_jsonl
from matrix_llm.base.vllm_server import VLLMServer
from matrix_llm.config import MatrixConfig
from matrix_llm.data.wordproblems import generate
from matrix_llm.run import engine_accuracy as module
from matrix_llm.run.engine_accuracy import EngineAccuracy
from matrix_llm.run.metrics import MetricsFileCallback
from matrix_llm.run.preemption import StopOnSignal
from matrix_llm.run.scoring import Scoring, read_scores
from matrix_llm.train import main as train
from matrix_llm.trainer import MatrixTrainer
from tests.support.checkpoints import save_llama
from tests.support.engines import free_port
from tests.support.tiny import TINY, config, rows, tiny_model
from tests.support.tiny import train as train_tiny

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

# --- without an engine: when it is asked, and what becomes of its answers --------------------------------------------


class Answers:
    """In place of ScoreProcess: answers at once, or when told to."""

    started: list
    failing = False
    running = False

    def __init__(self, scoring, weights, output):
        assert (weights / "model.safetensors").is_file()
        output.mkdir(exist_ok=True)
        Answers.started.append(weights)

    def is_over(self):
        return not Answers.running

    def result(self):
        if Answers.failing:
            raise EvalError("no memory. Its log is log.txt.")
        step = int(Answers.started[-1].parent.name.removeprefix("step-"))
        return {"correct": step, "total": 10, "accuracy": step / 10, "low": 0.0, "high": 1.0, "unanswered": 0}

    def close(self):
        Answers.running = False


@pytest.fixture
def answers(monkeypatch):
    Answers.started, Answers.failing, Answers.running = [], False, False
    monkeypatch.setattr(module, "ScoreProcess", Answers)
    return Answers


@pytest.fixture
def measured(tmp_path, tiny_tokenizer):
    """A trainer of four steps that logs to metrics.jsonl, and its EngineAccuracy."""

    def make(every=2, **settings):
        trainer = MatrixTrainer(
            tiny_model(),
            MatrixConfig(**config(tmp_path, **settings)),
            train_dataset=rows(),
            processing_class=tiny_tokenizer,
            callbacks=[MetricsFileCallback()],
        )
        scoring = Scoring(tmp_path / "accuracy", "vllm", "x", 8, 0.3, False, torch.device("cpu"))
        callback = EngineAccuracy(trainer, generate(3, seed=0), scoring, every=every, stop=StopOnSignal())
        trainer.add_callback(callback)
        return trainer, callback

    return make


def logged(folder, name="accuracy_step"):
    return [entry for entry in read_jsonl(folder / "metrics.jsonl") if name in entry]


def test_it_is_measured_before_during_and_after_training_and_every_loss_is_logged(measured, answers, tmp_path, capsys):
    trainer, callback = measured()
    trainer.train()
    assert callback.before_and_after() == {}  # the files of eval/ are not there
    assert [(entry["accuracy_step"], entry["accuracy"]) for entry in logged(tmp_path)] == [(0, 0.0), (2, 0.2), (4, 0.4)]
    losses = logged(tmp_path, "loss")
    assert [entry["step"] for entry in losses] == [1, 2, 3, 4]
    assert all("ce" in entry and "accuracy" not in entry for entry in losses)
    assert not list(tmp_path.glob("accuracy/*/weights"))
    assert "accuracy of step 2: 20.0 % of 10 held-out problems" in capsys.readouterr().out


def test_the_weights_of_a_measurement_are_those_of_its_step(measured, answers, tmp_path, monkeypatch):
    from safetensors.torch import load_file

    kept = {}

    def keep(self, scoring, weights, output):
        kept[int(weights.parent.name.removeprefix("step-"))] = load_file(weights / "model.safetensors")
        Answers.started.append(weights)

    monkeypatch.setattr(Answers, "__init__", keep)
    trainer, _ = measured(save_strategy="steps", save_steps=2)
    first = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    assert kept.keys() == {0, 2}
    for name, tensor in load_file(tmp_path / "checkpoint-2" / "model.safetensors").items():
        assert torch.equal(kept[2][name], tensor)
        assert torch.equal(kept[0][name], first[name])
    assert not torch.equal(kept[0]["lm_head.weight"], kept[2]["lm_head.weight"])


def test_measuring_changes_no_weight(measured, answers, tmp_path, tiny_tokenizer):
    trainer, _ = measured()
    trainer.train()
    alone = train_tiny(tmp_path / "alone", tiny_tokenizer)
    for name, tensor in alone.model.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], tensor), name


def test_an_engine_that_fails_before_training_stops_the_run_and_later_only_says_so(measured, answers, tmp_path, capsys):
    answers.failing = True
    trainer, _ = measured()
    with pytest.raises(RecipeError, match=r"accuracy_engine='vllm'.*no memory.*log\.txt.*transformers"):
        trainer.train()
    answers.failing = False
    trainer, callback = measured()
    callback.on_step_begin = lambda *_, **__: setattr(answers, "failing", True)
    trainer.train()
    assert trainer.state.global_step == 4
    assert [entry["accuracy_step"] for entry in logged(tmp_path)] == [0]
    assert "accuracy of step 2 could not be measured: no memory" in capsys.readouterr().out


def test_a_full_disk_costs_a_measurement_and_not_the_run(measured, answers, tmp_path, capsys):
    trainer, callback = measured()

    def fail(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    callback.on_step_begin = lambda *_, **__: setattr(callback, "_save", fail)
    trainer.train()
    assert trainer.state.global_step == 4
    assert "step 2 could not be measured: the weights cannot be saved: No space left" in capsys.readouterr().out


def test_training_waits_for_the_last_measurement_and_a_request_to_stop_ends_the_waiting(measured, answers, capsys):
    trainer, callback = measured(every=1)
    begun = []

    def on_step_begin(args, state, control, **kwargs):
        if state.global_step == 1:  # that of step 1 has started, and never answers
            answers.running = True
            callback.stop.receive(15)
            begun.append(time.monotonic())

    callback.on_step_begin = on_step_begin
    trainer.train()
    assert time.monotonic() - begun[0] < 20
    assert [path.parent.name for path in answers.started] == ["step-0", "step-1"]
    callback.close()


def test_a_request_to_stop_at_the_end_ends_the_waiting_too(measured, answers, capsys):
    trainer, callback = measured()
    trainer.train()
    answers.running = True
    callback.stop.receive(15)
    assert callback.before_and_after() == {}
    assert "accuracy after training is not measured" in capsys.readouterr().out


def test_a_resumed_run_logs_and_scores_what_its_predecessor_left(measured, answers, tmp_path, monkeypatch):
    settings = {"save_strategy": "steps", "save_steps": 2}
    trainer, _ = measured(**settings)
    trainer.train()
    assert [entry["accuracy_step"] for entry in logged(tmp_path)] == [0, 2]
    # killed after the checkpoint of step 2: one score is not in its log, one measurement was interrupted
    folder = tmp_path / "accuracy"
    for step in (1, 2, 3):
        (folder / f"step-{step}" / "weights").mkdir(parents=True)
        (folder / f"step-{step}" / "weights" / "model.safetensors").touch()
    found = {"correct": 1, "total": 2, "accuracy": 0.5, "low": 0.1, "high": 0.9, "extraction_failures": 0}
    (folder / "step-1" / "gsm8k_problems.json").write_text(json.dumps({"convention": "x", "scores": {"x": found}}))
    answers.started.clear()
    trainer, _ = measured(**settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    found = [(entry["accuracy_step"], entry["accuracy"]) for entry in logged(tmp_path)]
    assert found == [(0, 0.0), (1, 0.5), (2, 0.2)]
    assert [path.parent.name for path in answers.started] == ["step-2"]
    assert not (folder / "step-3").exists()


# --- vLLM itself, on the CPU: a server, started once ------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory, tiny_llama, tiny_tokenizer):
    """(the folder of the model, the address of the server)."""
    folder, port = tmp_path_factory.mktemp("served"), free_port()
    tiny_llama(512).save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "model")]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    settings = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with (folder / "log.txt").open("wb") as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, **settings}, start_new_session=True
        )
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 240
    try:
        while True:
            try:
                VLLMServer(address).describe()
                break
            except EvalError:
                may_come = server.poll() is None and time.monotonic() < deadline
                assert may_come, (folder / "log.txt").read_text()[-3000:]
                time.sleep(0.5)
        yield folder / "model", address
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@needs_vllm
@pytest.mark.slow
def test_a_server_scores_the_weights_of_each_step_as_eval_does(served, tmp_path, capsys):
    model, address = served
    settings = {key: value for key, value in TINY.items() if key not in ("model_config", "tokenizer_vocab_size")}
    settings |= {"model_name_or_path": str(model), "output_dir": str(tmp_path / "run"), "save_strategy": "steps"}
    settings |= {"save_steps": 2, "accuracy_rows": 12, "accuracy_steps": 2, "accuracy_max_new_tokens": 24}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**settings, "accuracy_engine": address}))
    assert train([str(tmp_path / "recipe.yaml")]) == 0
    run = tmp_path / "run"
    assert [entry["accuracy_step"] for entry in logged(run)] == [0, 2, 4]
    results = json.loads((run / "results.json").read_text())
    texts = []
    for weights, step in ((model, 0), (run / "checkpoint-2", 2), (run, 4)):
        by_hand = tmp_path / f"by-hand-{step}"
        arguments = ["--model", str(weights), "--data", str(run / "accuracy" / "problems.jsonl"), "--max_tokens", "24"]
        arguments += ["--prompt", "plain", "--engine", "transformers", "--output_dir", str(by_hand)]
        assert evaluate(arguments) == 0
        texts.append((by_hand / "gsm8k_problems.jsonl").read_text())
        assert (run / "accuracy" / f"step-{step}" / "gsm8k_problems.jsonl").read_text() == texts[-1]
        entry = next(entry for entry in logged(run) if entry["accuracy_step"] == step)
        assert entry["accuracy"] == read_scores(by_hand)["accuracy"]
    assert len(set(texts)) == 3  # each of its own weights
    assert results["accuracy_before"]["total"] == results["accuracy_after"]["total"] == 12


@needs_vllm
@pytest.mark.slow
def test_a_server_of_another_model_is_refused_and_lives(served, tmp_path, capsys, tiny_tokenizer):
    _, address = served
    save_llama(tmp_path / "other", rows=300, max_position_embeddings=512)
    tiny_tokenizer.save_pretrained(tmp_path / "other")
    arguments = ["--model", str(tmp_path / "other"), "--data", "builtin", "--limit", "1", "--engine", address]
    assert evaluate([*arguments, "--output_dir", str(tmp_path / "out"), "--prompt", "plain"]) == 1
    assert "of the same shapes" in capsys.readouterr().err
    assert VLLMServer(address).describe()["max_model_len"] == 512


@needs_vllm
@pytest.mark.slow
def test_weights_that_another_run_puts_there_meanwhile_are_noticed(served):
    model, address = served
    engine = ServerEngine(locate(str(model)), address)
    VLLMServer(address).load(str(model), "theirs")
    with pytest.raises(EvalError, match="another run"):
        list(engine.generate([Request("q", 0, (5, 6, 7), 4)], Decoding()))
