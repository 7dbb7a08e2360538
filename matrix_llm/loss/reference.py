"""Any token loss on whole logits, with autograd: `matrix_llm.losses.token_loss`, what the fused head is compared with.

Legend: N positions, V vocabulary, D embedding width, M number tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from matrix_llm.base.errors import DataError, RecipeError
from matrix_llm.base.values import check_choice
from matrix_llm.information import outside_autocast
from matrix_llm.loss.choice import NEEDS_EMBEDDINGS, NEEDS_NUMBERS, NEEDS_TEACHER, check_settings
from matrix_llm.loss.dense import label, numbers, teacher, vectors
from matrix_llm.loss.dense.positions import Positions
from matrix_llm.loss.positions import check_integers, label_error

IGNORED = -100

FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "ce": label.cross_entropy,
    "dft": label.dft,
    "minus_p": label.minus_p,
    "power": label.power,
    "threshold": label.threshold,
    "focal": label.focal,
    "eaft": label.eaft,
    "label_smoothing": label.label_smoothing,
    "z_loss": label.z_loss,
    "gem": label.gem,
    "ntl": numbers.ntl,
    "emo": vectors.emo,
    "mce": vectors.mce,
    "soft_mce": vectors.soft_mce,
    "asft": teacher.asft,
    "kd": teacher.kd,
    "soft_ce": teacher.soft_ce,
}

_WITHOUT_LABEL = ("kd", "soft_ce", "soft_mce")  # the label only says that the position counts


@outside_autocast
def token_loss(
    logits: Tensor,  # (N, V)
    labels: Tensor,  # (N,)
    loss: str,
    *,
    embeddings: Tensor | None = None,  # (V, D)
    teacher_logits: Tensor | None = None,  # (N, V)
    number_ids: Tensor | None = None,  # (M,)
    number_values: Tensor | None = None,  # (M,)
    **settings: Any,
) -> Tensor:
    """The value of a token loss at each position. See `matrix_llm.losses.token_loss`, the public name."""
    # 1. The loss, its settings, and what it needs
    full = _full_settings(loss, settings)
    _check_logits(logits, labels)
    vocabulary_size = logits.shape[1]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    if loss in (*NEEDS_EMBEDDINGS, "mce"):
        embeddings = _checked_embeddings(loss, embeddings, vocabulary_size).detach().to(dtype)
    if loss in NEEDS_TEACHER:
        _check_teacher(loss, teacher_logits, logits)
    if loss in NEEDS_NUMBERS:
        number_ids, number_values = _checked_numbers(loss, number_ids, number_values, logits)
        numbers.check_numbers(number_ids, number_values, vocabulary_size, full["squash"])

    # 2. The positions that count; the others are not read
    labels = labels.long()
    counted = torch.nonzero(labels != IGNORED).squeeze(1)
    z, y = logits[counted].to(dtype), labels[counted]
    _check_values("logits", z, counted)
    t = None
    if loss in NEEDS_TEACHER and teacher_logits is not None:
        t = teacher_logits[counted].detach().to(dtype).masked_fill(z == -torch.inf, -torch.inf)
        _check_values("teacher_logits", t, counted)
    _check_label_logits(loss, z, y, counted)

    # 3. The loss there, and 0 elsewhere
    positions = Positions(z, y, embeddings, t, number_ids, number_values)
    return z.new_zeros(labels.shape).index_put((counted,), FUNCTIONS[loss](positions, **full))


# ------------------------------------------------------------------------------------------------------------ checks


def _full_settings(loss: str, settings: dict[str, Any]) -> dict[str, Any]:
    check_choice("loss", loss, list(FUNCTIONS))
    if loss != "mce":
        return check_settings(loss, settings)
    if settings:
        raise RecipeError(f"mce is the exact one here and has no setting {', '.join(settings)}: see mce.token_mce.")
    return {}


def _check_logits(logits: Tensor, labels: Tensor) -> None:
    if logits.ndim != 2 or not logits.is_floating_point():
        raise DataError(f"logits is {tuple(logits.shape)} {logits.dtype}, but must be (N, V) of a float dtype.")
    positions, vocabulary_size = logits.shape
    if labels.shape != (positions,):
        raise DataError(f"labels has shape {tuple(labels.shape)}, but {positions} positions need ({positions},).")
    check_integers(labels)
    wrong = (labels != IGNORED) & ((labels < 0) | (labels.long() >= vocabulary_size))
    if wrong.any():
        position = int(torch.nonzero(wrong)[0])
        raise label_error(int(labels[position]), position, vocabulary_size)


def _checked_embeddings(loss: str, embeddings: Tensor | None, vocabulary_size: int) -> Tensor:
    if embeddings is None:
        raise DataError(
            f"{loss} compares tokens by their vectors. Give embeddings=(V, D), such as the LM head's weight."
        )
    if embeddings.ndim != 2 or embeddings.shape[0] != vocabulary_size:
        raise DataError(
            f"embeddings {tuple(embeddings.shape)} must be (V, D) with the V={vocabulary_size} tokens of the logits."
        )
    return embeddings


def _check_teacher(loss: str, teacher_logits: Tensor | None, logits: Tensor) -> None:
    if teacher_logits is None:
        raise DataError(f"{loss} needs the logits of a second model. Give teacher_logits=(N, V).")
    if teacher_logits.ndim == 2 and teacher_logits.shape[1] != logits.shape[1]:
        raise DataError(
            f"teacher_logits have {teacher_logits.shape[1]} tokens and logits {logits.shape[1]}, but {loss} compares "
            "token by token: use a teacher with the same vocabulary. Where only the padding differs, pad with -inf."
        )
    if teacher_logits.shape != logits.shape:
        raise DataError(
            f"teacher_logits {tuple(teacher_logits.shape)} must have the shape of logits, {tuple(logits.shape)}."
        )


def _checked_numbers(
    loss: str, number_ids: Tensor | None, number_values: Tensor | None, logits: Tensor
) -> tuple[Tensor, Tensor]:
    """Both as tensors, in the loss's dtype and where the logits are."""
    if number_ids is None or number_values is None:
        name = "number_ids" if number_ids is None else "number_values"
        raise DataError(
            f"{loss} needs {name}: which tokens are numbers, and their values. `number_tokens(tokenizer)` gives both."
        )
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    ids = torch.as_tensor(number_ids, device=logits.device)
    return ids, torch.as_tensor(number_values, dtype=dtype, device=logits.device)


def _check_values(name: str, z: Tensor, counted: Tensor) -> None:
    bad = torch.isnan(z) | (z == torch.inf)
    if bad.any():
        n, v = (int(i) for i in torch.nonzero(bad)[0])
        raise DataError(f"{name}[{int(counted[n])}, {v}] is {z[n, v].item()}, so the position has no distribution.")
    if z.shape[1] and (empty := (z == -torch.inf).all(-1)).any():
        raise DataError(
            f"{name}[{int(counted[torch.nonzero(empty)[0]])}] is -inf everywhere, so it has no distribution."
        )


def _check_label_logits(loss: str, z: Tensor, y: Tensor, counted: Tensor) -> None:
    if loss in _WITHOUT_LABEL:
        return
    impossible = z.gather(1, y.unsqueeze(1)).squeeze(1) == -torch.inf
    if impossible.any():
        n = int(torch.nonzero(impossible)[0])
        raise DataError(
            f"logits[{int(counted[n])}, {int(y[n])}] is -inf, but {int(y[n])} is the label, so {loss} is infinite. "
            "Ignore the position with -100, or give its token a finite logit."
        )
