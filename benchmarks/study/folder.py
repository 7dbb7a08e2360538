"""The folder of a study, OUT: the files that its runs leave there, and the refusal to mix two setups.

runs.jsonl          one row per finished run: arm, seed, settings, figures
problems.jsonl      one row per run and problem set: which problems it solved
study.json          the setup that all rows share
base.json           the figures of the weights that every run starts from
ARM-sSEED/          one run, as matrix_llm/train.py leaves it, with measured.json
logs/               what training and measuring printed
"""

import hashlib
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.study.design import ARMS, Arm, StudyError
from benchmarks.study.processes import ROOT
from matrix_llm.base.files import read_jsonl, write_text

RUNS, PROBLEMS, SETUP, BASE, MEASURED = "runs.jsonl", "problems.jsonl", "study.json", "base.json", "measured.json"


def run_folder(output: Path, arm: str, seed: int) -> Path:
    return output / f"{arm}-s{seed}"


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append one line and wait until it is on the disk. A line cut off by an earlier kill is closed first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cut_off = path.is_file() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        if cut_off:
            file.write("\n")
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def known_runs(output: Path, arms: Sequence[Arm] = ARMS) -> set[tuple[str, int]]:
    """(arm, seed) of every run that has its row.

    Raises:
        StudyError: a row of an arm whose settings have changed since.
    """
    rows, by_name = read_jsonl(output / RUNS), {arm.name: arm for arm in arms}
    for row in rows:
        if "settings" in row and row["arm"] in by_name and row["settings"] != dict(by_name[row["arm"]].overrides):
            raise StudyError(
                f"{output / RUNS} holds runs of {row['arm']} with other settings, {row['settings']}. "
                "Use another --output, or remove those rows."
            )
    return {(row["arm"], row["seed"]) for row in rows}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def base_of(recipe: Path, overrides: Sequence[str]) -> str:
    """The model that the runs start from: the recipe's `model_name_or_path`, or the override of it; "" without one."""
    settings = yaml.safe_load(recipe.read_text(encoding="utf-8")) or {}
    base = settings.get("model_name_or_path", "")
    for key, value in itertools.pairwise(overrides):
        if key == "--model_name_or_path":
            base = value
    return base


def register_setup(output: Path, recipe: Path, overrides: Sequence[str], measuring: Sequence[str]) -> None:
    """Write OUT/study.json, or compare with the one that is there, so that rows of two setups never meet in one folder.

    Files given to `measuring`, and a base on this machine, are compared by their bytes, wherever they lie.

    Raises:
        StudyError: the folder belongs to another setup.
    """
    base = base_of(recipe, overrides)
    setup = {
        "recipe": yaml.safe_load(recipe.read_text(encoding="utf-8")) or {},
        "overrides": list(overrides),
        "measuring": [f"{Path(x).name} {_sha256(Path(x))}" if Path(x).is_file() else x for x in measuring],
        "base_sha256": [_sha256(path) for path in sorted((ROOT / base).glob("*.safetensors"))] if base else [],
    }
    file = output / SETUP
    if not file.is_file():
        write_text(file, json.dumps(setup, indent=2) + "\n")
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    if changed := [key for key in setup if before.get(key) != setup[key]]:
        raise StudyError(
            f"{output} holds a study with a different setup ({', '.join(changed)}). "
            "Start it as before, or use another --output."
        )
