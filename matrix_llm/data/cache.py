"""Cache on disk what has been read or tokenised once, under a key made from everything it depends on.

    <HF_DATASETS_CACHE>/matrix_llm/rows-<key>/rows.arrow         the checked rows of one source
                                   tokenizer-<key>/              a tokenizer trained on them
                                   tokens-<key>/tokens*.arrow    their token ids and labels
                                   leakage-<key>/report.json     what leakage_check found

The key covers the bytes of the rows' files, the tokenizer, the settings, the versions of the libraries, and the code of
this package that decides how rows become tokens: change any of them, and the key changes. A folder is built under a
temporary name and renamed when it is complete, so a killed run leaves nothing that a later one could mistake for
data, and two runs that build the same folder do not disturb each other. What it leaves is removed by the next run that
builds something: the lock on it has no holder any more. Folders can be deleted safely between runs.
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
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets

from matrix_llm.base.errors import DataError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

LIBRARIES = ("datasets", "tokenizers", "transformers", "trl")  # their versions are read without importing them
CODE = ("data/*.py", "model/tokenizer.py")  # this room, and the code that trains and loads tokenizers
BUILDING = ".building-"
ABANDONED = 24 * 3600  # seconds; where there are no locks, an older unfinished folder counts as a killed run's
# Names, paths and leftovers of the last call: none of these affects the tokens of a row
IRRELEVANT = {
    "tokenizer_config.json": ("name_or_path", "tokenizer_file"),
    "tokenizer.json": ("padding", "truncation"),
}


def cache_root() -> Path | None:
    """The cache folder, or None if it cannot be written. HF_DATASETS_CACHE moves it."""
    root = Path(datasets.config.HF_DATASETS_CACHE) / "matrix_llm"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            return root
    except OSError:
        return None


# --- keys -------------------------------------------------------------------------------------------------------------


@cache
def code_digest(package: Path = Path(__file__).parents[1]) -> str:
    """A digest of the libraries' versions and of the files of `package` that decide how rows become tokens."""
    digest = hashlib.sha256(repr([version(name) for name in LIBRARIES]).encode())
    for path in sorted(path for pattern in CODE for path in package.glob(pattern)):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def key_of(*parts: Any) -> str:
    """A key for something that depends on `parts` and on the code.

    >>> key_of("a", 1) == key_of("a", 1), key_of("a", 1) == key_of("a", 2), len(key_of())
    (True, False, 32)
    """
    return hashlib.sha256(repr((code_digest(), *parts)).encode()).hexdigest()[:32]


def tokenizer_key(tokenizer: Any) -> str:
    """A digest of what save_pretrained writes: vocabulary, rules, special tokens and templates."""
    digest = hashlib.sha256(type(tokenizer).__name__.encode())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            content = path.read_bytes()
            if path.name in IRRELEVANT:
                settings = json.loads(content)
                for name in IRRELEVANT[path.name]:
                    settings.pop(name, None)
                content = json.dumps(settings).encode()
            digest.update(path.name.encode() + content)
    return digest.hexdigest()


# --- folders ----------------------------------------------------------------------------------------------------------


def cached_folder(root: Path, name: str, build: Callable[[Path], None]) -> Path:
    """The folder root/name. If it does not exist yet, build(folder) fills it first.

    Raises:
        DataError: the folder cannot be written, e.g. because the disk is full.
    """
    final = root / name
    if final.is_dir():
        return final
    _remove_abandoned(root)
    building: str | None = None
    lock: int | None = None
    try:
        building, lock = _start_building(root)
        build(Path(building))
        os.chmod(building, 0o755)  # mkdtemp makes folders private
        try:
            os.rename(building, final)
        except OSError:
            if not final.is_dir():  # if it is, another process was first, and its folder is just as good
                raise
    except OSError as error:
        raise DataError(
            f"the cache {root} cannot be written: {error.strerror or error}. "
            "Make room, or set HF_DATASETS_CACHE to another folder."
        ) from None
    finally:
        if building is not None:
            shutil.rmtree(building, ignore_errors=True)
        if lock is not None:
            os.close(lock)
    return final


def _start_building(root: Path) -> tuple[str, int | None]:
    """A new folder, and the lock on it that its builder holds until it ends, however it ends."""
    while True:
        building = tempfile.mkdtemp(prefix=BUILDING, dir=root)
        lock = _lock(building)
        if os.path.isdir(building):
            return building, lock
        if lock is not None:  # another process took the new folder for an abandoned one before it was locked
            os.close(lock)


def _lock(folder: str | Path) -> int | None:
    """A handle that holds the lock of a folder; None where another process does, or the file system has no locks."""
    if fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return handle
    except OSError:
        os.close(handle)
        return None


def _remove_abandoned(root: Path) -> None:
    """Remove unfinished folders whose builder is gone: nobody holds their lock, or they are a day old."""
    for path in root.glob(f"{BUILDING}*"):
        with contextlib.suppress(FileNotFoundError):  # its builder has just finished and renamed it
            lock = _lock(path)
            if lock is not None or time.time() - path.stat().st_mtime > ABANDONED:
                shutil.rmtree(path, ignore_errors=True)
            if lock is not None:
                os.close(lock)


def open_arrow(folder: Path, name: str) -> datasets.Dataset:
    """The memory-mapped table of name.arrow, or of the parts name_00000_of_0000N.arrow written by N processes."""
    files = sorted(folder.glob(f"{name}*.arrow"))
    dataset = datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in files])
    # TRL caches packed rows under this; a random one, the default, would differ between processes and runs
    dataset._fingerprint = hashlib.sha256(folder.name.encode()).hexdigest()[:16]
    return dataset
