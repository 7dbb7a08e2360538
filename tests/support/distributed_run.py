"""Trains tiny models with MatrixTrainer on one process or several; writes losses, gradient norms and weights.

    python tests/support/distributed_run.py           a server: a job is a line of JSON in, its answer a line of JSON
                                                      out, with the exit codes of the job's processes
    accelerate launch ... distributed_run.py JOB.json one process of a job, for engines/test_multinode.py

The server imports everything once and forks, so that an engine costs only its own seconds. A job:

{"out": "/tmp/zero3", "models": "/tmp/models", "processes": 2, "env": {}, "log": "/tmp/zero3.log",
 "cases": {"untied": {"architecture": "llama", "per_device_train_batch_size": 4, "deepspeed": "zero3.json"}}}

`models` holds a checkpoint for each architecture, loaded by from_pretrained as in matrix_llm/train.py: whole, under
zero.Init, or on one process only, as the engine wants it. "lora" adds an adapter, and lists the modules that are
trained whole as well; "teacher" names a folder in `models`; "fresh_summary" makes every micro-batch summarise the
vocabulary again.
"""

import gc
import json
import os
import sys
from pathlib import Path

if not __package__:
    # run as a script: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, set_seed

from matrix_llm.config import MatrixConfig
from matrix_llm.model import lm_head as head
from matrix_llm.model.tokenizer import train_tokenizer
from matrix_llm.trainer import MatrixTrainer
from tests.support.engines import free_port
from tests.support.tiny import config, rows

# Rows whose one label nothing predicts: a micro-batch of such a row is empty on one process and not on the other.
EMPTY = (3, 12, 40)


def data() -> Dataset:
    """64 rows, so that 8 per step fill an epoch: accelerate would complete a ragged end by repeating rows."""
    found = rows(64).to_list()
    for row in (found[i] for i in EMPTY):  # not -100 throughout: TRL drops such a row
        row["labels"] = [row["input_ids"][0], *[-100] * (len(row["input_ids"]) - 1)]
    return Dataset.from_list(found)


def whole_weights(trainer: MatrixTrainer) -> dict[str, torch.Tensor]:
    """A collective; whole on the first process, whatever shards them."""
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return (
        {k.removeprefix("module."): v.detach().float().cpu().clone().contiguous() for k, v in state.items()}
        if state
        else {}
    )


def how_sharded(trainer: MatrixTrainer) -> dict:
    """What proves that the engine is the one asked for."""
    wrapped, model = trainer.model_wrapped, trainer.accelerator.unwrap_model(trainer.model)
    weight = next(
        p for n, p in trainer.model.named_parameters() if n.endswith(("lm_head.weight", "embed_tokens.weight"))
    )
    return {
        "wrapper": type(wrapped).__name__,
        "zero_stage": wrapped.zero_optimization_stage() if hasattr(wrapped, "zero_optimization_stage") else 0,
        "offloads": bool(wrapped.zero_cpu_offload()) if hasattr(wrapped, "zero_cpu_offload") else False,
        "head_is_dtensor": isinstance(weight, DTensor),
        "head_is_partitioned": hasattr(weight, "ds_id") and weight.numel() == 0,
        "head_is_tied": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        "processes": trainer.accelerator.num_processes,
    }


def run_case(out: Path, models: Path, settings: dict) -> None:
    settings = dict(settings)
    architecture, lora, fresh = (
        settings.pop("architecture"),
        settings.pop("lora", None),
        settings.pop("fresh_summary", False),
    )
    if (teacher := settings.pop("teacher", None)) is not None:
        settings["teacher_model_name_or_path"] = str(models / teacher)
    adapter = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "down_proj"], modules_to_save=lora or None, task_type="CAUSAL_LM"
    )
    args = MatrixConfig(**config(out, **settings))  # first: under ZeRO-3 it decides how the weights are loaded
    set_seed(0)  # the adapter's random start
    made, summarise = [], head.summarise
    head.summarise = lambda *a: made.append(None) or summarise(*a)
    trainer = MatrixTrainer(
        AutoModelForCausalLM.from_pretrained(models / architecture, dtype=torch.float32, attn_implementation="eager"),
        args,
        train_dataset=data(),
        processing_class=train_tokenizer(["a b"], 260),
        peft_config=None if lora is None else adapter,
    )
    if fresh:  # the head never knows which step it is, and so makes a new summary for every micro-batch
        head.MatrixHead.step = property(lambda self: None, lambda self, value: None)
    trainer.train()
    if fresh:
        del head.MatrixHead.step
    head.summarise = summarise
    engine = how_sharded(trainer)
    state = whole_weights(trainer)
    if trainer.is_world_process_zero():
        save_file(state, out / "weights.safetensors")
        found = {"history": trainer.state.log_history, "summaries": len(made), "engine": engine}
        (out / "found.json").write_text(json.dumps(found))
    trainer.accelerator.wait_for_everyone()  # a process that leaves first can abort the other inside gloo


def work(job: dict) -> None:
    torch.set_num_threads(1)
    if "ACCELERATE_USE_FSDP" in os.environ:
        from tests.support import fsdp_on_cpu

        fsdp_on_cpu.allow()  # without it accelerate trains with DDP on a CPU, and says nothing
    for name, settings in job["cases"].items():
        out = Path(job["out"], name)
        out.mkdir(parents=True, exist_ok=True)
        run_case(out, Path(job["models"]), settings)
        gc.collect()  # the DeepSpeed configuration of a case is global for as long as its trainer lives


def end(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    # gloo's threads sometimes abort the interpreter's shutdown ("terminate called without an active exception")
    os._exit(status)


def child(job: dict, rank: int, port: int) -> None:
    log = os.open(f"{job['log']}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if job["processes"] > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(job["processes"]),
            "MASTER_ADDR": "127.0.0.1",
        }
        os.environ |= {"MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(job["processes"])}
    os.environ |= job["env"]
    try:
        work(job)
    except BaseException:
        import traceback

        traceback.print_exc()
        end(1)
    end(0)


def run(job: dict) -> list[int]:
    port, pids = free_port(), {}
    for rank in range(job["processes"]):
        if (pid := os.fork()) == 0:
            child(job, rank, port)
        pids[pid] = rank
    codes = [0] * job["processes"]
    while pids:
        pid, status = os.wait()
        codes[pids.pop(pid)] = os.waitstatus_to_exitcode(status)
        if status != 0:
            for other in pids:
                os.kill(other, 15)  # it waits for one that is gone
    return codes


def serve() -> None:
    answers = os.dup(1)
    os.dup2(2, 1)
    if "DS_ACCELERATOR" in os.environ:
        import deepspeed  # noqa: F401
    for line in sys.stdin:
        os.write(answers, (json.dumps(run(json.loads(line))) + "\n").encode())


if __name__ == "__main__":
    if len(sys.argv) > 1:
        work(json.loads(Path(sys.argv[1]).read_text()))
        end(0)
    serve()
