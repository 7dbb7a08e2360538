"""Two real processes on the CPU (gloo) give the numbers of one: DDP, ZeRO-2, ZeRO-3 and FSDP2, untied and tied heads."""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow

FSDP2 = "--use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP --fsdp_transformer_layer_cls_to_wrap LlamaDecoderLayer"
ENGINES = {
    "ddp": "",  # torchrun: accelerate launch has no flag for DDP on CPUs
    "zero2": "--use_deepspeed",
    "zero3": "--use_deepspeed",
    "fsdp2": FSDP2,
}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def deepspeed_config(path, stage):
    blocks = {
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": False},
        "gradient_accumulation_steps": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": "auto",
    }
    path.write_text(json.dumps(blocks))
    return str(path)


def skip_without_deepspeed(engine):
    if engine.startswith("zero"):
        if importlib.util.find_spec("deepspeed") is None:
            pytest.skip("deepspeed is not installed (pip install -e .[deepspeed])")
        if shutil.which("g++") is None or shutil.which("ninja") is None:
            pytest.skip("DeepSpeed compiles its CPU communication op, which needs g++ and ninja")


def start(engine, command, folder):
    """Run a script on one process ("single") or on two, and fail with its output if it fails."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent), env.get("PYTHONPATH", "")])
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])  # ninja, for DeepSpeed's op
    port = ["--main_process_port", str(free_port())]
    shape = ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", *port]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *ENGINES.get(engine, "").split(), *shape]
    if engine == "ddp":
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", shape[-1]]
    if engine == "single":
        launcher = [sys.executable]
    done = subprocess.run([*launcher, *command], env=env, capture_output=True, text=True, timeout=600, cwd=folder, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def launch(out, engine, architecture, **settings):
    out.mkdir()
    settings = {"architecture": architecture, "learning_rate": 1e-3, "max_steps": 4, **settings}
    command = [str(HERE / "distributed_run.py"), str(out)]
    if engine == "single":
        start("single", [*command, json.dumps({**settings, "per_device_train_batch_size": 4})], out)
    else:
        if engine.startswith("zero"):
            settings["deepspeed"] = deepspeed_config(out / "ds.json", int(engine[-1]))
        start(engine, [*command, json.dumps({**settings, "per_device_train_batch_size": 2})], out)
    history = json.loads((out / "history.json").read_text())
    return history, load_file(out / "weights.safetensors")


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    cache = {}

    def run(architecture, **settings):
        key = (architecture, *sorted(settings.items()))
        if key not in cache:
            cache[key] = launch(tmp_path_factory.mktemp("single") / "run", "single", architecture, **settings)
        return cache[key]

    return run


CASES = [
    ("ddp", "llama", {}),
    ("zero2", "llama", {}),
    ("zero3", "llama", {}),
    ("zero3", "llama_tied", {"mce_embedding_grad": True}),
    ("fsdp2", "llama", {}),
    ("fsdp2", "llama_tied", {"mce_embedding_grad": True}),
]


@pytest.mark.parametrize(("engine", "architecture", "settings"), CASES, ids=[f"{e}-{a}" for e, a, _ in CASES])
def test_two_ranks_match_one(engine, architecture, settings, single, tmp_path):
    skip_without_deepspeed(engine)
    expected, expected_weights = single(architecture, **settings)
    got, weights = launch(tmp_path / "run", engine, architecture, **settings)
    for key in ("loss", "ce", "mce", "grad_norm"):
        ours, theirs = ([entry[key] for entry in h if key in entry] for h in (got, expected))
        assert len(ours) == 4
        assert ours == pytest.approx(theirs, rel=1e-5), key
    for name, value in expected_weights.items():
        if name in weights:
            assert (weights[name] - value).abs().max() < 1e-5, name
    assert set(expected_weights) - set(weights) <= {"lm_head.weight"}  # a tied head may be left out


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_a_sharded_run_of_train_py_saves_whole_weights(engine, tmp_path):
    from test_train import TINY
    from transformers import AutoModelForCausalLM

    skip_without_deepspeed(engine)
    settings = {**TINY, "max_steps": 1, "output_dir": str(tmp_path / "run"), "builtin_rows": 16}
    if engine == "zero3":
        settings["deepspeed"] = deepspeed_config(tmp_path / "ds.json", 3)
    (tmp_path / "r.yaml").write_text(json.dumps(settings))
    start(engine, [str(HERE.parent / "matrix_llm" / "train.py"), str(tmp_path / "r.yaml")], tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert model.lm_head.weight.shape == (300, 32)
    assert all(p.isfinite().all() and p.numel() for p in model.parameters())
