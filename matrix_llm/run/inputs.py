"""What the files behind a recipe hold: a resumed run must read what the run was started with.

    inputs_of(recipe)  ->  {"dataset": [["data/a.jsonl", "3f0c..."], ...], "eval_dataset": [...], ...}

recipe.yaml says that a setting has not changed; these digests say that the file it names has not. They are stored with
the results of a run. A file's date does not count.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matrix_llm.base.errors import RecipeError, one_line
from matrix_llm.base.files import parse_json
from matrix_llm.config import Recipe
from matrix_llm.data.entries import names_of, question_source
from matrix_llm.data.readers import file_digest
from matrix_llm.loss.settings import EMBEDDINGS
from matrix_llm.run.run_folder import PARTIAL, RESULTS

INPUTS = "inputs"
# Settings that may name a file or a folder which decides what is computed
FILES = (
    "deepspeed", "mce_embeddings", "chat_template_path", "tokenizer_name_or_path", "model_name_or_path",
    "teacher_model_name_or_path",
)  # fmt: skip
OF_A_MODEL = {".json", ".jinja", ".model", ".txt", ".safetensors", ".bin"}  # not its card or its pictures

Inputs = dict[str, list[list[str]]]  # setting -> [name as given, digest] of each thing it names


def inputs_of(recipe: Recipe) -> Inputs:
    """Digests of everything that the recipe's settings name and that is at hand.

    Raises:
        DataError: a data set on the Hub cannot be reached.
    """
    data, seed = recipe.data, recipe.training.seed
    # 1. Rows: all their bytes, or, of a stream and of what may be as large as weights, what is cheap to read
    training = [
        data.training_source(entry, seed).content(streaming=data.streaming) for entry in data.training_entries()
    ]
    held_out = [data.held_out_source(entry, seed).content() for entry in data.held_out_entries()]
    tests = data.leakage_check if data.leakage == "drop" else None  # otherwise they change nothing
    found = {
        "dataset": (names_of(recipe.resolved.get("dataset")), training),
        "eval_dataset": (names_of(recipe.resolved.get("eval_dataset")), held_out),
        "leakage_check": (tests or [], [question_source(name).content() for name in tests or []]),
    }
    # 2. Other files that the recipe names
    for key in FILES:
        value = getattr(recipe.training, key, None) or getattr(recipe.model, key, None)
        if key == "mce_embeddings" and value in EMBEDDINGS:
            continue  # a name, even where a folder has the same one
        if isinstance(value, str) and (path := Path(value).expanduser()).exists():
            found[key] = ([str(recipe.resolved.get(key, value))], [_digest(path)])
    return {
        key: [[name, digest] for name, digest in zip(*pair, strict=True) if digest]
        for key, pair in found.items()
        if pair[0]
    }


def _digest(path: Path) -> str:
    files = sorted(each for each in path.iterdir() if each.suffix in OF_A_MODEL) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        if file.is_file():
            digest.update(file.name.encode() if path.is_dir() else b"")
            digest.update(file_digest(file, ends_only=file.suffix in (".safetensors", ".bin")))
    return digest.hexdigest()


def check_inputs(checkpoint: Path, now: Inputs) -> None:
    """Refuse to resume on other rows or files than the run was started with, each named.

    A run of an earlier version, which stored nothing about them, passes.

    Raises:
        RecipeError: something has changed.
    """
    stored = next((path for name in (PARTIAL, RESULTS) if (path := checkpoint.parent / name).is_file()), None)
    try:
        content = parse_json(stored.read_text(encoding="utf-8")) if stored else {}
        then: Mapping[str, Any] = content.get(INPUTS, {})
        before_now = [(key, then[key], now[key]) for key in now.keys() & then.keys()]
        pairs = [(key, before, name, after) for key, old, new in before_now
                 for (_, before), (name, after) in zip(old, new, strict=False)]  # fmt: skip
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise RecipeError(f"{stored} cannot be read: {one_line(error)}. Restore it, or start a new run.") from None
    changed = [
        f"{key}: {name!r} has other content: {str(before)[:12]} then, {after[:12]} now"
        for key, before, name, after in pairs
        if before != after
    ]
    if changed:
        raise RecipeError(
            f"cannot resume {str(checkpoint)!r} with other files than it was started with "
            f"({'; '.join(sorted(changed))}). Restore them, or start a new run in another output_dir."
        )
