"""The parity table of docs/reliability.md: how far each engine is from one process after 20 optimizer steps.

    python benchmarks/parity.py [--out parity.jsonl] [--engine zero3 ...]

In float32 on the CPU. Prints Markdown. It runs what tests/engines/test_distributed.py runs: two real processes (gloo)
for each engine, DeepSpeed and FSDP2 themselves.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

if not __package__:
    # run as a script: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tests.support.engines import why_no_deepspeed
from tests.support.parity_runs import CASES, ENGINES, REFERENCE, Runner, differences

LABELS = {
    "accumulation 1x8": "1 process, 8 micro-batches",
    "ddp": "2 x DDP",
    "zero1": "2 x ZeRO-1",
    "zero2": "2 x ZeRO-2",
    "zero3": "2 x ZeRO-3",
    "zero3_offload": "2 x ZeRO-3, CPU offload",
    "fsdp2": "2 x FSDP2",
}
COLUMNS = ("loss", "grad_norm", "weights")


def table(measured: list[dict]) -> str:
    lines = ["| engine | " + " | ".join(CASES) + " |", "|---|" + "---|" * len(CASES)]
    for engine in dict.fromkeys(row["engine"] for row in measured):
        cells = {
            row["case"]: " / ".join(f"{row[key]:.1e}" for key in COLUMNS) for row in measured if row["engine"] == engine
        }
        lines.append(f"| {LABELS[engine]} | " + " | ".join(cells[case] for case in CASES) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", action="append", choices=list(LABELS), help="default: all")
    parser.add_argument("--out", type=Path, help="also write one line of JSON for each cell")
    args = parser.parse_args()
    engines = [name for name in args.engine or LABELS if not (ENGINES[name].deepspeed and why_no_deepspeed())]
    started, measured = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(Path(folder))
        expected = runner.results(REFERENCE)
        for engine in engines:
            for case, got in runner.results(engine).items():
                found = differences(got, expected[case])
                found["loss"] = max(found[key] for key in ("loss", "ce", "mce"))
                measured.append(
                    {"engine": engine, "case": case, **found, "tokens_trained": int(got.curve("num_tokens")[-1])}
                )
                if args.out is not None:
                    with args.out.open("a") as file:
                        file.write(json.dumps(measured[-1]) + "\n")
        runner.close()
    print(table(measured))
    print(
        f"\nlargest of all: {max(row[key] for row in measured for key in COLUMNS):.1e}, "
        f"in {time.perf_counter() - started:.0f} s"
    )


if __name__ == "__main__":
    main()
