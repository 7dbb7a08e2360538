"""Which files of a folder hold the rows of a configuration and a split. Nothing is mixed that was not asked for.

    gsm/main/train.jsonl          find_rows(gsm, "main", "train")   -> [gsm/main/train.jsonl]
    gsm/main/test.jsonl           find_rows(gsm, None, "train")     -> refused: main or socratic?
    gsm/socratic/train.jsonl

A data card (README.md) that lists the files of each configuration decides, as it does on the Hub.
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from matrix_llm.base.errors import DataError
from matrix_llm.base.safe_yaml import read_yaml
from matrix_llm.base.values import nearest
from matrix_llm.data.formats import KNOWN, SUFFIXES, UNREADABLE, suffix_of

# The words by which files and folders say which split they hold, as on the Hub
SPLITS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
LISTED = 6  # names in an error message
SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"  # written by save_to_disk
NOT_ROWS = {SAVED, SAVED_SPLITS, "dataset_info.json", "dataset_infos.json"}


def find_rows(folder: Path, config: str | None, split: str) -> list[Path]:
    """The files, or the one folder of save_to_disk, in order of reading.

    Raises:
        DataError: there are none, or they are of several configurations.
    """
    # 1. What save_to_disk wrote
    if (saved := _saved(folder, split)) is not None:
        return [saved]
    # 2. What the data card lists
    configs = _card_configs(folder)
    if configs:
        return _files_of_card(folder, configs, config, split)
    # 3. One configuration: a folder with its name, or files that have it in theirs
    files = _files_below(folder)
    if config is not None:
        if (folder / config).is_dir() and config not in (".", ".."):
            return find_rows(folder / config, None, split)
        named = [path for path in files if config.lower() in _words(path.name)]
        if not named:
            names = sorted({path.relative_to(folder).parts[0] for path in files})
            raise DataError(
                f"{folder.absolute()} has nothing for the configuration {config!r}. It holds "
                f"{', '.join(names[:LISTED])}. Correct or remove dataset_config, or give a file."
                f"{nearest(config, names)}"
            )
        files = named
    # 4. One split of it
    files = _files_of_split(folder, files, split)
    _check_one_configuration(folder, files)
    _check_read_once(folder, files)
    return files


def is_saved(path: Path) -> bool:
    """Whether the folder is one that save_to_disk wrote for one data set."""
    return (path / SAVED).is_file()


def saved_files(folder: Path) -> list[Path]:
    """The files that save_to_disk wrote, without those in which `datasets` keeps the results of later calls."""
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith(("cache-", "tmp")))


def _saved(folder: Path, split: str) -> Path | None:
    if is_saved(folder):
        return folder
    if not (folder / SAVED_SPLITS).is_file():
        return folder / split if is_saved(folder / split) else None
    try:
        splits = list(json.loads((folder / SAVED_SPLITS).read_bytes())["splits"])
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{folder / SAVED_SPLITS}: not what save_to_disk writes. Save the data set again.") from None
    found = _choose_split(splits, split)
    if found is None:
        raise _no_split(folder, splits, split)
    if not is_saved(folder / found):
        raise DataError(f"{folder / found}: no {SAVED} in it, so the copy is incomplete. Save the data set again.")
    return folder / found


def _no_split(folder: Path, splits: Iterable[str], split: str) -> DataError:
    return DataError(
        f"{folder.absolute()} has files for {', '.join(sorted(splits))}, but none for the split {split!r}. "
        "Name one of these splits, or give a file."
    )


def _choose_split(splits: Iterable[str], split: str) -> str | None:
    """The one of `splits` that is asked for: it itself, or else the only one that means the same (dev, validation)."""
    names = list(splits)
    same = [name for name in names if name in SPLITS and SPLITS[name] == SPLITS.get(split)]
    return split if split in names else same[0] if len(same) == 1 else None


# --- files by their names ---------------------------------------------------------------------------------------------


def _files_below(folder: Path) -> list[Path]:
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    files = [path for path in found if suffix_of(path) in SUFFIXES and path.name not in NOT_ROWS]
    if not files:
        others = sorted({suffix_of(path) for path in found} & UNREADABLE.keys())
        way_out = f"{UNREADABLE[others[0]]} ({others[0]})" if others else "Give another path"
        raise DataError(f"{folder.absolute()} holds no {KNOWN} file, so there are no rows to read. {way_out}.")
    return files


def _words(name: str) -> list[str]:
    return re.split(r"[-_. ]+", name.lower())


# Where a file says its split, best first: train-0.jsonl, gsm8k_train.jsonl, train/0
IN_FRONT, IN_NAME, ABOVE = range(3)


def _stem(path: Path) -> str:
    return path.name[: -len(suffix_of(path))]


def _split_of(path: Path, folder: Path) -> tuple[str | None, int]:
    """The split that a file says it holds, in its own name or in that of a folder above it, and which of these.

    As the Hub names them: train-00000-of-00002.parquet, train_sft-00000-of-00002.parquet. As people do: train.jsonl,
    gsm8k_test.jsonl, train/algebra/1.json.
    """
    part_of = re.fullmatch(r"(.+)-\d{5}-of-\d{5}", _stem(path))
    words = _words(part_of[1] if part_of else _stem(path))
    if words[0] in SPLITS:
        return part_of[1] if part_of else words[0], IN_FRONT
    found = [word for word in words if word in SPLITS]
    if found:
        return found[-1], IN_NAME
    above = [word for part in path.relative_to(folder).parts[-2::-1] for word in _words(part) if word in SPLITS]
    return above[0] if above else None, ABOVE


def _files_of_split(folder: Path, files: list[Path], split: str) -> list[Path]:
    """The files of the split, or all if none says which split it holds."""
    exact = [path for path in files if split not in SPLITS and _stem(path) == split]  # train_sft.jsonl
    split_of = {path: _split_of(path, folder) for path in files}
    said = sorted({each for each, _ in split_of.values() if each is not None})
    if exact or not said:
        return exact or files
    wanted = _choose_split(said, split)
    if wanted is None:  # files of other splits must not be mistaken for this one
        raise _no_split(folder, said, split)
    # test.jsonl is the test split, where backward_test.jsonl only has something to do with it
    best = min(where for each, where in split_of.values() if each == wanted)
    chosen = [path for path in files if split_of[path] == (wanted, best)]
    names = sorted({re.sub(r"\d+", "0", _stem(path)) for path in chosen}) if best != ABOVE else []
    if len(names) > 1:  # train.jsonl and train_socratic.jsonl: the same problems, written in two ways
        listed = ", ".join(sorted(path.name for path in chosen)[:LISTED])
        raise DataError(
            f"{folder.absolute()} holds several sets of rows for the split {split!r}: {listed}. "
            "Give one of these files, or a list of them."
        )
    return chosen


def _check_one_configuration(folder: Path, files: list[Path]) -> None:
    """Refuse files of several folders, unless these are parts of a split's own folder (train/a.jsonl, train/b/c.jsonl).

    gsm/main/train.jsonl and gsm/socratic/train.jsonl hold the same problems, written in two ways.
    """
    above = set()
    for path in files:
        parts = path.relative_to(folder).parts[:-1]
        says_split = [any(word in SPLITS for word in _words(part)) for part in parts]
        at_split = says_split.index(True) if True in says_split else len(parts)
        above.add("/".join(parts[:at_split]))
    if len(above) > 1:
        listed = sorted(each or "files beside these folders" for each in above)
        names = ", ".join(listed[:LISTED]) + (", ..." if len(listed) > LISTED else "")
        raise DataError(
            f"{folder.absolute()} holds several configurations: {names}. "
            "Choose one with dataset_config (of leakage_check: PATH:NAME), or give a list of data sets."
        )


def _check_read_once(folder: Path, files: list[Path]) -> None:
    """Refuse rows that are there in two formats, and parts in a format that is not read."""
    stems: dict[Path, Path] = {}
    for path in files:
        stem = path.parent / _stem(path)
        if stem in stems:
            raise DataError(
                f"{folder.absolute()} holds both {stems[stem].name} and {path.name}, and reading both may take every "
                "row twice. Remove one, or give a file."
            )
        stems[stem] = path
    patterns = {(path.parent, re.sub(r"\d+", "0", stem.name)) for stem, path in stems.items()}
    for path in sorted({each for parent, _ in patterns for each in parent.iterdir()}):
        suffix = suffix_of(path)
        if suffix not in UNREADABLE:
            continue
        name = path.name[: -len(suffix)]
        inner = suffix_of(Path(name))
        bare = name[: -len(inner)] if inner in SUFFIXES else name  # train-1 of train-1.jsonl.bz2
        if (path.parent, re.sub(r"\d+", "0", bare)) in patterns:
            raise DataError(
                f"{path.absolute()} belongs to {files[0].name}, but is not read: {KNOWN} files are. "
                f"{UNREADABLE[suffix]}, or give a file."
            )


# --- the data card ----------------------------------------------------------------------------------------------------


def _card_configs(folder: Path) -> list[dict[str, Any]]:
    """The `configs` of README.md that name their files; an empty list if there are none."""
    card = folder / "README.md"
    if not card.is_file():
        return []
    found = re.match(r"\ufeff?---\s*\n(.*?)\n---\s*(\n|$)", card.read_text("utf-8", errors="replace"), re.DOTALL)
    try:
        header = read_yaml(found[1]) if found else None
    except yaml.YAMLError:
        return []
    configs = header.get("configs") if isinstance(header, dict) else None
    if not isinstance(configs, list):
        return []
    return [each for each in configs if isinstance(each, dict) and each.get("data_files")]


def _files_of_card(folder: Path, configs: Sequence[dict[str, Any]], config: str | None, split: str) -> list[Path]:
    by_name = {str(each.get("config_name", "default")): each for each in configs}
    card = folder.absolute() / "README.md"
    # 1. the configuration: named, or the only one, or the one marked as default
    if config is None:
        marked = [name for name, each in by_name.items() if each.get("default") is True]
        config = next(iter([*by_name] if len(by_name) == 1 else [*marked, *({"default"} & by_name.keys())]), None)
    if config is None:
        raise DataError(
            f"{card} lists several configurations: {', '.join(by_name)}. Choose one with dataset_config (of "
            "leakage_check: PATH:NAME), or give a list of data sets."
        )
    if config not in by_name:
        raise DataError(
            f"{card} lists {', '.join(by_name)}, but not {config!r}. Correct dataset_config.{nearest(config, by_name)}"
        )
    # 2. the split: {split: ..., path: ...}, or patterns that are all of train
    entries = by_name[config]["data_files"]
    entries = entries if isinstance(entries, list) else [entries]
    paths_of: dict[str, list[str]] = {}
    for entry in entries:
        name, paths = (entry.get("split"), entry.get("path")) if isinstance(entry, dict) else ("train", entry)
        paths_of.setdefault(str(name), []).extend(paths if isinstance(paths, list) else [str(paths)])
    wanted = _choose_split(paths_of, split)
    if wanted is None:
        raise _no_split(folder, paths_of, split)
    # 3. its files
    inside = folder / str(by_name[config].get("data_dir", ""))
    try:
        files = sorted({path for pattern in paths_of[wanted] for path in inside.glob(pattern) if path.is_file()})
    except (ValueError, NotImplementedError):  # an absolute pattern
        files = []
    unread = [path for path in files if suffix_of(path) not in SUFFIXES]
    if not files or unread:
        which = f"{unread[0].name}, and rows are read from {KNOWN}" if unread else "no file that is here"
        raise DataError(
            f"{card} lists {', '.join(paths_of[wanted])} for {config}, {wanted}, which is {which}. "
            "Complete the folder, or give a file."
        )
    return files
