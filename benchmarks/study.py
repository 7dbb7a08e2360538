"""Does matrix cross-entropy help? The controlled study: one recipe, several losses, several seeds, everything else equal.

    python benchmarks/study.py text --output runs/study/text.jsonl --text gsm8k/train.jsonl math/train.jsonl
    python matrix_llm/train.py recipes/study_pretrain.yaml --dataset runs/study/text.jsonl --output_dir runs/study/pretrained
    python benchmarks/study.py run recipes/study_small.yaml --output runs/study --seeds 5 --workers 2 --text gsm8k/test.jsonl
    python benchmarks/study.py run recipes/study_small.yaml --output runs/study --seeds 3 --workers 2 --text gsm8k/test.jsonl \\
        --arms ablations
    python benchmarks/study.py run recipes/study_small.yaml --output runs/study-rate --seeds 3 ... -- --learning_rate 1.5e-3
    python benchmarks/study.py report --output runs/study --page docs/results.md --sensitivity runs/study-rate
    python benchmarks/study.py plan recipes/llemma7b.yaml --seeds 3 --launch slurm --output runs/llemma [--submit]
    python benchmarks/study.py collect --output runs/llemma
    python benchmarks/study.py report --output runs/llemma --page docs/llemma.md

`run` is resumable: a run whose row stands in OUT/runs.jsonl is not repeated. One thread a run: on a CPU
rounding is the same for all.

PRE-REGISTRATION, written before any run of the study (25 November 2026). Sizes were chosen on CE alone, with an earlier base.
The learning rate was then tuned on seed 901 with held-out problems of their own (seed 901; the study's are 20,240,724's), for CE and for
CE + MCE alike, one run of 650 steps each: accuracy / held-out CE

    learning rate    1.5e-3           2.5e-3           4e-3
    ce               43.65 % / .1456  45.70 % / .1442  28.45 % / .2016
    mce              44.10 % / .1507  43.75 % / .1473  24.95 % / .2132

All arms use CE's best, 2.5e-3. MCE's best, 1.5e-3, is the lowest that was tried, and 0.35 points above its 2.5e-3; if that is no
chance, the choice favours CE by as much or more. No other accuracy of an arm with MCE has been seen in this study (docs/tiny.md has some
of another one). The runs have 400 steps, not 650, because the machine that makes them is half as fast as the one that tuned.

seeds         1 to 5 for the main contrast, 1 to 3 for the ablations. A seed draws the training rows and their order; all runs
              start from the same base weights. The arms of a seed differ in the named settings and in nothing else. Where the clock
              cuts the study short, a contrast has the seeds of which both its runs are done.
contrasts     main: mce (mce_weight 1, the defaults) minus ce (mce_weight 0). Ablations: those of ARMS, each minus its reference.
              grad, sketch, taylor4 and krylov16 read the whole vocabulary, so their reference is `whole`, which does too.
              krylov16 stands in for the exact solver, which takes about an hour a run here.
primary       maj@1: greedy exact-match accuracy on 2,000 held-out problems, the same for all runs; GSM8K's accuracy (convention
              "verified") where `collect` reads a large run.
primary test  paired t over seeds, two-sided, alpha 0.05. "A difference" is claimed only where in addition the hierarchical
              bootstrap's 95 % interval (seeds and problems redrawn, 10,000 draws, seed 0) excludes 0. Anything else is reported
              as no difference found.
secondary     held-out CE a token, paired t over seeds at alpha 0.05. The sign-flip permutation p is given beside both; it cannot
              fall below 2 / 2^S, 0.0625 at five seeds and 0.25 at three, so no verdict rests on it.
described     exact McNemar of each seed, pass@k, other CE, ECE, distinct-n, effective ranks, seconds, memory: with t intervals,
              and no claims.
ablations     Holm over all ablation contrasts that were run, on the primary test's p; the bootstrap interval as above.
sensitivity   the main contrast again, seeds 1 to 3, at learning rate 1.5e-3 and with clipping off (max_grad_norm 1e9), each a study of
              its own, if the clock allows: described, and no claims. Gradient norms of all runs are given.
detectable    the true difference found with 80 % power by the t test alone at its level (ablations: 0.05 over their number, Holm's
              first step), from the observed spread over seeds, with each.
111 M         the main contrast again on a GPU (recipes/study_100m.yaml, bf16), seeds 1 to 8 as far as the GPU time goes, decided by the
              rules above; written on 25 November 2026 before any run of it. Tuned on seed 901 and held-out problems of seed 901, CE and
              CE + MCE alike, at learning rates 4e-4 and 1e-3 and 150 and 400 steps: the number of steps is the one whose better CE
              accuracy is nearest 60 %, the learning rate CE's better one there. Several runs share the GPU, so seconds mean nothing.
exclusions    none, except that a run whose loss became non-finite has no accuracy: it is listed, and its seed leaves the contrasts
              it belongs to. A run that was killed is repeated with the same seed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import hashlib
import itertools
import json
import os
import random
import shlex
import shutil
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from study_statistics import SAMPLES

from matrix_llm.base.files import read_jsonl, write_text
from matrix_llm.run.run_folder import NON_FINITE

ROOT = Path(__file__).resolve().parents[1]
TRAIN, MEASURE = ROOT / "matrix_llm" / "train.py", ROOT / "benchmarks" / "study_measure.py"
RUNS, PROBLEMS, SETUP, BASE = "runs.jsonl", "problems.jsonl", "study.json", "base.json"
TEXT_SEED = 1_000_003  # of the generator's rows in the base's text: no fine-tuning seed draws the same


@dataclass(frozen=True)
class Arm:
    """One way to train; `overrides` is all that differs from the recipe."""

    name: str
    overrides: Mapping[str, Any]
    reference: str | None
    """The arm that it is compared with."""
    group: str
    what: str
    settings: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "settings", tuple(x for key, value in self.overrides.items() for x in (f"--{key}", str(value)))
        )


WHOLE = {"mce_top_k": 1_000_000}
ARMS = (
    Arm("ce", {"mce_weight": 0}, None, "main", "cross-entropy alone"),
    Arm("mce", {"mce_weight": 1.0}, "ce", "main", "CE + MCE, defaults (Krylov, 6 steps, LM head's vectors, detached)"),
    Arm("weight0.1", {"mce_weight": 0.1}, "ce", "ablations", "mce_weight 0.1"),
    Arm("weight0.3", {"mce_weight": 0.3}, "ce", "ablations", "mce_weight 0.3"),
    Arm("weight3", {"mce_weight": 3.0}, "ce", "ablations", "mce_weight 3"),
    Arm("input", {"mce_weight": 1.0, "mce_embeddings": "input"}, "mce", "ablations", "vectors of the input embedding"),
    Arm(
        "warmup",
        {"mce_weight": 1.0, "mce_warmup_steps": 0.3},
        "mce",
        "ablations",
        "the weight rising from 0 over 30 % of the steps",
    ),
    Arm(
        "whole",
        {"mce_weight": 1.0, **WHOLE},
        "mce",
        "ablations",
        "the whole vocabulary, not the 16 likeliest and the rest's moments",
    ),
    Arm(
        "krylov16",
        {"mce_weight": 1.0, **WHOLE, "mce_steps": 16},
        "whole",
        "ablations",
        "Krylov with 16 steps: exact to about 0.1 %",
    ),
    Arm(
        "taylor4",
        {"mce_weight": 1.0, "mce_solver": "taylor", "mce_order": 4},
        "whole",
        "ablations",
        "the paper's Taylor series, order 4",
    ),
    Arm("grad", {"mce_weight": 1.0, "mce_embedding_grad": "true"}, "whole", "ablations", "gradient into the vectors"),
    Arm("sketch", {"mce_weight": 1.0, "mce_sketch_dim": 64}, "whole", "ablations", "vectors sketched to 64 dimensions"),
    Arm(
        "exact",
        {"mce_weight": 1.0, "mce_solver": "exact"},
        "whole",
        "exact",
        "dense logarithm at every position: many times slower",
    ),
)
BY_NAME = {arm.name: arm for arm in ARMS}


class StudyError(ValueError):
    """Something the user can mend. The message says what, and how."""


def say(text: str) -> None:
    print(f"=> {text}", flush=True)


def choose_arms(names: str) -> list[Arm]:
    """Arms by group or name, and the references that their contrasts need.

    >>> [arm.name for arm in choose_arms("sketch")]
    ['mce', 'sketch']
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    known = {arm.group for arm in ARMS} | BY_NAME.keys()
    if unknown := [name for name in wanted if name not in known]:
        raise StudyError(
            f"--arms {unknown[0]} is neither a group (main, ablations, exact) nor an arm ({', '.join(BY_NAME)})."
        )
    chosen = {arm.name for arm in ARMS if arm.group in wanted or arm.name in wanted}
    while missing := {str(ref) for name in chosen if (ref := BY_NAME[name].reference)} - chosen:
        chosen |= missing
    return [arm for arm in ARMS if arm.name in chosen]


def append(path: Path, row: Mapping[str, Any]) -> None:
    """One line, on the disk before this returns; a line that a kill cut off before is closed first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cut_off = path.is_file() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * cut_off + json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def folder_of(output: Path, arm: str, seed: int) -> Path:
    return output / f"{arm}-s{seed}"


# --- the base's text -----------------------------------------------------------------------------------------------------------


def make_text(output: Path, sources: Sequence[Path], builtin: int) -> int:
    """{"text": ...} rows of question/answer (GSM8K), problem/solution (MATH) and query/response files and of the generator, shuffled."""
    from matrix_llm.data.forms import Row, parse_row
    from matrix_llm.data.readers import Source
    from matrix_llm.data.tokens import row_texts
    from matrix_llm.data.wordproblems import generate

    texts = []
    for path in sources:
        for where, row in Source(str(path)).read():
            row = {"query": row["problem"], "response": row["solution"]} if "problem" in row else row
            texts.append("".join(row_texts(parse_row(row, where), "plain")))
    for problem in generate(builtin, seed=TEXT_SEED, split="train"):
        texts.append("".join(row_texts(Row(question=problem.query, answer=problem.response), "plain")))
    random.Random(0).shuffle(texts)
    write_text(output, "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    return len(texts)


# --- runs ------------------------------------------------------------------------------------------------------------------------


def figures_of(folder: Path) -> dict[str, Any]:
    """What a finished run says of itself: seconds, memory, and the curves of its metrics.jsonl."""
    from matrix_llm.run.metrics import METRICS

    results, entries = json.loads((folder / "results.json").read_text(encoding="utf-8")), read_jsonl(folder / METRICS)
    memory = [entry["peak_memory_gib"] for entry in entries if "peak_memory_gib" in entry]
    norms = [entry["grad_norm"] for entry in entries if "grad_norm" in entry]
    row = {
        "grad_norm": round(sum(norms) / len(norms), 4) if norms else None,
        "train_seconds": None
        if results.get("resumed_from")
        else results.get("train_seconds"),  # a part of them is no figure
        "steps": results.get("steps"),
        "versions": results.get("versions"),
        "peak_memory_gib": round(max(memory), 3) if memory else None,
        "curve_ce": [[entry["step"], round(entry["ce"], 4)] for entry in entries if "ce" in entry],
        "curve_rank_head": [
            [entry["step"], round(entry["effective_rank"], 3)] for entry in entries if "effective_rank" in entry
        ],
    }
    if "eval_ce" in (evaluation := results.get("evaluation", {})):
        row["ce_recipe"] = round(evaluation["eval_ce"], 6)
    return row


def train_command(recipe: Path, arm: Arm, seed: int, folder: Path, extra: Sequence[str] = ()) -> list[str]:
    """The arguments of matrix_llm/train.py, the script first."""
    return [str(TRAIN), str(recipe), *extra, "--seed", str(seed), "--output_dir", str(folder), *arm.settings]


def _call(command: Sequence[str], log: Path) -> int:
    threads = dict.fromkeys(["OMP_NUM_THREADS", "MKL_NUM_THREADS"], "1")  # equal rounding for all runs
    threads |= {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(2**32),
    }  # glibc keeps freed memory: same bits, fewer page faults
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {shlex.join(command)}\n")
        file.flush()
        return subprocess.run(
            [sys.executable, *command],
            cwd=ROOT,
            env={**os.environ, **threads},
            stdout=file,
            stderr=file,
            stdin=subprocess.DEVNULL,
        ).returncode


def one_run(
    recipe: Path, arm: Arm, seed: int, output: Path, extra: Sequence[str], measuring: Sequence[str]
) -> tuple[dict, dict]:
    """Trains and measures one (arm, seed), going on from whatever an earlier call left; returns its rows."""
    folder, log = folder_of(output, arm.name, seed), output / "logs" / f"{arm.name}-s{seed}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    row: dict[str, Any] = {"arm": arm.name, "seed": seed, "settings": dict(arm.overrides)}
    resumed = False
    if not (folder / "results.json").is_file():
        resumed = any(folder.glob("checkpoint-*"))
        if not resumed:
            shutil.rmtree(folder, ignore_errors=True)
        command = train_command(
            recipe, arm, seed, folder, [*extra, *(["--resume_from_checkpoint", "true"] if resumed else [])]
        )
        if _call(command, log):
            if (folder / NON_FINITE).is_file():
                return {**row, "status": "diverged"}, {}
            said = last_line(log.read_text(encoding="utf-8"))
            raise StudyError(
                f"training {folder.name} failed: {said} The whole log is {log}. Then run the same command again."
            )
    measured = folder / "measured.json"
    if not measured.is_file() and _call([str(MEASURE), str(folder), "--out", str(measured), *measuring], log):
        raise StudyError(
            f"measuring {folder.name} failed: {last_line(log.read_text(encoding='utf-8'))} The whole log is {log}."
        )
    found = json.loads(measured.read_text(encoding="utf-8"))
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    row |= {"status": "done", "resumed": resumed, **found["row"], **figures_of(folder)}
    return row, {"arm": arm.name, "seed": seed, **found["problems"]}


def measure_base(base: str, output: Path, measuring: Sequence[str]) -> None:
    """The same figures of the weights that all runs start from, into OUT/base.json; a base that is no local folder has none."""
    file, log = output / BASE, output / "logs" / "base.log"
    if file.is_file() or not (ROOT / base / "config.json").is_file():
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    if _call([str(MEASURE), str(ROOT / base), "--out", str(file), *measuring], log):
        raise StudyError(
            f"measuring {base} failed: {last_line(log.read_text(encoding='utf-8'))} The whole log is {log}."
        )


def last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it printed nothing.")


def run(
    recipe: Path,
    output: Path,
    *,
    seeds: Sequence[int],
    arms: Sequence[Arm],
    workers: int = 1,
    extra: Sequence[str] = (),
    measuring: Sequence[str] = (),
) -> int:
    """Runs what is missing, seed by seed, so that a study that is cut short holds whole pairs. Returns how many runs were made."""
    base = check_setup(output, recipe, extra, measuring)
    if base:
        measure_base(base, output, measuring)
    known = known_runs(output)
    todo = [(arm, seed) for seed in seeds for arm in arms if (arm.name, seed) not in known]
    say(
        f"{len(todo)} runs to make, {len(seeds) * len(arms) - len(todo)} of {len(seeds) * len(arms)} have their rows in {output / RUNS}"
    )
    lock, errors = threading.Lock(), []

    def work(task: tuple[Arm, int]) -> None:
        arm, seed = task
        if errors:
            return
        started = time.perf_counter()
        try:
            row, problems = one_run(recipe, arm, seed, output, extra, measuring)
        except Exception as error:
            errors.append(error)
            return
        with lock:
            if problems:
                append(output / PROBLEMS, problems)
            append(output / RUNS, row)  # last: a row says that all of its run is on file
        accuracy = f"{100 * row['accuracy_heldout']:.1f} %" if "accuracy_heldout" in row else row["status"]
        say(f"{arm.name}, seed {seed}: {accuracy}, {time.perf_counter() - started:.0f} s")

    with ThreadPoolExecutor(max(1, workers)) as pool:
        list(pool.map(work, todo))
    if errors:
        raise errors[0]
    return len(todo)


def known_runs(output: Path) -> set[tuple[str, int]]:
    """(arm, seed) of the rows on file; rows of an arm that has changed since are refused."""
    rows = read_jsonl(output / RUNS)
    for row in rows:
        if "settings" in row and row["arm"] in BY_NAME and row["settings"] != dict(BY_NAME[row["arm"]].overrides):
            raise StudyError(
                f"{output / RUNS} holds {row['arm']} of other settings, {row['settings']}. Give another --output, or remove those rows."
            )
    return {(row["arm"], row["seed"]) for row in rows}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_setup(output: Path, recipe: Path, extra: Sequence[str], measuring: Sequence[str]) -> str:
    """Rows of two setups never meet in one folder. Files and a local base count by their bytes, wherever they lie; returns the base."""
    import yaml

    settings = yaml.safe_load(recipe.read_text(encoding="utf-8")) or {}
    base = settings.get("model_name_or_path", "")
    for key, value in itertools.pairwise(extra):
        base = value if key == "--model_name_or_path" else base
    weights = sorted((ROOT / base).glob("*.safetensors")) if base else []
    setup = {
        "recipe": settings,
        "overrides": list(extra),
        "measuring": [f"{Path(x).name} {_sha256(Path(x))}" if Path(x).is_file() else x for x in measuring],
        "base_sha256": [_sha256(path) for path in weights],
    }
    file = output / SETUP
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        if changed := [key for key in setup if before.get(key) != setup[key]]:
            raise StudyError(
                f"{output} holds a study of another {', '.join(changed)}. Give the earlier one again, or another --output."
            )
    else:
        write_text(file, json.dumps(setup, indent=2) + "\n")
    return base


# --- command line ---------------------------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    text = commands.add_parser("text", help="make the text that the base is trained on")
    text.add_argument("--text", type=Path, nargs="*", default=[], help="training sets: GSM8K's and MATH's JSONL")
    text.add_argument("--builtin", type=int, default=16_000, help="rows of the generator (default: 16000)")
    both = argparse.ArgumentParser(add_help=False)
    both.add_argument("recipe", type=Path)
    both.add_argument("--seeds", type=int, default=5, help="seeds 1 to N (default: 5)")
    both.add_argument("--arms", default="main", help=f"groups (main, ablations, exact) or names: {', '.join(BY_NAME)}")
    run_ = commands.add_parser("run", parents=[both], help="train and measure what is missing")
    run_.add_argument("--workers", type=int, default=1, help="runs at a time, one thread each")
    run_.add_argument(
        "--text",
        type=Path,
        nargs="*",
        default=[],
        help="question/answer files whose CE is measured, e.g. GSM8K's test set",
    )
    run_.add_argument("--measure", default="", help="options of study_measure.py, in one string")
    plan_ = commands.add_parser("plan", parents=[both], help="print or submit the commands of a large recipe")
    plan_.add_argument("--launch", choices=["local", "slurm"], default="local")
    plan_.add_argument("--launcher", default="accelerate launch", help="local: what starts training")
    plan_.add_argument("--nodes", type=int, default=1, help="slurm: nodes of a training job")
    plan_.add_argument("--gsm8k", type=Path, help="GSM8K's test set as a file (default: from the Hub)")
    plan_.add_argument("--math", type=Path, help="MATH's test set as a file (default: from the Hub)")
    plan_.add_argument(
        "--evaluation", default="", help="options of eval/gsm8k.py and eval/hendrycks_math.py, in one string"
    )
    plan_.add_argument(
        "--samples",
        type=int,
        default=SAMPLES,
        help="of GSM8K, a problem, beside greedy (default: %(default)s; 0: none)",
    )
    plan_.add_argument("--submit", action="store_true", help="run the commands instead of printing them")
    collect_ = commands.add_parser("collect", help="read finished large runs")
    collect_.add_argument(
        "--benchmarks", default="gsm8k,math", help="those that a run must have been scored on (default: gsm8k,math)"
    )
    report = commands.add_parser("report", help="tables and plots")
    report.add_argument("--page", type=Path, default=ROOT / "docs" / "results.md", help="page with the study's markers")
    report.add_argument(
        "--sensitivity", type=Path, nargs="*", default=[], help="studies that differ in an override, described beside"
    )
    for each in (text, run_, plan_, collect_, report):
        default = None if each is not plan_ else Path("runs/study-large")
        each.add_argument(
            "--output",
            type=Path,
            default=default,
            required=not default,
            help="folder of the study; of `text`, the file",
        )
    for each in (run_, plan_):
        each.epilog = "After -- : overrides of the recipe, for all arms alike."
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        arguments = ["plan", *arguments]  # study.py RECIPE --seeds 3 --launch slurm
    cut = list(arguments).index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(list(arguments[:cut]))
    options.overrides = list(arguments[cut + 1 :])
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        return _command(options)
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _command(options: argparse.Namespace) -> int:
    output = options.output.absolute() if options.command == "run" else options.output
    if options.command == "text":
        say(f"{output}: {make_text(output, options.text, options.builtin)} texts")
    elif options.command == "report":
        from study_report import write_report

        say(f"wrote {', '.join(map(str, write_report(output, options.page, options.sensitivity)))}")
    elif options.command == "collect":
        from study_launch import collect

        say(f"{collect(output, options.benchmarks.split(','))} runs added to {output / RUNS}")
    else:
        what: dict[str, Any] = {
            "seeds": range(1, options.seeds + 1),
            "arms": choose_arms(options.arms),
            "extra": options.overrides,
        }
        if options.command == "run":
            texts = [str(path.absolute()) for path in options.text]
            measuring = [*(["--text", *texts] if texts else []), *shlex.split(options.measure)]
            run(options.recipe.absolute(), output, workers=options.workers, measuring=measuring, **what)
            return 0
        from study_launch import Launch, plan, submit

        launch = Launch(
            options.launch,
            options.launcher,
            options.nodes,
            options.gsm8k,
            options.math,
            options.evaluation,
            options.samples,
        )
        planned = plan(options.recipe, output, launch=launch, **what)
        if options.submit:
            submit(planned, output)
        else:
            print("\n\n".join("\n".join([f"# {name}", *commands]) for name, commands in planned))
    return 0


if __name__ == "__main__":
    from study import main as start  # one module, one StudyError: study_report imports this file by its name

    sys.exit(start())
