"""The whole diagnosis as one JSON object: `diagnose` measures, and `reading`, `text`, `page` and the card read it.

    model, rows, settings    what was measured, with what
    head                     the LM head's rows as MCE sees them, for each choice of token vectors
    loss                     CE and MCE in all, by kind of token and by CE
    forgiven                 CE - MCE, and to which tokens
    gradients                MCE and CE + w MCE against CE, for the same groups
    token_losses             every token loss against CE, for the same groups
    solver                   the solver's error against an accurate reference
    reading                  the figures in words
    cost, versions           seconds of each part, the peak of memory, and what ran

"In use" are the recipe's token vectors; beside them stand the same vectors minus their mean ("centred"), or the LM
head's own rows where the recipe centres them.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import psutil
import torch
from torch import Tensor

from matrix_llm.base.errors import ModelError, RecipeError
from matrix_llm.base.weights import check_finite
from matrix_llm.config import Recipe
from matrix_llm.diagnose.accuracy import count_affordable, mce_loss, measure_solver, spread_by_ce
from matrix_llm.diagnose.forgiven import Forgiven, forgiven
from matrix_llm.diagnose.gradients import (
    LMHead,
    Overlap,
    Terms,
    agreement,
    cross_entropy,
    evaluate,
    overlap,
    sum_agreement,
)
from matrix_llm.diagnose.groups import by_cross_entropy, by_kind, show_token
from matrix_llm.diagnose.head import describe_rows, nearest_pairs
from matrix_llm.diagnose.positions import Positions, draw_positions
from matrix_llm.diagnose.reading import read_figures, read_token_losses
from matrix_llm.diagnose.subject import Subject, not_applied, read_model, read_rows
from matrix_llm.diagnose.token_losses import Measured, choose_losses, compare_losses
from matrix_llm.loss.settings import LossSettings
from matrix_llm.loss.vocabulary import mean_vector, subtract_mean
from matrix_llm.model.lm_head import check_head, load_embeddings
from matrix_llm.publish.card import versions
from matrix_llm.publish.finished_run import DIAGNOSIS_FORMAT, DIAGNOSIS_VERSION

IN_USE = "in use"
GRADIENTS = 4  # (N, V) float32 that are held at once
PAIRS_OF = 1024  # targets whose nearest rows are looked for


@dataclass
class _Clock:
    """Seconds of each part, said as it begins."""

    say: Callable[[str], None]
    seconds: dict[str, float] = field(default_factory=dict)
    _last: float = field(default_factory=time.perf_counter)

    def finish(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part] = round(now - self._last, 2)
        self.say(f"=> {part}: {self.seconds[part]:.1f} s")
        self._last = now


def diagnose(subject: Subject, asked: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure what MCE will do to a model on the rows of a recipe.

    Args:
        subject: of `subject.find_subject`.
        asked: positions to measure; fewer if the rows hold fewer.
        say: prints a line on the progress.

    Returns:
        The object of this module's docstring; numbers, texts, lists and mappings only.

    Raises:
        DataError, RecipeError, ModelError: rows, model or settings that cannot be measured.
    """
    clock, recipe = _Clock(say), subject.recipe
    # 1. rows, model, positions
    prepared = read_rows(recipe, say)
    clock.finish("reading rows")
    model = read_model(subject, prepared.tokenizer)
    check_finite(model, subject.name)  # with the adapter in it
    check_head(model)
    if torch.cuda.is_available() and not recipe.training.use_cpu:
        model.to("cuda")  # type: ignore[arg-type]
    clock.finish("reading the model")
    positions = draw_positions(model, prepared.train, asked, recipe.training.seed, say)
    clock.finish("hidden states")
    check_memory(len(positions.labels), len(LMHead.of(model).weight), _free_memory(model.device))

    # 2. everything else needs only the LM head and the positions
    result: dict[str, Any] = {"format": DIAGNOSIS_FORMAT, "version": DIAGNOSIS_VERSION}
    result["model"] = _describe_model(subject, model)
    result["rows"] = _describe_rows(recipe, prepared.report, positions, asked)
    result["settings"] = _describe_settings(recipe, len(LMHead.of(model).weight))
    result |= _measure(recipe, model, prepared.tokenizer, positions, clock)
    result["token_losses"]["reading"] = read_token_losses(result["token_losses"])
    result["reading"] = read_figures(result)
    result["cost"] = {
        "seconds": clock.seconds,
        "cpu_seconds": round(time.process_time(), 1),  # all threads of this process, its imports included
        "peak_memory_gib": round(_peak_memory(), 2),
        "device": str(model.device),
    }
    result["versions"] = versions()
    return result


def check_memory(positions: int, vocabulary: int, free: int) -> None:
    """Refuse more positions than memory holds: their gradients in the logits, of CE, of MCE and two more at a time.

    Args:
        free: bytes.

    Raises:
        RecipeError: with the number that fits.

    >>> check_memory(480, 49152, 2**30)
    """
    each = GRADIENTS * 4 * vocabulary
    if positions * each > free:
        raise RecipeError(
            f"--positions: the gradients of {positions:,} positions take about {positions * each / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are free. Ask for at most {max(free // each, 2):,}."
        )


def _free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


# --- what was measured ------------------------------------------------------------------------------------------------


def _describe_model(subject: Subject, model: Any) -> dict[str, Any]:
    weight = model.get_output_embeddings().weight
    return {
        "name": subject.name,
        "base_of_adapter": subject.adapter.base if subject.adapter else None,
        "revision": subject.recipe.model.model_revision,
        "architecture": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": weight.shape[0],
        "hidden_width": weight.shape[1],
        "tied": model.get_input_embeddings().weight is weight,
    }


def _describe_rows(recipe: Recipe, report: Any, positions: Positions, asked: int) -> dict[str, Any]:
    return {
        "dataset": recipe.data.dataset,
        "prompt_template": recipe.data.prompt_template,
        "max_length": recipe.training.max_length,
        "read": report.rows_in,
        "trainable": report.rows_kept,
        "dropped_too_long": report.dropped_too_long,
        "dropped_without_trained_token": report.dropped_all_masked,
        "dropped_weight_zero": report.dropped_weight_zero,
        "cut_to_max_length": report.truncated,
        "rows_used": positions.rows,
        "tokens_used": positions.tokens,
        "trained_positions_in_them": positions.trained,
        "positions_asked": asked,
        "positions": len(positions.labels),
        "seed": recipe.training.seed,
    }


def _describe_settings(recipe: Recipe, vocabulary: int) -> dict[str, Any]:
    training = recipe.training
    solver = LossSettings.from_config(training).solver_for(vocabulary)
    given = {name: getattr(training, name) for name in vars(training) if name.startswith(("mce_", "token_loss"))}
    return {
        **given,
        "mce_weight_shown": _weight(recipe),
        "solver": asdict(solver) | {"whole_vocabulary": solver.top_k is None},
        "use_peft": recipe.model.use_peft,
        "trains_head": not recipe.model.use_peft or "lm_head" in (recipe.model.lora_modules_to_save or []),
        "not_applied": not_applied(recipe),
    }


def _weight(recipe: Recipe) -> float:
    """w of CE + w MCE: the recipe's mce_weight, or 1 where that is 0."""
    return recipe.training.mce_weight or 1.0


def _peak_memory() -> float:
    """The largest resident memory of this process so far, in GiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


# --- the measurements -------------------------------------------------------------------------------------------------


def token_vectors(recipe: Recipe, model: Any) -> dict[str, Tensor]:
    """The token vectors to measure MCE with, (V, D) float32 each: those in use, and a second choice to compare."""
    weight = model.get_output_embeddings().weight.detach()
    chosen = recipe.training.mce_embeddings
    if chosen in ("lm_head", "centred"):
        vectors = weight
    elif chosen == "input":
        vectors = model.get_input_embeddings().weight.detach()
    else:
        vectors = load_embeddings(chosen, len(weight)).to(weight.device)
    vectors = vectors.float()
    centred = subtract_mean(vectors, mean_vector(vectors, torch.float32))
    return {IN_USE: centred, "lm_head": vectors} if chosen == "centred" else {IN_USE: vectors, "centred": centred}


def _measure(recipe: Recipe, model: Any, tokenizer: Any, positions: Positions, clock: _Clock) -> dict[str, Any]:
    hidden, labels, head = positions.hidden, positions.labels, LMHead.of(model)
    settings, weight = LossSettings.from_config(recipe.training), _weight(recipe)
    choices = token_vectors(recipe, model)
    result: dict[str, Any] = {"head": {}, "forgiven": {}, "gradients": {}, "token_losses": {}, "solver": {}}

    # 1. CE, which all else is compared with
    ce = evaluate(cross_entropy, hidden, labels, head)
    _check_finite("CE", ce.value, labels, tokenizer)
    ce_ce = overlap(ce, ce, hidden)
    groups = {"all": {"all": torch.arange(len(labels))}}
    groups |= {"by_kind": by_kind(labels, tokenizer), "by_ce": by_cross_entropy(ce.value)}
    targets = torch.unique(labels)[:PAIRS_OF]
    values = {}
    clock.finish("CE and its gradient")

    for name, vectors in choices.items():
        # 2. the rows, MCE, what it forgives, and its gradient
        said = name if name != IN_USE else recipe.training.mce_embeddings
        result["head"][name] = _head(vectors, targets, tokenizer)
        clock.finish(f"rows of the LM head, {said}")
        mce = evaluate(mce_loss(settings, vectors), hidden, labels, head)
        _check_finite(f"MCE with {said} vectors", mce.value, labels, tokenizer)
        values[name] = mce.value
        result["forgiven"][name] = _forgiven(
            forgiven(hidden, labels, head, vectors, ce.value - mce.value), labels, tokenizer
        )
        products = ce_ce, overlap(ce, mce, hidden), overlap(mce, mce, hidden)
        result["gradients"][name] = _agreements(groups, products, weight)
        clock.finish(f"MCE and its gradient, {said}")
        # 3. the other token losses; none of them centres the token vectors
        if name == IN_USE:
            measured = Measured(hidden, labels, head, choices.get("lm_head", vectors), ce, mce, products)
            chosen = choose_losses(recipe.training, labels, tokenizer)
            result["token_losses"] = compare_losses(chosen, measured, weight, groups)
            clock.finish(f"{len(chosen.candidates)} other token losses")
            del measured
        # 4. the solver's error, on as many positions as the reference can treat
        result["solver"][name] = _solver(mce, ce, positions, head, vectors, weight)
        clock.finish(f"the solver's error, {said}")
        del mce
    result["loss"] = {name: _losses(group, ce.value, values) for name, group in groups.items()}
    return result


def _check_finite(what: str, values: Tensor, labels: Tensor, tokenizer: Any) -> None:
    """Refuse a loss that is not finite: a logit overflows."""
    if not torch.isfinite(values).all():
        place = int(torch.nonzero(~torch.isfinite(values))[0])
        target = show_token(tokenizer, int(labels[place]))
        raise ModelError(
            f"{what} is {values[place].item()} where the target is {target}, so its gradient says nothing. Give other "
            "rows, or another checkpoint."
        )


def _head(vectors: Tensor, targets: Tensor, tokenizer: Any) -> dict[str, Any]:
    pairs = nearest_pairs(vectors, targets)
    shown = [
        {"token": _token(tokenizer, each.token), "nearest": _token(tokenizer, each.nearest), "cosine": each.cosine}
        for each in pairs
    ]
    return {**asdict(describe_rows(vectors)), "nearest_of": len(targets), "nearest": shown}


def _token(tokenizer: Any, token: int) -> dict[str, Any]:
    return {"id": token, "text": show_token(tokenizer, token)}


def _forgiven(found: Forgiven, labels: Tensor, tokenizer: Any) -> dict[str, Any]:
    whole = found.nats * len(labels)
    pairs = [
        {
            **asdict(each),
            "target": _token(tokenizer, each.target),
            "token": _token(tokenizer, each.token),
            "share": each.nats / whole if whole > 0 else None,
        }
        for each in found.pairs
    ]
    return {**asdict(found), "pairs": pairs}


def _losses(group: dict[str, Tensor], ce: Tensor, mce: dict[str, Tensor]) -> dict[str, Any]:
    """For each group: its positions, means, and share of the sums."""

    def describe(at: Tensor) -> dict[str, Any]:
        at = at.to(ce.device)
        return {
            "positions": len(at),
            "share_of_positions": len(at) / len(ce),
            "ce": ce[at].mean().item(),
            "share_of_ce": (ce[at].sum() / ce.sum().clamp(min=1e-30)).item(),
            "mce": {name: each[at].mean().item() for name, each in mce.items()},
            "share_of_mce": {name: (each[at].sum() / each.sum().clamp(min=1e-30)).item() for name, each in mce.items()},
        }

    return {name: describe(at) for name, at in group.items() if len(at)}


def _agreements(
    groups: dict[str, dict[str, Tensor]], products: tuple[Overlap, Overlap, Overlap], weight: float
) -> dict[str, Any]:
    """For each group: MCE, and CE + w MCE, against CE, in the hidden states and in the LM head."""

    def describe(at: Tensor) -> dict[str, Any]:
        found: dict[str, Any] = {"mce": {}, "sum": {}}
        for place, (aa, ab, bb) in zip(
            ("hidden", "head"), zip(*(each.of(at) for each in products), strict=True), strict=True
        ):
            found["mce"][place] = asdict(agreement(aa, ab, bb))
            found["sum"][place] = asdict(sum_agreement(aa, ab, bb, weight))
        return found

    return {kind: {name: describe(at) for name, at in group.items() if len(at)} for kind, group in groups.items()}


def _solver(
    mce: Terms, ce: Terms, positions: Positions, head: LMHead, vectors: Tensor, weight: float
) -> dict[str, Any]:
    hidden, labels = positions.hidden, positions.labels
    at = spread_by_ce(ce.value, count_affordable(len(labels), *vectors.shape))
    hidden, labels, ce, mce = hidden[at], labels[at], ce.at(at), mce.at(at)
    error, reference = measure_solver(mce, ce, hidden, labels, head, vectors, weight)
    # the cosine with CE that an exact solver would have on these positions
    everything = torch.arange(len(labels))
    pairs = ((ce, ce), (ce, reference), (reference, reference))
    products = list(zip(*(overlap(a, b, hidden).of(everything) for a, b in pairs), strict=True))
    exact = {place: asdict(agreement(*three)) for place, three in zip(("hidden", "head"), products, strict=True)}
    return {**asdict(error), "exact_against_ce": exact}
