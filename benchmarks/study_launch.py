"""Large runs of the controlled study: their commands, printed or submitted, and their results, read back into runs.jsonl.

A run is OUT/ARM-sSEED, trained by matrix_llm/train.py, scored by eval/gsm8k.py and eval/hendrycks_math.py, and measured on GSM8K's
reference solutions (CE, calibration, effective ranks) by study_measure.py. Locally the commands of a run follow each other; with Slurm,
training is docs/slurm.sh, which goes on by itself, and the others wait for its success.
"""

from __future__ import annotations

import json
import math
import shlex
import subprocess
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from study import (
    ARMS,
    PROBLEMS,
    ROOT,
    RUNS,
    Arm,
    StudyError,
    append,
    figures_of,
    folder_of,
    known_runs,
    last_line,
    say,
    train_command,
)
from study_statistics import SAMPLES, TEMPERATURE, distinct_n

from matrix_llm.base.files import read_jsonl
from matrix_llm.run.run_folder import NON_FINITE

SUBMITTED, MEASURED, SAMPLED = "submitted.jsonl", "measured.json", "eval_samples"
Planned = list[tuple[str, list[str]]]


@dataclass(frozen=True)
class Launch:
    """How and where."""

    how: str = "local"  # or "slurm"
    launcher: str = "accelerate launch"  # local: what starts training, with its own options
    nodes: int = 1  # slurm: of a training job
    gsm8k: Path | None = None  # test sets as files; None: from the Hub
    math: Path | None = None
    evaluation: str = ""  # further options of both scripts
    samples: int = SAMPLES  # GSM8K is scored greedily, and once more with so many samples a problem for pass@k; 0: not


def plan(
    recipe: Path, output: Path, *, seeds: Sequence[int], arms: Sequence[Arm], extra: Sequence[str], launch: Launch
) -> Planned:
    """(run, its shell commands), seed by seed."""
    planned: Planned = []
    for seed in seeds:
        for arm in arms:
            folder = folder_of(output, arm.name, seed)
            arguments = shlex.join(train_command(recipe, arm, seed, folder, extra)[1:])
            scoring = []
            for script, data in (("gsm8k", launch.gsm8k), ("hendrycks_math", launch.math)):
                options = shlex.join(["--model", str(folder), *(["--data", str(data)] if data else [])])
                scoring.append(f"python eval/{script}.py {options} {launch.evaluation}".rstrip())
            if launch.samples:
                sampling = f"--n {launch.samples} --temperature {TEMPERATURE} --output_dir {shlex.quote(str(folder / SAMPLED))}"
                scoring.append(f"{scoring[0]} {sampling}")
            heldout = str(launch.gsm8k or "openai/gsm8k:main")
            measuring = [
                "benchmarks/study_measure.py",
                str(folder),
                "--out",
                str(folder / MEASURED),
                "--heldout",
                heldout,
            ]
            scoring.append(f"python {shlex.join(measuring)}")
            if launch.how == "local":
                there = (
                    f"[ -f {shlex.quote(str(folder / 'results.json'))} ]"  # so that the same lines go on after a kill
                )
                training = f"{there} || {launch.launcher} matrix_llm/train.py {arguments} --resume_from_checkpoint true"
                planned.append((folder.name, [training, *scoring]))
                continue
            job = f"JOB=$(sbatch --parsable --nodes {launch.nodes} --job-name {folder.name} docs/slurm.sh {arguments})"
            after = f"sbatch --dependency=afterok:${{JOB%%;*}} --nodes 1 --gpus 1 --time 6:00:00 --job-name {folder.name}-eval"
            planned.append((folder.name, [job, *(f"{after} --wrap {shlex.quote(command)}" for command in scoring)]))
    return planned


def submit(planned: Planned, output: Path) -> None:
    """Runs each run's commands in one shell; a run that OUT/submitted.jsonl names is left out."""
    done = {row["run"] for row in read_jsonl(output / SUBMITTED)}
    for name, commands in planned:
        if name in done:
            say(f"{name} was submitted before: remove its line in {output / SUBMITTED} to submit it again")
            continue
        ran = subprocess.run(["bash", "-euc", "\n".join(commands)], cwd=ROOT, text=True, capture_output=True)
        if ran.returncode and (output / name / NON_FINITE).is_file():
            say(f"{name}: the loss became non-finite; the others go on")
        elif ran.returncode:
            raise StudyError(f"submitting {name} failed: {last_line(ran.stderr)}")
        append(output / SUBMITTED, {"run": name, "said": ran.stdout.splitlines()[-3:]})
        say(f"submitted {name}")


def diversity(rows: Sequence[dict], name: str) -> dict[str, float]:
    """distinct-n of the samples of a problem, mean over the problems; nothing where each has one sample."""
    samples: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        samples[row["id"]].append(row["response"])
    figures = {}
    for n in (1, 2, 3):
        found = [distinct_n(responses, n) for responses in samples.values() if len(responses) > 1]
        if kept := [share for share in found if not math.isnan(share)]:
            figures[f"distinct_{n}_{name}"] = sum(kept) / len(kept)
    return figures


def summaries_in(folder: Path) -> list[dict]:
    """The summaries that eval/ wrote there; its other JSON files hold settings."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return [summary for summary in found if "verdicts" in summary]


def collect(output: Path, benchmarks: Sequence[str] = ("gsm8k", "math")) -> int:
    """Rows of the runs in OUT/ARM-sSEED that have none yet and are trained and scored on all `benchmarks`, from results.json,
    metrics.jsonl, eval/*.json (greedy) and eval_samples/*.json (pass@k, distinct-n); returns how many."""
    known, added = known_runs(output), 0
    for arm in ARMS:
        for folder in sorted(output.glob(f"{arm.name}-s*"), key=lambda path: (len(path.name), path.name)):
            number = folder.name.removeprefix(f"{arm.name}-s")
            if not number.isdigit() or (arm.name, int(number)) in known:
                continue
            row = {"arm": arm.name, "seed": int(number), "settings": dict(arm.overrides)}
            if (folder / NON_FINITE).is_file():
                append(output / RUNS, {**row, "status": "diverged"})
                added += 1
                continue
            summaries = summaries_in(folder / "eval")
            if warm := [summary["name"] for summary in summaries if summary["settings"]["temperature"] != 0]:
                raise StudyError(
                    f"{folder / 'eval'} scored {warm[0]} on samples, and the study compares greedy answers. Score it again with "
                    f"--temperature 0 --overwrite; samples belong into {folder / SAMPLED}."
                )
            missing = sorted(set(benchmarks) - {summary["benchmark"] for summary in summaries})
            missing += [name for name in ("results.json", MEASURED) if not (folder / name).is_file()]
            if missing:
                say(f"{folder.name} is not there yet: {', '.join(missing)}")
                continue
            row |= {"status": "done", **figures_of(folder)}
            row |= json.loads((folder / MEASURED).read_text(encoding="utf-8"))["row"]
            for summary in summaries:
                name, verdicts = summary["name"], summary["verdicts"]
                row[f"accuracy_{name}"] = sum(v is True for v in verdicts.values()) / len(verdicts)
                correct = "".join("1" if verdicts[problem] is True else "0" for problem in sorted(verdicts))
                append(output / PROBLEMS, {"arm": arm.name, "seed": int(number), "set": name, "correct": correct})
            for summary in summaries_in(folder / SAMPLED):
                name = summary["name"]
                row |= {f"pass@{k}_{name}": share for k, share in summary.get("pass_at_k", {}).items()}
                row |= diversity(read_jsonl(folder / SAMPLED / f"{name}.jsonl"), name)
            append(output / RUNS, row)
            added += 1
    return added
