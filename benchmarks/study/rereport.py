"""A study's folder from the raw files next to its page, so that the page can be written again after its runs are gone.

python benchmarks/study.py rereport docs/results.md
"""

import json
import tempfile
from pathlib import Path

from benchmarks.study.design import StudyError
from benchmarks.study.folder import BASE, PROBLEMS, RUNS, SETUP
from benchmarks.study.report import jsonl, write_report
from matrix_llm.base.files import read_jsonl, write_text


def lay_out(page: Path, folder: Path) -> list[Path]:
    """Fill `folder` as the study left it, and return the folders of its sensitivity studies, which lie beneath it.

    Raises:
        StudyError: the page has no raw files next to it.
    """

    def raw(name: str) -> Path:
        return page.with_name(f"{page.stem}_{name}")

    if missing := [name for name in ("rows.jsonl", "problems.jsonl", "setup.json") if not raw(name).is_file()]:
        raise StudyError(
            f"{page} has no {raw(missing[0]).name} next to it, so it cannot be written again from its rows."
        )
    found = json.loads(raw("setup.json").read_text(encoding="utf-8"))
    for name, source in ((RUNS, "rows.jsonl"), (PROBLEMS, "problems.jsonl")):
        write_text(folder / name, raw(source).read_text(encoding="utf-8"))
    write_text(folder / SETUP, json.dumps(found["setup"]))
    if found["base"]:
        write_text(folder / BASE, json.dumps({"row": found["base"]}))

    studies: dict[str, list[dict[str, object]]] = {}
    for row in read_jsonl(raw("sensitivity.jsonl")):
        studies.setdefault(row.pop("study"), []).append(row)
    folders: list[Path] = []
    for name, rows in studies.items():
        folders.append(folder / f"sensitivity-{len(folders)}")
        write_text(folders[-1] / RUNS, jsonl(rows))
        write_text(folders[-1] / SETUP, json.dumps({"overrides": [f"--{name.split()[0]}", *name.split()[1:]]}))
    return folders


def rewrite(page: Path) -> list[Path]:
    """Write the page's tables and plots again from the raw files next to it."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        return write_report(folder, page, lay_out(page, folder))
