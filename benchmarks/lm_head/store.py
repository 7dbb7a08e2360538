"""The JSON file of measured rows. None is measured twice, unless the loss's code has changed since."""

import contextlib
import datetime
import hashlib
import json
import os
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.lm_head.memory import ROOT
from benchmarks.lm_head.tables import row_text
from matrix_llm.base.files import write_text

Row = dict[str, Any]


def loss_code_digest() -> str:
    """Of the files that compute the loss. A row that was measured with other code is measured again."""
    package = ROOT / "matrix_llm"
    files = [package / "mce.py", package / "information.py", *sorted((package / "loss").rglob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def this_machine() -> Row:
    cpu = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    versions = {"torch": str(torch.__version__)}
    for package in ("trl", "transformers", "triton", "liger-kernel", "cut-cross-entropy"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "cpu": (cpu or ["unknown"])[0],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions,
    }


class Store:
    """Rows of one machine. Without a file they live as long as the process."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.code = loss_code_digest()
        self.data: Row = {"machine": this_machine(), "rows": {}}
        if path and path.is_file():
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["machine"] != self.data["machine"]:
                raise SystemExit(
                    f"error: --json {path} holds rows of another machine, {stored['machine']}, "
                    f"and this is {self.data['machine']}. Name another file."
                )
            self.data = stored

    def get(self, about: Row, measure: Callable[[], Row]) -> Row:
        """The row of that kind, shape and name; measured and stored first if it is missing or its code has changed."""
        key = json.dumps(about, sort_keys=True)
        known = self.data["rows"].get(key)
        if known and known["library"] == self.code and "failed" not in known:
            return known
        print(f"measuring {key}", file=sys.stderr, flush=True)
        stamp = {
            "library": self.code,
            "command": " ".join(["python", *sys.argv]),
            "date": datetime.date.today().isoformat(),
        }
        row = {**about, **measure(), **stamp}
        self.data["rows"][key] = row
        if self.path:
            write_text(self.path, json.dumps(self.data, indent=1))
        print(row_text(row), flush=True)
        return row
