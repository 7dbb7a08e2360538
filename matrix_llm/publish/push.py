"""Push a finished run to the Hub.

1. without a network: the name, the weights, no token in any file that would be sent (names.py, checks.py)
2. the Hub accepts the token, and the repository exists or is created, with the requested visibility
3. links to the files, next to a fresh card, are uploaded from a temporary folder; the run's own folder is only read
4. check that every file has arrived, and that the repository is as private as it was
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from huggingface_hub import ModelCard, get_token

from matrix_llm.base.errors import PushError
from matrix_llm.publish.card import card_of
from matrix_llm.publish.checks import check_run, check_secrets
from matrix_llm.publish.client import CLIENT_ERRORS, HubClient, scrub_logs
from matrix_llm.publish.destination import Destination
from matrix_llm.publish.finished_run import CARD, RECIPE, RunSettings, is_image_run, recipe_yaml
from matrix_llm.publish.names import check_repository_name, is_hub_name

# Weights of an earlier push, which from_pretrained would load instead of the new ones.
STALE = ["model*.safetensors", "model.safetensors.index.json", "adapter_model*.safetensors", "adapter_config.json"]


def push(
    run: Path, to: Destination, *, licence: str | None = None, base_model: str | None = None, keep_card: bool = False
) -> str:
    """Send a finished run to the Hub, and return its address there. Processes other than the first return "".

    Args:
        licence: for the card; by default that of the run's old card, or else the base model's.
        base_model: an adapter's base model on the Hub, where it was trained on a folder.
        keep_card: send README.md as it is in `run`. An image run's card is always sent as it is.

    Raises:
        RecipeError: the run or the name cannot be used; the Hub was not asked.
        PushError: the Hub could not be reached, or refused.
    """
    if os.environ.get("RANK", "0") != "0":
        return ""

    # 1. without a network
    token = to.token or get_token()
    check_repository_name(to.repo, "--repo")
    settings, files = check_run(run, token, base_model=base_model)
    keep_card = keep_card or is_image_run(run)
    card = (run / CARD).read_text(encoding="utf-8") if keep_card else card_of(run, settings, licence, base_model)
    check_secrets(run / CARD, card, token)

    way_out = f"{run} is unharmed. Push it again, which sends only what is missing: {to.command(run)}"
    hub = HubClient(to.repo, to.token, way_out)
    with scrub_logs(hub.secrets), tempfile.TemporaryDirectory(prefix="matrix_llm_push_") as folder:
        # 2. the token, the repository, the branch
        hub.check_token()
        was_private = _open_repository(hub, to)
        branch = to.revision or "main"
        if branch != "main" and not branch.startswith("refs/"):  # refs/pr/1 exists, or cannot be made by a push
            hub.request(hub.api.create_branch, to.repo, branch=branch, exist_ok=True)

        # 3. the files
        if not keep_card and "license" not in ModelCard(card).data.to_dict():
            base = base_model or settings.model_name_or_path
            card = card_of(run, settings, _licence_on_hub(hub, base), base_model)
        sent = _stage(Path(folder), run, files, card, settings, base_model)
        before = hub.request(hub.api.repo_info, to.repo, revision=branch).sha
        commit = hub.request(
            hub.api.upload_folder,
            repo_id=to.repo,
            folder_path=folder,
            revision=branch,
            delete_patterns=STALE,
            commit_message="Push a matrix_llm run",
        )

        # 4. have they arrived?
        missing = sent - set(hub.request(hub.api.list_repo_files, to.repo, revision=branch))
        is_private_now = bool(hub.request(hub.api.repo_info, to.repo).private)
    if was_private and not is_private_now:
        raise PushError(
            f"{to.repo!r} was private when the push began and is public now: everyone can read what was sent. If that "
            f"was not meant, change it at {hub.endpoint}/{to.repo}/settings."
        )
    if missing:
        raise PushError(
            f"{to.repo!r} lacks {', '.join(sorted(missing))} after the push; its .gitignore may exclude them. Correct "
            f"it there. {way_out}"
        )
    nothing_new = ", none was missing" if commit.oid == before else ""
    print(f"=> {len(sent)} files there{nothing_new}", flush=True)
    return f"{hub.endpoint}/{to.repo}" + (f"/tree/{to.revision}" if to.revision else "")


def _open_repository(hub: HubClient, to: Destination) -> bool:
    """Create the repository if there is none, and print its visibility, which is never changed.

    Returns:
        whether it is private.

    Raises:
        PushError: it is public, and private was asked for or is what a new repository should have become.
    """
    is_new = not hub.request(hub.api.repo_exists, to.repo)
    if is_new:
        hub.request(hub.api.create_repo, to.repo, private=to.private is not False, exist_ok=True)
    is_private = hub.request(hub.api.repo_info, to.repo).private
    settings = f"{hub.endpoint}/{to.repo}/settings"
    if not is_private and (to.private or (is_new and to.private is None)):
        raise PushError(
            f"{to.repo!r} is public, but private was asked for. A push does not change a repository's visibility: "
            f"change it at {settings}, push to another name, or ask for public."
        )
    if is_new:
        note = "made"
    elif is_private and to.private is False:
        note = f"exists and stays private; change that at {settings}"
    elif not is_private and to.private is None:
        note = "exists and is public, so everyone can read what is pushed"
    else:
        note = "exists"
    print(f"=> {to.repo} ({'private' if is_private else 'public'}): {note}", flush=True)
    return bool(is_private)


def _licence_on_hub(hub: HubClient, base: str | None) -> str | None:
    """The licence that the base model's card states. Not worth failing for: a card without one is also true."""
    if base is None or not is_hub_name(base):
        return None
    try:
        licence = getattr(hub.api.model_info(base).card_data, "license", None)
        return licence if isinstance(licence, str) else None
    except CLIENT_ERRORS:
        return None


def _stage(
    folder: Path, run: Path, files: list[Path], card: str, settings: RunSettings, base_model: str | None
) -> set[str]:
    """Link or write into `folder` what will be sent, and return the names in the repository."""
    for file in files:
        link = folder / file.relative_to(run)
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(file.resolve())
    adapter = folder / "adapter_config.json"
    if base_model is not None and adapter.exists():  # PEFT loads the base model named there
        content = {**json.loads(adapter.read_text(encoding="utf-8")), "base_model_name_or_path": base_model}
        adapter.unlink()  # a link into the run
        adapter.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / RECIPE).write_text(recipe_yaml(settings.given), encoding="utf-8")
    (folder / CARD).write_text(card, encoding="utf-8")
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
