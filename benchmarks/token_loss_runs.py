"""One short training run of a pretrained model with each token loss: the loss, the true CE and the gradient norm.

    python benchmarks/token_loss_runs.py --model models/smollm2-135m --teacher runs/smollm2 --out runs/token_losses

Each loss is trained for --steps steps of recipes/smollm2.yaml, without MCE (the line "ce + mce" has it), on the same
rows in the same order from the same weights. Three of them are trained a second time in two parts, stopped at half of
the steps and resumed: the weights must be the same to the last bit. A finished run is not repeated, and its weights are
removed. The table is made from rows.jsonl, the figures of every step; `--table docs/token_loss_runs.jsonl` prints that
of docs/losses.md. --teacher is what kd, soft_ce and soft_mce aim at; ASFT's reference is --model itself.

These are no measure of which loss is better: one seed, one learning rate for all, and few steps.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import hashlib
import json
import shutil
import subprocess
from dataclasses import dataclass, field
from typing import Any

from benchmarks.output import markdown_table
from matrix_llm.base.files import read_jsonl, write_text

ROOT = Path(__file__).resolve().parents[1]
RESUMED = ("emo", "ntl", "kd")


@dataclass(frozen=True)
class Run:
    """One line of the table."""

    name: str
    """As the table calls it; its folder is named so, without spaces."""
    loss: str
    """token_loss."""
    settings: dict[str, Any] = field(default_factory=dict)
    """token_loss_settings; {}: the defaults."""
    mce_weight: float = 0.0
    """Weight of MCE."""

    @property
    def folder(self) -> str:
        return self.name.replace(" ", "")


RUNS = [
    Run("ce", "ce"),
    Run("ce + mce", "ce", mce_weight=1.0),
    Run("dft", "dft"),
    Run("minus_p", "minus_p"),
    Run("power, alpha 8", "power", {"alpha": 8.0}),
    Run("threshold, p <= 0.5", "threshold", {"at": 0.5, "side": "bottom", "base": "logp"}),
    Run("focal", "focal"),
    Run("eaft", "eaft"),
    Run("asft", "asft"),
    Run("label_smoothing", "label_smoothing"),
    Run("z_loss", "z_loss"),
    Run("gem, linear", "gem"),
    Run("gem, logsigmoid", "gem", {"h": "logsigmoid"}),
    Run("ntl", "ntl"),
    Run("emo", "emo"),
    Run("kd", "kd"),
    Run("soft_ce", "soft_ce"),
    Run("soft_mce, top_k 16", "soft_mce", {"top_k": 16}),
]


def command_of(run: Run, arguments: argparse.Namespace, output: Path, *extra: str) -> list[str]:
    """The command that trains one run."""
    given = {
        "model_name_or_path": arguments.model, "output_dir": output, "max_steps": arguments.steps,
        "per_device_train_batch_size": arguments.rows, "builtin_eval_rows": 16, "logging_steps": 1,
        "bf16": str(arguments.bf16).lower(), "mce_weight": run.mce_weight, "token_loss": run.loss,
    }  # fmt: skip
    if run.settings:
        given["token_loss_settings"] = json.dumps(run.settings)
    if run.loss in ("kd", "soft_ce", "soft_mce"):
        given["teacher_model_name_or_path"] = arguments.teacher
    elif run.loss == "asft":
        given["teacher_model_name_or_path"] = arguments.model
    flags = [part for key, value in given.items() for part in (f"--{key}", str(value))]
    return [sys.executable, str(ROOT / "matrix_llm/train.py"), str(ROOT / "recipes/smollm2.yaml"), *flags, *extra]


def train(run: Run, arguments: argparse.Namespace, output: Path, *extra: str) -> None:
    """Train one run, unless its folder is finished; what it prints is kept beside the folder."""
    if (output / "results.json").is_file():
        return
    if "--resume_from_checkpoint" not in extra:
        shutil.rmtree(output, ignore_errors=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    with (output.parent / f"{output.name}.log").open("a") as log:
        done = subprocess.run(command_of(run, arguments, output, *extra), stdout=log, stderr=log, check=False)
    if done.returncode != 0:
        raise SystemExit(f"error: {run.name} ended with status {done.returncode}. See {log.name}.")


def weights_of(folder: Path) -> str:
    """SHA-256 of a finished run's weights, which are then removed; it is kept in the folder."""
    kept, weights = folder / "weights.sha256", folder / "model.safetensors"
    if weights.is_file():
        with weights.open("rb") as file:
            write_text(kept, hashlib.file_digest(file, "sha256").hexdigest())
        weights.unlink()
    return kept.read_text(encoding="utf-8")


def resume(run: Run, arguments: argparse.Namespace, output: Path) -> None:
    """Train one run twice, the second time from a checkpoint at half of the steps."""
    if (output / "weights.sha256").is_file():
        return
    half = arguments.steps // 2
    saving = ("--save_strategy", "steps", "--save_steps", str(half), "--save_total_limit", "2")
    if not (output / f"checkpoint-{half}").is_dir():
        train(run, arguments, output, *saving)
    shutil.rmtree(output / f"checkpoint-{arguments.steps}", ignore_errors=True)
    for name in ("results.json", "model.safetensors", "README.md"):
        (output / name).unlink(missing_ok=True)
    train(run, arguments, output, *saving, "--resume_from_checkpoint", str(output / f"checkpoint-{half}"))
    for checkpoint in output.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


KEPT = ("step", "loss", "token_loss", "ce", "mce", "entropy", "mean_token_accuracy", "grad_norm", "eval_ce")


def rows_of(out: Path) -> list[dict[str, Any]]:
    """The figures of every step of the finished runs, and whether a resumed run ended with the same bits."""
    rows = []
    for run in RUNS:
        folder, again = out / run.folder, out / f"{run.folder}.resumed"
        if not (folder / "results.json").is_file():
            continue
        for entry in read_jsonl(folder / "metrics.jsonl"):
            figures = {key: float(f"{entry[key]:.6g}") for key in KEPT if key in entry}
            if "grad_norm" in figures or "eval_ce" in figures:
                rows.append({"run": run.name, **figures})
        if (again / "weights.sha256").is_file():
            rows.append({"run": run.name, "resumed_to_same_bits": weights_of(folder) == weights_of(again)})
    return rows


def lines(rows: list[dict[str, Any]]) -> list[list[str]]:
    """The table: a line for each run."""
    found = []
    for name in dict.fromkeys(row["run"] for row in rows):
        own = [row for row in rows if row["run"] == name]
        steps = [row for row in own if "grad_norm" in row]
        held_out = [row["eval_ce"] for row in own if "eval_ce" in row]
        same = [row["resumed_to_same_bits"] for row in own if "resumed_to_same_bits" in row]

        def figures(key: str, digits: int = 3, steps: list[dict[str, Any]] = steps) -> list[str]:
            """Of the first step, and the mean of the last five."""
            last = sum(row.get(key, row["ce"]) for row in steps[-5:]) / len(steps[-5:])
            return [f"{steps[0].get(key, steps[0]['ce']):.{digits}f}", f"{last:.{digits}f}"]

        value, true, norm = figures("token_loss"), figures("ce"), figures("grad_norm", 2)
        again = {True: "yes", False: "NO"}[same[0]] if same else ""
        found.append([name, *value, *true, f"{held_out[0]:.3f}", f"{held_out[-1]:.3f}", *norm, again])
    return found


HEADER = [
    "loss", "value, step 1", "last 5", "true CE, step 1", "last 5", "held-out CE before", "after",
    "gradient norm, step 1", "last 5", "resumed: same bits",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", default="models/smollm2-135m", help="folder of the pretrained model")
    parser.add_argument("--teacher", default="runs/smollm2", help="folder of the model that distillation aims at")
    parser.add_argument("--out", default="runs/token_losses", help="folder of the runs")
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps, even")
    parser.add_argument("--rows", type=int, default=4, help="rows in a step")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--losses", nargs="*", help="names of the table; default: all")
    parser.add_argument("--table", metavar="ROWS.jsonl", help="print the table of these rows, and train nothing")
    arguments = parser.parse_args()
    out = Path(arguments.out)
    for run in RUNS if not arguments.table else []:
        if arguments.losses and run.name not in arguments.losses:
            continue
        train(run, arguments, out / run.folder)
        if run.loss in RESUMED:
            resume(run, arguments, out / f"{run.folder}.resumed")
            weights_of(out / f"{run.folder}.resumed")
        weights_of(out / run.folder)
        print(f"=> {run.name} is done", flush=True)
    rows = read_jsonl(Path(arguments.table)) if arguments.table else rows_of(out)
    if not arguments.table:
        write_text(out / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    print(markdown_table(HEADER, lines(rows)))


if __name__ == "__main__":
    main()
