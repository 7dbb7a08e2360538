"""Does matrix cross-entropy help? One recipe, several losses, several seeds, everything else equal.

    python benchmarks/study.py text --output runs/study/text.jsonl --text gsm8k/train.jsonl math/train.jsonl
    python matrix_llm/train.py recipes/study_pretrain.yaml --dataset runs/study/text.jsonl \\
        --output_dir runs/study/pretrained
    python benchmarks/study.py run recipes/study_small.yaml --output runs/study --seeds 5 --text gsm8k/test.jsonl
    python benchmarks/study.py run recipes/study_small.yaml --output runs/study --seeds 3 --text gsm8k/test.jsonl \\
        --arms ablations
    python benchmarks/study.py run recipes/study_small.yaml --output runs/study-rate --seeds 3 \\
        --text gsm8k/test.jsonl -- --learning_rate 1.5e-3
    python benchmarks/study.py report --output runs/study --page docs/results.md --sensitivity runs/study-rate
    python benchmarks/study.py plan recipes/llemma7b.yaml --seeds 3 --launch slurm --output runs/llemma [--submit]
    python benchmarks/study.py collect --output runs/llemma
    python benchmarks/study.py report --output runs/llemma --page docs/llemma.md

`run` is resumable: a run whose row is in OUT/runs.jsonl is not repeated. Each run uses one thread, so that all round
alike on a CPU. The questions and the rules of decision are in benchmarks/study/preregistration.md.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.study.design import BY_NAME, SAMPLES, choose_arms
from benchmarks.study.folder import RUNS
from benchmarks.study.launch import Launch, plan, submit
from benchmarks.study.processes import ROOT, say
from benchmarks.study.run import Study, run_missing
from matrix_llm.base.errors import MatrixLLMError


def text_command(output: Path, text: list[Path], builtin: int) -> None:
    from benchmarks.study.text import write_base_text

    say(f"{output}: {write_base_text(output, text, builtin)} texts")


def run_command(
    recipe: Path,
    output: Path,
    seeds: int,
    arms: str,
    overrides: list[str],
    workers: int,
    text: list[Path],
    measure: str,
) -> None:
    # Absolute paths: the runs are started in the repository's root.
    texts = ["--text", *(str(path.absolute()) for path in text)] if text else []
    study = Study(recipe.absolute(), output.absolute(), overrides, [*texts, *shlex.split(measure)])
    run_missing(study, range(1, seeds + 1), choose_arms(arms), workers)


def plan_command(
    recipe: Path,
    output: Path,
    seeds: int,
    arms: str,
    overrides: list[str],
    launch: str,
    launcher: str,
    nodes: int,
    gsm8k: Path | None,
    math: Path | None,
    evaluation: str,
    samples: int,
    submit_runs: bool,
) -> None:
    how = Launch(launch, launcher, nodes, gsm8k, math, evaluation, samples)
    planned = plan(recipe, output, range(1, seeds + 1), choose_arms(arms), overrides, how)
    if submit_runs:
        submit(planned, output)
    else:
        print("\n\n".join("\n".join([f"# {run.name}", *run.commands]) for run in planned))


def collect_command(output: Path, benchmarks: str) -> None:
    from benchmarks.study.collect import collect

    say(f"{collect(output, benchmarks.split(','))} runs added to {output / RUNS}")


def report_command(output: Path, page: Path, sensitivity: list[Path]) -> None:
    from benchmarks.study.report import write_report

    say(f"wrote {', '.join(map(str, write_report(output, page, sensitivity)))}")


def rereport_command(page: Path) -> None:
    from benchmarks.study.rereport import rewrite

    say(f"wrote {', '.join(map(str, rewrite(page)))}")


COMMANDS: dict[str, Callable[..., None]] = {
    "text": text_command,
    "run": run_command,
    "plan": plan_command,
    "collect": collect_command,
    "report": report_command,
    "rereport": rereport_command,
}


def make_parser() -> argparse.ArgumentParser:
    """One subcommand for each of COMMANDS, whose parameters are its options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = argparse.ArgumentParser(add_help=False)  # options of `run` and of `plan`
    runs.add_argument("recipe", type=Path)
    runs.add_argument("--seeds", type=int, default=5, help="seeds 1 to N (default: 5)")
    runs.add_argument("--arms", default="main", help=f"groups (main, ablations, exact) or names: {', '.join(BY_NAME)}")
    runs.set_defaults(overrides=[])
    epilog = "After -- : overrides of the recipe, for all arms alike."

    # 1. `text`, for the base
    text = commands.add_parser("text", help="make the text that the base is trained on")
    text.add_argument("--output", type=Path, required=True, help="the file to write")
    text.add_argument("--text", type=Path, nargs="*", default=[], help="training sets: GSM8K's and MATH's JSONL")
    text.add_argument("--builtin", type=int, default=16_000, help="rows of the generator (default: 16000)")

    # 2. `run`, on this machine
    run = commands.add_parser("run", parents=[runs], epilog=epilog, help="train and measure what is missing")
    run.add_argument("--output", type=Path, required=True, help="folder of the study")
    run.add_argument("--workers", type=int, default=1, help="runs at a time, one thread each")
    run.add_argument(
        "--text",
        type=Path,
        nargs="*",
        default=[],
        help="question/answer files whose CE is measured, such as GSM8K's test set",
    )
    run.add_argument("--measure", default="", help="options of benchmarks.study.measure, in one string")

    # 3. `plan` and `collect`, for runs elsewhere
    large = commands.add_parser(
        "plan", parents=[runs], epilog=epilog, help="print or submit the commands of a large recipe"
    )
    large.add_argument("--output", type=Path, default=Path("runs/study-large"), help="folder of the study")
    large.add_argument("--launch", choices=["local", "slurm"], default="local")
    large.add_argument("--launcher", default="accelerate launch", help="local: what starts training")
    large.add_argument("--nodes", type=int, default=1, help="slurm: nodes of a training job")
    large.add_argument("--gsm8k", type=Path, help="GSM8K's test set as a file (default: from the Hub)")
    large.add_argument("--math", type=Path, help="MATH's test set as a file (default: from the Hub)")
    large.add_argument(
        "--evaluation", default="", help="options of eval/gsm8k.py and eval/hendrycks_math.py, in one string"
    )
    large.add_argument(
        "--samples",
        type=int,
        default=SAMPLES,
        help="samples per problem of GSM8K, in addition to greedy answers (default: %(default)s; 0: none)",
    )
    large.add_argument(
        "--submit", action="store_true", dest="submit_runs", help="run the commands instead of printing them"
    )

    collect = commands.add_parser("collect", help="read finished large runs")
    collect.add_argument("--output", type=Path, required=True, help="folder of the study")
    collect.add_argument(
        "--benchmarks", default="gsm8k,math", help="those a run must have been scored on (default: gsm8k,math)"
    )

    # 4. `report`, and `rereport` when only the raw files are left
    report = commands.add_parser("report", help="write tables and plots")
    report.add_argument("--output", type=Path, required=True, help="folder of the study")
    report.add_argument("--page", type=Path, default=ROOT / "docs" / "results.md", help="page with the study's markers")
    report.add_argument(
        "--sensitivity",
        type=Path,
        nargs="*",
        default=[],
        help="studies that differ in an override, to describe as well",
    )
    again = commands.add_parser("rereport", help="write a page again from the raw files next to it")
    again.add_argument("page", type=Path, help="such as docs/results.md")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 with one line on stderr where something has to be put right first."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0].endswith((".yaml", ".yml")):
        words = ["plan", *words]  # study.py RECIPE --seeds 3 --launch slurm
    cut = words.index("--") if "--" in words else len(words)
    options = vars(make_parser().parse_args(words[:cut]))
    if "overrides" in options:
        options["overrides"] = words[cut + 1 :]
    command = COMMANDS[options.pop("command")]
    try:
        command(**options)
    except MatrixLLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
