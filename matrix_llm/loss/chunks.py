"""How many positions are processed at once, so that the full (N, V) logits never exist."""

from __future__ import annotations

import math

CHUNK_BYTES = 256 * 2**20  # working memory of one chunk of positions


def positions_per_chunk(positions: int, bytes_per_position: int, least_budget: int = 0) -> int:
    """The length of nearly even chunks, as few as fit into CHUNK_BYTES, or into `least_budget` bytes if that is more.

    >>> positions_per_chunk(7, CHUNK_BYTES // 3)  # three would fit: 3 + 3 + 1
    3
    >>> positions_per_chunk(7, 10 * CHUNK_BYTES)  # never less than one
    1
    """
    fitting = max(1, min(positions, max(CHUNK_BYTES, least_budget) // max(1, bytes_per_position)))
    return math.ceil(positions / math.ceil(positions / fitting))
