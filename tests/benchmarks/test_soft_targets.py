"""benchmarks/soft_targets.py: its truth is the library's definition, and its errors are those of the solvers."""

import torch
from torch.nn import functional as F

from benchmarks.soft_targets import TEACHERS, make_target, measure, smoothing_terms, truth
from benchmarks.solver_accuracy import Predictions
from matrix_llm.diagnose.gradients import LMHead
from matrix_llm.information import matrix_log
from matrix_llm.loss.settings import Solver
from matrix_llm.loss.soft_targets import soft_terms
from matrix_llm.loss.solvers import Embeddings
from matrix_llm.mce import token_mce

F64 = torch.float64


def predictions(v=200, h=20, n=6):
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(v, h, dtype=F64, generator=g)
    hidden, moved = (0.5 * torch.randn(n, h, dtype=F64, generator=g) for _ in range(2))
    labels = torch.randint(0, v, (n,), generator=g)
    return Predictions(hidden, LMHead(weight, None, 1.0, None), labels, list("abcdef")), (hidden + moved) @ weight.T


def test_the_truth_is_the_definition():
    student, teacher = predictions()
    q, vectors = student.head.logits(student.hidden).softmax(-1), F.normalize(student.head.weight, dim=-1)
    targets = [make_target(name, teacher, 5) for name in TEACHERS]
    assert all(torch.allclose(target.weights.sum(-1), torch.ones(6, dtype=F64)) for target in targets)
    for target, true in zip(targets, truth(q, targets, vectors), strict=True):
        exact = soft_terms(q, *target, Embeddings(vectors, None), Solver("exact", 6, 4, None, None), want_gradient=True)
        torch.testing.assert_close(tuple(true), exact, rtol=1e-9, atol=1e-11)


def test_errors_shrink_with_steps_and_kept_tokens():
    student, teacher = predictions()
    near, _, far = measure(student, teacher, [3])
    for result in (near, far):
        rows = {row["solver"]: row for row in result["table"]}
        for column in ("value", "logits", "hidden"):
            assert (
                rows["whole vocabulary, 3 block steps"][column] < 0.1 * rows["whole vocabulary, 1 block steps"][column]
            )
            assert rows["top 64, the target's and tail"][column] < rows["top 8, the target's and tail"][column]
    assert near["soft MCE"] < far["soft MCE"]


def test_smoothing_mixes_in_the_vocabularys_moment():
    student, _ = predictions()
    logits, vectors = student.head.logits(student.hidden), F.normalize(student.head.weight, dim=-1)
    q = logits.softmax(-1)
    one_hot, smooth = smoothing_terms(q, student.labels, vectors)
    torch.testing.assert_close(one_hot, token_mce(logits, student.labels, vectors, solver="exact"))
    log_q = matrix_log(torch.einsum("nv,vi,vj->nij", q, vectors, vectors))
    torch.testing.assert_close(smooth, -torch.einsum("vi,nij,vj->n", vectors, log_q, vectors) / len(vectors))
