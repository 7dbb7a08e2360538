"""What the loss should compute. Made once, from the recipe or from a caller's keywords, and passed down as one object.

    LossSettings  what the user can set; None lets the library choose
    Solver        the same with every None replaced, for one vocabulary: `LossSettings.solver_for`

Defaults are decided in `solver_for` and nowhere else. No tensors here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from matrix_llm.base.errors import RecipeError
from matrix_llm.loss.choice import NEEDS_TEACHER, recipe_settings

if TYPE_CHECKING:
    from matrix_llm.config import MatrixConfig

SOLVERS = ("exact", "krylov", "taylor")
TARGETS = ("label", "teacher")
TARGET_TOKENS = 16  # the teacher's likeliest, which make MCE's target
EMBEDDINGS = ("lm_head", "input", "centred")  # `LossSettings.embeddings` by name; anything else is a file

# Chosen from the tables of docs/solvers.md and docs/performance.md: over all positions of a pretrained model the
# gradient of CE + MCE is 2 to 3 % off, at nearly the cost of cross-entropy alone.
DEFAULT_STEPS = 6
DEFAULT_TOP_K = 16
WHOLE_VOCABULARY = 1024  # up to this size, by default every token is kept exactly: there is nothing to gain


@dataclass(frozen=True)
class Solver:
    """How log Q is evaluated over one vocabulary. `LossSettings.solver_for` makes it, with every default filled in."""

    name: str
    """"exact", "krylov" or "taylor"."""

    steps: int
    """Lanczos steps, at least 1. "krylov" only."""

    order: int
    """Terms of the Taylor series, at least 1. "taylor" only."""

    sketch_dim: int | None
    """Width of the Gaussian sketch of the embeddings; None: no sketch."""

    top_k: int | None
    """Tokens kept exactly at each position; None: the whole vocabulary."""

    centred: bool = False
    """Whether the mean of the embeddings is subtracted from each of them before they are scaled to norm 1."""

    def bytes_per_position(self, vocabulary_size: int, width: int, itemsize: int) -> int:
        """Working memory of one position, on top of its logits, in bytes."""
        if self.name == "exact":
            return itemsize * width * (3 * vocabulary_size + 6 * width)
        if self.name == "taylor":
            return itemsize * 4 * self.order * vocabulary_size
        if self.top_k is None:
            return itemsize * 2 * self.steps * vocabulary_size
        return 0  # head_tail.py has its own block length, whatever the chunk


@dataclass(frozen=True)
class LossSettings:
    """A token loss + mce_weight * MCE, and how MCE is computed.

    Raises:
        RecipeError: a value out of range, an unknown token loss, or `top_k` with a solver that cannot use it.

    >>> LossSettings(top_k=16).solver_for(32016)
    Solver(name='krylov', steps=6, order=4, sketch_dim=None, top_k=16, centred=False)
    """

    mce_weight: float = 1.0
    """Weight of the MCE term; finite, at least 0. 0 leaves plain cross-entropy, with MCE still measured."""

    solver: str = "krylov"
    """How log Q is evaluated: "krylov" (fast), "exact" (the reference) or "taylor" (the paper's series)."""

    steps: int | None = None
    """Lanczos steps of "krylov", at least 1; None: 6."""

    order: int = 4
    """Terms of the "taylor" series, at least 1."""

    sketch_dim: int | None = None
    """Width that the embeddings are randomly projected to, at least 1; None: no sketch."""

    top_k: int | None = None
    """Tokens that "krylov" keeps exactly at each position, at least 1; None: see `solver_for`."""

    embeddings: str = "lm_head"
    """Which token vectors to compare: "lm_head" (its weight), "centred" (the same minus their mean), "input" (the input
    embeddings), or the path of a .safetensors file."""

    embedding_grad: bool = False
    """Whether the gradient of MCE also flows into the token vectors."""

    token_loss: str = "ce"
    """What MCE is added to: a key of `choice.LOSSES`."""

    token_loss_settings: Mapping[str, Any] | None = None
    """Its settings, and ntl's number_ids and number_values; None: the defaults."""

    target: str = "label"
    """What MCE aims at: "label", or "teacher", the distribution of the token loss's teacher."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mce_weight) and self.mce_weight >= 0):
            raise RecipeError(
                f"mce_weight={self.mce_weight} must be a finite number of at least 0. Give 0 for plain CE."
            )
        if self.solver not in SOLVERS:
            raise RecipeError(
                f"solver={self.solver!r} is unknown. Use 'krylov' (the default), 'exact' (the reference) or 'taylor'."
            )
        if self.target not in TARGETS:
            raise RecipeError(f"target={self.target!r} is unknown. Use 'label' or 'teacher'.")
        if self.target == "teacher" and (self.token_loss not in NEEDS_TEACHER or self.solver == "taylor"):
            raise RecipeError(
                f"target='teacher' needs a token_loss with a teacher ({', '.join(NEEDS_TEACHER)}) and a solver other "
                f"than taylor, not token_loss={self.token_loss!r} and solver={self.solver!r}. Set target='label'."
            )
        for key in ("steps", "order", "sketch_dim", "top_k"):
            value = getattr(self, key)
            if value is None and key != "order":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise RecipeError(f"{key}={value!r} must be an integer of at least 1.")
        if self.solver != "krylov" and self.top_k is not None:
            raise RecipeError(
                f"top_k={self.top_k} needs solver='krylov', but solver={self.solver!r} reads the whole vocabulary. "
                "Remove top_k."
            )

    @classmethod
    def from_config(cls, args: MatrixConfig) -> LossSettings:
        """The `mce_*` settings of a recipe."""
        return cls(
            mce_weight=args.mce_weight,
            solver=args.mce_solver,
            steps=args.mce_steps,
            order=args.mce_order,
            sketch_dim=args.mce_sketch_dim,
            top_k=args.mce_top_k,
            embeddings=args.mce_embeddings,
            embedding_grad=args.mce_embedding_grad,
            target=args.mce_target,
            token_loss=args.token_loss,
            token_loss_settings=recipe_settings(args.token_loss, args.token_loss_settings) or None,
        )

    def solver_for(self, vocabulary_size: int, *, choose_top_k: bool | None = None) -> Solver:
        """The solver for a vocabulary of this size, with the defaults filled in. They are decided only here.

        Args:
            vocabulary_size: V; a `top_k` of V or more means the whole vocabulary.
            choose_top_k: whether `top_k=None` means 16 tokens for V above 1,024, rather than the whole vocabulary.
                Never with a sketch or trained embeddings, since the tail's vectors count as constants.
                None: decided by `embedding_grad`.
        """
        top_k = self.top_k
        choose = not self.embedding_grad if choose_top_k is None else choose_top_k
        if choose and self.solver == "krylov" and top_k is None and self.sketch_dim is None:
            top_k = DEFAULT_TOP_K if vocabulary_size > WHOLE_VOCABULARY else None
        if top_k is not None and top_k >= vocabulary_size:
            top_k = None
        steps = DEFAULT_STEPS if self.steps is None else self.steps
        return Solver(self.solver, steps, self.order, self.sketch_dim, top_k, centred=self.embeddings == "centred")
