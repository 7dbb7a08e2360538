"""Where on the Hub a run goes, from a recipe's `push_to_hub`, `hub_model_id` and similar settings."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from transformers import TrainingArguments

from matrix_llm.base.errors import RecipeError
from matrix_llm.publish.client import HubClient, scrub_logs
from matrix_llm.publish.names import check_repository_name, is_hub_name


@dataclass(frozen=True)
class Destination:
    """A repository on the Hub, and how to write to it."""

    repo: str
    """user/name or organisation/name."""

    private: bool | None = None
    """True: must be private. False: public if it is new. None: private if it is new, else left as it is."""

    revision: str | None = None
    """The branch, created if it is missing; None is main."""

    token: str | None = field(default=None, repr=False)
    """The access token; None is HF_TOKEN, or else the token saved by `hf auth login`."""

    def command(self, run: Path) -> str:
        """The command line that pushes `run` there."""
        words = ["python -m matrix_llm.hub push", str(run), "--repo", self.repo]
        if self.private is False:
            words.append("--public")
        if self.revision:
            words += ["--revision", self.revision]
        return " ".join(words)


class PushableRecipe(Protocol):
    """What a recipe for language models and one for images have in common."""

    @property
    def model(self) -> Any: ...

    @property
    def training(self) -> TrainingArguments: ...

    @property
    def resolved(self) -> dict[str, Any]: ...


def find_destination(recipe: PushableRecipe, *, ask: bool = True) -> Destination | None:
    """Where `push_to_hub` sends the finished run; None without it. The recipe is not changed.

    The Hub checks token and name now, before hours of training. Only the first process asks it, and only that process
    gets a destination.

    Args:
        ask: False checks the settings alone, for `--dry_run`, and finds no destination.

    Raises:
        RecipeError: a setting that cannot be honoured.
        PushError: see `HubClient.check_token`.
    """
    training, model = recipe.training, recipe.model
    if not training.push_to_hub:
        return None

    # 1. settings that would need what a push does not do
    if (strategy := recipe.resolved.get("hub_strategy", "end")) != "end":
        raise RecipeError(
            f"hub_strategy={strategy!r}: only the finished run is pushed, no checkpoint. Remove it, or set it to 'end'."
        )
    base = getattr(model, "model_name_or_path", None)  # image recipes have neither of the two
    if getattr(model, "use_peft", False) and not is_hub_name(base):
        raise RecipeError(
            f"push_to_hub=True: the adapter's base model {base!r} is not on the Hub, so nobody else could load it. Set "
            "push_to_hub: false, and push the finished run with --base-model user/name."
        )

    # 2. the name; without an owner it belongs to the token's user, who is not known yet
    key = "hub_model_id" if training.hub_model_id else "hub_model_id (default: the name of output_dir)"
    name = training.hub_model_id or Path(str(training.output_dir)).resolve().name
    has_owner = training.hub_model_id is not None and "/" in training.hub_model_id
    check_repository_name(name if has_owner else f"user/{name}", key)
    if not ask or os.environ.get("RANK", "0") != "0":
        return None

    # 3. the token, which also names the owner
    destination = Destination(name, training.hub_private_repo, training.hub_revision, training.hub_token)
    hub = HubClient(name, training.hub_token)
    with scrub_logs(hub.secrets):
        user = hub.check_token()
    return destination if has_owner else replace(destination, repo=f"{user}/{name}")


def remove_push_settings(recipe: PushableRecipe) -> None:
    """Remove the token from the recipe, so that no file of the run holds it, and switch off the Trainer's own pushing.

    The Trainer would create a public repository, and send pickles and unchecked weights at every save.
    """
    recipe.resolved.pop("hub_token", None)
    recipe.training.hub_token = None
    recipe.training.push_to_hub = False
