"""Train one run: AdamW, cosine rate, clipping, and the loss of matrix_llm, over a seed's rows.

The optimisation is that of the product's trainer (tests compare a run of both, step by step); only the frozen layers
are not computed again.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import get_cosine_schedule_with_warmup

from benchmarks.pretrained_study.cache import CachedSet
from benchmarks.pretrained_study.design import CLIPPING, EPSILON, WARMUP, WEIGHT_DECAY, WINDOW
from benchmarks.pretrained_study.rows import batches
from benchmarks.pretrained_study.split import Split
from benchmarks.study.design import StudyError
from matrix_llm.loss.settings import LossSettings
from matrix_llm.model.lm_head import add_matrix_head

LOSS_KEYS = {"mce_weight": "mce_weight", "token_loss": "token_loss", "mce_top_k": "top_k"}
LOSS_KEYS |= {"mce_steps": "steps", "mce_embeddings": "embeddings"}
OTHER_KEYS = {"max_grad_norm", "adam_epsilon", "max_train_rows"}


@dataclass(frozen=True)
class Step:
    """One optimizer step."""

    ce: float
    """Summed CE of its rows, in nats, before the step."""
    base_ce: float
    """The base's summed CE of the same rows."""
    tokens: int
    """Trained positions."""
    gradient: float
    """Norm of the gradient before clipping."""


def loss_settings(overrides: Mapping[str, Any]) -> LossSettings:
    """The loss of an arm.

    Raises:
        StudyError: an override that this training does not know, so that none is ignored.
    """
    if unknown := sorted(set(overrides) - set(LOSS_KEYS) - OTHER_KEYS):
        raise StudyError(
            f"the arm sets {unknown[0]}={overrides[unknown[0]]!r}, which benchmarks/pretrained_study/training.py does "
            f"not know. It knows {', '.join(sorted({*LOSS_KEYS, *OTHER_KEYS}))}."
        )
    return LossSettings(**{LOSS_KEYS[key]: value for key, value in overrides.items() if key in LOSS_KEYS})


def train(
    split: Split, pool: CachedSet, places: Sequence[int], overrides: Mapping[str, Any], rate: float, batch_rows: int
) -> Iterator[Step]:
    """Train in place, and yield after every step.

    Args:
        places: of the rows in the pool, in order; an arm with `max_train_rows` takes that many from the start.
    """
    head = add_matrix_head(split.upper, loss_settings(overrides))
    steps = batches(list(places)[: overrides.get("max_train_rows")], batch_rows)
    matrices, vectors = ([p for p in split.trained if (p.ndim > 1) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, eps=overrides.get("adam_epsilon", EPSILON))
    schedule = get_cosine_schedule_with_warmup(optimizer, round(WARMUP * len(steps)), len(steps))

    split.upper.train()
    for number, chosen in enumerate(steps):
        rows = [pool.rows[place] for place in chosen]
        inputs = split.inputs(rows, pool.states(chosen))
        head.step = number  # the vocabulary's summary is computed once per step
        with torch.autocast(split.device.type, torch.bfloat16, enabled=split.device.type == "cuda"):
            out = split.upper(**inputs.arguments, labels=inputs.labels, matrix_loss=True)
        tokens = sum(row.trained for row in rows)
        (out.loss_sum / tokens).backward()
        norm = torch.nn.utils.clip_grad_norm_(split.trained, overrides.get("max_grad_norm", CLIPPING))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        base = sum(pool.base_ce[place] for place in chosen)
        yield Step(out.cross_entropy.sum().item(), base, tokens, norm.item())


def windows(steps: Sequence[Step]) -> list[list[float]]:
    """[last step, CE a token, the base's CE a token] of every WINDOW steps; the last window may be shorter."""
    found = []
    for start in range(0, len(steps), WINDOW):
        part = steps[start : start + WINDOW]
        tokens = sum(step.tokens for step in part)
        ce, base = (sum(getattr(step, name) for step in part) / tokens for name in ("ce", "base_ce"))
        found.append([start + len(part), round(ce, 5), round(base, 5)])
    return found


def rises(curve: Sequence[Sequence[float]], steps: int) -> bool:
    """Whether training CE exceeds the base's on the same rows in any window that begins after the warm-up.

    >>> rises([[10, 1.2, 1.1], [20, 1.0, 1.1]], 20), rises([[10, 1.2, 1.1], [20, 1.2, 1.1]], 20)
    (False, True)
    """
    first = [0, *(int(last) for last, *_ in curve[:-1])]
    return any(ce > base for start, (_, ce, base) in zip(first, curve, strict=True) if start >= max(1, WARMUP * steps))


def describe_steps(steps: Sequence[Step]) -> dict[str, Any]:
    """What a row keeps of the steps."""
    curve = windows(steps)
    return {
        "steps": len(steps),
        "curve_ce": curve,
        "rises": rises(curve, len(steps)),
        "grad_norm": round(sum(step.gradient for step in steps) / len(steps), 4),
        "clipped": round(sum(step.gradient > CLIPPING for step in steps) / len(steps), 4),
    }
