"""Read the results of large runs back into OUT/runs.jsonl and OUT/problems.jsonl."""

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.study.design import ARMS, Arm, StudyError
from benchmarks.study.figures import distinct_n, training_figures
from benchmarks.study.folder import MEASURED, PROBLEMS, RUNS, append_row, known_runs
from benchmarks.study.launch import SAMPLED
from benchmarks.study.processes import say
from matrix_llm.base.files import read_jsonl
from matrix_llm.run.run_folder import NON_FINITE


def collect(output: Path, benchmarks: Sequence[str] = ("gsm8k", "math"), arms: Sequence[Arm] = ARMS) -> int:
    """Add the rows of the runs in OUT/ARM-sSEED that have none yet, and return how many were added.

    A run is added once it is trained, measured and scored on all `benchmarks`, or once its loss became non-finite.
    """
    known, added = known_runs(output, arms), 0
    for arm in arms:
        for folder in sorted(output.glob(f"{arm.name}-s*"), key=lambda path: (len(path.name), path.name)):
            seed = folder.name.removeprefix(f"{arm.name}-s")
            if not seed.isdigit() or (arm.name, int(seed)) in known:
                continue
            run = {"arm": arm.name, "seed": int(seed)}
            settings = {"settings": dict(arm.overrides)}
            if (folder / NON_FINITE).is_file():
                append_row(output / RUNS, {**run, **settings, "status": "diverged"})
                added += 1
                continue
            summaries = greedy_summaries(folder)
            missing = sorted(set(benchmarks) - {summary["benchmark"] for summary in summaries})
            missing += [name for name in ("results.json", MEASURED) if not (folder / name).is_file()]
            if missing:
                say(f"{folder.name} is not finished: {', '.join(missing)} missing")
                continue
            for summary in summaries:
                append_row(output / PROBLEMS, {**run, "set": summary["name"], "correct": verdict_string(summary)})
            append_row(output / RUNS, {**run, **settings, "status": "done", **figures_of_run(folder, summaries)})
            added += 1
    return added


def summaries_in(folder: Path) -> list[dict[str, Any]]:
    """The summaries that eval/ wrote there; its other JSON files hold settings."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return [summary for summary in found if "verdicts" in summary]


def greedy_summaries(folder: Path) -> list[dict[str, Any]]:
    """The summaries in the run's eval/ folder.

    Raises:
        StudyError: one of them scored samples. The study compares greedy answers.
    """
    summaries = summaries_in(folder / "eval")
    if sampled := [summary["name"] for summary in summaries if summary["settings"]["temperature"] != 0]:
        raise StudyError(
            f"{folder / 'eval'} scored {sampled[0]} on samples, and the study compares greedy answers. "
            f"Score it again with --temperature 0 --overwrite; samples belong in {folder / SAMPLED}."
        )
    return summaries


def verdict_string(summary: Mapping[str, Any]) -> str:
    """A "1" for each problem solved and a "0" for each other, in the order of the problems' ids."""
    return "".join("1" if verdict is True else "0" for _, verdict in sorted(summary["verdicts"].items()))


def figures_of_run(folder: Path, summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """From results.json, metrics.jsonl, measured.json, the greedy summaries, and eval_samples/ (pass@k, distinct-n)."""
    figures = training_figures(folder)
    figures |= json.loads((folder / MEASURED).read_text(encoding="utf-8"))["row"]
    for summary in summaries:
        verdicts = summary["verdicts"].values()
        figures[f"accuracy_{summary['name']}"] = sum(verdict is True for verdict in verdicts) / len(verdicts)
    for summary in summaries_in(folder / SAMPLED):
        name = summary["name"]
        figures |= {f"pass@{k}_{name}": share for k, share in summary.get("pass_at_k", {}).items()}
        figures |= diversity(read_jsonl(folder / SAMPLED / f"{name}.jsonl"), name)
    return figures


def diversity(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, float]:
    """distinct-n of each problem's samples, mean over problems; nothing if each has one sample or too few words."""
    samples: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        samples[row["id"]].append(row["response"])
    groups = [responses for responses in samples.values() if len(responses) > 1]
    figures = {}
    for n in (1, 2, 3):
        shares = [share for group in groups if not math.isnan(share := distinct_n(group, n))]
        if shares:
            figures[f"distinct_{n}_{name}"] = sum(shares) / len(shares)
    return figures
