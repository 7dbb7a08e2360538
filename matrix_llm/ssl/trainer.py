"""`SSLTrainer` under its public name. The code is in `training/`."""

from matrix_llm.ssl.training.callbacks import EmaCallback, ema_momentum
from matrix_llm.ssl.training.trainer import SSLTrainer

__all__ = ["EmaCallback", "SSLTrainer", "ema_momentum"]
