"""The design of the study: its arms, and what is the same for all of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from matrix_llm.base.errors import MatrixLLMError

ALPHA = 0.05  # level of every test
SAMPLES, TEMPERATURE = 8, 0.7  # samples per problem, and their temperature, for pass@k and distinct-n


class StudyError(MatrixLLMError, ValueError):
    """A study that cannot start, continue or be reported."""


@dataclass(frozen=True)
class Arm:
    """One way to train."""

    name: str
    """Name in folders, rows and tables."""
    overrides: Mapping[str, Any]
    """Settings of the recipe that this arm changes; nothing else differs between arms."""
    reference: str | None
    """Name of the arm it is compared with; None for `ce`, which is only a reference."""
    group: str
    """`main`, `ablations` or `exact`; Holm's correction covers every contrast outside `main`."""
    description: str
    """A few words for the table of ablations."""

    @property
    def arguments(self) -> list[str]:
        """The overrides as arguments of matrix_llm/train.py."""
        return [word for key, value in self.overrides.items() for word in (f"--{key}", str(value))]


MCE: dict[str, Any] = {"mce_weight": 1.0}
WHOLE = MCE | {"mce_top_k": 1_000_000}  # more than any vocabulary: every token is kept exactly
ARMS = (
    Arm("ce", {"mce_weight": 0}, None, "main", "cross-entropy alone"),
    Arm("mce", MCE, "ce", "main", "CE + MCE, defaults (Krylov, 6 steps, LM head's vectors, detached)"),
    Arm("weight0.1", {"mce_weight": 0.1}, "ce", "ablations", "mce_weight 0.1"),
    Arm("weight0.3", {"mce_weight": 0.3}, "ce", "ablations", "mce_weight 0.3"),
    Arm("weight3", {"mce_weight": 3.0}, "ce", "ablations", "mce_weight 3"),
    Arm("input", MCE | {"mce_embeddings": "input"}, "mce", "ablations", "vectors of the input embedding"),
    Arm(
        "warmup", MCE | {"mce_warmup_steps": 0.3}, "mce", "ablations", "the weight rising from 0 over 30 % of the steps"
    ),
    Arm("whole", WHOLE, "mce", "ablations", "the whole vocabulary, not the 16 likeliest and the rest's moments"),
    # These read the whole vocabulary, so `whole`, which does too, is their reference.
    Arm("krylov16", WHOLE | {"mce_steps": 16}, "whole", "ablations", "Krylov with 16 steps: exact to about 0.1 %"),
    Arm(
        "taylor4",
        MCE | {"mce_solver": "taylor", "mce_order": 4},
        "whole",
        "ablations",
        "the paper's Taylor series, order 4",
    ),
    Arm("grad", MCE | {"mce_embedding_grad": "true"}, "whole", "ablations", "gradient into the vectors"),
    Arm("sketch", MCE | {"mce_sketch_dim": 64}, "whole", "ablations", "vectors sketched to 64 dimensions"),
    Arm(
        "exact", MCE | {"mce_solver": "exact"}, "whole", "exact", "dense logarithm at every position: many times slower"
    ),
)
BY_NAME = {arm.name: arm for arm in ARMS}


def choose_arms(names: str) -> list[Arm]:
    """Arms by group or name, separated by commas, and the references that their contrasts need.

    Raises:
        StudyError: a name that is neither a group nor an arm.

    >>> [arm.name for arm in choose_arms("sketch")]
    ['ce', 'mce', 'whole', 'sketch']
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    groups = list(dict.fromkeys(arm.group for arm in ARMS))
    if unknown := [name for name in wanted if name not in (*groups, *BY_NAME)]:
        raise StudyError(
            f"--arms {unknown[0]} is not a group ({', '.join(groups)}) or an arm. Choose among {', '.join(BY_NAME)}."
        )
    chosen = {arm.name for arm in ARMS if arm.group in wanted or arm.name in wanted}
    while missing := {reference for name in chosen if (reference := BY_NAME[name].reference)} - chosen:
        chosen |= missing
    return [arm for arm in ARMS if arm.name in chosen]
