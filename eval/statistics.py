"""The statistics of scores under their public name. The code is in `matrix_llm.base.statistics` and
`eval.report.scores`.
"""

from matrix_llm.base.statistics import (
    bootstrap_difference,
    mcnemar_exact,
    minimum_detectable_difference,
    pass_at_k,
    two_proportion,
    wilson_interval,
)

from .report.scores import majority_vote

__all__ = [
    "bootstrap_difference",
    "majority_vote",
    "mcnemar_exact",
    "minimum_detectable_difference",
    "pass_at_k",
    "two_proportion",
    "wilson_interval",
]
