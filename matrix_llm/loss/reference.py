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
    """The value of one token loss at each position, differentiable in the logits: the reference for the fused head.

    With z = logits, q = softmax(z), y = labels, p = q_y, CE = -log p, L = logsumexp(z), t = softmax(teacher_logits),
    e_j the embeddings scaled to norm 1, and a term in [brackets] that passes no gradient:

        ce                CE                               label_smoothing   (1 - epsilon) CE + epsilon mean_j(-log q_j)
        dft               [p] CE                           z_loss            CE + weight L^2
        minus_p           1 - p                            gem               -sum_j [r_j w_j] (log q_y - log q_j)
        power             (1 - p^alpha) / alpha            ntl               sum_j s_j |v_j - v_y|, s over the numbers
        threshold         1 - p or CE where p >= at        emo               (CE + [CE / d] d) / 2
        focal             (1 - p)^gamma CE                 kd                KL(t || q), KL(q || t), or between
        eaft              [(H_k / scale)^alpha] CE         soft_ce           -sum_j t_j log q_j
        asft              [p] CE + weight KL(t || q)       soft_mce          -tr(P log Q), P = sum_j t_j e_j e_j^T
        mce               -e_y^T log(Q) e_y, Q = sum_j q_j e_j e_j^T

    The function of each, in `matrix_llm.loss.dense`, has the whole definition; `matrix_llm.loss.choice.LOSSES` has the
    settings with defaults and ranges.

    The mean over a batch is sum(values) / (labels != -100).sum(), with two exceptions: "ntl" divides by the positions
    whose label is a number, and the released code of "threshold" by the positions that are kept.

    Args:
        logits: (N, V) any float dtype; statistics are float32, or float64 for float64 logits. -inf removes a token.
        labels: (N,) integers in [0, V), or -100: the position does not count, its value and gradient are 0, and its
            logits are not read. "kd", "soft_ce" and "soft_mce" read nothing else of the label.
        loss: one of the names above.
        embeddings: (V, D) of any norm, for "emo", "mce" and "soft_mce": constants.
        teacher_logits: (N, V), for "kd", "soft_ce", "soft_mce" and "asft" (its reference model): constants. -inf
            removes a token, and so does -inf in the model's own logits.
        number_ids, number_values: (M,) integers and numbers, for "ntl"; `number_tokens(tokenizer)` gives both.
        settings: those of the loss; the others have their defaults.

    Returns:
        (N,) in nats ("ntl" and "emo"'s d: in units of the distance), float64 for float64 logits and else float32.

    Raises:
        RecipeError: an unknown loss or setting, or a value that is not allowed.
        DataError: shapes that do not fit, something that the loss needs and that is missing, NaN or +inf, a label
            outside the vocabulary or with a logit of -inf, a divergence that is infinite.
        TypeError: labels that are not integers.

    >>> import torch
    >>> token_loss(torch.zeros(2, 4, dtype=torch.float64), torch.tensor([3, -100]), "power", alpha=2)  # (1 - 1/16) / 2
    tensor([0.4688, 0.0000], dtype=torch.float64)
    """
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
