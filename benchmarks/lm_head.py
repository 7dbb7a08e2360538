"""CE + MCE straight from hidden states, against every peer's cross-entropy alone: time, peak memory and accuracy in one run.

    python benchmarks/lm_head.py --shape llemma-cpu qwen-cpu --json lm_head.json        # the targets' table
    python benchmarks/lm_head.py --shape llemma-cpu --sweep N V --json lm_head.json     # cost against N, and against V
    python benchmarks/lm_head.py --shape llemma-cpu --n 512 --sweep steps sketch --json lm_head.json   # error against cost
    python benchmarks/lm_head.py --step --json lm_head.json                             # a whole training step, weight 0 and 1
    python benchmarks/lm_head.py --json lm_head.json [gpu.json] --markdown --plot docs  # tables and plots, from the JSON alone

Time: forward and backward (gradients in hidden and weight) of every implementation in turns, after warm-up; between calls the
weight is touched as an optimizer step touches it, so that whatever is cached about it is made anew inside the timed call;
"later micro-batch" is ours with that made before. The floor is hidden W^T, G W and G^T hidden alone.
Memory: each implementation in a process of its own (CUDA: in one process); growth of the peak of the resident set (of the allocator)
over what stood before the call, alone ("extra") and with hidden and weight ("total"). Accuracy: on the timed inputs, with the timed
settings, against a 32-step float64 recurrence over the whole vocabulary, itself held against `solver="exact"` on a few positions.
The inputs are random but shaped like a trained model's; `make_inputs` says how. Rows land in the JSON as they come and are not
measured twice, unless matrix_llm's code changed since.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import contextlib
import ctypes
import datetime
import functools
import gc
import hashlib
import json
import math
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import torch
from lm_head_cases import (
    EAGER,
    SHAPES,
    TORCH_REFERENCE,
    Loss,
    Shape,
    eager,
    implementations,
    make_inputs,
    ours,
    run_once,
    solver_errors,
    solver_settings,
    truth,
)
from lm_head_plots import OURS, OURS_AGAIN, OURS_CE, PRODUCTS, draw, markdown, row_text, shape_table
from torch import Tensor

from matrix_llm.base.files import write_text

# ---- time


def too_large(name: str, shape: Shape) -> str | None:
    """Why an implementation that holds whole logits cannot run on the CPU here; a killed process reports nothing."""
    if shape.device == "cuda" or name not in (EAGER, TORCH_REFERENCE):
        return None
    free = (
        next(
            int(line.split()[1])
            for line in Path("/proc/meminfo").read_text().splitlines()
            if line.startswith("MemAvailable")
        )
        * 1024
    )
    needed = 3 * 4 * shape.n * shape.v
    return f"needs about {needed / 2**30:.0f} GiB for its logits" if needed > 0.8 * free else None


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def interleave(
    calls: Mapping[str, Callable[[], None]], prepare: Callable[[], None], repeats: int, device: str
) -> dict[str, list[float]]:
    """Seconds of each call, in turns, there and back, so that a slow minute of the machine hits all of them.

    What took eight times the fastest in its warm-up is out of the race, and has three repeats.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    warm = dict.fromkeys(calls, 0.0)
    for repeat in range(-3 if device == "cuda" else -1, repeats):
        for name in list(seconds)[:: 1 if repeat % 2 else -1]:
            if repeat >= 3 and warm[name] > 8 * min(warm.values()):
                continue
            prepare()
            gc.collect()
            synchronize(device)
            start = time.perf_counter()
            try:
                calls[name]()
                synchronize(device)
            except torch.OutOfMemoryError:
                del seconds[name], warm[name]
                torch.cuda.empty_cache()
                print(f"  {name}: out of memory", flush=True)
                continue
            elapsed = time.perf_counter() - start
            if repeat >= 0:
                seconds[name].append(elapsed)
            else:
                warm[name] = elapsed
        if repeat >= 0:
            print(
                f"  repeat {repeat + 1} of {repeats}: {sum(s[-1] for s in seconds.values()):.1f} s",
                file=sys.stderr,
                flush=True,
            )
    return seconds


def touch(weight: Tensor) -> None:
    with torch.no_grad():
        weight.mul_(1.0)


def time_row(shape: Shape, names: list[str] | None, args: argparse.Namespace) -> dict[str, Any]:
    found, absent = implementations(shape.device)
    chosen: dict[str, Loss | None] = {PRODUCTS: None, **{k: f for k, f in found.items() if names is None or k in names}}
    for name in list(chosen):
        if reason := too_large(name, shape):
            absent[name] = reason
            del chosen[name]
    inputs = make_inputs(shape, shape.device, args.seed)
    calls = {name: functools.partial(run_once, loss, inputs, shape) for name, loss in chosen.items()}
    seconds = interleave(calls, functools.partial(touch, inputs[1]), args.repeats, shape.device)
    return {"seconds": seconds, "absent": absent}


# ---- memory


def resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak_growth(call: Callable[[], Any], device: str) -> tuple[int, int]:
    """Bytes that stood before the call, and how far the peak rose above them during it."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return before, torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmRSS")
    call()
    return before, max(0, resident("VmHWM") - before)


def in_child(task: dict[str, Any]) -> dict[str, Any]:
    """`task` in a process of its own. One malloc arena, and every large block given back when freed: the peak is the task's."""
    settings = {
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": str(2**20),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    command = [sys.executable, __file__, "--child", json.dumps(task)]
    result = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True)
    if result.returncode:
        last = (
            result.stderr.strip().splitlines() or [f"killed by signal {-result.returncode}, most likely out of memory"]
        )[-1]
        return {"failed": last}
    return json.loads(result.stdout.splitlines()[-1])


def step_memory(call: Callable[[], None], device: str) -> dict[str, Any]:
    call()  # the optimizer's state
    before, extra = peak_growth(call, device)
    return {"before": before, "extra": extra}


def child(task: dict[str, Any]) -> dict[str, Any]:
    if "step" in task:
        return step_memory(training_step(task)[task["step"]], task["device"])
    shape = Shape(*task["shape"])
    loss = implementations(shape.device)[0].get(task["name"])
    small = SHAPES["tiny"]._replace(n=16, dtype=shape.dtype, device=shape.device)
    run_once(loss, make_inputs(small, small.device, 0), small)
    inputs = make_inputs(shape, shape.device, task["seed"])
    _, extra = peak_growth(functools.partial(run_once, loss, inputs, shape), shape.device)
    return {"extra": extra, "inputs": sum(t.numel() * t.element_size() for t in inputs[:2])}


def head_memory(task: dict[str, Any]) -> dict[str, Any]:
    """On a GPU in this process: its allocator counts exactly, whatever ran before."""
    if Shape(*task["shape"]).device != "cuda":
        return in_child(task)
    try:
        return child(task)
    except torch.OutOfMemoryError as error:
        return {"failed": str(error).splitlines()[0]}


# ---- sweeps

SWEPT: tuple[str, ...] = (
    PRODUCTS,
    OURS,
    OURS_CE,
    EAGER,
    "torch linear_cross_entropy, auto",
    "torch linear_cross_entropy, chunk 256",
    "TRL, chunked head",
)
SWEPT += ("Liger, fused", "Apple, cut-cross-entropy")


def accuracy_row(shape: Shape, args: argparse.Namespace) -> dict[str, Any]:
    inputs = make_inputs(shape, shape.device, args.seed)
    true = truth(inputs, args.accuracy_positions, args.exact_positions)
    found = {
        "positions": len(true.sample),
        "exact_positions": args.exact_positions,
        "check": true.check,
        "inputs": true.inputs,
    }
    return {**found, **solver_errors(inputs, true, {})}


def solver_row(kind: str, shape: Shape, args: argparse.Namespace) -> dict[str, Any]:
    inputs = make_inputs(shape, shape.device, args.seed)
    true = truth(inputs, args.accuracy_positions, args.exact_positions)
    errors, calls = {}, {}
    for name, kwargs in solver_settings(kind, shape).items():
        try:
            errors[name] = solver_errors(inputs, true, kwargs)
        except ValueError as error:
            print(f"  {name}: refused ({error})", flush=True)
            continue
        calls[name] = functools.partial(run_once, functools.partial(ours, **kwargs), inputs, shape)
    plain: dict[str, Loss] = {EAGER: eager, OURS_CE: functools.partial(ours, mce_weight=0.0)}
    for name, loss in plain.items():
        if not too_large(name, shape):
            calls[name] = functools.partial(run_once, loss, inputs, shape)
    seconds = interleave(calls, functools.partial(touch, inputs[1]), args.repeats, shape.device)
    return {"errors": errors, "seconds": seconds, "positions": len(true.sample), "check": true.check}


# ---- a whole training step


def training_step(task: dict[str, Any]) -> dict[str, Callable[[], None]]:
    """A step (forward, backward, AdamW) of one Llama-shaped model as MatrixTrainer makes it, with mce_weight "0" (SFTTrainer's own
    loss, TRL's fused head) and "1"."""
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM

    from matrix_llm.config import MatrixConfig
    from matrix_llm.model.tokenizer import train_tokenizer
    from matrix_llm.trainer import MatrixTrainer

    device, hidden, length = task["device"], task["hidden"], task["length"]
    torch.manual_seed(0)
    heads = max(1, hidden // (128 if hidden >= 2048 else 64))
    config = LlamaConfig(
        vocab_size=task["vocabulary"],
        hidden_size=hidden,
        intermediate_size=hidden * 43 // 16,  # 11008 for 4096
        num_hidden_layers=task["layers"],
        num_attention_heads=heads,
        max_position_embeddings=length,
    )
    config.dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    ids = torch.randint(task["vocabulary"], (task["batch"], length), device=device)
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    tokens = torch.tensor(ids.shape[0] * (length - 1), device=device)

    def step(trainer: MatrixTrainer) -> None:
        trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        trainer.state.global_step += 1  # the weights have changed

    steps = {}
    for weight in (0.0, 1.0):
        settings = MatrixConfig(
            tempfile.mkdtemp(), mce_weight=weight, gradient_checkpointing=True, use_cpu=device == "cpu", bf16=False,
            max_length=length, report_to="none",
        )  # fmt: skip
        rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
        trainer = MatrixTrainer(model, settings, train_dataset=rows, processing_class=train_tokenizer(["a b"], 260))
        steps[f"{weight:.0f}"] = functools.partial(step, trainer)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return steps


def step_row(task: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    on_gpu = task["device"] == "cuda"
    memory = {} if on_gpu else {name: in_child({**task, "step": name}) for name in ("0", "1")}
    steps = training_step(task)
    if on_gpu:
        memory = {name: step_memory(call, task["device"]) for name, call in steps.items()}
    return {"seconds": interleave(steps, lambda: None, args.repeats, task["device"]), "memory": memory}


# ---- rows and the command line


def library_digest() -> str:
    """Of every file of matrix_llm that the loss imports: a row measured with other code is measured again."""
    files = sorted(str(m.__file__) for name, m in sys.modules.items() if name.startswith("matrix_llm.") and m.__file__)
    return hashlib.sha256(b"".join(Path(f).read_bytes() for f in files if not f.endswith("files.py"))).hexdigest()[:12]


LIBRARY = library_digest()  # here, before a step or TRL brings in more modules


def machine() -> dict[str, Any]:
    model = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    versions = {"torch": str(torch.__version__)}
    for package in ("trl", "transformers", "triton", "liger-kernel", "cut-cross-entropy"):
        with contextlib.suppress(ImportError):
            versions[package] = version(package)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": (model or ["unknown"])[0],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "versions": versions,
    }


def once(path: Path | None, row: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The row of that kind, shape and name in the file; measured, and stored at once, if it is not there."""
    key = json.dumps(row, sort_keys=True)
    data: dict[str, Any] = {"machine": machine(), "rows": {}}
    if path and path.is_file():
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["machine"] != data["machine"]:
            raise SystemExit(
                f"--json {path} holds rows of {stored['machine']}, and this is {data['machine']}; name another file."
            )
        data = stored
    known = data["rows"].get(key)
    if known and known["library"] == LIBRARY and "failed" not in known:
        return known
    print(f"measuring {key}", file=sys.stderr, flush=True)
    stamp = {"library": LIBRARY, "command": " ".join(["python", *sys.argv]), "date": datetime.date.today().isoformat()}
    data["rows"][key] = {**row, **make(), **stamp}
    if path:
        write_text(path, json.dumps(data, indent=1))
    print(row_text(data["rows"][key]), flush=True)
    return data["rows"][key]


def measure(kind: str, name: str, shape: Shape, names: list[str] | None, args: argparse.Namespace) -> None:
    """Time of all implementations in turns, then the memory of each."""
    path, about = args.json and args.json[0], {"name": name, "shape": list(shape)}
    timed = once(path, {"kind": f"{kind}time", **about}, lambda: time_row(shape, names, args))
    rows = []
    for implementation in (i for i in timed["seconds"] if i != OURS_AGAIN):
        task = {"name": implementation, "shape": list(shape), "seed": args.seed}
        row = {"kind": f"{kind}memory", **about, "implementation": implementation}
        rows.append(once(path, row, functools.partial(head_memory, task)))
    print(f"{name}: {shape_table(rows, timed)}", flush=True)


def doubling(first: int, last: int) -> list[int]:
    return [first * 2**i for i in range(max(1, int(math.log2(max(1, last / first))) + 1))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=[])
    parser.add_argument("--n", type=int, help="positions, instead of the shape's")
    parser.add_argument("--hidden", type=int, help="hidden width, instead of the shape's (--step: 512)")
    parser.add_argument("--vocabulary", type=int, help="instead of the shape's (--step: 32016)")
    parser.add_argument(
        "--sweep",
        nargs="+",
        choices=("N", "V", "steps", "sketch"),
        default=[],
        help="at the first shape; not the table",
    )
    parser.add_argument("--max-n", type=int, default=4096, help="--sweep N: 256, doubling up to this")
    parser.add_argument("--max-v", type=int, default=131072, help="--sweep V: 8192, doubling up to this")
    parser.add_argument("--step", action="store_true", help="a whole training step of a Llama-shaped model")
    for name, value in {"layers": 4, "batch": 4, "length": 256}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"--step: {value}")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--accuracy-positions", type=int, default=64)
    parser.add_argument(
        "--exact-positions", type=int, default=4, help="on which the reference is held against solver='exact'"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--json", type=Path, nargs="+", help="rows are added to the first; --markdown and --plot read all"
    )
    parser.add_argument("--markdown", action="store_true", help="print the tables of the JSON")
    parser.add_argument("--plot", type=Path, help="folder for lm_head_cost.png and lm_head_solvers.png")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(json.loads(args.child))))
        return
    for name in args.shape:
        base = SHAPES[name]
        shape = base._replace(n=args.n or base.n, h=args.hidden or base.h, v=args.vocabulary or base.v)
        if shape.device == "cuda" and not torch.cuda.is_available():
            print(
                f"{name}: not measured, for it needs a CUDA device and torch {torch.__version__} sees none.", flush=True
            )
            continue
        label = name if shape == base else f"{name} at {shape.n} x {shape.h} x {shape.v}"
        path = args.json and args.json[0]
        if not args.sweep:
            for missing, why in implementations(shape.device)[1].items():
                print(f"{missing}: absent, {why}.", flush=True)
            measure("", label, shape, None, args)
            row = {"kind": "accuracy", "name": label, "shape": list(shape)}
            once(path, row, functools.partial(accuracy_row, shape, args))
        for kind in args.sweep:
            if kind in ("steps", "sketch"):
                row = {"kind": f"solvers, {kind}", "name": label, "shape": list(shape)}
                once(path, row, functools.partial(solver_row, kind, shape, args))
            sizes = {"N": doubling(256, args.max_n), "V": doubling(8192, args.max_v)}.get(kind, [])
            for size in sizes:
                measure(
                    f"sweep {kind}, ",
                    name,
                    shape._replace(n=size) if kind == "N" else shape._replace(v=size),
                    list(SWEPT),
                    args,
                )
    if args.step:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        task = {k: getattr(args, k) for k in ("layers", "batch", "length")}
        task.update(hidden=args.hidden or 512, vocabulary=args.vocabulary or 32016, device=device)
        once(args.json and args.json[0], {"kind": "step", "name": "step", "shape": task}, lambda: step_row(task, args))
    if args.markdown or args.plot:
        if not args.json:
            raise SystemExit("--markdown and --plot read measured rows; name their file with --json.")
        data = [json.loads(path.read_text(encoding="utf-8")) for path in args.json]
        if args.markdown:
            print(markdown(data))
        if args.plot:
            print(draw(data, args.plot))


if __name__ == "__main__":
    main()
