"""The token vectors' norms and leading directions, and a search for the likeliest tokens.

    unit_vectors       the e_j, scaled to norm 1
    mean_vector        their mean over the vocabulary, and
    subtract_mean      the vectors without it, for `mce_embeddings: centred`
    summarise          what head_tail.py needs of all vectors, once per optimizer step
    find_likeliest     top-k of wide logits, faster than torch.topk

Legend: C positions of one chunk, V vocabulary, D embedding width, p directions, r sketch width.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from matrix_llm.information import outside_autocast

DIRECTIONS = 12  # p
BASIS_VECTORS = 4096  # token vectors from which the directions are found
BASIS_ITERATIONS = 4
SEED = 20240723  # one fixed start and one fixed sketch: the same on every rank, at every step, and after a resume
GROUPS = 512  # of tokens, by id modulo GROUPS: their largest logits lead `find_likeliest` to a few candidates
BLOCK_ELEMENTS = 2**22  # elements of a temporary (block, D) copy: it stays in cache


@functools.lru_cache(maxsize=8)
def fixed_gaussian(width: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(width, columns) of N(0, 1), always the same. Cached on the device: copying from the host would wait for it."""
    generator = torch.Generator().manual_seed(SEED)
    with torch.inference_mode(
        False
    ):  # the cached tensor outlives the caller's mode, and autograd refuses inference tensors
        return torch.randn(width, columns, generator=generator, dtype=torch.float64).to(device, dtype)


# ------------------------------------------------------------------------------------------------------------- norms


def unit_vectors(
    embeddings: Tensor,  # (V, D) any float dtype, any norm
    *,
    dtype: torch.dtype,
    sketch_dim: int | None = None,
    centred: bool = False,
) -> Tensor:
    """Each vector scaled to norm 1, in `dtype`; a zero vector stays zero. Differentiable (zero vectors: gradient 0).

    With `centred` the mean over the vocabulary is subtracted first, and the gradient passes through the mean as well.
    With `sketch_dim` = r the vectors are those of embeddings @ R, with R (D, r) a fixed Gaussian matrix: MCE depends on
    E only through the cosines e_i . e_j, which a random projection roughly keeps (Johnson & Lindenstrauss).

    Returns:
        (V, D), or (V, r) with a sketch.
    """
    e = subtract_mean(embeddings, mean_vector(embeddings, dtype)) if centred else embeddings.to(dtype)
    largest = e.detach().abs().amax(-1, keepdim=True)  # divide by it first, so that no square overflows or underflows
    e = e / torch.where(largest > 0, largest, 1.0)
    if sketch_dim is not None:
        e = e @ fixed_gaussian(e.shape[1], sketch_dim, dtype, e.device)
    norm = torch.linalg.vector_norm(e, dim=-1, keepdim=True)
    zero = norm == 0
    return e * torch.where(zero, 0.0, 1.0 / torch.where(zero, 1.0, norm))


def inverse_norms(
    vectors: Tensor,  # (V, D) any float dtype, any norm
    dtype: torch.dtype,
) -> Tensor:
    """(V,) 1 / |vector| in `dtype`; 0 where the vector is zero (or denormal), NaN where it contains NaN."""
    norm = torch.linalg.vector_norm(vectors, dim=-1, dtype=dtype)
    doubtful = ~((norm > 1e-15) & (norm < 1e15))  # squares overflowed or underflowed, or the vector is zero
    if vectors.is_cuda or bool(doubtful.any()):  # on a GPU always: asking `any` would make the host wait
        largest = torch.linalg.vector_norm(vectors, ord=torch.inf, dim=-1, dtype=dtype)
        scaled = vectors.to(dtype) / torch.where(largest > 0, largest, 1.0).unsqueeze(-1)
        norm = torch.where(doubtful, largest * torch.linalg.vector_norm(scaled, dim=-1), norm)
    too_small = norm < 2 / torch.finfo(dtype).max  # 1 / norm would overflow: such a vector counts as zero
    return torch.where(too_small, 0.0, 1 / torch.where(too_small, 1.0, norm))


# ---------------------------------------------------------------------------------------------------------- the mean


def mean_vector(
    vectors: Tensor,  # (V, D) any float dtype
    dtype: torch.dtype,
) -> Tensor:
    """(D,) mean over all V vectors in `dtype`, summed a block at a time, and the blocks in float64. Differentiable."""
    total = torch.zeros(vectors.shape[1], dtype=torch.float64, device=vectors.device)
    for part in vectors.split(max(1, BLOCK_ELEMENTS // vectors.shape[1])):
        total = total + part.sum(0, dtype=dtype)
    return (total / vectors.shape[0]).to(dtype)


def subtract_mean(
    vectors: Tensor,  # (v, D) any float dtype
    mean: Tensor,  # (D,)
) -> Tensor:
    """vectors - mean, in the dtype of `mean`.

    A vector that differs from the mean by rounding alone becomes zero: scaled to norm 1 it would be a random direction.

    >>> subtract_mean(torch.tensor([[1.0, 3.0], [2.0, 1.0]]), torch.tensor([2.0, 1.0]))
    tensor([[-1.,  2.],
            [ 0.,  0.]])
    """
    moved = vectors.to(mean.dtype) - mean
    rounding = 16 * torch.finfo(mean.dtype).eps * mean.detach().abs().amax()
    largest = torch.linalg.vector_norm(moved.detach(), ord=torch.inf, dim=-1, keepdim=True)
    return torch.where(largest <= rounding, 0.0, moved)  # NaN stays


# ----------------------------------------------------------------------------------------------------------- summary


class VocabularySummary(NamedTuple):
    """What head_tail.py needs to know about the vocabulary, computed from the weight once. Carries no gradient."""

    inverse_norm: Tensor  # (V,) 1 / |vector - centre|, 0 for a zero vector
    directions: Tensor  # (D, p) U, orthonormal columns
    coordinates: Tensor  # (V, p) U^T e_j
    features: Tensor  # (V, p (p + 1) / 2 + 1) coordinate products x_a x_b with a <= b; then |e_j|^2, which is 1 or 0
    centre: Tensor | None = None  # (D,) what is subtracted from each vector before it is scaled; None: nothing


@outside_autocast  # which rounds to half precision, and CUDA has no QR of that
@torch.no_grad()
def summarise(
    vectors: Tensor,  # (V, D) any float dtype, any norm
    dtype: torch.dtype,  # float32 or float64, of the result
    centred: bool = False,
) -> VocabularySummary:
    """Directions by orthogonal iteration on every (V // 4096)-th unit vector, and the features of all vectors.

    With `centred`, those of the vectors minus their mean. The mean is subtracted before every product and norm, a block
    at a time: no (V, D) copy is made, and no two large numbers cancel where the vectors are close to their mean.
    """
    vocabulary_size, width = vectors.shape
    device = vectors.device
    block = max(1, (BLOCK_ELEMENTS // 4 if centred else BLOCK_ELEMENTS) // width)  # centring makes more copies of it
    centre = mean_vector(vectors, dtype) if centred else None
    if centre is None:
        inverse_norm = inverse_norms(vectors, dtype)
    else:
        inverse_norm = torch.cat([inverse_norms(subtract_mean(part, centre), dtype) for part in vectors.split(block)])

    # 1. U: the directions in which the vectors vary most. A stride, since BPE ids are sorted by frequency: the first
    #    4,096 tokens would not be representative.
    if width <= DIRECTIONS:
        directions = torch.eye(width, dtype=dtype, device=device)
    else:
        stride = max(1, vocabulary_size // BASIS_VECTORS)
        sample = _centre_or_widen(vectors[::stride], centre, dtype) * inverse_norm[::stride, None]
        directions = fixed_gaussian(width, min(width, 2 * DIRECTIONS), dtype, device)
        for _ in range(BASIS_ITERATIONS):
            directions = torch.linalg.qr(sample.T @ (sample @ directions)).Q  # columns in the order of their weight
        directions = directions[:, :DIRECTIONS].contiguous()
    p = directions.shape[1]

    # 2. coordinates of every unit vector along U
    coordinates = torch.empty(vocabulary_size, p, dtype=dtype, device=device)
    if vectors.dtype == dtype and centre is None:
        torch.mm(vectors, directions, out=coordinates)
    else:  # widened or centred a block at a time
        for start in range(0, vocabulary_size, block):
            at = slice(start, start + block)
            coordinates[at] = _centre_or_widen(vectors[at], centre, dtype) @ directions
    coordinates *= inverse_norm.unsqueeze(-1)

    # 3. features: their product with the probabilities gives the tail's second moment and its mass
    features = torch.empty(vocabulary_size, p * (p + 1) // 2 + 1, dtype=dtype, device=device)
    column = 0
    for i in range(p):
        torch.mul(coordinates[:, i:], coordinates[:, i : i + 1], out=features[:, column : column + p - i])
        column += p - i
    features[:, -1] = torch.where(inverse_norm == 0, 0.0, torch.where(inverse_norm.isnan(), inverse_norm, 1.0))
    return VocabularySummary(inverse_norm, directions, coordinates, features, centre)


def _centre_or_widen(vectors: Tensor, centre: Tensor | None, dtype: torch.dtype) -> Tensor:
    widened = vectors.to(dtype)
    return widened if centre is None else widened - centre


# --------------------------------------------------------------------------------------------------- likeliest tokens


def find_likeliest(
    logits: Tensor,  # (C, V)
    count: int,
    group_max: Tensor
    | None = None,  # (C, GROUPS) largest of each group's first V // GROUPS logits, where known already
) -> tuple[Tensor, Tensor]:
    """`logits.topk(count)` for a small count: values (C, count) in falling order, and ids (C, count).

    The `count` largest logits lie in the `count` groups with the largest maxima, so one cheap pass over the logits
    leaves few candidates. torch.topk alone takes several times as long on a wide row of logits.
    """
    positions, vocabulary_size = logits.shape
    depth = vocabulary_size // GROUPS
    if depth < 2 or count > GROUPS // 4:
        return logits.topk(count)
    if group_max is None:
        group_max = logits[:, : depth * GROUPS].unflatten(1, (depth, GROUPS)).amax(1)  # token g + GROUPS * d in group g
    best = group_max.topk(count, sorted=False).indices  # (C, count)
    offsets = torch.arange(depth, device=logits.device) * GROUPS
    candidates = (best.unsqueeze(-1) + offsets).flatten(1)
    ungrouped = torch.arange(depth * GROUPS, vocabulary_size, device=logits.device).expand(positions, -1)
    candidates = torch.cat([candidates, ungrouped], dim=1)
    values, at = logits.gather(1, candidates).topk(count)
    return values, candidates.gather(1, at)
