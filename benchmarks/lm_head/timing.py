"""Seconds of several calls, taken in turns."""

import gc
import sys
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

SLOW = 8  # times the fastest in its warm-up: such a call has three repeats, whatever was asked for


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def touch(weight: Tensor) -> None:
    """Change the weight as an optimizer step does, so that the next call has to make whatever is cached about it."""
    with torch.no_grad():
        weight.mul_(1.0)


def interleave(
    calls: Mapping[str, Callable[[], None]], prepare: Callable[[], None], repeats: int, device: str
) -> dict[str, list[float]]:
    """Seconds of each call, in turns, there and back, so that a slow minute of the machine hits all of them.

    A call that runs out of GPU memory is left out of the result.

    Args:
        prepare: called before each call, and not timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    warm_up = dict.fromkeys(calls, 0.0)
    for repeat in range(-3 if device == "cuda" else -1, repeats):  # negative: warm-up
        for name in list(seconds)[:: 1 if repeat % 2 else -1]:
            if repeat >= 3 and warm_up[name] > SLOW * min(warm_up.values()):
                continue
            prepare()
            gc.collect()
            synchronize(device)
            start = time.perf_counter()
            try:
                calls[name]()
                synchronize(device)
            except torch.OutOfMemoryError:
                del seconds[name], warm_up[name]
                torch.cuda.empty_cache()
                print(f"  {name}: out of memory", flush=True)
                continue
            elapsed = time.perf_counter() - start
            if repeat >= 0:
                seconds[name].append(elapsed)
            else:
                warm_up[name] = elapsed
        if repeat >= 0:
            total = sum(each[-1] for each in seconds.values())
            print(f"  repeat {repeat + 1} of {repeats}: {total:.1f} s", file=sys.stderr, flush=True)
    return seconds
