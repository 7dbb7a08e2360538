"""What frozen features are worth: nearest neighbours, linear classifiers, few labels, effective ranks.

    knn_accuracy         weighted votes of the nearest training images; nothing is trained, nothing is tuned
    linear_accuracy      logistic regression on standardised features, to the optimum: the quick linear probe
    few_label_accuracy   the same from a few labels a class, over many draws of them: tells good features apart where the others saturate
    fit_linear           the published linear probe, a classifier trained by LARS or SGD on batches of features
    effective_ranks      how many directions the features use

None of these numbers says anything alone. Put them beside raw pixels and the same network at random initialisation.

Legend: N images, F features, K classes, B rows of a batch, Q rows compared at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from matrix_llm.base.errors import ProbeError
from matrix_llm.ssl.lars import LARS
from matrix_llm.ssl.metrics import batch_effective_rank, inter_class_effective_rank, intra_class_effective_rank

__all__ = [
    "Features", "ProbeError", "check_classes", "choose_c", "class_balanced_split", "correct_at", "effective_ranks", "few_label_accuracy",
    "few_label_draws", "fit_linear", "interval_of_mean", "knn_accuracy", "knn_votes", "linear_accuracy", "linear_scores",
]  # fmt: skip

SIMILARITIES = 2**26  # numbers held at a time by knn_votes: 256 MiB
CS = tuple(10.0**power for power in range(-4, 3))  # what choose_c tries


@dataclass(frozen=True)
class Features:
    """Of the images of one split, in their order, without those that could not be read."""

    x: Tensor  # (N, F) float32
    y: Tensor  # (N,) int64, 0 to K - 1
    skipped: tuple[str, ...] = ()  # why, for each image left out

    def __post_init__(self) -> None:
        if self.x.ndim != 2 or self.y.shape != self.x.shape[:1] or not len(self.y):
            raise ProbeError(
                f"features {tuple(self.x.shape)}, labels {tuple(self.y.shape)}, but it takes (N, F) rows and a label each."
            )
        if not torch.isfinite(self.x).all():  # every comparison with NaN is false, which would count as some answer
            raise ProbeError(
                f"the features of shape {tuple(self.x.shape)} hold NaN or infinity: the network has diverged."
            )


def check_classes(
    train: Tensor,  # (N,) labels
    test: Tensor,  # (N,)
    names: list[str] | None = None,
) -> int:
    """K, the number of classes, where every class that is asked for can be learned.

    Raises:
        ProbeError: a negative label, a single class, or a class of the test part without a training image.
    """
    if min(int(train.min()), int(test.min())) < 0:
        raise ProbeError(
            "some labels are negative, which says that they are unknown. Leave these images out, or take a labelled split."
        )
    if (missing := sorted(set(test.tolist()) - set(train.tolist()))) != []:
        shown = ", ".join(names[k] if names else str(k) for k in missing[:5])
        raise ProbeError(
            f"{len(missing)} class(es) of the test images have no training image: {shown}. Add some, or take these classes out of the test."
        )
    if len(set(train.tolist())) < 2:
        raise ProbeError(
            "all training images are of one class, so any classifier is right. Give images of at least two."
        )
    return int(train.max()) + 1


def _classes(train: Features, test: Features) -> int:
    """K, also where the training rows of a class could not be read: it then gets no score, and its images count as wrong."""
    return int(max(train.y.max(), test.y.max())) + 1


def correct_at(
    scores: Tensor,  # (N, K)
    y: Tensor,  # (N,)
    k: int = 1,
) -> int:
    """How many rows have their class among the k best scores. A tie counts as wrong: a constant output knows nothing.

    >>> correct_at(torch.tensor([[0.1, 0.9], [0.5, 0.5]]), torch.tensor([1, 0]))
    1
    """
    own = scores.gather(1, y[:, None])
    return int(((~(scores < own)).sum(1) <= k).sum())


# ---------------------------------------------------------------------------------------------------------- nearest neighbours


def knn_votes(train: Features, test: Features, *, k: int = 20, temperature: float = 0.07) -> Tensor:
    """(N, K): each class's sum of exp(cosine / temperature) over the k training rows of the largest cosine.

    Wu et al. 2018 (arXiv 1805.01978), section 3.4. A k that is not between 1 and N, or no temperature, is a ProbeError.
    """
    if not 1 <= k <= len(train.y):
        raise ProbeError(
            f"k={k} neighbours, but there are {len(train.y)} training images. Give a k between 1 and that."
        )
    if not temperature > 0:
        raise ProbeError(f"temperature={temperature}, but cosines are divided by it. Give a positive number.")
    bank = F.normalize(train.x, dim=1)
    votes = train.x.new_zeros(len(test.y), _classes(train, test))
    chunk = max(SIMILARITIES // len(bank), 1)
    for start in range(0, len(test.y), chunk):
        rows = F.normalize(test.x[start : start + chunk], dim=1)
        cosine, nearest = (rows @ bank.T).topk(k, dim=1)  # (Q, k)
        votes[start : start + chunk].scatter_add_(1, train.y[nearest], (cosine / temperature).exp())
    return votes


def knn_accuracy(train: Features, test: Features, *, k: int = 20, temperature: float = 0.07) -> float:
    """Top-1 of `knn_votes`.

    >>> corners = Features(torch.eye(2), torch.tensor([0, 1]))
    >>> knn_accuracy(corners, corners, k=1)
    1.0
    """
    return correct_at(knn_votes(train, test, k=k, temperature=temperature), test.y) / len(test.y)


# -------------------------------------------------------------------------------------------------- logistic regression, solved


def _standardised(train: Tensor, *others: Tensor) -> list[np.ndarray]:
    """By the mean and deviation of `train`; a feature that never varies there becomes 0 - not a division by almost nothing."""
    rows = train.cpu().double()
    mean, std = rows.mean(0), rows.std(0, correction=0)
    scale = torch.where(std > 1e-6 * std.max(), 1 / std, 0.0)
    return [((x.cpu().double() - mean) * scale).numpy() for x in (train, *others)]


def _logistic_scores(x: np.ndarray, y: np.ndarray, test: np.ndarray, *, C: float, classes: int) -> Tensor:
    """(N, K) of a multinomial logistic regression on rows x; -inf for a class that is not in y."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise ProbeError(
            "this probe needs scikit-learn, which is not installed: pip install 'matrix-llm[ssl]'."
        ) from None
    found = LogisticRegression(C=C, max_iter=2000).fit(x, y)
    scores = found.decision_function(test)
    if scores.ndim == 1:  # two classes: one score, for the second
        scores = np.stack([-scores, scores], axis=1)
    out = torch.full((len(test), classes), -math.inf, dtype=torch.float64)
    out[:, torch.from_numpy(found.classes_)] = torch.from_numpy(scores)
    return out


def linear_scores(train: Features, test: Features, *, C: float = 1.0) -> Tensor:
    """(N, K) scores of min_W 1/C · |W|²/2 + sum_i cross-entropy_i, on features standardised by the training rows; on the CPU.

    Raises:
        ProbeError: C is not positive, or scikit-learn is not there.
    """
    if not C > 0:
        raise ProbeError(f"C={C}, but the penalty is divided by it. Give a positive number.")
    x, z = _standardised(train.x, test.x)
    return _logistic_scores(x, train.y.cpu().numpy(), z, C=C, classes=_classes(train, test))


def linear_accuracy(train: Features, test: Features, *, C: float = 1.0) -> float:
    """Top-1 of `linear_scores`.

    >>> x = torch.tensor([[-1.0], [-2.0], [1.0], [2.0]])
    >>> line = Features(x, torch.tensor([0, 0, 1, 1]))
    >>> linear_accuracy(line, line)
    1.0
    """
    return correct_at(linear_scores(train, test, C=C), test.y.cpu()) / len(test.y)


def choose_c(train: Features, *, seed: int = 0) -> float:
    """The C of 1e-4, ..., 100 that is best on a fifth of the training rows; the smallest of equals. A class of one row is a ProbeError."""
    held_out = class_balanced_split(train.y, 20, seed, equal=False)
    is_held = torch.zeros(len(train.y), dtype=torch.bool)
    is_held[held_out] = True
    parts = [
        Features(train.x[mask.to(train.x.device)], train.y[mask.to(train.y.device)]) for mask in (~is_held, is_held)
    ]
    if set(parts[1].y.tolist()) - set(parts[0].y.tolist()):
        raise ProbeError(
            "a class has one training image, which cannot be both trained on and held out. Give C a number."
        )
    return max(CS, key=lambda C: (linear_accuracy(*parts, C=C), -C))


# ---------------------------------------------------------------------------------------------------------------- few labels


def few_label_draws(
    y: Tensor,  # (N,)
    *,
    labels_per_class: int,
    draws: int,
    seed: int = 0,
) -> list[np.ndarray]:
    """For each draw, the places of labels_per_class rows of each class. They depend on these arguments alone, not on any model.

    Raises:
        ProbeError: a class with fewer rows.

    >>> few_label_draws(torch.tensor([0, 1, 0, 1]), labels_per_class=2, draws=1)[0].tolist()
    [0, 1, 2, 3]
    """
    if labels_per_class < 1 or draws < 1:
        raise ProbeError(f"labels_per_class={labels_per_class} and draws={draws} must be 1 or more.")
    labels = y.cpu().numpy()
    places = [np.flatnonzero(labels == k) for k in np.unique(labels)]
    if (fewest := min(map(len, places))) < labels_per_class:
        raise ProbeError(
            f"labels_per_class={labels_per_class}, but the smallest class has {fewest} training image(s). Ask for at most that many."
        )
    found = []
    for draw in range(draws):
        rng = np.random.default_rng([seed, labels_per_class, draw])
        found.append(np.sort(np.concatenate([rng.choice(rows, labels_per_class, replace=False) for rows in places])))
    return found


def few_label_accuracy(
    train: Features, test: Features, *, labels_per_class: int = 5, draws: int = 20, seed: int = 0, C: float = 1.0
) -> list[float]:
    """Top-1 for each draw of labels, by logistic regression on standardised features.

    Mean and deviation are those of all training rows: that takes no label, and five rows would give a poor estimate.

    Raises:
        ProbeError: see `few_label_draws`.
    """
    x, z = _standardised(train.x, test.x)
    y, classes = train.y.cpu().numpy(), _classes(train, test)
    chosen = few_label_draws(train.y, labels_per_class=labels_per_class, draws=draws, seed=seed)
    scores = (_logistic_scores(x[rows], y[rows], z, C=C, classes=classes) for rows in chosen)
    return [correct_at(s, test.y.cpu()) / len(test.y) for s in scores]


def interval_of_mean(values: list[float]) -> tuple[float, float]:
    """Student's 95 % interval for the mean of independent draws; not their spread, which does not shrink with more draws.

    Raises:
        ProbeError: fewer than two values.

    >>> [round(v, 3) for v in interval_of_mean([0.0, 1.0])]  # 0.5 -+ 12.706 · 0.7071 / sqrt(2)
    [-5.853, 6.853]
    """
    if len(values) < 2:
        raise ProbeError("one draw says nothing about how draws differ. Make at least 2.")
    from scipy.stats import t

    radius = float(t.ppf(0.975, len(values) - 1)) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return float(np.mean(values)) - radius, float(np.mean(values)) + radius


def class_balanced_split(
    y: Tensor,  # (N,)
    percent: float,
    seed: int,
    *,
    equal: bool = True,
) -> Tensor:
    """Sorted places of about `percent` % of the rows, at least one of each class.

    A smaller percentage of the same seed is part of a larger one.

    Args:
        equal: as many of each class, as in the ImageNet splits of SimCLR; else `percent` % of each class.

    Raises:
        ProbeError: percent is not above 0 and at most 100, or a class has too few rows.

    >>> class_balanced_split(torch.tensor([0, 0, 1, 1]), 50, seed=0).shape
    torch.Size([2])
    """
    if not 0 < percent <= 100:
        raise ProbeError(f"percent={percent}, but a share of the training images is above 0 and at most 100 %.")
    labels = y.cpu().numpy()
    rng, chosen = np.random.default_rng(seed), []
    places = [np.flatnonzero(labels == k) for k in np.unique(labels)]
    for k, rows in enumerate(places):
        count = max(round((len(labels) / len(places) if equal else len(rows)) * percent / 100), 1)
        if count > len(rows):
            raise ProbeError(
                f"percent={percent} takes {count} image(s) of each class, but class {np.unique(labels)[k]} has {len(rows)}. "
                "Give a smaller percent, or a list of files with --split."
            )
        chosen.append(rng.permutation(rows)[:count])
    return torch.from_numpy(np.sort(np.concatenate(chosen)))


# ------------------------------------------------------------------------------------------------------- the trained classifier


def cosine(step: int, total: int) -> float:
    """From 1 to 0: the factor of the learning rate at this step."""
    return 0.5 * (1 + math.cos(math.pi * step / total))


def linear_layer(width: int, classes: int, seed: int) -> nn.Linear:
    """With the start of the released codes (MoCo, SimSiam, Barlow Twins): deviation 0.01, no bias."""
    layer = nn.Linear(width, classes)
    with torch.no_grad():
        layer.weight.normal_(std=0.01, generator=torch.Generator().manual_seed(seed))
        layer.bias.zero_()
    return layer


def lars_reach(learning_rate: float, momentum: float, steps: int) -> float:
    """By how many e-folds LARS can lengthen a weight in a run with the cosine schedule: c · lr / (1 - m) · steps / 2.

    A step is at most c = 0.001 of the weight's length, times the learning rate. ImageNet's 31,300 steps at 0.48 give 75; one step an
    epoch, on a small data set, leaves the classifier where it started.

    >>> round(lars_reach(0.48, 0.9, 31300), 1)
    75.1
    """
    return 0.001 * learning_rate / max(1 - momentum, 1e-9) * steps / 2


def fit_linear(
    batches: Callable[[int], Iterable[tuple[Tensor, Tensor]]],  # epoch -> (B, F) features and (B,) labels
    *,
    width: int,
    classes: int,
    epochs: int,
    steps: int,
    learning_rate: float,
    optimizer: str = "lars",
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> nn.Sequential:
    """Batch normalisation without affine, then a linear layer, trained on cross-entropy; cosine to 0. In eval mode.

    Args:
        batches: the features of an epoch, fresh where images are augmented. A batch of fewer than two rows is passed over.
        steps: batches of an epoch, for the schedule.
        learning_rate: at the first step.
        optimizer: "lars" or "sgd".

    Raises:
        ProbeError: another optimizer, or nothing to train for.
    """
    if optimizer not in ("lars", "sgd"):
        raise ProbeError(f"optimizer={optimizer!r}, but the probe is trained by lars or sgd.")
    if epochs < 1 or steps < 1:
        raise ProbeError(f"epochs={epochs} of {steps} step(s) train nothing. Both must be 1 or more.")
    probe = nn.Sequential(nn.BatchNorm1d(width, affine=False), linear_layer(width, classes, seed)).to(device).train()
    make = LARS if optimizer == "lars" else torch.optim.SGD
    trained = make(probe.parameters(), lr=learning_rate, momentum=momentum, weight_decay=weight_decay)
    for epoch in range(epochs):
        for step, (x, y) in enumerate(batches(epoch)):
            if len(y) < 2:
                continue
            for group in trained.param_groups:
                group["lr"] = learning_rate * cosine(epoch * steps + step, epochs * steps)
            trained.zero_grad()
            F.cross_entropy(probe(x), y).backward()
            trained.step()
    return probe.eval()


def feature_batches(train: Features, batch_size: int, seed: int) -> Callable[[int], Iterator[tuple[Tensor, Tensor]]]:
    """For `fit_linear`: fixed features in a new order each epoch, without the rest that fills no batch."""

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(len(train.y))).to(train.x.device)
        for start in range(0, len(order) - batch_size + 1, batch_size):
            rows = order[start : start + batch_size]
            yield train.x[rows], train.y[rows]

    return batches


# ------------------------------------------------------------------------------------------------------------ effective ranks


def effective_ranks(
    features: Tensor,  # (B, F)
    labels: Tensor,  # (B,)
) -> dict[str, float | int | None]:
    """Effective rank of all rows, within and between classes (eq. 20, 21), and B: an estimate from few rows is too low.

    None: no class has two rows, or there is one class alone.

    >>> effective_ranks(torch.eye(2), torch.tensor([0, 1]))["intra_class_effective_rank"] is None
    True
    """
    counts = torch.bincount(labels)
    return {
        "effective_rank": batch_effective_rank(features),
        "intra_class_effective_rank": intra_class_effective_rank(features, labels) if int(counts.max()) > 1 else None,
        "inter_class_effective_rank": inter_class_effective_rank(features, labels)
        if int((counts > 0).sum()) > 1
        else None,
        "effective_rank_batch_size": len(features),
    }
