"""detectron2's names for the weights of a ResNet, a configuration for them, and its file format. detectron2 is not
needed.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, BinaryIO

import numpy as np
from transformers import PreTrainedModel, ResNetConfig

from matrix_llm.base.errors import ExportError
from matrix_llm.ssl.transfer.layers import COUNTER, NORM, check_standard_resnet, copy_state, layer_names

__all__ = ["detectron2_config", "detectron2_state", "write_pickle"]

# MODEL.RESNETS.DEPTH of detectron2, for bottleneck layers, of which its C4 head is built
DEPTHS = {(3, 4, 6, 3): 50, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}


def detectron2_state(backbone: PreTrainedModel) -> dict[str, np.ndarray]:
    """The weights under detectron2's names: stem.conv1.weight, stem.conv1.norm.*, res2.0.conv1.weight, ...,
    res2.0.shortcut.norm.*.

    Returns:
        float32, without the counters, which detectron2's frozen normalisation does not have. `detectron2_config` says
        which convolutions have the strides.

    Raises:
        ExportError: another architecture, or strides, activations and shortcuts that detectron2's ResNet does not have.

    >>> from transformers import ResNetModel
    >>> config = ResNetConfig(embedding_size=8, hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 1, 1])
    >>> detectron2_state(ResNetModel(config))["res3.0.shortcut.norm.bias"].shape
    (32,)
    """
    model = check_standard_resnet(backbone, "detectron2")
    widths = tuple(model.config.hidden_sizes or ())
    if any(before == after for before, after in pairwise(widths)):
        raise ExportError(
            f"hidden_sizes={widths}: detectron2 has no shortcut between stages of one width. Pretrain with growing "
            "widths."
        )
    state = copy_state(model)
    exported = {}
    for ours, _, _, theirs in layer_names(model):
        exported[f"{theirs}.weight"] = state[f"{ours}.convolution.weight"].numpy()
        for key in NORM:
            if key != COUNTER:
                exported[f"{theirs}.norm.{key}"] = state[f"{ours}.normalization.{key}"].numpy()
    return exported


def detectron2_config(
    config: ResNetConfig, image_mean: Sequence[float], image_std: Sequence[float], weights: str
) -> str:
    """MoCo's published settings for Mask R-CNN with a C4 backbone on COCO (its 2x schedule), with this network's sizes.

    Args:
        image_mean, image_std: of the run, for pixels in 0 to 1; detectron2 has pixels in 0 to 255.
        weights: MODEL.WEIGHTS, the path of the .pkl.

    Returns:
        YAML. The ROI head's name is one that MoCo's detection/train_net.py registers.

    Raises:
        ExportError: a network that detectron2's configuration cannot describe. Its weights can be exported
            nevertheless.

    >>> "PIXEL_STD: [63.75, 63.75, 63.75]" in detectron2_config(ResNetConfig(), [0.5] * 3, [0.25] * 3, "r50.pkl")
    True
    """
    # 1. Refuse networks that detectron2's keys cannot describe.
    widths, depths, channels = tuple(config.hidden_sizes or ()), tuple(config.depths or ()), config.num_channels
    if config.layer_type != "bottleneck":
        raise ExportError(
            "layer_type='basic', but detectron2's C4 head is built of bottleneck layers. Use the weights in an FPN "
            "config."
        )
    if depths not in DEPTHS or widths != tuple(widths[0] * 2**i for i in range(4)) or widths[0] % 4:
        known = f"the depths {', '.join(map(str, DEPTHS))} and widths that double"
        raise ExportError(
            f"depths={depths}, hidden_sizes={widths}, but detectron2's keys describe {known}. Build the network in "
            "Python."
        )
    if channels not in (1, 3) or len(image_mean) != channels or len(image_std) != channels:
        raise ExportError(
            f"{channels} channel(s), image_mean={list(image_mean)}: detectron2 reads grey or RGB images, one mean a "
            "channel."
        )
    # 2. MoCo's settings, with pixels from 0 to 255
    mean, std = ([round(255 * float(value), 6) for value in values] for values in (image_mean, image_std))
    return f"""\
# Mask R-CNN, C4, COCO: MoCo's settings, 2x schedule (1x: STEPS [60000, 80000], MAX_ITER 90000).
VERSION: 2
MODEL:
  META_ARCHITECTURE: GeneralizedRCNN
  WEIGHTS: {json.dumps(weights)}
  MASK_ON: true
  PIXEL_MEAN: {mean}
  PIXEL_STD: {std}
  BACKBONE: {{FREEZE_AT: 0}}
  RESNETS:
    DEPTH: {DEPTHS[depths]}
    NORM: SyncBN
    STRIDE_IN_1X1: {json.dumps(config.downsample_in_bottleneck)}
    STEM_OUT_CHANNELS: {config.embedding_size}
    RES2_OUT_CHANNELS: {widths[0]}
    WIDTH_PER_GROUP: {widths[0] // 4}
  RPN: {{PRE_NMS_TOPK_TEST: 6000, POST_NMS_TOPK_TEST: 1000}}
  ROI_HEADS: {{NAME: Res5ROIHeadsExtraNorm}}  # with a norm after res5, by MoCo's train_net.py
INPUT: {{FORMAT: {"RGB" if channels == 3 else "L"}, MIN_SIZE_TRAIN: [640, 672, 704, 736, 768, 800], MIN_SIZE_TEST: 800}}
DATASETS: {{TRAIN: [coco_2017_train], TEST: [coco_2017_val]}}
SOLVER: {{IMS_PER_BATCH: 16, BASE_LR: 0.02, STEPS: [120000, 160000], MAX_ITER: 180000}}
TEST: {{PRECISE_BN: {{ENABLED: true}}}}
"""


def write_pickle(state: dict[str, np.ndarray], file: BinaryIO) -> None:
    """Write the weights as detectron2's checkpointer reads them.

    The author is not "Caffe2": detectron2 then matches the ends of names, so that res5 also finds
    roi_heads.res5, and renames nothing.
    """
    _Pickler(file, protocol=4).dump({"model": state, "__author__": "matrix_llm", "matching_heuristics": True})


class _Pickler(pickle.Pickler):
    """Write arrays as numpy.ndarray(shape, dtype, buffer).

    NumPy 2's own pickles name private modules, which older NumPy versions, common with detectron2, lack. The buffer
    is a bytearray, so that the arrays are writable after reading.
    """

    def reducer_override(self, value: object) -> Any:
        if isinstance(value, np.ndarray):
            return np.ndarray, (value.shape, value.dtype.str, bytearray(value.tobytes()))
        return NotImplemented
