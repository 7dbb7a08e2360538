"""Image sources under one name. The code is in `images/`."""

from matrix_llm.base.errors import ImageDataError
from matrix_llm.ssl.images.dataset import EpochSampler, Images, TrainImages
from matrix_llm.ssl.images.load import load_images

__all__ = ["EpochSampler", "ImageDataError", "Images", "TrainImages", "load_images"]
