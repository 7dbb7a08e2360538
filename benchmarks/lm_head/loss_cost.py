"""Time and memory of every group of token losses (`losses.GROUPS`), each beside our own CE in one run."""

import functools
import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.lm_head import losses
from benchmarks.lm_head.inputs import Shape
from benchmarks.lm_head.loss_inputs import LossInputs, make_loss_inputs
from benchmarks.lm_head.memory import measure_token_loss_memory
from benchmarks.lm_head.names import CE, OURS_CE, THEIRS, THEIRS_CE
from benchmarks.lm_head.store import Store
from benchmarks.lm_head.timing import interleave, touch


def cpu_seconds() -> tuple[float, float]:
    """Seconds of all cores so far that were not idle, and those of this process."""
    user, nice, system, _, _, *others = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + sum(others)) / 100, time.process_time()


def busy_elsewhere(before: tuple[float, float], seconds: float) -> float:
    """Cores that other processes kept busy since `before`, `seconds` ago."""
    everything, own = (now - then for now, then in zip(cpu_seconds(), before, strict=True))
    return max(0.0, everything - own) / seconds


def load_other(folder: Path) -> Callable[..., Any]:
    """`linear_matrix_cross_entropy` of another checkout, whose modules live beside ours under names of their own."""
    ours = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "matrix_llm"}
    sys.path.insert(0, str(folder.resolve()))
    try:
        return importlib.import_module("matrix_llm.mce").linear_matrix_cross_entropy
    finally:
        sys.path.pop(0)
        for name in [name for name in sys.modules if name.split(".")[0] == "matrix_llm"]:
            del sys.modules[name]
        sys.modules |= ours


def measure_group(label: str, shape: Shape, repeats: int, seed: int, other: Path | None) -> dict[str, Any]:
    """Seconds of every implementation of one group in turns, our own CE among them.

    Args:
        other: a checkout whose CE and CE + MCE join the group "ce".
    """
    known = losses.implementations(label, shape.device)
    if other is not None and label == CE:
        theirs = load_other(other)

        def run(inputs: LossInputs, mce_weight: float) -> Tensor:
            return theirs(inputs.hidden, inputs.weight, inputs.labels, mce_weight=mce_weight).loss

        known.found |= {
            THEIRS: functools.partial(run, mce_weight=1.0),
            THEIRS_CE: functools.partial(run, mce_weight=0.0),
        }
    inputs = make_loss_inputs(shape, seed)
    calls = {name: functools.partial(losses.run_once, loss, inputs, shape.chunk) for name, loss in known.found.items()}
    before, start = cpu_seconds(), time.monotonic()
    seconds = interleave(calls, functools.partial(touch, inputs.weight), repeats, shape.device)
    elsewhere = busy_elsewhere(before, time.monotonic() - start)
    return {"seconds": seconds, "absent": known.absent, "busy_elsewhere": elsewhere}


def measure_losses(
    name: str, shape: Shape, store: Store, repeats: int, seed: int, wanted: list[str], other: Path | None
) -> None:
    """Time, then memory, of the groups in `wanted`."""
    for label in wanted:
        about = {"name": name, "shape": list(shape), "loss": label}
        if other is not None and label == CE:
            about["other"] = other.name
        measure = functools.partial(measure_group, label, shape, repeats, seed, other)
        timed = store.get({"kind": "token loss time", **about}, measure)
        for implementation in timed["seconds"]:
            if implementation not in (THEIRS, THEIRS_CE) and (label == CE or implementation != OURS_CE):
                key = {"kind": "token loss memory", **about, "implementation": implementation}
                store.get(key, functools.partial(measure_token_loss_memory, label, implementation, shape, seed))
