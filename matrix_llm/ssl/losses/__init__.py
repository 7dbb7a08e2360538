"""Matrix-SSL and the losses it is compared with; they need torch alone.

Read `matrix.py` first (Matrix-SSL and MEC), with `polynomials.py` for its matrix products. `covariance.py` (Barlow
Twins, VICReg), `contrastive.py` (SimCLR, MoCo), `predictive.py` (BYOL, SimSiam) and `clustering.py` (SwAV) stand
alone. `checks.py` is what all of them do with their arguments first; `gather.py` collects the rows of all ranks.
"""

from matrix_llm.ssl.losses.clustering import sinkhorn, swav_loss
from matrix_llm.ssl.losses.contrastive import moco_loss, nt_xent_loss
from matrix_llm.ssl.losses.covariance import barlow_twins_loss, vicreg_loss
from matrix_llm.ssl.losses.matrix import (
    dense_matrix_ssl_loss,
    matrix_alignment_loss,
    matrix_ssl_loss,
    matrix_uniformity_loss,
    mec_loss,
)
from matrix_llm.ssl.losses.predictive import byol_loss, simsiam_loss

__all__ = [
    "barlow_twins_loss",
    "byol_loss",
    "dense_matrix_ssl_loss",
    "matrix_alignment_loss",
    "matrix_ssl_loss",
    "matrix_uniformity_loss",
    "mec_loss",
    "moco_loss",
    "nt_xent_loss",
    "simsiam_loss",
    "sinkhorn",
    "swav_loss",
    "vicreg_loss",
]
