"""Token losses to compare with matrix cross-entropy, as researchers and other toolkits define them (docs/losses.md).

    token_loss          the reference: whole logits, autograd
    linear_token_loss   the same and MCE, fused with the LM head: what training uses
    number_tokens       what the number token loss needs to know of a tokenizer

Legend: N positions, V vocabulary, H hidden width, D embedding width, M number tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from matrix_llm.loss import reference
from matrix_llm.loss.dense.numbers import number_tokens
from matrix_llm.loss.linear import TeacherLike, TokenLossOutput, linear_loss
from matrix_llm.loss.settings import LossSettings
from matrix_llm.loss.teachers import Teacher, TopTokens

__all__ = ["Teacher", "TokenLossOutput", "TopTokens", "linear_token_loss", "number_tokens", "token_loss"]


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
    return reference.token_loss(
        logits,
        labels,
        loss,
        embeddings=embeddings,
        teacher_logits=teacher_logits,
        number_ids=number_ids,
        number_values=number_values,
        **settings,
    )


@torch.compiler.disable
def linear_token_loss(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (N,)
    loss: str = "ce",
    *,
    mce_weight: float = 0.0,
    bias: Tensor | None = None,  # (V,)
    embeddings: Tensor | None = None,  # (V, D)
    teacher: TeacherLike | None = None,
    settings: Mapping[str, Any] | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    reduction: str = "mean",
    matrix: LossSettings | None = None,
) -> TokenLossOutput:
    """A token loss + mce_weight * MCE straight from hidden states; the full (N, V) logits never exist.

    The same values as `token_loss(logits, labels, loss, **settings)` with
    logits = softcap * tanh(logit_scale * (hidden W^T + bias) / softcap), or without the cap if softcap is None.

    Args:
        hidden: (N, H) float64, float32, bfloat16 or float16. Statistics are float32 (float64 for float64 input).
        weight: (V, H) of the LM head.
        labels: (N,) integers in [0, V), or ignore_index.
        loss: a key of `matrix_llm.loss.choice.LOSSES`.
        mce_weight: finite, at least 0. MCE is measured also at 0. No loss's gate weighs it.
        bias: (V,) of the LM head; -inf removes a token.
        embeddings: (V, D) token vectors of MCE, emo and soft_mce, of any norm; None: the LM head's weight, detached.
        teacher: kd, soft_ce, asft and soft_mce: `Teacher(hidden, weight, bias, logit_scale, softcap)`, whose logits are
            made a chunk at a time; `TopTokens(ids, log_probabilities)`, stored before; or whole logits (N, V). A plain
            tuple is taken for one of the first two. Other losses do not read it.
        settings: the loss's own settings by name; ntl's number_ids (K,) and number_values (K,) among them.
        ignore_index: the label of positions that do not count.
        logit_scale, softcap: as the model does to its logits; softcap above 0, or None.
        reduction: "mean" over the positions that count, "sum", or "none". For "mean", ntl's term is divided by the
            positions whose label is a number, and threshold's by those that it keeps; MCE by all that count.
        matrix: how MCE is computed; the other arguments override its mce_weight and token_loss. None: the measured
            default.

    Returns:
        `TokenLossOutput`. If every label is ignored, the loss is a zero still connected to the graph.

    Raises:
        ValueError: shapes that do not fit, a label outside the vocabulary, an unknown loss, setting or reduction, a
            setting out of range, a teacher that is missing or has another vocabulary.
        TypeError: labels that are not integers.

    >>> h, w = torch.zeros(2, 3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    >>> linear_token_loss(h, w, torch.tensor([0, -100]), "dft").loss  # p CE = log(3) / 3
    tensor(0.3662, dtype=torch.float64)
    """
    chosen = dataclasses.replace(
        matrix or LossSettings(), mce_weight=mce_weight, token_loss=loss, token_loss_settings=settings
    )
    return linear_loss(
        hidden,
        weight,
        labels,
        chosen,
        embeddings=weight.detach() if embeddings is None else embeddings,
        teacher=teacher,
        bias=bias,
        ignore_index=ignore_index,
        logit_scale=logit_scale,
        softcap=softcap,
        reduction=reduction,
    )
