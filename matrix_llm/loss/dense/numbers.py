"""The number token loss, NTL, and which tokens are numbers.

Legend: N positions that count, V vocabulary, M number tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from matrix_llm.base.errors import DataError, ModelError
from matrix_llm.loss.dense.positions import Positions

SAMPLE = "7 + 48 = 55, so 12*3=36 and 1250/5=250."


def number_tokens(tokenizer: Any) -> tuple[Tensor, Tensor]:
    """The tokens that are one ASCII digit, and their values. The tokenizer is not changed.

    Returns:
        ids (10,) int64 and values (10,) float32, from 0 to 9.

    Raises:
        ModelError: a digit without a token of its own, or a tokenizer that never uses these tokens.
    """
    vocabulary = tokenizer.get_vocab()
    digits = [str(value) for value in range(10)]
    missing = [digit for digit in digits if digit not in vocabulary]
    if missing:
        raise ModelError(
            f"token_loss='ntl' needs a token for each of the ten digits, but the tokenizer has none for "
            f"{', '.join(missing)}. Use another model, or another token_loss."
        )
    ids = {vocabulary[digit] for digit in digits}
    if not ids & set(tokenizer.encode(SAMPLE, add_special_tokens=False)):
        raise ModelError(
            f"token_loss='ntl' acts on tokens that are one digit, but the tokenizer makes none of {SAMPLE!r}: its "
            "numbers are longer tokens, or begin with a space. Use another model, or another token_loss."
        )
    return torch.tensor([vocabulary[digit] for digit in digits]), torch.arange(10, dtype=torch.float32)


def _distances(values: Tensor, squash: float | None) -> Tensor:
    """The distances between the numbers, (M, M): |difference|, with `squash` scaled linearly so that the smallest is 1
    and the largest is `squash`."""
    distance = (values.unsqueeze(0) - values.unsqueeze(1)).abs()
    if squash is None:
        return distance
    different = distance > 0
    least, most = distance[different].min(), distance.max()
    return torch.where(different, 1 + (distance - least) * (squash - 1) / (most - least), 0.0)


def ntl(positions: Positions, *, kind: str, reweigh: bool, squash: float | None, weight: float | None) -> Tensor:
    """NTL (arXiv 2411.02083) where the label is a number, 0 elsewhere; with s the softmax over the number tokens alone,

        "was"   sum_j s_j |v_j - v_y|         gradient s_j (|v_j - v_y| - value)
        "mse"   (sum_j s_j v_j - v_y)^2       gradient 2 (sum_i s_i v_i - v_y) s_j (v_j - sum_i s_i v_i)

    and with a weight, CE + weight NTL. In a batch NTL's mean is that over the positions whose label is a number.

    Args:
        reweigh: m value + 1.01 M (1 - m) instead, m the probability of all numbers and M the largest distance. The
            package ntloss has it by default; the paper does not have it.
        squash: for "was", the ratio of the largest distance to the smallest.
        weight: 0.3 in the paper; None: NTL alone.
    """
    assert positions.number_ids is not None
    assert positions.number_values is not None
    values = positions.number_values
    matches = positions.labels.unsqueeze(1) == positions.number_ids  # (N, M)
    is_number = matches.any(-1)
    number = matches.to(torch.int8).argmax(-1)  # the label's place among the numbers; 0 where it is none
    logits = torch.where(
        is_number.unsqueeze(1), positions.logits[:, positions.number_ids], 0.0
    )  # elsewhere all may be -inf
    s = torch.softmax(logits, dim=-1)
    if kind == "was":
        distance = _distances(values, squash)
        value, largest = (s * distance[number]).sum(-1), distance.max()
    else:
        value = ((s * values).sum(-1) - values[number]) ** 2
        largest = (values.max() - values.min()) ** 2
    if reweigh:
        q = positions.log_probabilities().exp()
        others = torch.ones(q.shape[1], dtype=q.dtype, device=q.device).index_fill(0, positions.number_ids, 0.0)
        value = q[:, positions.number_ids].sum(-1) * value + 1.01 * largest * (q * others).sum(-1)
    value = torch.where(is_number, value, 0.0)
    return value if weight is None else positions.cross_entropy() + weight * value


def check_numbers(ids: Tensor, values: Tensor, vocabulary_size: int, squash: float | None) -> None:
    """Raise DataError for number tokens that NTL cannot be computed with."""
    if ids.ndim != 1 or ids.shape != values.shape or ids.numel() == 0:
        raise DataError(
            f"number_ids {tuple(ids.shape)} and number_values {tuple(values.shape)} must be (M,), one value for each "
            "number token."
        )
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise DataError(f"number_ids is {ids.dtype}, but token ids are integers. Convert it with `.long()`.")
    if ids.min() < 0 or ids.max() >= vocabulary_size or ids.unique().numel() < ids.numel():
        raise DataError(f"number_ids={ids.tolist()} must be different tokens of the vocabulary of {vocabulary_size}.")
    if not torch.isfinite(values).all():
        raise DataError(f"number_values={values.tolist()} must be finite.")
    if squash is not None:
        distance = (values.unsqueeze(0) - values.unsqueeze(1)).abs()
        if distance[distance > 0].unique().numel() < 2:
            raise DataError(
                f"ntl's squash={squash} is the ratio of the largest distance to the smallest, but number_values="
                f"{values.tolist()} have only one. Remove squash."
            )
