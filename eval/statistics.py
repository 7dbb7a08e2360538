"""The statistics of scores under their public name. The code is in `matrix_llm.base.statistics` and
`eval.report.scores`.
"""

from eval.report.scores import majority_vote
from matrix_llm.base.statistics import (
    bootstrap_difference,
    mcnemar_exact,
    minimum_detectable_difference,
    pass_at_k,
    two_proportion,
    wilson_interval,
)

__all__ = [
    "bootstrap_difference",
    "majority_vote",
    "mcnemar_exact",
    "minimum_detectable_difference",
    "pass_at_k",
    "two_proportion",
    "wilson_interval",
]
