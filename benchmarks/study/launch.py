"""Large runs of the study: their commands, to print or to submit. collect.py reads the results back.

A run is OUT/ARM-sSEED, trained by matrix_llm/train.py, scored by eval/gsm8k.py and eval/hendrycks_math.py, and
measured on GSM8K's reference solutions (CE, calibration, effective ranks) by benchmarks.study.measure. On this
machine the commands of a run follow each other. With Slurm, training is docs/slurm.sh, which resumes by itself, and
the other jobs wait until it succeeds.
"""

import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.study.design import SAMPLES, TEMPERATURE, Arm, StudyError
from benchmarks.study.folder import MEASURED, append_row, run_folder
from benchmarks.study.processes import ROOT, last_line, measure_command, say, train_command
from matrix_llm.base.files import read_jsonl
from matrix_llm.run.run_folder import NON_FINITE

SUBMITTED, SAMPLED = "submitted.jsonl", "eval_samples"


@dataclass(frozen=True)
class Launch:
    """How and where large runs are started."""

    how: str = "local"
    """`local` or `slurm`."""
    launcher: str = "accelerate launch"
    """local: what starts training, with its own options."""
    nodes: int = 1
    """slurm: nodes of a training job; at least 1."""
    gsm8k: Path | None = None
    """GSM8K's test set as a file; None reads it from the Hub."""
    math: Path | None = None
    """MATH's test set as a file; None reads it from the Hub."""
    evaluation: str = ""
    """Further options of both evaluation scripts."""
    samples: int = SAMPLES
    """Samples per problem of a second pass over GSM8K, for pass@k; 0 leaves that pass out."""


@dataclass(frozen=True)
class PlannedRun:
    name: str
    """Name of the run's folder, ARM-sSEED."""
    commands: list[str]
    """Shell commands, in order."""


def plan(
    recipe: Path, output: Path, seeds: Sequence[int], arms: Sequence[Arm], overrides: Sequence[str], launch: Launch
) -> list[PlannedRun]:
    """The commands of every run, seed by seed."""
    commands = slurm_commands if launch.how == "slurm" else local_commands
    planned = []
    for seed in seeds:
        for arm in arms:
            folder = run_folder(output, arm.name, seed)
            _, *arguments = train_command(recipe, arm, seed, folder, overrides)  # without the script's path
            planned.append(PlannedRun(folder.name, commands(folder, shlex.join(arguments), launch)))
    return planned


def local_commands(folder: Path, arguments: str, launch: Launch) -> list[str]:
    """Training is skipped if it is done and resumed if it was interrupted, so the same lines can be run again."""
    done = f"[ -f {shlex.quote(str(folder / 'results.json'))} ]"
    training = f"{done} || {launch.launcher} matrix_llm/train.py {arguments} --resume_from_checkpoint true"
    return [training, *scoring_commands(folder, launch)]


def slurm_commands(folder: Path, arguments: str, launch: Launch) -> list[str]:
    job = f"JOB=$(sbatch --parsable --nodes {launch.nodes} --job-name {folder.name} docs/slurm.sh {arguments})"
    # --parsable prints "ID;CLUSTER" on a federation, and a dependency takes the ID alone
    after = f"sbatch --dependency=afterok:${{JOB%%;*}} --nodes 1 --gpus 1 --time 6:00:00 --job-name {folder.name}-eval"
    return [job, *(f"{after} --wrap {shlex.quote(command)}" for command in scoring_commands(folder, launch))]


def scoring_commands(folder: Path, launch: Launch) -> list[str]:
    """Both benchmarks greedily, GSM8K once more with samples, and the likelihood of GSM8K's solutions."""
    commands = []
    for script, data in (("gsm8k", launch.gsm8k), ("hendrycks_math", launch.math)):
        options = shlex.join(["--model", str(folder), *(["--data", str(data)] if data else [])])
        commands.append(f"python eval/{script}.py {options} {launch.evaluation}".rstrip())
    if launch.samples:
        to = shlex.quote(str(folder / SAMPLED))
        commands.append(f"{commands[0]} --n {launch.samples} --temperature {TEMPERATURE} --output_dir {to}")
    heldout = ["--heldout", str(launch.gsm8k or "openai/gsm8k:main")]
    commands.append(f"python {shlex.join(measure_command(folder, folder / MEASURED, heldout))}")
    return commands


def submit(planned: Sequence[PlannedRun], output: Path) -> None:
    """Run each run's commands in one shell; runs named in OUT/submitted.jsonl are left out.

    Raises:
        StudyError: a run's commands failed for a reason other than a non-finite loss.
    """
    submitted = {row["run"] for row in read_jsonl(output / SUBMITTED)}
    for run in planned:
        if run.name in submitted:
            say(f"{run.name} was submitted before: remove its line in {output / SUBMITTED} to submit it again")
            continue
        done = subprocess.run(["bash", "-euc", "\n".join(run.commands)], cwd=ROOT, text=True, capture_output=True)
        if done.returncode and (output / run.name / NON_FINITE).is_file():
            say(f"{run.name}: the loss became non-finite; the other runs continue")
        elif done.returncode:
            raise StudyError(f"submitting {run.name} failed: {last_line(done.stderr)}")
        append_row(output / SUBMITTED, {"run": run.name, "said": done.stdout.splitlines()[-3:]})
        say(f"submitted {run.name}")
