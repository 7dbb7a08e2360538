"""The model card of a run, and the run on the Hub.

    python -m matrix_llm.hub card runs/x                        # write runs/x/README.md anew, with the scores of runs/x/eval/
    python -m matrix_llm.hub push runs/x --repo user/name       # private unless --public; again: only what is missing is sent

1. without a network: the name, the run's weights (whole? no empty shard of ZeRO-3?), no token in any file that would be sent
2. the Hub knows the token, and the repository is there, or made, with the visibility that was asked for
3. links to the files in a temporary folder beside a fresh card go through `HfApi.upload_folder`; the run's folder is only read

Each request is tried again on 5xx, 429 and dropped or stalled connections. No message carries a token.
"""

from __future__ import annotations

import argparse
import email.utils
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import yaml
from huggingface_hub import HfApi, ModelCard, constants, get_token
from huggingface_hub.errors import LocalTokenNotFoundError
from huggingface_hub.utils import get_session

from matrix_llm.base.errors import PushError, RecipeError, scrub
from matrix_llm.config import Recipe
from matrix_llm.publish.card import card_of, is_hub_name, is_image_run, model_card, versions, write_card
from matrix_llm.publish.checks import (
    STALE,
    causes,
    check_name,
    check_run,
    check_secrets,
    check_weights,
    innermost_reason,
)

if TYPE_CHECKING:
    from matrix_llm.ssl.config import SSLRecipe

__all__ = [
    "Destination",
    "PushError",
    "check_weights",
    "destination_of",
    "model_card",
    "push",
    "scrub",
    "versions",
    "write_card",
]

# -------------------------------------------------------------------------------------------------------------- the Hub

TRIES = 5  # of each step, the first included; the client's own tries of single requests come on top
FIRST_WAIT = 1.0  # seconds before the second try, doubled before each further one
LONGEST_WAIT = 300.0  # a Retry-After beyond it is reported, not slept through
TIMEOUT = 120.0  # seconds without a byte; the client's default is to wait for ever
Found = TypeVar("Found")


@dataclass(frozen=True)
class Destination:
    """Where a run goes. `private` None: a new repository is private, an existing one stays as it is."""

    repo: str
    private: bool | None = None
    revision: str | None = None
    token: str | None = field(default=None, repr=False)

    def secrets(self) -> list[str | None]:
        return [self.token, get_token()]

    def command(self, run: Path) -> str:
        """The command that pushes `run` there."""
        options = (" --public" if self.private is False else "") + (
            f" --revision {self.revision}" if self.revision else ""
        )
        return f"python -m matrix_llm.hub push {run} --repo {self.repo}{options}"


def _response(error: BaseException) -> Any:
    return next((found for each in causes(error) if (found := getattr(each, "response", None)) is not None), None)


def _is_transient(error: BaseException) -> bool:
    if any(isinstance(each, LocalTokenNotFoundError) for each in causes(error)):
        return False
    if (response := _response(error)) is not None:
        return response.status_code in (408, 409, 412, 429) or response.status_code >= 500
    kinds = (ConnectionError, TimeoutError, json.JSONDecodeError)  # no JSON: a proxy's error page
    return any(
        isinstance(each, kinds) or "TransportError" in [k.__name__ for k in type(each).__mro__]
        for each in causes(error)
    )


def _retry_after(error: BaseException) -> float:
    """Seconds that the Hub asks to wait; 0 where it does not."""
    value = response.headers.get("retry-after", "") if (response := _response(error)) is not None else ""
    if value.strip().isdigit():
        return float(value)
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError):
        return 0.0


def _attempt(call: Callable[[], Found], *secrets: str | None) -> Found:
    """`call()`, again after a failure that may pass. Every step is safe to repeat: what has arrived is not sent twice."""
    for number in range(1, TRIES + 1):
        session = get_session()
        if session.timeout.read is None:
            session.timeout = TIMEOUT
        try:
            return call()
        except Exception as error:
            wait = max(FIRST_WAIT * 2 ** (number - 1), _retry_after(error))
            if number == TRIES or wait > LONGEST_WAIT or not _is_transient(error):
                raise
            print(
                scrub(f"=> {innermost_reason(error)}; trying again in {wait:.0f} s ({number} of {TRIES})", *secrets),
                file=sys.stderr,
                flush=True,
            )
            time.sleep(wait)
    raise AssertionError("unreachable")


def _fail(error: Exception, to: Destination, endpoint: str, way_out: str) -> NoReturn:
    """PushError for whatever the client raised."""
    response, settings = _response(error), f"{endpoint}/settings/tokens"
    status, reason = getattr(response, "status_code", None), innermost_reason(error)
    whence = (
        "the given token" if to.token else "the token in HF_TOKEN" if os.environ.get("HF_TOKEN") else "the saved token"
    )
    if any(isinstance(each, LocalTokenNotFoundError) for each in causes(error)):
        text = f"no token for {endpoint}. Make one with write access at {settings}, then set HF_TOKEN or run: hf auth login"
    elif status == 401:
        text = f"{endpoint} rejects {whence} (401). Make a new one with write access at {settings}, then set HF_TOKEN or run: hf auth login"
    elif status == 403:
        text = f"{whence} may not write to {to.repo!r} (403: {reason}). Take one with write access there ({settings}), or another --repo."
    elif _is_transient(error):
        waiting = (
            f" and asks to wait {seconds:.0f} s"
            if (seconds := _retry_after(error)) > LONGEST_WAIT
            else f", after {TRIES} tries"
        )
        text = f"{endpoint} fails ({f'{status}: ' if status else ''}{reason}){waiting}. {way_out}"
    else:
        text = f"{endpoint} refuses {to.repo!r} ({f'{status}: ' if status else ''}{type(error).__name__}: {reason}). {way_out}"
    raise PushError(scrub(text, *to.secrets())) from None  # the client's own traceback may quote what the server echoed


def connect(to: Destination, way_out: str = "Try again later.") -> tuple[HfApi, str]:
    """The client, and the name of the user whose token it holds.

    Raises:
        PushError: offline, no connection, no token, or one that is rejected, may only read, or is another user's.
    """
    api = HfApi(token=to.token)
    if constants.HF_HUB_OFFLINE:
        name = "HF_HUB_OFFLINE" if os.environ.get("HF_HUB_OFFLINE") else "TRANSFORMERS_OFFLINE"
        raise PushError(
            f"{name}={os.environ.get(name, '1')} keeps the client off the network, so nothing can be pushed. Unset it. {way_out}"
        )
    try:
        me = _attempt(api.whoami, *to.secrets())
    except Exception as error:
        _fail(error, to, api.endpoint, way_out)
    role, names = (
        me.get("auth", {}).get("accessToken", {}).get("role"),
        [me["name"], *(each["name"] for each in me.get("orgs", []))],
    )
    if role == "read":
        raise PushError(
            f"the token of {me['name']!r} may only read. Make one with write access at {api.endpoint}/settings/tokens."
        )
    owner = to.repo.split("/")[0].lower() if "/" in to.repo else None
    if (
        role == "write" and owner and owner not in map(str.lower, names)
    ):  # a fine-grained token may not list all it can write to
        raise PushError(
            f"the token is of {me['name']!r}, who cannot write to {to.repo!r}. Names to push to: {', '.join(names)}."
        )
    return api, me["name"]


@contextmanager
def _quiet_about(secrets: list[str | None]) -> Iterator[None]:
    """Log lines of the client and what lies below it are scrubbed, too."""

    def clean(record: logging.LogRecord) -> bool:
        record.msg, record.args = scrub(record.getMessage(), *secrets), ()
        return True

    handlers = [handler for name in (None, "huggingface_hub") for handler in logging.getLogger(name).handlers]
    for handler in handlers:
        handler.addFilter(clean)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(clean)


def _open(api: HfApi, to: Destination) -> None:
    """The repository, there or made. Its visibility is said, never changed.

    Raises:
        PushError: it can be read by everyone, and private was asked for or it should have been made so.
    """
    if made := not api.repo_exists(to.repo):
        api.create_repo(to.repo, private=to.private is not False, exist_ok=True)
    info = api.repo_info(to.repo)
    if not info.private and (to.private or (made and to.private is None)):
        raise PushError(
            f"{to.repo!r} is public, but private was asked for, and a repository's visibility is not changed in passing. Change it at "
            f"{api.endpoint}/{to.repo}/settings, push to another name, or ask for public."
        )
    note = "made" if made else "exists"
    if not made and not info.private and to.private is None:
        note = "exists and is public, so everyone can read what is pushed"
    elif not made and info.private and to.private is False:
        note = f"exists and stays private; change that at {api.endpoint}/{to.repo}/settings"
    print(f"=> {to.repo} ({'private' if info.private else 'public'}): {note}", flush=True)


def _stage(stage: Path, run: Path, files: list[Path], card: str, recipe: Recipe, base_model: str | None) -> set[str]:
    """Links to `files` below `stage`, with the card, and recipe.yaml without its token; the names in the repository."""
    for file in files:
        link = stage / file.relative_to(run)
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(file.resolve())
    if base_model is not None and (adapter := stage / "adapter_config.json").exists():
        settings = {**json.loads(adapter.read_text(encoding="utf-8")), "base_model_name_or_path": base_model}
        adapter.unlink()
        adapter.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    settings = {key: value for key, value in recipe.resolved.items() if key != "hub_token"}
    (stage / "recipe.yaml").write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf-8")
    (stage / "README.md").write_text(card, encoding="utf-8")
    return {file.relative_to(stage).as_posix() for file in stage.rglob("*") if file.is_file()}


def push(
    run: Path, to: Destination, *, licence: str | None = None, base_model: str | None = None, keep_card: bool = False
) -> str:
    """Send a finished run to the Hub and return its address there; on the first process only, and "" on others. `run` is only read.

    Args:
        licence: for the card; by default the run's old card's, or else the base model's.
        base_model: an adapter's base on the Hub, where it was trained on a folder.
        keep_card: send README.md as it lies in `run`.

    Raises:
        RecipeError: `run` or the name cannot be pushed; nothing was asked of the Hub.
        PushError: the Hub could not be reached or refused.
    """
    if os.environ.get("RANK", "0") != "0":
        return ""
    check_name(to.repo)
    recipe, files = check_run(run, to.token or get_token(), base_model=base_model)
    keep_card = keep_card or is_image_run(run)  # pretrain.py wrote it
    card = (run / "README.md").read_text(encoding="utf-8") if keep_card else card_of(run, recipe, licence, base_model)
    check_secrets(run / "README.md", card, to.token or get_token())
    way_out = f"The run in {run} is whole. Push it again, and only what is missing is sent: {to.command(run)}"
    with _quiet_about(to.secrets()), tempfile.TemporaryDirectory(prefix="matrix_llm_push_") as folder:
        api, _ = connect(to, way_out)

        def ask(call: Callable[[], Found]) -> Found:
            return _attempt(call, *to.secrets())

        try:
            ask(lambda: _open(api, to))
            base = base_model or recipe.model.model_name_or_path
            if (
                not keep_card
                and base is not None
                and is_hub_name(base)
                and "license" not in ModelCard(card).data.to_dict()
            ):
                with suppress(Exception):  # a card without it is true, too
                    card = card_of(run, recipe, getattr(api.model_info(base).card_data, "license", None), base_model)
            sent = _stage(Path(folder), run, files, card, recipe, base_model)
            if (branch := to.revision or "main") != "main" and not branch.startswith("refs/"):
                ask(lambda: api.create_branch(to.repo, branch=branch, exist_ok=True))
            head = ask(lambda: api.repo_info(to.repo, revision=branch)).sha
            options: dict[str, Any] = {
                "revision": branch,
                "delete_patterns": STALE,
                "commit_message": "Push a matrix_llm run",
            }
            commit = ask(lambda: api.upload_folder(repo_id=to.repo, folder_path=folder, **options))
            lacking = ", ".join(sorted(sent - set(ask(lambda: api.list_repo_files(to.repo, revision=branch)))))
        except PushError:
            raise
        except Exception as error:
            _fail(error, to, api.endpoint, way_out)
    if lacking:
        raise PushError(
            f"{lacking} did not arrive in {to.repo!r}, as where its .gitignore leaves them out. Correct it. {way_out}"
        )
    print(f"=> {len(sent)} files there{', none was missing' if commit.oid == head else ''}", flush=True)
    return f"{api.endpoint}/{to.repo}" + (f"/tree/{to.revision}" if to.revision else "")


def destination_of(recipe: Recipe | SSLRecipe, *, ask: bool = True) -> Destination | None:
    """Where `push_to_hub` of a recipe leads, with token and name checked by the Hub before anything is loaded; None without it, and on
    every process but the first. hub_token leaves the recipe here, so that no file of the run holds it.

    The Trainer's own pushing is switched off: it would make a public repository and send pickles and unchecked weights at every save.

    Raises:
        RecipeError: a setting that cannot be honoured.
        PushError: see `connect`.
    """
    training, resolved = recipe.training, recipe.resolved
    token, wanted = training.hub_token, training.push_to_hub
    resolved.pop("hub_token", None)
    training.hub_token, training.push_to_hub = None, False
    if not wanted:
        return None
    if (strategy := resolved.get("hub_strategy", "end")) != "end":
        raise RecipeError(
            f"hub_strategy={strategy!r}: only the finished run is pushed, no checkpoint. Remove it, or say end."
        )
    base = getattr(recipe.model, "model_name_or_path", None)
    if getattr(recipe.model, "use_peft", False) and not is_hub_name(base):
        raise RecipeError(
            f"push_to_hub=True would publish an adapter of the folder {base!r}, which nobody else can load. Set push_to_hub: false, and "
            "push the finished run with --base-model user/name."
        )
    name, owned = (
        training.hub_model_id or Path(str(training.output_dir)).resolve().name,
        "/" in (training.hub_model_id or ""),
    )
    to = Destination(name, training.hub_private_repo, training.hub_revision, token)
    check_name(
        name if owned else f"user/{name}",
        "hub_model_id" if training.hub_model_id else "hub_model_id (output_dir's name)",
    )
    if not ask or os.environ.get("RANK", "0") != "0":
        return None
    with _quiet_about(to.secrets()):
        _, me = connect(to)
    return to if owned else replace(to, repo=f"{me}/{name}")


# ------------------------------------------------------------------------------------------------------- the command line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(scrub(message))  # "unrecognized arguments: --tokn hf_..."


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0; 2 where the run or the name cannot be used; 1 where the Hub could not be reached or refused. One line on stderr."""
    parser = _Parser(
        prog="python -m matrix_llm.hub", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    card = commands.add_parser("card", help="write a run's README.md anew")
    pushing = commands.add_parser("push", help="send a run to the Hub")
    for command in (card, pushing):
        command.add_argument("run", type=Path, help="output_dir of a finished run")
        command.add_argument(
            "--license", help="as the Hub spells it, e.g. apache-2.0; by default the old card's, or the base model's"
        )
        command.add_argument("--base-model", help="Hub name of the base model, where the recipe names a folder")
    pushing.add_argument("--repo", required=True, help="user/name")
    pushing.add_argument("--public", action="store_true", help="make a new repository public; by default it is private")
    pushing.add_argument("--revision", help="branch, made where it is missing; by default main")
    pushing.add_argument(
        "--token", help="by default HF_TOKEN or the one of `hf auth login`, which other users of the machine cannot see"
    )
    pushing.add_argument("--keep-card", action="store_true", help="send README.md as it lies in the run's folder")
    options = parser.parse_args(arguments)
    try:
        if options.command == "card":
            print(f"=> {write_card(options.run, licence=options.license, base_model=options.base_model)}")
        else:
            to = Destination(options.repo, False if options.public else None, options.revision, options.token)
            address = push(
                options.run, to, licence=options.license, base_model=options.base_model, keep_card=options.keep_card
            )
            if address:
                print(f"=> {address}")
    except (RecipeError, OSError, ValueError, PushError) as problem:
        print(f"error: {scrub(str(problem), getattr(options, 'token', None))}", file=sys.stderr)
        return 1 if isinstance(problem, PushError) else 2
    return 0
