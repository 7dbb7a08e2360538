"""The two-view augmentation under one name. The code is in `images/`."""

from matrix_llm.ssl.images.augment import Augment
from matrix_llm.ssl.images.crops import TwoViewCollator
from matrix_llm.ssl.images.draws import draw
from matrix_llm.ssl.images.eval_transform import EvalTransform
from matrix_llm.ssl.images.settings import AugmentConfig

__all__ = ["Augment", "AugmentConfig", "EvalTransform", "TwoViewCollator", "draw"]
