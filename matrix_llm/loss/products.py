"""Matrix products in mixed precision: half-precision factors, float32 sums.

>>> out = torch.empty(1, 1)
>>> multiply(torch.ones(1, 2, dtype=torch.bfloat16), torch.ones(2, 1, dtype=torch.bfloat16), out=out)
>>> out
tensor([[2.]])
"""

from __future__ import annotations

import torch
from torch import Tensor

# addmm of half-precision factors to a float32 sum (pytorch/pytorch#167931)
ADDS_HALF_TO_FLOAT32 = torch.__version__ >= "2.10"


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b. Half-precision products accumulate in float32, and stay in it if `out` is float32."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total += a @ b, or total = a @ b for the `first` one, accumulated in the dtype of `total`."""
    if a.dtype != total.dtype and not a.is_cuda:
        a, b = a.to(total.dtype), b.to(total.dtype)
    if first:
        multiply(a, b, out=total)
    elif a.dtype == total.dtype:
        total.addmm_(a, b)
    elif ADDS_HALF_TO_FLOAT32:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.add_(torch.mm(a, b, out_dtype=total.dtype))
