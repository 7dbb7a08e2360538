"""Shared by the tests of pushes: a small Hub on loopback, a client process, and finished runs."""

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.support.finished_run import change_recipe, write_run
from tests.support.hub_server import Client, FakeHub


@pytest.fixture(scope="package")
def server():
    return FakeHub()


@pytest.fixture(scope="package")
def client(server, tmp_path_factory):
    client = Client(server, tmp_path_factory.mktemp("hf_home"))
    yield client
    client.close()


@pytest.fixture
def hub(server):
    """The server, empty."""
    server.forget()
    return server


@pytest.fixture
def run(tmp_path, tiny_llama, tiny_tokenizer):
    """A finished run with everything that a run may leave, what must stay at home included."""
    run = write_run(tmp_path)
    tiny_llama().save_pretrained(run)
    tiny_tokenizer.save_pretrained(run)
    (run / "loss.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    (run / "checkpoint-4").mkdir()
    for name in (
        "training_args.bin",
        "pytorch_model.bin",
        "optimizer.pt",
        "checkpoint-4/model.safetensors",
        "eval/gsm8k.jsonl",
        ".hidden",
    ):
        (run / name).write_bytes(b"not for others")
    return run


@pytest.fixture
def adapter_run(run, tiny_llama, tmp_path):
    """A LoRA run on a local base model, which lies in tmp_path / "base"."""
    tiny_llama().save_pretrained(tmp_path / "base")
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        (run / name).unlink()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(
        base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    ).save_pretrained(run)
    change_recipe(run, model_name_or_path=str(tmp_path / "base"), model_config=None, use_peft=True)
    return run
