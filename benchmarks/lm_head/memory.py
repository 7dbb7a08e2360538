"""Peak memory of a call: on the CPU in a separate process (child.py), on a GPU by the allocator, which is exact."""

import ctypes
import functools
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.lm_head import losses
from benchmarks.lm_head.implementations import implementations, run_once
from benchmarks.lm_head.inputs import SHAPES, Shape, make_inputs
from benchmarks.lm_head.loss_inputs import make_loss_inputs

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Peak:
    """Bytes."""

    before: int
    """Bytes in use before the call."""
    extra: int
    """Bytes that the peak rose above that during the call."""


def resident(name: str) -> int:
    """Bytes of this process: VmRSS (now) or VmHWM (at its peak)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[name].split()[0])


def peak_of(call: Callable[[], Any], device: str) -> Peak:
    """The peak of the allocator on a GPU, and of the resident set on the CPU."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return Peak(before, torch.cuda.max_memory_allocated() - before)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmRSS")
    call()
    return Peak(before, max(0, resident("VmHWM") - before))


def in_child(task: dict[str, Any]) -> dict[str, Any]:
    """Run `task` in a separate process, with one malloc arena and large blocks returned at once."""
    settings = {
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": str(2**20),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    command = [sys.executable, "-m", "benchmarks.lm_head.child", json.dumps(task)]
    result = subprocess.run(command, cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True)
    if result.returncode:
        killed = f"killed by signal {-result.returncode}, most likely out of memory"
        return {"failed": (result.stderr.strip().splitlines() or [killed])[-1]}
    return json.loads(result.stdout.splitlines()[-1])


def loss_memory(name: str, shape: Shape, seed: int) -> dict[str, int]:
    """Bytes that the loss of that name adds to its inputs, and those of hidden and weight. Measured in this process."""
    loss = implementations(shape.device).found.get(name)
    # Whatever the first call loads or compiles is not the loss's memory.
    small = SHAPES["tiny"]._replace(n=16, dtype=shape.dtype, device=shape.device)
    run_once(loss, make_inputs(small, 0), small)
    inputs = make_inputs(shape, seed)
    peak = peak_of(functools.partial(run_once, loss, inputs, shape), shape.device)
    return {"extra": peak.extra, "inputs": sum(t.numel() * t.element_size() for t in (inputs.hidden, inputs.weight))}


def token_loss_memory(label: str, name: str, shape: Shape, seed: int) -> dict[str, int]:
    """Bytes that one implementation of a group of `losses.GROUPS` adds to its inputs. Measured in this process."""
    loss = losses.implementations(label, shape.device).found[name]
    small = SHAPES["tiny"]._replace(n=64, dtype=shape.dtype, device=shape.device)
    losses.run_once(loss, make_loss_inputs(small, 0), small.chunk)
    inputs = make_loss_inputs(shape, seed)
    return {"extra": peak_of(functools.partial(losses.run_once, loss, inputs, shape.chunk), shape.device).extra}


def measure_token_loss_memory(label: str, name: str, shape: Shape, seed: int) -> dict[str, Any]:
    if shape.device != "cuda":
        return in_child({"loss": label, "name": name, "shape": list(shape), "seed": seed})
    try:
        return token_loss_memory(label, name, shape, seed)
    except torch.OutOfMemoryError as error:
        return {"failed": str(error).splitlines()[0]}


def measure_loss_memory(name: str, shape: Shape, seed: int) -> dict[str, Any]:
    if shape.device != "cuda":
        return in_child({"name": name, "shape": list(shape), "seed": seed})
    try:
        return loss_memory(name, shape, seed)
    except torch.OutOfMemoryError as error:
        return {"failed": str(error).splitlines()[0]}
