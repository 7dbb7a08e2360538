"""Lanczos and its quadrature (loss/krylov.py, and the same recurrence in loss/head_tail.py) under rounding."""

import pytest
import torch

from matrix_llm.mce import token_mce

F64 = torch.float64


def graded(scale, *, n=16, v=300, d=40):
    """Vectors with a power-law spectrum, and predictions as sure as `scale`: Q's eigenvalues span many decades."""
    g = torch.Generator().manual_seed(0)
    embeddings = torch.randn(v, d, dtype=F64, generator=g) / torch.arange(1, d + 1, dtype=F64)
    logits = scale * torch.randn(n, v, dtype=F64, generator=g)
    labels = torch.randint(0, v, (n,), generator=g)
    return logits.float().double(), labels, embeddings.float().double()  # the same numbers in float32


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_as_many_steps_as_dimensions_are_exact_to_rounding(scale):
    """The three-term recurrence alone loses orthogonality, and seven digits of the value with it."""
    arguments = graded(scale)
    torch.testing.assert_close(
        token_mce(*arguments, steps=40), token_mce(*arguments, solver="exact"), rtol=1e-11, atol=0
    )


@pytest.mark.parametrize("top_k", [16, 40])
def test_head_and_tail_in_float32_keep_five_digits_of_sure_predictions(top_k):
    """One orthogonalisation loses them all: the basis decays into copies of its first vectors."""
    logits, labels, embeddings = graded(10.0)
    wide = token_mce(logits, labels, embeddings, steps=16, top_k=top_k)
    narrow = token_mce(logits.float(), labels, embeddings.float(), steps=16, top_k=top_k)
    torch.testing.assert_close(narrow.double(), wide, rtol=1e-5, atol=0)
