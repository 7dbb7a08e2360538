"""How many positions are processed at once, so that the full (N, V) logits never exist.

positions_per_chunk  between two products with the LM head: as many as fit into memory
blocks               in a chain of element-wise steps over a chunk: as many as stay in cache
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

CHUNK_BYTES = 256 * 2**20  # working memory of one chunk of positions
BLOCK_ELEMENTS = {"cpu": 2**19, "cuda": 2**26}  # on a GPU no cache holds a block, but many short kernels cost time
LEAST_BLOCK = 8  # positions, for the threads to share


def positions_per_chunk(positions: int, bytes_per_position: int, least_budget: int = 0) -> int:
    """The length of nearly even chunks, as few as fit into CHUNK_BYTES, or into `least_budget` bytes if that is more.

    >>> positions_per_chunk(7, CHUNK_BYTES // 3)  # three would fit: 3 + 3 + 1
    3
    >>> positions_per_chunk(7, 10 * CHUNK_BYTES)  # never less than one
    1
    """
    fitting = max(1, min(positions, max(CHUNK_BYTES, least_budget) // max(1, bytes_per_position)))
    return math.ceil(positions / math.ceil(positions / fitting))


def blocks(z: Tensor) -> Iterator[slice]:
    """The positions of z (C, V), a block at a time.

    >>> import torch
    >>> list(blocks(torch.empty(20, 2**16)))
    [slice(0, 8, None), slice(8, 16, None), slice(16, 20, None)]
    """
    positions, vocabulary_size = z.shape
    length = max(LEAST_BLOCK, BLOCK_ELEMENTS["cuda" if z.is_cuda else "cpu"] // vocabulary_size)
    for start in range(0, positions, length):
        yield slice(start, min(start + length, positions))
