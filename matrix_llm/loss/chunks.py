"""How many positions are worked on at once, so that the (N, V) logits are never whole."""

from __future__ import annotations

import math

CHUNK_BYTES = 256 * 2**20  # working memory of one chunk of positions


def positions_per_chunk(positions: int, bytes_per_position: int, least_budget: int = 0) -> int:
    """The size of chunks of nearly even size, as few as fit CHUNK_BYTES, or `least_budget` bytes where that is more.

    >>> positions_per_chunk(7, CHUNK_BYTES // 3)  # three would fit: 3 + 3 + 1
    3
    >>> positions_per_chunk(7, 10 * CHUNK_BYTES)  # never less than one
    1
    """
    fitting = max(1, min(positions, max(CHUNK_BYTES, least_budget) // max(1, bytes_per_position)))
    return math.ceil(positions / math.ceil(positions / fitting))
