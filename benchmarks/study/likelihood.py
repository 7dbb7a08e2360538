"""How likely a model finds given responses, and the effective rank of the hidden states it reads them with.

Legend: B rows of a batch, T tokens of a row, N response tokens, V vocabulary size, H hidden width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.study.figures import expected_calibration_error
from matrix_llm.base.modes import evaluation_mode
from matrix_llm.data.tokens import Continuation
from matrix_llm.information import effective_rank
from matrix_llm.loss.vocabulary import unit_vectors

NO_LIMIT = 100_000  # tokens of a row


@dataclass(frozen=True)
class Batch:
    ids: Tensor  # (B, T)
    mask: Tensor  # (B, T)
    labels: Tensor  # (B, T), -100 at the prompt and the padding


@dataclass(frozen=True)
class Likelihood:
    """Over the response tokens of some texts."""

    ce: float
    """Cross-entropy per token, in nats."""
    ece: float
    """Expected calibration error of the likeliest next token."""
    tokens: int
    """Number of these tokens."""


def make_batches(
    tokenizer: Any, texts: Sequence[tuple[str, str]], device: torch.device, limit: int = NO_LIMIT, batch_size: int = 32
) -> Iterator[Batch]:
    """Batches of (prompt, response) pairs, shortest first. Both parts are tokenised apart, as in training.

    Args:
        limit: tokens of a row that are kept, from its start.
    """
    responses = Continuation(tokenizer)([response for _, response in texts])
    rows: list[tuple[Tensor, Tensor]] = []  # ids and labels, (T_i,) each
    for (prompt, _), response in zip(texts, responses, strict=True):
        prompt_ids, response_ids = tokenizer(prompt)["input_ids"], [*response, tokenizer.eos_token_id]
        labels = [-100] * len(prompt_ids) + response_ids
        rows.append((torch.tensor((prompt_ids + response_ids)[:limit]), torch.tensor(labels[:limit])))
    rows.sort(key=lambda row: len(row[0]))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    for start in range(0, len(rows), batch_size):
        ids, labels = zip(*rows[start : start + batch_size], strict=True)
        yield Batch(
            pad_sequence(ids, True, pad).to(device),
            pad_sequence([torch.ones_like(row) for row in ids], True, 0).to(device),
            pad_sequence(labels, True, -100).to(device),
        )


def likelihood(model: Any, tokenizer: Any, texts: Sequence[tuple[str, str]], limit: int = NO_LIMIT) -> Likelihood:
    """Cross-entropy and calibration over the responses of (prompt, response) pairs."""
    total = 0.0
    confidences: list[float] = []
    right: list[bool] = []
    with evaluation_mode(model), torch.no_grad():
        for batch in make_batches(tokenizer, texts, model.device, limit):
            logits = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits[:, :-1]
            target = batch.labels[:, 1:]
            kept = target != -100
            log_q, target = logits[kept].float().log_softmax(-1), target[kept]  # (N, V), (N,)
            total -= log_q.gather(1, target[:, None]).double().sum().item()
            best = log_q.max(-1)
            confidences += best.values.exp().tolist()
            right += (best.indices == target).tolist()
    return Likelihood(total / len(right), expected_calibration_error(confidences, right), len(right))


def hidden_effective_rank(model: Any, tokenizer: Any, texts: Sequence[tuple[str, str]]) -> float:
    """Effective rank, 1 to H, of the second moment of the hidden states, as unit vectors, at response positions.

    The states are those of the last layer, which the LM head reads.
    """
    width = model.config.get_text_config().hidden_size
    moment = torch.zeros(width, width, dtype=torch.float64, device=model.device)  # (H, H)
    count = 0
    with evaluation_mode(model), torch.no_grad():
        for batch in make_batches(tokenizer, texts, model.device):
            out = model.base_model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
            states = out.last_hidden_state[:, :-1][batch.labels[:, 1:] != -100]  # (N, H)
            directions = unit_vectors(states, dtype=torch.float32)
            moment += (directions.T @ directions).double()
            count += len(directions)
    return effective_rank(moment / count).item()
