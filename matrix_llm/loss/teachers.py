"""Losses whose target is another model's distribution: kd, soft_ce, asft, soft_mce.

The teacher is given as its hidden states and LM head, whose logits are made a chunk at a time like the student's; as
the logits of its likeliest tokens, stored before; or as whole logits. No gradient flows into it.

With s and t the two log-softmaxes at temperature T, and m = beta t + (1 - beta) s (in probabilities),

    beta = 0   KL(t || s)                              gradient (q - t) / T
    beta = 1   KL(s || t)                              q_j (l_j - mean) / T,   l = log s - log t
    else       beta KL(t || m) + (1 - beta) KL(s || m) (1 - beta) q_j (l_j - mean) / T,   l = log s - log m

Legend: N positions, C of one chunk, V vocabulary, H hidden width of the teacher, k stored tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from matrix_llm.base.errors import RecipeError
from matrix_llm.loss.products import multiply
from matrix_llm.loss.token_terms import Chunk, LossTerms, TokenLoss


class Teacher(NamedTuple):
    """A second model's hidden states and LM head."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None = None  # (V,)
    logit_scale: float = 1.0  # factor on the logits
    softcap: float | None = None  # bound on the logits


class TopTokens(NamedTuple):
    """The teacher's likeliest tokens, stored before."""

    ids: Tensor  # (N, k) int64, all different in a row
    log_probabilities: Tensor  # (N, k) over the whole vocabulary; -inf: no token


def _name_form(teacher: Any) -> Teacher | TopTokens | Tensor:
    """A plain tuple or list as the form that it is: hidden states are numbers, ids are integers."""
    if isinstance(teacher, (Tensor, Teacher, TopTokens)):
        return teacher
    parts = tuple(teacher) if isinstance(teacher, (tuple, list)) else ()
    if parts and isinstance(parts[0], Tensor):
        form: Any = Teacher if parts[0].is_floating_point() else TopTokens
        if 2 <= len(parts) <= len(form._fields):
            return form(*parts)
    raise RecipeError(
        f"the teacher is a {type(teacher).__name__} that is none of its forms. Give Teacher(hidden, weight, bias, "
        "logit_scale, softcap), TopTokens(ids, log_probabilities), or logits (N, V)."
    )


def check_teacher(teacher: Any, positions: int, vocabulary_size: int) -> Teacher | TopTokens | Tensor:
    """The teacher as one of the three forms, with shapes that fit.

    Raises:
        ValueError: it has other positions or another vocabulary, or is none of the forms.
    """
    teacher = _name_form(teacher)
    if isinstance(teacher, TopTokens):
        if teacher.ids.shape != teacher.log_probabilities.shape or teacher.ids.shape[:1] != (positions,):
            raise ValueError(
                f"the teacher's ids {tuple(teacher.ids.shape)} and log-probabilities "
                f"{tuple(teacher.log_probabilities.shape)} must both be ({positions}, k)."
            )
        if teacher.ids.numel() and not 0 <= int(teacher.ids.min()) <= int(teacher.ids.max()) < vocabulary_size:
            raise ValueError(
                f"the teacher's tokens reach id {int(teacher.ids.max())}, but the student has {vocabulary_size}. "
                "Distillation compares token by token: use a teacher with the student's vocabulary."
            )
        return teacher._replace(ids=teacher.ids.long())  # int32 cannot index
    own = teacher if isinstance(teacher, Tensor) else teacher.hidden
    size = teacher.shape[-1] if isinstance(teacher, Tensor) else teacher.weight.shape[0]
    if own.ndim != 2 or own.shape[0] != positions:
        raise ValueError(f"the teacher has {tuple(own.shape)}, but {positions} positions need ({positions}, ...).")
    if size != vocabulary_size:
        raise ValueError(
            f"the teacher has a vocabulary of {size}, the student one of {vocabulary_size}. Distillation compares "
            "token by token: use a teacher with the student's vocabulary."
        )
    return teacher


def select_positions(teacher: Teacher | TopTokens | Tensor, index: Tensor) -> Teacher | TopTokens | Tensor:
    """The teacher at the positions of `index`, (n,)."""
    if isinstance(teacher, Tensor):
        return teacher.detach()[index]
    if isinstance(teacher, TopTokens):
        return TopTokens(teacher.ids[index], teacher.log_probabilities.detach()[index])
    return teacher._replace(hidden=teacher.hidden.detach()[index], weight=teacher.weight.detach())


def _logits(loss: TokenLoss, chunk: Chunk) -> Tensor:
    """(C, V) the teacher's logits at this chunk's positions, in the dtype of the statistics.

    A token that the student cannot have (a bias of -inf) is none for the teacher either.
    """
    teacher, z = loss.teacher, chunk.z
    if isinstance(teacher, Tensor):
        out = teacher[chunk.at].to(z.dtype, copy=True)
    elif isinstance(teacher, TopTokens):
        ids, logs = teacher.ids[chunk.at], teacher.log_probabilities[chunk.at].to(z.dtype)
        out = torch.full_like(z, -torch.inf).scatter_(1, ids, logs)
    else:
        assert chunk.product is not None
        out = chunk.product
    return out if loss.allowed is None else out.masked_fill_(~loss.allowed, -torch.inf)


def make_logits(teacher: Teacher, at: slice, out: Tensor) -> None:
    """out (C, V) = the teacher's logits at some positions."""
    hidden = teacher.hidden[at]
    multiply(hidden, teacher.weight.to(hidden.dtype).T, out=out)
    if teacher.bias is not None:
        out += teacher.bias.detach()
    if teacher.logit_scale != 1.0:
        out *= teacher.logit_scale
    if teacher.softcap is not None:
        out.div_(teacher.softcap).tanh_().mul_(teacher.softcap)


def likeliest(chunk: Chunk, loss: TokenLoss, count: int) -> tuple[Tensor, Tensor]:
    """The teacher's likeliest tokens: ids (C, k), and their probabilities scaled to sum to 1, (C, k); k <= count."""
    logits = _logits(loss, chunk)
    if isinstance(loss.teacher, TopTokens):
        count = min(count, loss.teacher.ids.shape[1])
    values, ids = logits.topk(min(count, logits.shape[1]), dim=-1)
    return ids, torch.softmax(values, -1)


def _keep_likeliest(log_t: Tensor, top_k: int) -> Tensor:
    """-inf everywhere but at the `top_k` largest of each position; in place."""
    values, ids = log_t.topk(top_k, dim=-1)
    return log_t.fill_(-torch.inf).scatter_(1, ids, values)


def _expectation(weights: Tensor, values: Tensor) -> Tensor:
    """(C,) sum_j weights_j values_j, where 0 times anything is 0."""
    return torch.where(weights > 0, values, 0.0).mul_(weights).sum(-1)


def _forward_kl(t: Tensor, log_t: Tensor, log_s: Tensor) -> Tensor:
    """(C,) KL(t || s); t may sum to less than 1."""
    return _expectation(t, log_t - log_s)


def _difference_terms(of: Tensor, difference: Tensor) -> tuple[Tensor, Tensor]:
    """sum_j of_j difference_j (C,), and of_j (difference_j - that sum) (C, V)."""
    difference = torch.where(of > 0, difference, 0.0)
    mean = (of * difference).sum(-1)
    return mean, difference.sub_(mean[:, None]).mul_(of)


def _kd(chunk: Chunk, loss: TokenLoss) -> LossTerms:
    beta, temperature = loss.settings["beta"], loss.settings["temperature"]
    top_k, renormalise = loss.settings["top_k"], loss.settings["renormalise"]
    zero = torch.zeros_like(chunk.ce)

    # 1. both distributions at the temperature
    log_s = torch.log_softmax(chunk.z / temperature, -1)
    log_t = torch.log_softmax(_logits(loss, chunk).div_(temperature), -1)
    if top_k is not None and top_k < log_t.shape[1]:
        log_t = _keep_likeliest(log_t, top_k)
        if renormalise:
            log_t -= log_t.logsumexp(-1, keepdim=True)
    s, t = log_s.exp(), log_t.exp()

    # 2. the divergence, and its gradient in z / temperature
    if beta == 0:
        value = _forward_kl(t, log_t, log_s)
        gradient = s.mul_(t.sum(-1, keepdim=True)).sub_(t)
    elif beta == 1:
        value, gradient = _difference_terms(s, log_s - log_t)
    else:
        mixture = torch.add(t * beta, s, alpha=1 - beta).log()
        reverse, gradient = _difference_terms(s, log_s - mixture)
        value = beta * _forward_kl(t, log_t, mixture) + (1 - beta) * reverse
        gradient = gradient.mul_(1 - beta)
    return LossTerms(value, zero, zero, gradient, 1 / temperature)


def _soft_ce(chunk: Chunk, loss: TokenLoss) -> LossTerms:
    """-sum_j t_j log q_j."""
    t_logits = _logits(loss, chunk)
    t = torch.softmax(t_logits, -1)
    value = _expectation(t, chunk.log_z[:, None] - chunk.z)
    entropy = torch.special.entr(t).sum(-1)
    return LossTerms(value, None, torch.zeros_like(value), t, -1.0, floor=entropy)


def _asft(chunk: Chunk, loss: TokenLoss) -> LossTerms:
    """p CE, p a constant, plus weight times the KL divergence to the reference."""
    weight, p, ce = loss.settings["weight"], chunk.p, chunk.ce
    assert chunk.q is not None
    log_t = torch.log_softmax(_logits(loss, chunk), -1)
    log_q = chunk.z - chunk.log_z[:, None]
    if loss.settings["direction"] == "ref_model":
        t = log_t.exp()
        return LossTerms(p * ce + weight * _forward_kl(t, log_t, log_q), p + weight, p, t, -weight)
    kl, gradient = _difference_terms(chunk.q, log_q - log_t)
    return LossTerms(p * ce + weight * kl, p, p, gradient, weight)


LARGEST_SOFT_TARGET = 1024  # tokens: the block of directions has as many columns


def _soft_mce(chunk: Chunk, loss: TokenLoss) -> LossTerms:
    """-tr(P log Q) with P = sum_i t_i e_i e_i^T over the teacher's likeliest tokens."""
    assert chunk.q is not None
    assert loss.soft_matrix is not None
    assert loss.target_entropy is not None
    ids, target = likeliest(chunk, loss, loss.settings["top_k"] or chunk.z.shape[1])
    value, gradient = loss.soft_matrix(chunk.q, ids, target)
    zero = torch.zeros_like(value)
    return LossTerms(value, zero, zero, gradient, floor=loss.target_entropy(ids, target))


def check_soft_target(top_k: int | None, tokens: int) -> None:
    """Raise RecipeError for a soft target of more than LARGEST_SOFT_TARGET of the teacher's `tokens`."""
    if min(top_k or tokens, tokens) > LARGEST_SOFT_TARGET:
        raise RecipeError(
            f"soft_mce with top_k={top_k} has a target of {min(top_k or tokens, tokens)} tokens at each position, but "
            f"at most {LARGEST_SOFT_TARGET} fit. Write `token_loss_settings: {{top_k: 16}}`."
        )


TERMS: dict[str, Callable[[Chunk, TokenLoss], LossTerms]] = {
    "kd": _kd,
    "soft_ce": _soft_ce,
    "asft": _asft,
    "soft_mce": _soft_mce,
}
