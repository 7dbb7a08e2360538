"""The memory estimate of --dry_run against the measured peak of real training on the CPU.

    python benchmarks/memory_plan.py                            # 15 minutes
    python benchmarks/memory_plan.py --engine "no sharding"

Two sizes; one process, and two with DDP, ZeRO-2, ZeRO-3, FSDP2.

Measured: the anonymous resident memory of rank 0, read every 2 ms, at its peak during the second and third optimizer
step, less what the process held before the model was built (interpreter, libraries, rows). Estimated:
matrix_llm.plan.memory for the same recipe. DeepSpeed's buckets are fully reserved but touched only as far as the
model reaches, so they are set to the model's size here.
"""

import sys
from pathlib import Path

if not __package__:
    # run as a script: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import os
import socket
import subprocess
import tempfile
import threading
import time
from typing import Any

SIZES = {
    "17 M": {
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 6,
        "vocab_size": 4096,
    },
    "69 M": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 12,
        "vocab_size": 8192,
    },
}
SHORT: dict[str, Any] = {"per_device_train_batch_size": 1, "max_length": 32}
CASES: dict[str, dict[str, Any]] = {
    "full": SHORT,
    "LoRA": {**SHORT, "use_peft": True, "lora_target_modules": "all-linear"},
    "full, 8 x 256 tokens": {"per_device_train_batch_size": 8, "max_length": 256},
    "full, 8 x 256, checkpointing": {
        "per_device_train_batch_size": 8,
        "max_length": 256,
        "gradient_checkpointing": True,
    },
}
ENGINES: dict[str, list[str]] = {
    "no sharding": [],
    "DDP": [],  # "no sharding" on two processes
    "ZeRO-2": ["--use_deepspeed"],
    "ZeRO-3": ["--use_deepspeed"],
    "FSDP2": [
        "--use_fsdp",
        "--fsdp_version",
        "2",
        "--fsdp_auto_wrap_policy",
        "TRANSFORMER_BASED_WRAP",
        "--fsdp_transformer_layer_cls_to_wrap",
        "LlamaDecoderLayer",
    ],
}


def write_recipe(folder: Path, size: str, engine: str, **changes: Any) -> Path:
    """A recipe whose rows are exactly max_length tokens long."""
    settings: dict[str, Any] = {
        "model_config": {"model_type": "llama", "tie_word_embeddings": False, **SIZES[size]},
        "tokenizer_vocab_size": 300, "dataset": str(folder / "rows.jsonl"), "too_long": "truncate", "max_steps": 3,
        "learning_rate": 1e-4, "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True,
        "output_dir": str(folder / "run"),
        **changes,
    }  # fmt: skip
    if engine.startswith("ZeRO"):
        bucket = int(size.split()[0]) * 1_000_000
        zero = {
            "stage": int(engine[-1]),
            "reduce_bucket_size": bucket,
            "overlap_comm": False,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
        blocks = {
            "zero_optimization": zero, "zero_force_ds_cpu_optimizer": False, "bf16": {"enabled": False},
            "gradient_accumulation_steps": "auto", "train_micro_batch_size_per_gpu": "auto",
            "gradient_clipping": "auto",
        }  # fmt: skip
        (folder / "ds.json").write_text(json.dumps(blocks))
        settings["deepspeed"] = str(folder / "ds.json")
    (folder / "rows.jsonl").write_text((json.dumps({"text": "x1 y2 " * 200}) + "\n") * 64)
    (folder / "recipe.yaml").write_text(json.dumps(settings))
    return folder / "recipe.yaml"


def _anonymous() -> int:
    """Bytes of this process that are not pages of a file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/self/status has no RssAnon: this needs Linux 4.5 or later.")


class Peak(threading.Thread):
    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes, self._stop_asked = 0, threading.Event()

    def run(self) -> None:
        while not self._stop_asked.is_set():
            self.bytes = max(self.bytes, _anonymous())
            time.sleep(0.002)

    def finish(self) -> int:
        self._stop_asked.set()
        self.join()
        return max(self.bytes, _anonymous())


def child(recipe_path: Path) -> None:
    """Train three steps and write the measured bytes next to the recipe, from the process of rank 0."""
    import peft  # noqa: F401 - libraries that are loaded late are not part of the training
    import torch
    from transformers import TrainerCallback

    from matrix_llm.config import load_recipe
    from matrix_llm.model.adapters import lora_config
    from matrix_llm.model.load import load_model
    from matrix_llm.run.prepare import prepare_data
    from matrix_llm.trainer import MatrixTrainer

    if "ACCELERATE_USE_FSDP" in os.environ:  # accelerate turns to FSDP only where it sees accelerators
        from tests.support.fsdp_on_cpu import allow

        allow()

    class FromStepTwo(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                peak.bytes = 0

    torch.set_num_threads(1)
    recipe = load_recipe(recipe_path)
    prepared = prepare_data(recipe)
    recipe.training.dataset_kwargs = prepared.dataset_kwargs
    torch.nn.Linear(8, 8)(torch.zeros(8, 8)).sum().backward()  # autograd's threads are there before
    before = _anonymous()
    peak = Peak()
    model = load_model(recipe.model, prepared.tokenizer, seed=0)
    trainer = MatrixTrainer(
        model, recipe.training, train_dataset=prepared.train, processing_class=prepared.tokenizer,
        peft_config=lora_config(recipe.model), callbacks=[FromStepTwo()],
    )  # fmt: skip
    peak.start()
    trainer.train()
    measured = peak.finish() - before
    if int(os.environ.get("RANK", "0")) == 0:
        recipe_path.with_name("measured.json").write_text(json.dumps(measured))
    trainer.accelerator.wait_for_everyone()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads sometimes abort the interpreter's shutdown


def estimate(recipe_path: Path, engine: str) -> Any:
    """The MemoryPlan of --dry_run for this engine."""
    from transformers import AutoConfig

    from matrix_llm.config import load_recipe
    from matrix_llm.plan.memory import plan_memory

    recipe = load_recipe(recipe_path, dry_run=True)
    config = AutoConfig.for_model(**(recipe.model.model_config or {}))
    plans = plan_memory(recipe, config, int(recipe.training.max_length or 0), 1 if engine == "no sharding" else 2)
    return next(each for each in plans if each.engine == engine.replace("DDP", "no sharding"))


def measure(size: str, engine: str = "no sharding", **changes: Any) -> dict[str, float]:
    """Bytes on the process of rank 0: measured peak, estimate, and its part for weights, gradients and optimizer."""
    with tempfile.TemporaryDirectory() as name:
        recipe = write_recipe(Path(name), size, engine, **changes)
        command = [str(Path(__file__).resolve()), "--child", str(recipe)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        launcher = [sys.executable]
        if engine == "DDP":  # accelerate launch has no flag for DDP on CPUs
            launcher += ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
        elif ENGINES[engine]:
            shape = ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
            launcher += ["-m", "accelerate.commands.launch", *ENGINES[engine], *shape, "--main_process_port", port]
        env = {
            **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
            "DS_ACCELERATOR": "cpu", "HF_DATASETS_CACHE": str(Path(name) / "cache"),
            "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),  # ninja, for DeepSpeed
            "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0",  # freed tensors go back at once
        }  # fmt: skip
        done = subprocess.run([*launcher, *command], env=env, capture_output=True, text=True, check=False, timeout=900)
        if done.returncode:
            raise RuntimeError(
                f"{size}, {engine}: exit status {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
            )
        plan = estimate(recipe, engine)
        return {
            "measured": json.loads(recipe.with_name("measured.json").read_text()),
            "estimate": plan.total,
            "state": plan.state,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description="Estimated against measured memory, on the CPU.")
    parser.add_argument("--engine", choices=list(ENGINES), action="append", help="only these (default: all)")
    parser.add_argument("--case", choices=list(CASES), action="append", help="only these (default: all)")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    print(f"{'size':6} {'engine':12} {'case':30} {'estimate':>9} {'measured':>9} {'est./meas.':>10}   MiB per process")
    for size in SIZES:
        for engine in options.engine or ENGINES:
            for case in options.case or CASES:
                got = measure(size, engine, **CASES[case])
                ratio = got["estimate"] / got["measured"]
                print(
                    f"{size:6} {engine:12} {case:30} "
                    f"{got['estimate'] / 2**20:9.0f} {got['measured'] / 2**20:9.0f} {ratio:10.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
