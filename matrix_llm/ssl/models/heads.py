"""The projector and the predictor: small multi-layer perceptrons."""

from __future__ import annotations

import itertools

from torch import nn

__all__ = ["mlp"]


def mlp(widths: tuple[int, ...], *, hidden_bn: bool = True, end: str = "linear") -> nn.Sequential:
    """Linear layers of these widths, with batch normalisation and ReLU between them.

    Args:
        widths: of the input and of each layer.
        hidden_bn: batch normalisation after the hidden layers.
        end: what follows the last layer: "linear" (nothing), "bn" (batch normalisation without affine) or "bn_affine".

    >>> [type(layer).__name__ for layer in mlp((4, 8, 2), end="bn")]
    ['Linear', 'BatchNorm1d', 'ReLU', 'Linear', 'BatchNorm1d']
    """
    layers: list[nn.Module] = []
    for i, (inner, outer) in enumerate(itertools.pairwise(widths)):
        is_last = i == len(widths) - 2
        has_bn = end != "linear" if is_last else hidden_bn
        layers.append(nn.Linear(inner, outer, bias=not has_bn))  # the normalisation would subtract a bias again
        if has_bn:
            layers.append(nn.BatchNorm1d(outer, affine=not (is_last and end == "bn")))
        if not is_last:
            layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)
