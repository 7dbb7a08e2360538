"""What one trained run is measured on, with everything fixed but its weights.

Legend: N trained positions of a batch, V vocabulary, H hidden width.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.pretrained_study.cache import CachedSet
from benchmarks.pretrained_study.split import Split
from benchmarks.study.measure import PROBLEM_SEED
from matrix_llm.base.modes import evaluation_mode
from matrix_llm.data.prompts import CHAT, PROMPT_TEMPLATES
from matrix_llm.data.readers import Source
from matrix_llm.data.wordproblems import generate
from matrix_llm.information import effective_rank
from matrix_llm.loss.vocabulary import unit_vectors
from matrix_llm.model.lm_head import head_effective_rank
from matrix_llm.run.decode import final_answer, measure_accuracy

BATCH = 8
NUMBER_AFTER_EQUALS = re.compile(r"=\s*\$?\s*(-?\d[\d,]*(?:\.\d+)?)")
NEW_TOKENS = 256


@dataclass(frozen=True)
class Reading:
    """Over the trained positions of a set, each predicted from the true tokens before it."""

    ce: float
    """CE a token, in nats."""
    row_ce: list[float]
    """CE of each row, summed."""
    numbers: float
    """Share of the numbers after "=" of which every token is the likeliest one; NaN without such numbers."""
    rank_hidden: float
    """Effective rank of the last hidden states, as unit vectors."""


@dataclass(frozen=True)
class Asked:
    """A problem to answer."""

    query: str
    answer: str


def number_spans(tokenizer: Any, ids: Sequence[int]) -> list[tuple[int, int]]:
    """[first, last) of the tokens that spell each number after an "=" sign.

    The text is put together token by token, so a token is a number's if it holds any of its characters.
    """
    pieces = [tokenizer.decode([each], clean_up_tokenization_spaces=False) for each in ids]
    starts = [0]
    for piece in pieces:
        starts.append(starts[-1] + len(piece))
    spans = []
    for match in NUMBER_AFTER_EQUALS.finditer("".join(pieces)):
        inside = [i for i in range(len(ids)) if starts[i] < match.end(1) and starts[i + 1] > match.start(1)]
        spans.append((inside[0], inside[-1] + 1))
    return spans


@torch.no_grad()
def read(split: Split, tokenizer: Any, rows: CachedSet) -> Reading:
    """One pass over a set."""
    head = split.upper.get_output_embeddings()
    width = head.weight.shape[1]
    moment = torch.zeros(width, width, dtype=torch.float64)
    losses, exact, positions = [0.0] * len(rows.rows), [], 0
    order = sorted(range(len(rows.rows)), key=lambda i: len(rows.rows[i].ids))
    with evaluation_mode(split.upper):
        for start in range(0, len(order), BATCH):
            places = order[start : start + BATCH]
            inputs = split.inputs([rows.rows[i] for i in places], rows.states(places))
            hidden = split.upper.base_model(**inputs.arguments, use_cache=False).last_hidden_state[:, :-1]
            for n, place in enumerate(places):
                target = inputs.labels[n, 1:]
                kept = target != -100
                states: Tensor = hidden[n][kept]  # (N, H)
                logits = head(states).float()  # (N, V)
                losses[place] = torch.nn.functional.cross_entropy(logits, target[kept], reduction="sum").item()
                right = (logits.argmax(-1) == target[kept]).tolist()
                spans = number_spans(tokenizer, target[kept].tolist())
                exact += [all(right[first:last]) for first, last in spans]
                directions = unit_vectors(states, dtype=torch.float32)
                moment += (directions.T @ directions).double().cpu()
                positions += len(right)
    numbers = sum(exact) / len(exact) if exact else float("nan")
    return Reading(sum(losses) / positions, losses, numbers, effective_rank(moment / positions).item())


def greedy(split: Split, tokenizer: Any, test: Path, problems: int) -> dict[str, float]:
    """Accuracy of greedy answers to the first problems of GSM8K's test file, and to the generator's held-out ones."""
    rows = Source(str(test), max_rows=problems).rows()
    asked = [Asked(row.question, final_answer(row.answer) or "") for row in rows]
    sets: dict[str, Sequence[Any]] = {"gsm8k": asked, "generated": generate(problems, seed=PROBLEM_SEED, split="test")}
    template = CHAT if getattr(tokenizer, "chat_template", None) else PROMPT_TEMPLATES["plain"]
    how: dict[str, Any] = {"template": template, "max_new_tokens": NEW_TOKENS, "batch_size": 32}
    return {
        f"accuracy_{name}": measure_accuracy(split.full, tokenizer, each, **how).accuracy for name, each in sets.items()
    }


def measure(
    split: Split, tokenizer: Any, cache: Path, names: Sequence[str], test: Path | None = None, problems: int = 0
) -> dict[str, Any]:
    """The figures of a row: `ce_NAME` of each set, and for `heldout` the rest as well."""
    figures: dict[str, Any] = {"rank_head": round(head_effective_rank(split.upper), 4)}
    for name in names:
        reading = read(split, tokenizer, CachedSet.open(cache, name))
        figures[f"ce_{name}"] = reading.ce
        if name == "heldout":
            figures |= {"numbers_exact": reading.numbers, "rank_hidden": round(reading.rank_hidden, 4)}
            figures["row_ce"] = [round(each, 4) for each in reading.row_ce]
    if problems and test is not None:
        figures |= greedy(split, tokenizer, test, problems)
    return figures
