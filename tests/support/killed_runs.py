"""Runs of matrix_llm/train.py in forked processes that are killed, signalled or refused disk space (kill_run.py)."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from matrix_llm.base.files import read_jsonl
from tests.support.engines import deepspeed_config
from tests.support.paths import SUPPORT

# 3 optimizer steps an epoch, so 8 steps cross two epochs; losses are logged every 3 steps, between the checkpoints
RECIPE = {
    "model_config": {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 1, "tie_word_embeddings": False, "attention_dropout": 0.2,
    },
    "tokenizer_vocab_size": 300, "dataset": "builtin", "builtin_rows": 12, "eval_dataset": "builtin",
    "builtin_eval_rows": 4, "eval_strategy": "steps", "eval_steps": 3, "prompt_template": "plain", "max_length": 256,
    "max_steps": 8, "logging_steps": 3, "gradient_accumulation_steps": 2, "per_device_eval_batch_size": 2,
    "learning_rate": 1e-3, "lr_scheduler_type": "cosine", "weight_decay": 0.01, "use_cpu": True, "bf16": False,
    "gradient_checkpointing": False, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2,
    "disable_tqdm": True,
}  # fmt: skip
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
}  # fmt: skip
CLOCK = ("runtime", "per_second", "memory")  # what two equal runs may differ in


class RunServer:
    """kill_run.py, kept open: a run then takes its own seconds and not those of the imports."""

    def __init__(self, folder):
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "DS_ACCELERATOR": "cpu",
        }
        env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])  # ninja, for DeepSpeed's op
        self.errors = (folder / "server.log").open("w")
        command = [sys.executable, str(SUPPORT / "kill_run.py")]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=env, cwd=folder
        )

    def run(self, output, *arguments, engine="single", changes=None, **job):
        """Run train.py into `output`. Returns the exit code of each process, and what they printed.

        Args:
            arguments: of the command line, after the recipe.
            changes: settings that differ from RECIPE.
            job: what to do to the run (kill, signal, limit, nan), as kill_run.py describes.
        """
        folder = output.parent
        folder.mkdir(exist_ok=True)
        settings = {**RECIPE, "output_dir": str(output), "per_device_train_batch_size": 2, **(changes or {})}
        processes = job.pop("processes", 1 if engine == "single" else 2)
        if processes == 2:
            settings["per_device_train_batch_size"] = 1
        if engine.startswith("zero"):
            settings["deepspeed"] = deepspeed_config(folder / f"{engine}.json", int(engine[-1]))
        if engine == "fsdp2":
            job["env"] = FSDP2
        recipe = folder / f"{output.name}.yaml"
        recipe.write_text(json.dumps(settings))
        log = folder / f"{output.name}.log"
        for old in folder.glob(f"{log.name}.*"):
            old.unlink()
        job |= {"arguments": [str(recipe), *arguments], "processes": processes, "log": str(log), "output": str(output)}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        codes = json.loads(self.process.stdout.readline())
        return codes, "".join((folder / f"{log.name}.{rank}").read_text() for rank in range(processes))

    def close(self):
        self.process.stdin.close()
        self.process.wait(30)
        self.errors.close()


def logged(run):
    """The lines of metrics.jsonl, without the summary of the last start and without what a clock decides."""
    entries = [e for e in read_jsonl(run / "metrics.jsonl") if "train_runtime" not in e]
    return [{k: v for k, v in e.items() if not any(word in k for word in CLOCK)} for e in entries]


def assert_same_run(run, whole):
    """The run has the weights, metrics and checkpoints of the unbroken one, bit for bit, and no temporary files."""
    got, expected = load_file(run / "model.safetensors"), load_file(whole / "model.safetensors")
    assert set(got) == set(expected)
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
    assert logged(run) == logged(whole)
    assert not [p.name for p in run.iterdir() if p.name.startswith(".") or "partial" in p.name]
    assert sorted(p.name for p in run.glob("checkpoint-*")) == sorted(p.name for p in whole.glob("checkpoint-*"))


def kill_points(events, count, *, seed=None):
    """Places at which to kill a run: half of them between steps, half at a file operation.

    Before every second one of the latter, the file written last is cut to half its length.

    Args:
        events: how many file operations each process of an unbroken run makes.
        seed: draws the places; by default MATRIX_LLM_KILL_SEED, or a new one each time.
    """
    if seed is None:
        seed = int(os.environ.get("MATRIX_LLM_KILL_SEED", random.SystemRandom().randrange(10**6)))
    chance = random.Random(seed)
    points = []
    for index in range(count):
        rank = chance.randrange(len(events))
        point = {"rank": rank, "step": chance.randint(1, RECIPE["max_steps"])}
        if index % 2:
            point = {"rank": rank, "event": chance.randint(1, events[rank]), "tear": index % 4 == 1}
        points.append(point)
    print(f"MATRIX_LLM_KILL_SEED={seed}: {points}")  # shown when the test fails
    return points


def kill_and_resume(server, engine, whole, output, point):
    """Kill a run at `point`, resume it, and compare it with the unbroken one."""
    codes, shown = server.run(output, engine=engine, kill=point)
    assert codes[point["rank"]] == -9, (point, codes, shown[-4000:])
    if (output / "results.json").is_file() and not (output / "results.partial.json").is_file():
        return assert_same_run(output, whole)  # a process died after everything had been written
    codes, shown = server.run(output, "--resume_from_checkpoint", "true", engine=engine)
    assert set(codes) == {0}, (point, shown[-4000:])
    return assert_same_run(output, whole)


def assert_one_line(shown, *words):
    """A command printed exactly one error, without a traceback, and it holds all the words."""
    errors = [line for line in shown.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, shown[-4000:]
    assert "Traceback" not in shown, shown[-4000:]
    for word in words:
        assert word in errors[0], errors[0]
