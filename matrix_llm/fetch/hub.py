"""The route over the Hub: the files of a repository, as they are, copied out of the Hub's cache."""

from __future__ import annotations

import shutil
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoTokenizer

from matrix_llm.base.errors import FetchError, one_line, scrub
from matrix_llm.publish.client import CLIENT_ERRORS, reason_of
from matrix_llm.run.failures import why_not_written

# What a model needs, at the top of its repository: no pickles, no code, and no second copy in another format
WANTED = ["*.json", "*.jinja", "*.txt", "*.model", "*.safetensors", "README.md", "LICENSE*", "NOTICE*"]
UNWANTED = ["*/*"]


class UnreachableError(FetchError):
    """The Hub does not give the model: another route may."""


def download(repo: str, revision: str | None, folder: Path) -> str:
    """Copy the files of `repo` at `revision` to `folder`. HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN and the cache count.

    Returns:
        The commit.

    Raises:
        UnreachableError: no connection, no such repository or revision, or no permission.
        FetchError: the repository holds no model that can be loaded from safetensors, or it cannot be written here.
    """
    # 1. to the cache
    try:
        snapshot = Path(snapshot_download(repo, revision=revision, allow_patterns=WANTED, ignore_patterns=UNWANTED))
    except CLIENT_ERRORS as error:
        if (reason := why_not_written(error)) is not None:
            place = getattr(error, "filename", None) or "the cache of the Hub's client (HF_HOME)"
            raise FetchError(f"{place} cannot be written: {reason}. Free space, or set HF_HOME elsewhere.") from None
        raise UnreachableError(scrub(reason_of(error)).removesuffix(".")) from None

    # 2. to the folder: files of their own, not links into the cache
    for file in sorted(snapshot.iterdir()):
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    _check(repo, folder)
    return snapshot.name


def _check(repo: str, folder: Path) -> None:
    """Refuse what from_pretrained could not load."""
    names = {file.name for file in folder.iterdir()}
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        lacks = "config.json" if "config.json" not in names else "*.safetensors"
        raise FetchError(
            f"{repo!r} on the Hub has no {lacks} at its top, so it is not a model in safetensors. Where it holds .gguf "
            f"files, download one (hf download {repo} FILE.gguf --local-dir FOLDER), and give its path."
        )
    try:
        AutoConfig.from_pretrained(str(folder))
        AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise FetchError(f"transformers cannot load {repo!r} from the Hub: {one_line(error)}. Take another.") from None
