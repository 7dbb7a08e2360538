"""The statistics of scores under their public name. The code is in `matrix_llm.base.statistics` and
`eval.report.scores`.
"""

from matrix_llm.base.statistics import (
    bootstrap_difference,
    clustered_interval,
    mcnemar_exact,
    minimum_detectable_difference,
    pass_at_k,
    sign_flip_test,
    two_proportion,
    wilson_interval,
)

from .report.scores import majority_vote

__all__ = [
    "bootstrap_difference",
    "clustered_interval",
    "majority_vote",
    "mcnemar_exact",
    "minimum_detectable_difference",
    "pass_at_k",
    "sign_flip_test",
    "two_proportion",
    "wilson_interval",
]
