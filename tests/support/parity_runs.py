"""Engines, cases and their differences: for engines/test_distributed.py, test_multinode.py and benchmarks/parity.py."""

import atexit
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.support.engines import deepspeed_config, environment
from tests.support.paths import SUPPORT

STEPS = 20
REFERENCE = "single"  # one process, eight rows at once, the vocabulary summarised by every micro-batch
FSDP2 = {  # what `accelerate launch --config_file ds_configs/fsdp2.yaml` puts into the environment
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}  # fmt: skip


@dataclass(frozen=True)
class Engine:
    processes: int = 2
    deepspeed: str | None = None  # a file of ds_configs/
    env: dict[str, str] = field(default_factory=dict)
    rows: int | None = None  # to a micro-batch, in every case; None: as in CASES


ENGINES = {
    REFERENCE: Engine(processes=1, rows=8),
    "accumulation 1x8": Engine(processes=1, rows=1),
    "ddp": Engine(),
    "zero1": Engine(deepspeed="zero1"),
    "zero2": Engine(deepspeed="zero2"),
    "zero3": Engine(deepspeed="zero3"),
    "zero3_offload": Engine(deepspeed="zero3_offload"),
    "fsdp2": Engine(env=FSDP2),
}
# Settings, and the rows in a micro-batch of two processes: 8 rows per step in all, by accumulation if that is under 4.
CASES = {
    "untied": ({"architecture": "llama"}, 4),
    "tied, embedding_grad": ({"architecture": "llama_tied", "mce_embedding_grad": True}, 2),
    "LoRA": ({"architecture": "llama", "lora": []}, 4),
    "LoRA, lm_head saved": (
        {"architecture": "llama", "lora": ["lm_head"], "mce_embedding_grad": True},
        2,
    ),  # FSDP2: a unit of its own
    "top_k 16": ({"architecture": "llama", "mce_top_k": 16, "mce_steps": 6}, 1),
    "centred": ({"architecture": "llama_tied", "mce_embeddings": "centred", "mce_top_k": 16, "mce_steps": 6}, 2),
    "centred, embedding_grad, lm_head saved": (
        {"architecture": "llama", "lora": ["lm_head"], "mce_embedding_grad": True, "mce_embeddings": "centred"},
        2,
    ),
    "packed": ({"architecture": "llama", "packing": True, "max_length": 48, "mce_top_k": 16, "mce_steps": 6}, 1),
    "ntl": ({"architecture": "llama", "token_loss": "ntl", "mce_top_k": 16}, 2),  # a mean of its own, over all ranks
    "kd": ({"architecture": "llama", "token_loss": "kd", "teacher": "teacher", "mce_top_k": 16}, 2),
    "asft, LoRA": (
        {"architecture": "llama", "token_loss": "asft", "lora": [], "learning_rate": 0.01, "mce_top_k": 16},
        4,
    ),
}


SHORT = ("packed", "centred", "centred, embedding_grad, lm_head saved", "ntl", "kd", "asft, LoRA")  # five steps


def make_models(folder: Path) -> Path:
    from matrix_llm.model.tokenizer import train_tokenizer
    from tests.support.tiny import tiny_model

    for name in {settings["architecture"] for settings, _ in CASES.values()}:
        tiny_model(name).save_pretrained(folder / name)
    tiny_model("llama_tied", seed=5, vocab_size=260).save_pretrained(folder / "teacher")
    train_tokenizer(["a b"], 260).save_pretrained(folder / "teacher")
    return folder


def job_of(name: str, out: Path, models: Path, cases: tuple[str, ...] = tuple(CASES)) -> dict:
    engine = ENGINES[name]
    job = {
        "out": str(out),
        "models": str(models),
        "processes": engine.processes,
        "env": engine.env,
        "log": str(out / "log"),
        "cases": {},
    }
    for case in cases:
        settings, rows = CASES[case]
        rows = engine.rows or rows
        at_once = 2 if case == "packed" else 8  # a pack holds many rows, and a step here two packs
        rows = min(rows, at_once)
        accumulation = at_once // (rows * engine.processes)
        settings = {**settings, "per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation}
        # within one epoch: accelerate completes a ragged end by repeating rows
        settings["max_steps"] = 5 if case in SHORT else STEPS
        settings["fresh_summary"] = name == REFERENCE
        if engine.deepspeed:
            settings["deepspeed"] = deepspeed_config(out / f"{engine.deepspeed}.json", engine.deepspeed)
        job["cases"][case] = settings
    return job


@dataclass(frozen=True)
class Found:
    history: list[dict]
    weights: dict[str, torch.Tensor]
    summaries: int  # of the vocabulary, made in the whole run
    engine: dict  # distributed_run.how_sharded

    @classmethod
    def read(cls, folder: Path) -> "Found":
        found = json.loads((folder / "found.json").read_text())
        return cls(found["history"], load_file(folder / "weights.safetensors"), found["summaries"], found["engine"])

    def curve(self, key: str) -> list[float]:
        return [entry[key] for entry in self.history if key in entry]


def differences(got: Found, expected: Found) -> dict[str, float]:
    """Largest relative difference of loss, ce, mce and grad_norm in any step, and absolute one of any final weight."""
    largest = {}
    for key in ("loss", "ce", "mce", "grad_norm"):
        ours, theirs = got.curve(key), expected.curve(key)
        assert len(ours) == len(theirs) > 0, key
        largest[key] = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
    left_out = set(expected.weights) - set(got.weights)
    assert left_out <= {"lm_head.weight"}, left_out  # a tied head may be left out
    largest["weights"] = max(
        (got.weights[n] - w).abs().max().item() for n, w in expected.weights.items() if n in got.weights
    )
    return largest


class Runner:
    """A distributed_run.py server, and the results of the engines that it has run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.models = make_models(folder / "models")
        self.found: dict[str, dict[str, Found]] = {}
        self.errors = (folder / "server.log").open("w")
        self.process = subprocess.Popen(
            [sys.executable, str(SUPPORT / "distributed_run.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=environment(), cwd=folder,
        )  # fmt: skip

    def results(self, name: str) -> dict[str, Found]:
        if name not in self.found:
            out = self.folder / name
            out.mkdir(exist_ok=True)
            job = job_of(name, out, self.models)
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
            codes = json.loads(self.process.stdout.readline() or "[]")
            assert codes == [0] * len(codes) != [], (name, codes, self.said(out))
            self.found[name] = {case: Found.read(out / case) for case in job["cases"]}
        return self.found[name]

    def said(self, out: Path) -> str:
        self.errors.flush()
        logs = [*sorted(out.glob("log.*")), self.folder / "server.log"]
        return "\n".join(f"{log.name}: {log.read_text()[-3000:]}" for log in logs)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(30)
        self.errors.close()


_shared: list[Runner] = []


def shared_runner(folder: Path) -> Runner:
    """One for all test files of a session, in the first `folder` that it is asked for with."""
    if not _shared:
        _shared.append(Runner(folder))
        atexit.register(_shared[0].close)
    return _shared[0]
