"""MCE with a soft target (loss/soft_targets.py) against the dense definition, in float64, at awkward sizes."""

import doctest

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from matrix_llm.base.errors import RecipeError
from matrix_llm.information import matrix_entropy, matrix_log
from matrix_llm.loss import block_krylov, soft_head_tail, soft_targets
from matrix_llm.loss.block_krylov import block_quadrature
from matrix_llm.loss.settings import Solver
from matrix_llm.loss.soft_targets import soft_terms, teacher_matrix_entropy
from matrix_llm.loss.solvers import prepare_embeddings
from matrix_llm.loss.vocabulary import DIRECTIONS
from matrix_llm.mce import token_mce
from tests.support.head_tail import claimed_q
from tests.support.predictions import scale_to_entropy

F64 = torch.float64
EXACT, WHOLE = Solver("exact", 99, 4, None, None), Solver("krylov", 99, 4, None, None)
FEW = Solver("krylov", 4, 4, None, None)
SOLVERS = ["exact", "whole", "head and tail"]
every_form = pytest.mark.parametrize(
    "solver",
    [EXACT, WHOLE, Solver("krylov", 99, 4, None, 33), Solver("krylov", 99, 4, None, 5)],
    ids=["exact", "whole", "all kept", "5 kept"],
)
SIZES = [(7, 3), (7, 11), (33, 20), (33, 80), (300, 20)]  # V, D


def keeping(top_k):
    return Solver("krylov", 99, 4, None, top_k)


def named(solver, v):
    return {"exact": EXACT, "whole": WHOLE, "head and tail": keeping(v)}[solver]


def problem(c=3, v=33, d=20, k=4, *, scale=2.0, seed=0, awkward=False):
    """Logits, ids, weights that sum to 1, embeddings; with `awkward` two equal vectors, a zero one, a repeated id and
    an id without weight."""
    g = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(v, d, dtype=F64, generator=g) * torch.arange(1, d + 1, dtype=F64) ** -0.5
    logits = scale * torch.randn(c, v, dtype=F64, generator=g)
    ids = torch.randint(0, v, (c, k), generator=g)
    target = torch.rand(c, k, dtype=F64, generator=g).pow(3)
    if awkward:
        embeddings[0], embeddings[2] = 0, embeddings[1]
        ids[:, 0] = 1
        ids[0, -1] = 0
        if k > 2:
            ids[:, 1], ids[0, 2] = 2, 1
            target[-1, 1] = 0
    return logits, ids, target / target.sum(-1, keepdim=True), embeddings


def solve(logits, ids, target, embeddings, solver, *, want_gradient=True, dtype=F64):
    """Value and gradient in the logits, as a caller gets them."""
    q = logits.to(dtype).softmax(-1)
    before, target, prepared = q.clone(), target.to(dtype), prepare_embeddings(embeddings, solver, dtype)
    if solver.name == "krylov" and solver.top_k is None:  # soft_terms takes "exact" where the columns outnumber D
        value, g = block_quadrature(q, prepared.vectors, ids, target, solver.steps, want_gradient=want_gradient)
        made = value, None if g is None else q * (g - (q * g).sum(-1, keepdim=True))
    else:
        made = soft_terms(q, ids, target, prepared, solver, want_gradient=want_gradient)
    torch.testing.assert_close(q, before, rtol=0, atol=0, equal_nan=True)
    return made


def dense_p(ids, target, v):
    return torch.zeros(len(ids), v, dtype=F64).scatter_add(1, ids, target)


def moment(weights, embeddings):
    e = F.normalize(embeddings, dim=-1)
    return torch.einsum("nv,vi,vj->nij", weights, e, e)


def by_definition(logits, ids, target, embeddings, big_q=None):
    """-tr(P log Q) and its gradient in the logits, by autograd through the dense logarithm."""
    z = logits.clone().requires_grad_()
    q = z.softmax(-1)
    log_q = matrix_log(moment(q, embeddings) if big_q is None else big_q(q))
    value = -(moment(dense_p(ids, target, z.shape[1]), embeddings) * log_q).sum((1, 2))
    return value.detach(), torch.autograd.grad(value.sum(), z)[0]


def assert_equal(got, expected, tolerance=1e-10):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("module", [soft_targets, soft_head_tail], ids=lambda module: module.__name__)
def test_doctests(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


# ---------------------------------------------------------------------------------------------- against the definition


@pytest.mark.parametrize("awkward", [False, True], ids=["plain", "awkward"])
@pytest.mark.parametrize("k", [1, 4, 9])
@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize(("v", "d"), SIZES)
def test_every_solver_has_the_value_and_gradient_of_the_definition(v, d, c, k, awkward):
    """More target tokens than dimensions, repeated and weightless ids, equal and zero vectors among them."""
    given = problem(c, v, d, k, awkward=awkward)
    expected = by_definition(*given)
    assert expected[0].min() > 0 or awkward
    for solver in SOLVERS:
        assert_equal(solve(*given, named(solver, v)), expected)


@pytest.mark.parametrize("solver", SOLVERS)
def test_weights_that_sum_to_less_than_one_are_taken_as_they_are(solver):
    logits, ids, target, embeddings = problem()
    target = target * torch.tensor([[1.0], [0.3], [0.0]], dtype=F64)
    made = solve(logits, ids, target, embeddings, named(solver, 33))
    assert_equal(made, by_definition(logits, ids, target, embeddings))
    assert made[0][2].abs() < 1e-12


@pytest.mark.parametrize("solver", SOLVERS)
def test_gradcheck(solver):
    logits, ids, target, embeddings = problem(2, 7, 3, 4, awkward=True)

    class Soft(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            value, gradient = solve(z, ids, target, embeddings, named(solver, 7))
            ctx.save_for_backward(gradient)
            return value

        @staticmethod
        def backward(ctx, grad):
            return ctx.saved_tensors[0] * grad.unsqueeze(-1)

    assert torch.autograd.gradcheck(Soft.apply, (logits.requires_grad_(),))


@pytest.mark.parametrize("steps", [1, 2, 6, 99])
@pytest.mark.parametrize(("v", "d"), SIZES)
def test_a_one_hot_target_over_the_whole_vocabulary_is_todays_mce_step_by_step(v, d, steps):
    logits, ids, _, embeddings = problem(5, v, d, 1, scale=4.0)
    z = logits.clone().requires_grad_()
    value = token_mce(z, ids[:, 0], embeddings, steps=steps)
    expected = value.detach(), torch.autograd.grad(value.sum(), z)[0]
    whole = Solver("krylov", steps, 4, None, None)
    others = torch.randint(0, v, (5, 3))
    assert_equal(solve(logits, ids, torch.ones(5, 1, dtype=F64), embeddings, whole), expected)
    one_hot = torch.tensor([[0.0, 1.0, 0.0, 0.0]], dtype=F64).expand(5, -1)
    ids = torch.cat([others[:, :1], ids, others[:, 1:]], dim=1)
    assert_equal(solve(logits, ids, one_hot, embeddings, whole), expected)


def test_a_one_hot_target_with_head_and_tail_is_todays_where_the_target_is_likely():
    """Where it is not, today's keeps it in place of the least likely kept token, and the soft form beside that."""
    logits, _, _, embeddings = problem(9, 300, 40, 1, scale=3.0)
    labels = logits.topk(8).indices[torch.arange(9), torch.arange(9) % 8]
    z = logits.clone().requires_grad_()
    value = token_mce(z, labels, embeddings, top_k=8, steps=99)
    expected = value.detach(), torch.autograd.grad(value.sum(), z)[0]
    assert_equal(solve(logits, labels[:, None], torch.ones(9, 1, dtype=F64), embeddings, keeping(8)), expected)


# ------------------------------------------------------------------------------------------------------- head and tail


@pytest.mark.parametrize(("v", "d", "top_k", "k"), [(90, 20, 9, 4), (37, 13, 1, 9), (90, 40, 16, 1), (90, 12, 3, 4)])
def test_head_and_tail_solves_the_matrix_that_it_claims(v, d, top_k, k):
    """Autograd through the dense logarithm of that Q, in every logit: each token of the tail has its own derivative."""
    given = problem(5, v, d, k, awkward=True)
    logits, ids, _, embeddings = given
    kept = torch.cat([logits.topk(top_k).indices, ids], dim=1)
    expected = by_definition(*given, lambda q: claimed_q(q, kept, embeddings))
    assert_equal(solve(*given, keeping(top_k)), expected, 1e-9)


def test_head_and_tail_reads_no_vector_but_the_kept_ones():
    logits, ids, target, embeddings = problem(3, 300, 20, 4)
    solver = keeping(5)
    prepared = prepare_embeddings(embeddings, solver, F64)
    kept = torch.cat([logits.topk(5).indices, ids], dim=1).flatten()
    holes = torch.full_like(embeddings, torch.nan).index_copy(0, kept, embeddings[kept])
    q = logits.softmax(-1)
    whole = soft_terms(q, ids, target, prepared, solver, want_gradient=True)
    assert_equal(soft_terms(q, ids, target, prepared._replace(vectors=holes), solver, want_gradient=True), whole, 0)


@pytest.mark.parametrize(("d", "size"), [(80, 5 + 4 + DIRECTIONS), (20, 20)])
def test_the_logarithm_is_no_larger_than_the_kept_directions(d, size, monkeypatch):
    found = []
    log = soft_head_tail.log_at_block
    monkeypatch.setattr(soft_head_tail, "log_at_block", lambda t, start: found.append(t.shape) or log(t, start))
    solve(*problem(3, 300, d, 4), keeping(5))
    assert found == [(3, size, size)]


def test_the_callers_likeliest_tokens_are_taken():
    logits, ids, target, embeddings = problem(3, 300, 20, 4)
    solver = keeping(5)
    prepared, q = prepare_embeddings(embeddings, solver, F64), logits.softmax(-1)
    found = soft_terms(q, ids, target, prepared, solver, want_gradient=True)
    told = soft_terms(q, ids, target, prepared, solver, want_gradient=True, likeliest=q.topk(5).indices)
    other = soft_terms(q, ids, target, prepared, solver, want_gradient=True, likeliest=q.topk(5, largest=False).indices)
    assert_equal(told, found, 1e-13)
    assert not torch.allclose(other[0], found[0], rtol=1e-3)


def test_centred_vectors_are_centred_in_the_kept_rows_too():
    logits, ids, target, embeddings = problem(3, 300, 20, 4)
    embeddings = embeddings + 2
    solver = Solver("krylov", 99, 4, None, 5, centred=True)
    expected = solve(logits, ids, target, embeddings - embeddings.mean(0), keeping(5))
    assert_equal(solve(logits, ids, target, embeddings, solver), expected)
    centred = prepare_embeddings(embeddings, solver, F64)
    by_hand = prepare_embeddings(embeddings - embeddings.mean(0), WHOLE, F64)
    assert_equal([teacher_matrix_entropy(ids, target, centred)], [teacher_matrix_entropy(ids, target, by_hand)])


# ------------------------------------------------------------------------------------------------------ what must hold


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6), st.sampled_from([0.1, 1.0, 4.0, 12.0]), st.sampled_from([1, 2, 5, 12]),
    st.sampled_from([(7, 3), (33, 50), (60, 20)]), st.sampled_from(SOLVERS), st.integers(1, 6),
)  # fmt: skip
def test_bounds(seed, scale, k, size, solver, top_k):
    """-log tr(PQ) <= MCE <= soft CE and 0 <= MCE - ME(P) <= KL(p || q), with few kept tokens too (Q has trace 1)."""
    (v, d), c = size, 4
    logits, ids, target, embeddings = problem(c, v, d, k, scale=scale, seed=seed)
    chosen = keeping(top_k) if solver == "head and tail" else named(solver, v)
    value, _ = solve(logits, ids, target, embeddings, chosen, want_gradient=False)
    p, q = dense_p(ids, target, v), logits.softmax(-1)
    e = F.normalize(embeddings, dim=-1)
    soft_ce = -(p * logits.log_softmax(-1)).sum(-1)
    assert (value <= soft_ce + 1e-9).all()
    if solver != "head and tail":
        overlap = torch.einsum("cv,cw,vw->c", p, q, (e @ e.T).square())
        assert (value >= -overlap.log() - 1e-9).all()
    kl = value - teacher_matrix_entropy(ids, target, prepare_embeddings(embeddings, chosen, F64))
    assert (kl >= -1e-9).all()
    assert (kl <= soft_ce + torch.xlogy(p, p).sum(-1) + 1e-9).all()


@pytest.mark.parametrize(("v", "d"), [(7, 11), (33, 20)])
def test_the_smallest_value_is_the_teachers_own_entropy_where_it_is_met(v, d):
    logits, _, _, embeddings = problem(4, v, d)
    target, ids = logits.softmax(-1), torch.arange(v).expand(4, -1)
    for solver in SOLVERS:
        value, gradient = solve(logits, ids, target, embeddings, named(solver, v))
        entropy = teacher_matrix_entropy(ids, target, prepare_embeddings(embeddings, named(solver, v), F64))
        assert_equal([value, gradient], [entropy, torch.zeros_like(gradient)])


@pytest.mark.parametrize("k", [1, 4, 25])
def test_the_teachers_entropy_is_that_of_its_dense_matrix(k):
    _, ids, target, embeddings = problem(5, 33, 20, k, awkward=True)
    target = target * torch.linspace(0.1, 1, 5, dtype=F64).unsqueeze(-1)
    big_p = moment(dense_p(ids, target, 33), embeddings)
    expected = matrix_entropy(big_p) - big_p.diagonal(dim1=1, dim2=2).sum(-1)
    for solver in (WHOLE, keeping(3)):
        assert_equal([teacher_matrix_entropy(ids, target, prepare_embeddings(embeddings, solver, F64))], [expected])


@every_form
def test_it_is_the_mixture_of_one_hot_values_and_gradients(solver):
    logits, ids, target, embeddings = problem(3, 33, 20, 4, awkward=True)
    parts = []
    for i in range(4):
        one_hot = torch.zeros_like(target)
        one_hot[:, i] = 1  # the same ids, so that the same tokens are kept
        parts.append(solve(logits, ids, one_hot, embeddings, solver))
    value = sum(target[:, i] * parts[i][0] for i in range(4))
    gradient = sum(target[:, i, None] * parts[i][1] for i in range(4))
    assert_equal(solve(logits, ids, target, embeddings, solver), [value, gradient])


@every_form
def test_a_repeated_id_is_one_with_the_sum_of_the_weights(solver):
    logits, ids, target, embeddings = problem(3, 33, 20, 2)
    weights = torch.cat([0.25 * target, 0.75 * target, torch.zeros_like(target)], dim=1)
    made = solve(logits, torch.cat([ids, ids, ids], dim=1), weights, embeddings, solver)
    assert_equal(made, solve(logits, ids, target, embeddings, solver))


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_position_does_not_depend_on_its_neighbours_or_on_the_block_length(solver, monkeypatch):
    logits, ids, target, embeddings = problem(7, 60, 20, 4, awkward=True)
    chosen = keeping(6) if solver == "head and tail" else named(solver, 60)
    together = solve(logits, ids, target, embeddings, chosen)
    for i in range(7):
        alone = solve(logits[i : i + 1], ids[i : i + 1], target[i : i + 1], embeddings, chosen)
        assert_equal(alone, [x[i : i + 1] for x in together], 1e-12)
    monkeypatch.setattr(soft_targets, "BLOCK_ELEMENTS", 2 * 60 * 20)  # 2 + 2 + 2 + 1
    monkeypatch.setattr(soft_head_tail, "BLOCK_ELEMENTS", 3 * 22 * (20 + 4 * 22))  # 3 + 3 + 1
    monkeypatch.setattr(block_krylov, "positions_per_chunk", lambda *_: 3)
    assert_equal(solve(logits, ids, target, embeddings, chosen), together, 1e-12)


@pytest.mark.parametrize(
    "solver", [EXACT, Solver("krylov", 4, 4, None, None), keeping(16)], ids=["exact", "4 steps", "16 kept"]
)
@pytest.mark.parametrize("entropy", [0.5, 3.0])
def test_float32_is_enough_on_realistic_vectors(solver, entropy):
    """Vectors with a common direction and a power-law spectrum, and a teacher who sometimes disagrees."""
    g = torch.Generator().manual_seed(0)
    v, d, n, k = 1500, 48, 40, 8
    embeddings = torch.randn(v, d, dtype=F64, generator=g) * torch.arange(1, d + 1, dtype=F64) ** -0.5
    embeddings = (embeddings + 0.3 * torch.randn(d, dtype=F64, generator=g)).float().double()
    logits = scale_to_entropy(torch.randn(n, d, dtype=F64, generator=g) @ embeddings.T, entropy).float().double()
    teacher = (logits + torch.randn(n, v, dtype=F64, generator=g)).softmax(-1)
    target, ids = teacher.topk(k)
    target = (target / target.sum(-1, keepdim=True)).float().double()
    wide = solve(logits, ids, target, embeddings, solver)
    narrow = solve(logits, ids, target, embeddings.float(), solver, dtype=torch.float32)
    assert narrow[0].dtype == narrow[1].dtype == torch.float32
    torch.testing.assert_close(narrow[0].double(), wide[0], rtol=1e-3, atol=1e-6)  # 1e-6: q of a sure prediction
    assert ((narrow[1] - wide[1]).norm(dim=1) < 1e-3 * wide[1].norm(dim=1) + 1e-6).all()


@every_form
@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("k", [1, 3])
def test_no_gradient_exceeds_one_however_surprising_the_target(solver, dtype, k):
    """-q_j g_j lies between 0 and 1. Eigenvalues of Q below rounding noise would make it thousands."""
    logits, ids, target, embeddings = problem(60, 200, 40, k, scale=15.0)
    value, gradient = solve(logits, ids, target, embeddings.to(dtype), solver, dtype=dtype)
    assert value.max() > 20
    assert gradient.abs().max() < 1 + 1e-3


# ----------------------------------------------------------------------------------------------------------- few steps


def test_few_columns_are_blocks_and_as_many_as_dimensions_are_exact():
    logits, ids, target, embeddings = problem(3, 33, 20, 4)
    q, prepared = logits.softmax(-1), prepare_embeddings(embeddings, EXACT, F64)
    exact, four, five = (
        soft_terms(q, ids, target, prepared, solver, want_gradient=True)
        for solver in (EXACT, Solver("krylov", 4, 4, None, None), Solver("krylov", 5, 4, None, None))
    )
    assert_equal(five, exact, 0)
    assert_equal(four, solve(logits, ids, target, embeddings, FEW), 0)
    assert not torch.equal(four[0], exact[0])
    four = soft_terms(q, ids, target, prepared, FEW, want_gradient=False)
    assert four[1] is None


def test_more_block_steps_come_closer():
    given = problem(20, 300, 40, 4, scale=1.5)
    exact = by_definition(*given)
    errors = []
    for steps in (1, 2, 3, 4, 6):
        made = solve(*given, Solver("krylov", steps, 4, None, None))
        errors.append([(a - b).abs().mean().item() for a, b in zip(made, exact, strict=True)])
    assert errors == sorted(errors, reverse=True), errors
    assert errors[-1][0] < 0.02 * errors[0][0]


# ---------------------------------------------------------------------------------------------------------- bad input


def test_the_series_is_refused_with_a_way_out():
    logits, ids, target, embeddings = problem()
    with pytest.raises(RecipeError, match=r"solver='taylor'.*'krylov'"):
        solve(logits, ids, target, embeddings, Solver("taylor", 6, 4, None, None))


@pytest.mark.parametrize("solver", [EXACT, FEW, keeping(5)], ids=["exact", "4 steps", "5 kept"])
def test_no_positions_give_nothing(solver):
    logits, ids, target, embeddings = (x[:0] if len(x) == 3 else x for x in problem())
    prepared = prepare_embeddings(embeddings, solver, F64)
    value, gradient = soft_terms(logits.softmax(-1), ids, target, prepared, solver, want_gradient=True)
    assert (value.shape, gradient.shape) == ((0,), (0, 33))
    assert teacher_matrix_entropy(ids, target, prepared).shape == (0,)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("of", ["logits", "target"])
def test_nan_reaches_the_value_of_its_position_alone(solver, of):
    """The trainer's guard can then name step and row; an error of the eigensolver could not."""
    logits, ids, target, embeddings = problem(3, 33, 20, 4)
    prepared = prepare_embeddings(embeddings, named(solver, 33), F64)
    entropy = teacher_matrix_entropy(ids, target, prepared)
    expected = solve(logits, ids, target, embeddings, named(solver, 33))
    {"logits": logits, "target": target}[of][1, 0] = torch.nan
    value, gradient = solve(logits, ids, target, embeddings, named(solver, 33))
    assert value.isnan().tolist() == [False, True, False]
    assert_equal([value[::2], gradient[::2]], [expected[0][::2], expected[1][::2]])
    made = teacher_matrix_entropy(ids, target, prepared)
    assert made.isnan().tolist() == [False, of == "target", False]
    assert_equal([made[::2]], [entropy[::2]])


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_vector_that_is_nan_is_not_passed_over(solver):
    logits, ids, target, embeddings = problem(3, 33, 20, 4)
    embeddings[ids[1, 0]] = torch.nan
    assert solve(logits, ids, target, embeddings, named(solver, 33))[0].isnan().all()  # every Q has it
