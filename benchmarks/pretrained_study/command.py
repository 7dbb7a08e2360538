"""Does MCE help a pretrained model? The rules are in benchmarks/pretrained_study/preregistration.md.

    python benchmarks/pretrained_study.py prepare --output runs/pretrained --model models/smollm2-135m \\
        --train gsm8k/train.jsonl --test gsm8k/test.jsonl --math math/test.jsonl
    python benchmarks/pretrained_study.py tune --output runs/pretrained --workers 2
    python benchmarks/pretrained_study.py run --output runs/pretrained --workers 2 --stage pilot
    python benchmarks/pretrained_study.py run --output runs/pretrained --workers 2 --stage main
    python benchmarks/pretrained_study.py run --output runs/pretrained --workers 2 --stage all
    python benchmarks/pretrained_study.py report --output runs/pretrained --page docs/pretrained_study.md
    python benchmarks/pretrained_study.py plan recipes/llemma7b.yaml --rows 395000 --output runs/llemma

Every command continues where an earlier one stopped; a run whose row exists is not repeated, and `report` is valid
whatever is done so far. Each run uses one thread on a CPU. `plan` prints the commands of the same arms at 7B.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from benchmarks.pretrained_study.design import CLIPPING, EPSILON, LARGER, Sizes, make_arms
from benchmarks.study.design import StudyError
from benchmarks.study.folder import RUNS
from benchmarks.study.processes import say
from matrix_llm.base.errors import MatrixLLMError

STAGES = {
    "pilot": "ce and mce, three seeds",
    "main": "ce, mce and the control, all seeds that the pilot asks for",
    "all": "every arm",
}


def prepare_command(output: Path, model: Path, train: Path, test: Path, math: Path, **sizes: int) -> None:
    from benchmarks.pretrained_study.run import prepare

    prepare(output, model, train, test, math, Sizes(**sizes))


def tune_command(output: Path, workers: int) -> None:
    from benchmarks.pretrained_study.run import make_missing, tuning_tasks

    make_missing(output, tuning_tasks(output), workers)


def run_command(output: Path, workers: int, stage: str) -> None:
    from benchmarks.pretrained_study.run import make_missing, study_tasks

    make_missing(output, study_tasks(output, stage), workers)


def report_command(output: Path, page: Path) -> None:
    from benchmarks.pretrained_study.report import write_report

    say(f"wrote {', '.join(map(str, write_report(output, page)))}")


def cost_command(model: Path, train: Path) -> None:
    from benchmarks.pretrained_study.cost import cost_table

    print(cost_table(model, train))


def plan_command(
    recipe: Path, output: Path, rows: int, seeds: int, launch: str, launcher: str, nodes: int, submit_runs: bool
) -> None:
    from benchmarks.study.launch import Launch, plan, submit

    check_recipe(recipe)
    planned = plan(recipe, output, range(1, seeds + 1), make_arms(rows), [], Launch(launch, launcher, nodes))
    if submit_runs:
        submit(planned, output)
    else:
        print("\n\n".join("\n".join([f"# {run.name}", *run.commands]) for run in planned))


def check_recipe(recipe: Path) -> None:
    """Refuse a recipe whose clipping or epsilon is not the one that `ce_larger` divides.

    Raises:
        StudyError: it sets another.
    """
    settings = yaml.safe_load(recipe.read_text(encoding="utf-8")) or {}
    for key, value in {"max_grad_norm": CLIPPING, "adam_epsilon": EPSILON}.items():
        if float(settings.get(key, value)) != value:
            raise StudyError(
                f"{recipe} sets {key}={settings[key]}, but the arm ce_larger is {value} / {LARGER} there, as is right "
                f"where all other arms have {value}. Remove {key} from the recipe."
            )


def collect_command(output: Path, rows: int, benchmarks: str) -> None:
    from benchmarks.study.collect import collect

    say(f"{collect(output, benchmarks.split(','), make_arms(rows))} runs added to {output / RUNS}")


def size_command() -> None:
    from benchmarks.pretrained_study.large import hours_table, sample_table

    print(f"{hours_table()}\n\n{sample_table()}")


COMMANDS: dict[str, Callable[..., None]] = {
    "prepare": prepare_command,
    "tune": tune_command,
    "run": run_command,
    "report": report_command,
    "cost": cost_command,
    "plan": plan_command,
    "collect": collect_command,
    "size": size_command,
}


def make_parser() -> argparse.ArgumentParser:
    """One subcommand for each of COMMANDS, whose parameters are its options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, text: str) -> Any:
        return commands.add_parser(name, help=text)

    prepare = add("prepare", "deal out the rows, and run the frozen layers over them once")
    for name, text in {"model": "folder of the base", "train": "GSM8K's training set", "test": "its test set"}.items():
        prepare.add_argument(f"--{name}", type=Path, required=True, help=text)
    prepare.add_argument("--math", type=Path, required=True, help="MATH's test set")
    for field in fields(Sizes):
        prepare.add_argument(f"--{field.name}", type=int, default=field.default, help=f"default: {field.default}")
    tune, run = add("tune", "every arm at every rate"), add("run", "the runs of a stage")
    run.add_argument("--stage", choices=STAGES, default="all", help="; ".join(f"{k}: {v}" for k, v in STAGES.items()))
    for command in (tune, run):
        command.add_argument("--workers", type=int, default=1, help="runs at a time, one thread each")
    report = add("report", "write the page")
    report.add_argument("--page", type=Path, required=True, help="the page, with or without markers yet")
    for command in (prepare, tune, run, report):
        command.add_argument("--output", type=Path, required=True, help="folder of the study")

    cost = add("cost", "measure the seconds of a step on this machine")
    cost.add_argument("--model", type=Path, required=True)
    cost.add_argument("--train", type=Path, required=True)

    plan = add("plan", "print the commands of the same arms for a large recipe")
    plan.add_argument("recipe", type=Path)
    plan.add_argument("--output", type=Path, default=Path("runs/pretrained-large"))
    collect = add("collect", "read finished large runs; then `report` writes their page")
    collect.add_argument("--output", type=Path, required=True, help="folder of the study")
    collect.add_argument("--benchmarks", default="gsm8k,math", help="those a run must have been scored on")
    for command in (plan, collect):
        command.add_argument("--rows", type=int, required=True, help="rows of the recipe's training set")
    plan.add_argument("--seeds", type=int, default=3, help="seeds 1 to N (default: 3)")
    plan.add_argument("--launch", choices=["local", "slurm"], default="local")
    plan.add_argument("--launcher", default="accelerate launch", help="local: what starts training")
    plan.add_argument("--nodes", type=int, default=1, help="slurm: nodes of a training job")
    plan.add_argument("--submit", action="store_true", dest="submit_runs", help="run the commands instead")
    add("size", "print what the same study costs at 7B, and the sample that finds the paper's gain")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 with one line on stderr where something has to be put right first."""
    options = vars(make_parser().parse_args(arguments))
    try:
        COMMANDS[options.pop("command")](**options)
    except MatrixLLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
