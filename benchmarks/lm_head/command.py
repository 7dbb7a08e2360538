"""CE + MCE straight from hidden states, against the cross-entropy alone of every peer: time, memory and accuracy.

    python benchmarks/lm_head.py --shape llemma-cpu qwen-cpu --json lm_head.json        # the targets' table
    python benchmarks/lm_head.py --shape llemma-cpu --sweep N V --json lm_head.json     # cost against N, and against V
    python benchmarks/lm_head.py --shape llemma-cpu --n 512 --sweep steps sketch --json lm_head.json  # error, cost
    python benchmarks/lm_head.py --shape llemma-cpu --hidden 4096 --losses --json losses.json  # every token loss
    python benchmarks/lm_head.py --step --json lm_head.json                             # a complete training step
    python benchmarks/lm_head.py --json lm_head.json [gpu.json] --markdown --plot docs  # from the JSON alone

Time: forward and backward (gradients in hidden and weight) of every implementation in turns, after a warm-up. Between
calls the weight is touched as an optimizer step touches it, so that anything cached about it is recomputed inside the
timed call; "later micro-batch" is ours with that cached. The floor is hidden W^T, G W and G^T hidden alone.

Memory: how far the peak rises above the level before the call, alone ("extra") and with hidden and weight ("with
inputs"); of the resident set of a separate process on the CPU, and of the allocator on a GPU.

Accuracy: on the timed inputs, with the timed settings, against a 32-step float64 recurrence over the whole
vocabulary. The inputs are random but shaped like a trained model's; `make_inputs` describes how.
"""

import argparse
import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.lm_head.accuracy import measure_accuracy, measure_solvers
from benchmarks.lm_head.implementations import Loss, implementations, run_once, why_too_large
from benchmarks.lm_head.inputs import SHAPES, Shape, make_inputs
from benchmarks.lm_head.loss_cost import measure_losses
from benchmarks.lm_head.losses import GROUPS
from benchmarks.lm_head.memory import measure_loss_memory
from benchmarks.lm_head.names import EAGER, OURS, OURS_AGAIN, OURS_CE, PRODUCTS
from benchmarks.lm_head.plots import draw
from benchmarks.lm_head.store import Store
from benchmarks.lm_head.tables import markdown, shape_table
from benchmarks.lm_head.timing import interleave, touch
from benchmarks.lm_head.training_step import Step, measure_step

SWEPT = (
    PRODUCTS,
    OURS,
    OURS_CE,
    EAGER,
    "torch linear_cross_entropy, auto",
    "torch linear_cross_entropy, chunk 256",
    "TRL, chunked head",
    "Liger, fused",
    "Apple, cut-cross-entropy",
)


@dataclass(frozen=True)
class Effort:
    """How much is measured, and where the rows go."""

    store: Store
    """Where the rows are stored."""
    repeats: int
    """Timed calls of each implementation; at least 1."""
    positions: int
    """Positions on which a solver's error is measured."""
    exact_positions: int
    """Positions on which the reference itself is compared with solver="exact"."""
    seed: int
    """Seed of the inputs."""


def measure_time(shape: Shape, names: Sequence[str] | None, effort: Effort) -> dict[str, Any]:
    """Seconds of every implementation, or of those named, and why others are absent."""
    known = implementations(shape.device)
    losses: dict[str, Loss | None] = {PRODUCTS: None}
    for name, loss in known.found.items():
        if names is not None and name not in names:
            continue
        if reason := why_too_large(name, shape):
            known.absent[name] = reason
        else:
            losses[name] = loss
    inputs = make_inputs(shape, effort.seed)
    calls = {name: functools.partial(run_once, loss, inputs, shape) for name, loss in losses.items()}
    seconds = interleave(calls, functools.partial(touch, inputs.weight), effort.repeats, shape.device)
    return {"seconds": seconds, "absent": known.absent}


def measure_cost(prefix: str, name: str, shape: Shape, names: Sequence[str] | None, effort: Effort) -> None:
    """Time of all implementations in turns, then the memory of each.

    Args:
        prefix: of the rows' kind, which tells a sweep from the table.
    """
    about = {"name": name, "shape": list(shape)}
    timed = effort.store.get({"kind": f"{prefix}time", **about}, lambda: measure_time(shape, names, effort))
    rows = []
    for implementation in timed["seconds"]:
        if implementation != OURS_AGAIN:
            key = {"kind": f"{prefix}memory", **about, "implementation": implementation}
            measure = functools.partial(measure_loss_memory, implementation, shape, effort.seed)
            rows.append(effort.store.get(key, measure))
    print(f"{name}: {shape_table(rows, timed)}", flush=True)


def measure_table(label: str, shape: Shape, effort: Effort) -> None:
    """Cost and accuracy at one shape."""
    for missing, why in implementations(shape.device).absent.items():
        print(f"{missing}: absent, {why}.", flush=True)
    measure_cost("", label, shape, None, effort)
    effort.store.get(
        {"kind": "accuracy", "name": label, "shape": list(shape)},
        lambda: measure_accuracy(shape, effort.seed, effort.positions, effort.exact_positions),
    )


def measure_sweep(sweep: str, label: str, shape: Shape, effort: Effort) -> None:
    """Error against cost of several settings at one shape."""
    effort.store.get(
        {"kind": f"solvers, {sweep}", "name": label, "shape": list(shape)},
        lambda: measure_solvers(sweep, shape, effort.seed, effort.positions, effort.exact_positions, effort.repeats),
    )


def doubling(first: int, last: int) -> list[int]:
    """`first`, doubled as long as it stays within `last`; at least `first` itself."""
    return [first * 2**i for i in range(max(1, int(math.log2(max(1, last / first))) + 1))]


def make_parser() -> argparse.ArgumentParser:
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
        help="at each shape, in place of the table",
    )
    parser.add_argument(
        "--losses",
        nargs="*",
        choices=GROUPS,
        metavar="LOSS",
        help="at each shape, in place of the table: the token losses and their peers, each beside our own CE; "
        "without a name all of them",
    )
    parser.add_argument("--against", type=Path, help="--losses: another checkout, whose CE + MCE is timed in turns too")
    parser.add_argument("--max-n", type=int, default=4096, help="--sweep N: 256, doubling up to this")
    parser.add_argument("--max-v", type=int, default=131072, help="--sweep V: 8192, doubling up to this")
    parser.add_argument("--step", action="store_true", help="a complete training step of a Llama-shaped model")
    for name, value in {"layers": 4, "batch": 4, "length": 256}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"--step: {value}")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--accuracy-positions", type=int, default=64)
    parser.add_argument(
        "--exact-positions", type=int, default=4, help="on which the reference is compared with solver='exact'"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--json", type=Path, nargs="+", default=[], help="rows are added to the first; --markdown and --plot read all"
    )
    parser.add_argument("--markdown", action="store_true", help="print the tables of the JSON")
    parser.add_argument("--plot", type=Path, help="folder for lm_head_cost.png and lm_head_solvers.png")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(arguments)
    if (args.markdown or args.plot) and not args.json:
        parser.error("--markdown and --plot read measured rows; name their file with --json.")

    # 1. Measure what was asked for.
    if args.shape or args.step:
        store = Store(args.json[0] if args.json else None)
        effort = Effort(store, args.repeats, args.accuracy_positions, args.exact_positions, args.seed)
    for name in args.shape:
        base = SHAPES[name]
        shape = base._replace(n=args.n or base.n, h=args.hidden or base.h, v=args.vocabulary or base.v)
        if shape.device == "cuda" and not torch.cuda.is_available():
            print(f"{name}: not measured, because torch {torch.__version__} sees no CUDA device.", flush=True)
            continue
        label = name if shape == base else f"{name} at {shape.n} x {shape.h} x {shape.v}"
        if args.losses is not None:
            wanted = args.losses or list(GROUPS)
            measure_losses(label, shape, store, args.repeats, args.seed, wanted, args.against)
        elif not args.sweep:
            measure_table(label, shape, effort)
        for sweep in args.sweep:
            if sweep in ("steps", "sketch"):
                measure_sweep(sweep, label, shape, effort)
            for size in doubling(256, args.max_n) if sweep == "N" else []:
                measure_cost("sweep N, ", name, shape._replace(n=size), SWEPT, effort)
            for size in doubling(8192, args.max_v) if sweep == "V" else []:
                measure_cost("sweep V, ", name, shape._replace(v=size), SWEPT, effort)
    if args.step:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        step = Step(args.layers, args.batch, args.length, args.hidden or 512, args.vocabulary or 32016, device)
        about = {"kind": "step", "name": "step", "shape": vars(step)}
        store.get(about, lambda: measure_step(step, args.repeats))

    # 2. Tables and plots of everything in the files.
    data = [json.loads(path.read_text(encoding="utf-8")) for path in args.json] if args.markdown or args.plot else []
    if args.markdown:
        print(markdown(data))
    if args.plot:
        written = draw(data, args.plot)
        print("\n".join(map(str, written)) or "Nothing to draw yet: measure with --sweep N steps sketch first.")
    return 0
