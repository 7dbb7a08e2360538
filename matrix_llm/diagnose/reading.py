"""The figures of a diagnosis in words. Each sentence follows from thresholds that stand here and in docs/diagnose.md.

`read_figures` takes the object of `diagnosis.diagnose` and returns sentences; it knows nothing of models or tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from matrix_llm.diagnose.text import percent, ratio

SAME, SIMILAR = 0.95, 0.8  # cosine of MCE's gradient with CE's
SMALL = 0.1  # w |MCE| / |CE|, of gradients: less cannot matter much
RANDOM, SOLVED = 0.9, 0.1  # CE / log V of a model that predicts nothing yet; CE of rows that are nearly solved
LOSS_SMALL, LOSS_SAME = 0.1, 0.95  # MCE / CE
SHARED, ISOTROPIC = 0.2, 0.05  # mean cosine of two rows of the LM head
COMMON, LOWER = 0.05, 0.1  # share of the positions of a kind, and how far its MCE / CE is below that of all
CENTRING = 0.01  # fall of the cosine that makes centring worth a mention
NEAR = ("0.6 to 0.8", "0.8 and more")  # cosines of tokens that stand for much the same
ACCURATE, ROUGH = 0.02, 0.1  # relative error of the hidden gradient of CE + w MCE
TRUSTED = 1e-2  # of the reference itself
EQUAL, EQUAL_NORM = 0.999, 0.02  # cosine and |norm ratio - 1| of a token loss that does what CE does
MOVED = 0.05  # share of the gradient: a smaller move from or to a group is not worth a mention
APART = 2.0  # largest / smallest norm of the token losses' gradients
SURPRISING = ("2 to 5", "CE >= 5")


def read_figures(figures: Mapping[str, Any]) -> list[str]:
    """What the figures mean for training, one sentence or two for each point."""
    lines = [
        *_level(figures),
        *_ratio(figures),
        *_kinds(figures),
        *_direction(figures),
        *_head(figures),
        *_centring(figures),
        *_token_losses(figures),
        *_solver(figures),
    ]
    if figures["rows"]["positions"] < figures["rows"]["positions_asked"]:
        lines.append(
            f"Only {figures['rows']['positions']} positions were there, of {figures['rows']['positions_asked']} asked "
            "for: shares of small groups are uncertain."
        )
    return lines


def _in_use(part: Mapping[str, Any]) -> Mapping[str, Any]:
    return part["in use"]


def _level(figures: Mapping[str, Any]) -> list[str]:
    """How far the model is from random and from done, and which positions carry the loss."""
    whole, vocabulary = figures["loss"]["all"]["all"], figures["model"]["vocabulary"]
    ce, uniform = whole["ce"], math.log(vocabulary)
    if ce > RANDOM * uniform:
        return [
            f"The model predicts nothing yet: CE {ce:.2f}, against log V = {uniform:.2f} for a uniform guess. All "
            "figures below are those of the start, and will change as it learns."
        ]
    lines = []
    if ce < SOLVED:
        lines.append(f"These rows are nearly solved (CE {ce:.3f}): little is left for any loss to teach with them.")
    hard = [each for name, each in figures["loss"]["by_ce"].items() if name in SURPRISING]
    if hard:
        positions, share = sum(each["share_of_positions"] for each in hard), sum(each["share_of_ce"] for each in hard)
        lines.append(f"{percent(positions)} of the positions have CE >= 2; they carry {percent(share)} of CE.")
    return lines


def _ratio(figures: Mapping[str, Any]) -> list[str]:
    whole = figures["loss"]["all"]["all"]
    ce, mce = whole["ce"], _in_use(whole["mce"])
    if ce <= 0:
        return []
    ratio = mce / ce
    forgiven = _in_use(figures["forgiven"])
    if ratio < LOSS_SMALL:
        return [f"MCE is {ratio:.2f} of CE: it forgives nearly everything, since the likely tokens' vectors are alike."]
    if ratio > LOSS_SAME:
        return [
            f"MCE is {ratio:.2f} of CE: it forgives nearly nothing, since the likely tokens' vectors are orthogonal."
        ]
    near = sum(forgiven["by_cosine"][name] for name in NEAR)
    return [
        f"MCE is {ratio:.2f} of CE: it forgives {percent(1 - ratio)}, and {percent(near)} of that goes to tokens whose "
        "cosine with the target is at least 0.6."
    ]


def _kinds(figures: Mapping[str, Any]) -> list[str]:
    """The kind of token that MCE forgives most, where it stands out."""
    whole, kinds = figures["loss"]["all"]["all"], figures["loss"]["by_kind"]
    ratios = {
        kind: _in_use(each["mce"]) / each["ce"]
        for kind, each in kinds.items()
        if each["share_of_positions"] >= COMMON and each["ce"] > 0
    }
    kind = min(ratios, key=lambda each: ratios[each], default=None)
    overall = _in_use(whole["mce"]) / whole["ce"] if whole["ce"] > 0 else 0.0
    if kind is None or ratios[kind] > overall - LOWER:
        return []
    return [
        f'MCE forgives most where the target is of the kind "{kind}": there it is {ratios[kind]:.2f} of CE, so a wrong '
        "token counts for less than elsewhere."
    ]


def _direction(figures: Mapping[str, Any]) -> list[str]:
    """What adding MCE does to the gradient that reaches the model."""
    found = _in_use(figures["gradients"])["all"]["all"]
    mce, both = found["mce"]["hidden"], found["sum"]["hidden"]
    weight = figures["settings"]["mce_weight_shown"]
    if mce["cosine"] is None:
        return ["The gradient of CE or of MCE is zero at every position: there is nothing to compare."]
    name = "CE + MCE" if weight == 1 else f"CE + {weight:g} MCE"
    cosine, size, ratio = mce["cosine"], weight * mce["norm_ratio"], both["norm_ratio"]
    start = f"Hidden states: the cosine of MCE's gradient with CE's is {cosine:.3f}, its norm {mce['norm_ratio']:.2f}."
    lines = []
    if size < SMALL:
        lines.append(
            f"{start} With the weight {weight:g} it is {percent(size)} of CE's gradient, too little to change much; "
            f"mce_weight {1 / mce['norm_ratio']:.2g} would make them equal."
            if mce["norm_ratio"] > 0
            else start
        )
    elif cosine >= SAME:
        lines.append(
            f"{start} Expect the effect of a {ratio:.1f} times larger gradient. Adam, and clipping where it is active, "
            "normalise most of that away; compare with plain CE at another learning rate before crediting MCE."
        )
    elif cosine >= SIMILAR:
        lines.append(
            f"{start} Mostly a {ratio:.1f} times larger gradient, turned by {_angle(both['cosine'])} from CE's."
        )
    else:
        lines.append(
            f"{start} {name} is another objective: its gradient is turned by {_angle(both['cosine'])} from CE's, and "
            f"{ratio:.1f} times as large."
        )
    in_head = found["mce"]["head"]
    if not figures["settings"]["trains_head"]:
        lines.append("The LM head is frozen (use_peft), so only the hidden states' gradient trains anything.")
    elif in_head["cosine"] is not None and abs(in_head["cosine"] - cosine) > 0.05:
        lines.append(f"In the LM head's weight the cosine is {in_head['cosine']:.3f}.")
    return lines


def _angle(cosine: float) -> str:
    return f"{math.degrees(math.acos(max(-1.0, min(1.0, cosine)))):.0f} degrees"


def _head(figures: Mapping[str, Any]) -> list[str]:
    rows = _in_use(figures["head"])
    mean, rank, width = rows["mean_cosine"], rows["effective_rank"], rows["width"]
    lines = []
    if mean >= SHARED:
        lines.append(
            f"Two token vectors have a cosine of {mean:.2f} on average (effective rank {rank:.0f} of {width}): "
            "they share a direction, so MCE forgives any likely token in part, not only synonyms."
        )
    elif abs(mean) <= ISOTROPIC:
        lines.append(
            f"Two token vectors are orthogonal on average (cosine {mean:.2f}, effective rank {rank:.0f} of "
            f"{width}): they share no direction."
        )
    odd = [
        f"{rows[key]:,} {name}" for key, name in (("zero_rows", "zero"), ("duplicate_rows", "duplicate")) if rows[key]
    ]
    if odd:
        lines.append(f"The token vectors have {' and '.join(odd)} rows, most likely of tokens that were never trained.")
    return lines


def _centring(figures: Mapping[str, Any]) -> list[str]:
    if "centred" not in figures["gradients"]:
        return []
    cosines = [figures["gradients"][name]["all"]["all"]["mce"]["hidden"]["cosine"] for name in ("in use", "centred")]
    if None in cosines:
        return []
    plain, centred = cosines
    if plain - centred > CENTRING:
        return [
            f"With centred token vectors the cosine is {centred:.3f} instead of {plain:.3f}: MCE then says more that "
            "CE does not."
        ]
    return [f"Centring the token vectors changes little: cosine {centred:.3f} instead of {plain:.3f}."]


def _token_losses(figures: Mapping[str, Any]) -> list[str]:
    """The loss that the recipe trains, if it is not CE with or without MCE; how far apart all gradients are in norm."""
    found = figures["token_losses"]
    own, lines = found["own"], []
    if own != "ce" and not own.startswith("CE+"):
        said = found["reading"].get(own, "It could not be measured here.")
        lines.append(f"A run with these settings trains {own}; MCE and CE + MCE are for comparison. {said}")
    norms = {
        each["name"]: each["gradients"]["all"]["all"]["hidden"]["norm_ratio"]
        for each in figures["token_losses"]["losses"]
    }
    norms = {name: norm for name, norm in norms.items() if norm}
    if not norms:
        return lines
    least, most = min(norms, key=lambda name: norms[name]), max(norms, key=lambda name: norms[name])
    if norms[most] < APART * norms[least]:
        return lines
    return [
        *lines,
        f"The token losses' gradients have from {ratio(norms[least])} ({least}) to {ratio(norms[most])} ({most}) times "
        "the norm of CE's: at one learning rate, or with max_grad_norm active for some of them alone, a comparison "
        "says little about the losses. Tune the learning rate for each.",
    ]


def read_token_losses(found: Mapping[str, Any]) -> dict[str, str]:
    """What each token loss does to these positions, one sentence each, from the figures alone.

    Args:
        found: of `token_losses.compare_losses`.
    """
    ce, *others = found["losses"]
    return {each["name"]: _read_token_loss(each["gradients"], ce["gradients"]) for each in others}


def _read_token_loss(mine: Mapping[str, Any], ces: Mapping[str, Any]) -> str:
    whole = mine["all"]["all"]["hidden"]
    cosine, norm = whole["cosine"], whole["norm_ratio"]
    if cosine is None or not norm:
        return "Its gradient is zero, or CE's is: there is nothing to compare."
    if cosine >= EQUAL and abs(norm - 1) <= EQUAL_NORM:
        return "The same gradient as CE's."
    direction = f"{_angle(cosine)} from CE's gradient"
    if cosine >= SAME:
        direction = "In CE's direction"
    elif cosine < SIMILAR:
        direction = f"Another direction, {direction},"
    size = "as large" if abs(norm - 1) <= EQUAL_NORM else f"{ratio(norm)} times as large"
    moves = " and ".join(_read_moves(mine, ces)) or "spread over the labels as CE's"
    return f"{direction} and {size}; {moves}."


def _read_moves(mine: Mapping[str, Any], ces: Mapping[str, Any]) -> list[str]:
    """Where a loss's gradient moves against CE's: to or from surprising labels; the kind of label that gains most."""
    to, fro = (
        sum(each["share_of_gradient"] or 0.0 for name, each in of["by_ce"].items() if name in SURPRISING)
        for of in (mine, ces)
    )
    here, there = (
        {kind: each["share_of_gradient"] or 0.0 for kind, each in of["by_kind"].items()} for of in (mine, ces)
    )
    gains = max(here, key=lambda kind: here[kind] - there[kind])
    where = f"{gains} tokens" if gains in ("end", "other") else gains
    moves = (("labels with CE >= 2", to, fro), (where, here[gains], there[gains]))
    return [
        f"{'more' if to > fro else 'less'} of it at {where} ({percent(to)}, CE's {percent(fro)})"
        for where, to, fro in moves
        if abs(to - fro) >= MOVED
    ]


def _solver(figures: Mapping[str, Any]) -> list[str]:
    found, solver = _in_use(figures["solver"]), figures["settings"]["solver"]
    if max(found["reference_value"], found["reference_logits"]) > TRUSTED:
        return [
            f"The solver could not be judged: its reference is off by {percent(found['reference_logits'], 1)} itself "
            f"({found['reference_check']})."
        ]
    error = found["hidden"]
    if error is None:
        return []
    off = percent(error, 1 if error >= 0.001 else 2)
    start = f"The solver in use is {off} off in the hidden states' gradient of the whole loss"
    if error <= ACCURATE:
        return [f"{start}: accurate."]
    more = {
        "krylov": "Raise mce_steps" + ("" if solver["whole_vocabulary"] else " or mce_top_k"),
        "taylor": "Set mce_solver: krylov",
    }.get(solver["name"], "Check the settings")
    if error <= ROUGH:
        return [f"{start}: small against the noise of mini-batches. {more} to lower it."]
    return [f"{start}: too much to call it MCE's. {more}."]
