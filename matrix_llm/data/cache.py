"""What has been read and tokenised once is kept, under a key made of everything it depends on.

    <HF_DATASETS_CACHE>/matrix_llm/rows-<key>/rows.arrow         checked rows of one source
                                   tokenizer-<key>/              a tokenizer trained on them
                                   tokens-<key>/tokens*.arrow    their token ids and labels
                                   leakage-<key>/report.json     what leakage_check found

The key holds the bytes of the rows' files, the tokenizer, the settings, the versions of the libraries and the code of this package
that reads rows, so a changed setting, file or library is another key. A folder appears under its name in one rename, when it is whole:
a run that is killed leaves nothing that a later one would take for data, and two runs that build the same one don't disturb each other.
Folders are safe to delete at any time between runs.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import tokenizers
import transformers
import trl

from matrix_llm.base.errors import DataError

BUILDING = ".building-"
ABANDONED = 24 * 3600  # seconds after which an unfinished folder belongs to a run that was killed
CODE = (
    "data/readers.py", "data/jsonarray.py", "data/tokens.py", "data/prompts.py", "data/wordproblems.py", "data/leakage.py", "model/load.py"
)  # fmt: skip


def cache_root() -> Path | None:
    """The folder of all that is cached, or None where it cannot be written. HF_DATASETS_CACHE moves it."""
    root = Path(datasets.config.HF_DATASETS_CACHE) / "matrix_llm"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            return root
    except OSError:
        return None


@cache
def _code() -> str:
    digest = hashlib.sha256(repr([each.__version__ for each in (datasets, tokenizers, transformers, trl)]).encode())
    for name in CODE:
        digest.update((Path(__file__).parents[1] / name).read_bytes())
    return digest.hexdigest()


def key_of(*parts: Any) -> str:
    """A key for what depends on `parts` and on the code.

    >>> key_of("a", 1) == key_of("a", 1), key_of("a", 1) == key_of("a", 2), len(key_of())
    (True, False, 32)
    """
    return hashlib.sha256(repr((_code(), *parts)).encode()).hexdigest()[:32]


def tokenizer_key(tokenizer: Any) -> str:
    """A digest of all that save_pretrained writes of a tokenizer but its name and folder: vocabulary, rules, special tokens, templates."""
    digest = hashlib.sha256(type(tokenizer).__name__.encode())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if not path.is_file():
                continue
            content = path.read_bytes()
            if path.name == "tokenizer_config.json":
                named = json.loads(content)
                content = json.dumps(
                    {k: v for k, v in named.items() if k not in ("name_or_path", "tokenizer_file")}
                ).encode()
            if path.name == "tokenizer.json":  # padding and truncation are set by the last call, not by the tokenizer
                rules = json.loads(content)
                content = json.dumps({k: v for k, v in rules.items() if k not in ("padding", "truncation")}).encode()
            digest.update(path.name.encode() + content)
    return digest.hexdigest()


def cached_folder(root: Path, name: str, build: Callable[[Path], None]) -> Path:
    """root/name, made by build(folder) if it is not there yet.

    Raises:
        DataError: the folder cannot be written, e.g. because the disk is full.
    """
    final = root / name
    if final.is_dir():
        return final
    for path in root.glob(f"{BUILDING}*"):
        with contextlib.suppress(FileNotFoundError):  # its builder has just finished, and renamed it
            if time.time() - path.stat().st_mtime > ABANDONED:
                shutil.rmtree(path, ignore_errors=True)
    building: str | None = None
    try:
        building = tempfile.mkdtemp(prefix=BUILDING, dir=root)
        build(Path(building))
        os.chmod(building, 0o755)  # mkdtemp makes folders private
        try:
            os.rename(building, final)
        except OSError:
            if not final.is_dir():  # another process was first
                raise
    except OSError as error:
        raise DataError(
            f"the cache {root} cannot be written: {error.strerror or error}. Make room, or set HF_DATASETS_CACHE to another folder."
        ) from None
    finally:
        if building is not None:
            shutil.rmtree(building, ignore_errors=True)
    return final


def open_arrow(folder: Path, name: str) -> datasets.Dataset:
    """The memory-mapped rows of name.arrow, or of the parts name_00000_of_0000N.arrow that N processes have written."""
    files = sorted(folder.glob(f"{name}*.arrow"))
    dataset = datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in files])
    dataset._fingerprint = hashlib.sha256(folder.name.encode()).hexdigest()[
        :16
    ]  # the same in every process: packing is cached by it
    return dataset
