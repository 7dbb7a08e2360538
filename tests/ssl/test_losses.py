"""Every loss against a slow float64 reference written out here, in value and gradient, and facts it must satisfy."""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch

from matrix_llm.information import matrix_log, total_coding_rate
from matrix_llm.ssl.losses import (
    barlow_twins_loss,
    byol_loss,
    dense_matrix_ssl_loss,
    matrix_alignment_loss,
    matrix_ssl_loss,
    matrix_uniformity_loss,
    mec_loss,
    moco_loss,
    nt_xent_loss,
    simsiam_loss,
    sinkhorn,
    swav_loss,
    vicreg_loss,
)
from matrix_llm.ssl.losses.polynomials import gram, log_series, polynomial, trace_of_powers
from tests.support import ssl_distributed_run
from tests.support.paths import ROOT, SUPPORT

F64 = torch.float64
SIZES = [
    (3, 7),
    (3, 5),
    (4, 4),
    (7, 3),
    (5, 1),
    (2, 1),
    (2, 2),
]  # 2 B < d, B < d, B = d, B > d, d = 1, the smallest batch


def rows(count, width, seed=0):
    return torch.randn(count, width, dtype=F64, generator=torch.Generator().manual_seed(seed))


def views(count, width, seed=0):
    a, b = rows(count, width, seed), rows(count, width, seed + 1)
    return 0.8 * a, 0.6 * a + 0.5 * b


# --- references: from the definitions, with nothing of the code under test
# ---------------------------------------------------


def unit(z):
    return z / z.norm(dim=1, keepdim=True)


def covariance(a, b):
    """a^T H b / B with the centring matrix H = I - 1 1^T / B, as the released code writes it."""
    count = len(a)
    return unit(a).T @ (torch.eye(count, dtype=F64) - torch.ones(count, count, dtype=F64) / count) @ unit(b) / count


def chain_log(q, order):
    x = q - torch.eye(len(q), dtype=F64)
    power, total = x, torch.zeros_like(x)
    for k in range(1, order + 1):
        total = total + power / k if k % 2 else total - power / k
        power = power @ x
    return total


def reference_official(target, online, gamma=1.0, order=4, mu=1.0, lambda_=1.0):
    eye = torch.eye(target.shape[1], dtype=F64)
    uniformity = torch.trace(-(lambda_ * eye) @ chain_log(covariance(target, online) + mu * eye, order))
    alignment = torch.trace(
        -(covariance(target, target) + mu * eye) @ chain_log(covariance(online, online) + mu * eye, order)
    )
    return uniformity + gamma * alignment


def reference_paper(target, online, gamma=1.0, lambda_=1.0):
    """Autograd through eigvals is never asked: tr log is log det, and log(C22 + lambda I) a long series about lambda
    + 1/2.
    """
    width = target.shape[1]
    eye = torch.eye(width, dtype=F64)
    q = covariance(target, online) + lambda_ * eye
    uniformity = -torch.linalg.det(q).abs().log() / width + torch.trace(q)
    p, q = (covariance(z, z) + lambda_ * eye for z in (target, online))
    scale = lambda_ + 0.5  # the eigenvalues of q are in [lambda, lambda + 1]
    log_q = chain_log(q / scale, 400) + math.log(scale) * eye
    return uniformity - torch.trace(covariance(target, online)) + gamma * torch.trace(-p @ log_q + q)


def reference_mec(z1, z2, eps=64.0, order=4):
    """The released training loss: trace / B times 1 / lamda, lamda = 1 / (B eps / d)."""
    count, width = z1.shape
    lamda = 1 / (count * eps / width)
    return -torch.trace(chain_log(torch.eye(count, dtype=F64) + unit(z1) @ unit(z2).T * lamda, order)) / count / lamda


def reference_barlow(z1, z2, lambd=0.0051):
    a, b = ((z - z.mean(0)) / ((z - z.mean(0)).square().mean(0) + 1e-5).sqrt() for z in (z1, z2))
    total = 0
    for i in range(z1.shape[1]):
        for j in range(z1.shape[1]):
            c = (a[:, i] * b[:, j]).mean()
            total = total + ((1 - c) ** 2 if i == j else lambd * c**2)
    return total


def reference_vicreg(z1, z2):
    count, width = z1.shape
    loss = 25 * (z1 - z2).square().mean()
    for z in (z1, z2):
        z = z - z.mean(0)
        for i in range(width):
            std = ((z[:, i] ** 2).sum() / (count - 1) + 1e-4).sqrt()
            loss = loss + 25 * torch.clamp(1 - std, min=0) / width / 2
            for j in range(width):
                if i != j:
                    loss = loss + ((z[:, i] * z[:, j]).sum() / (count - 1)) ** 2 / width
    return loss


def reference_nt_xent(z1, z2, temperature=0.5):
    z, total = unit(torch.cat([z1, z2])), 0
    for i in range(len(z)):
        weights = [(z[i] @ z[k] / temperature).exp() for k in range(len(z)) if k != i]
        total = total - ((z[i] @ z[(i + len(z1)) % len(z)] / temperature).exp() / sum(weights)).log()
    return total / len(z)


QUEUE = rows(6, 7, seed=9)


def reference_moco(z1, z2, temperature=0.2):
    q, k, old = unit(z1), unit(z2.detach()), unit(QUEUE[:, : z1.shape[1]])
    positive = [(q[i] @ k[i] / temperature).exp() for i in range(len(q))]
    return sum(
        -(p / (p + sum((q[i] @ n / temperature).exp() for n in old))).log() for i, p in enumerate(positive)
    ) / len(q)


def reference_simsiam(z1, z2):
    cos = torch.nn.CosineSimilarity(dim=1)
    return -(cos(z1, z2.detach()).mean() + cos(z2, z1.detach()).mean()) * 0.5


def reference_swav(z1, z2):
    loss = 0
    for scores, others in ((z1, z2), (z2, z1)):
        q = (others.detach() / 0.05).exp()
        for _ in range(3):
            q = q / q.sum(0, keepdim=True) / q.shape[1]
            q = q / q.sum(1, keepdim=True) / q.shape[0]
        q = q * q.shape[0]
        p = (scores / 0.1).exp() / (scores / 0.1).exp().sum(1, keepdim=True)
        loss = loss - 0.5 * (q * p.log()).sum() / len(scores)
    return loss


CASES = {
    "matrix_ssl official": (matrix_ssl_loss, reference_official),
    "matrix_ssl paper": (
        lambda a, b: matrix_ssl_loss(a, b, preset="paper", lambda_=0.3, gamma=0.7),
        lambda a, b: reference_paper(a, b, 0.7, 0.3),
    ),
    "mec": (mec_loss, reference_mec),
    "mec, eps 2": (lambda a, b: mec_loss(a, b, eps=2.0, order=5), lambda a, b: reference_mec(a, b, 2.0, 5)),
    "barlow_twins": (barlow_twins_loss, reference_barlow),
    "vicreg": (vicreg_loss, reference_vicreg),
    "nt_xent": (nt_xent_loss, reference_nt_xent),
    "moco": (lambda a, b: moco_loss(a, b, QUEUE[:, : a.shape[1]]), reference_moco),
    "byol": (byol_loss, lambda a, b: (unit(a) - unit(b.detach())).square().sum(1).mean()),
    "simsiam": (lambda a, b: simsiam_loss(a, b, a, b), reference_simsiam),
    "swav": (swav_loss, reference_swav),
}


def value_and_gradients(loss, *z):
    z = [x.clone().requires_grad_() for x in z]
    value = loss(*z)
    return value.detach(), torch.autograd.grad(value, z, allow_unused=True, materialize_grads=True)


def assert_same(got, expected, tolerance=1e-10):
    torch.testing.assert_close(got[0], expected[0], rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(got[1], expected[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients_equal_the_slow_reference(name, size):
    loss, reference = CASES[name]
    assert_same(value_and_gradients(loss, *views(*size)), value_and_gradients(reference, *views(*size)))


@pytest.mark.parametrize("size", SIZES[:5])
@pytest.mark.parametrize("name", [n for n in CASES if n != "swav"])
def test_gradient_is_the_finite_difference(name, size):
    """In the branches that are not stopped."""
    z1, z2 = (z.requires_grad_() for z in views(*size, seed=5))
    if name in ("moco", "byol"):
        z2.requires_grad_(False)
    loss = CASES[name][0]
    if name == "simsiam":
        fixed = views(*size, seed=7)

        def loss(a, b):
            return simsiam_loss(a, b, *fixed)

    assert torch.autograd.gradcheck(loss, (z1, z2))


@pytest.mark.parametrize("size", SIZES[:5])
def test_swav_gradient_takes_the_assignments_as_constants(size):
    z1, z2 = (z.requires_grad_() for z in views(*size, seed=5))
    for scores, others in ((z1, z2), (z2, z1)):
        (grad,) = torch.autograd.grad(swav_loss(z1, z2), scores)
        torch.testing.assert_close(grad, ((scores / 0.1).softmax(1) - sinkhorn(others)) / (2 * 0.1 * size[0]))


@pytest.mark.parametrize(
    ("mu", "lambda_", "order", "gamma"),
    [(0.5, 0.5, 4, 1.0), (0.8, 0.3, 1, 0.5), (1.0, 1.0, 2, 2.0), (1.2, 0.7, 7, 0.3)],
)
@pytest.mark.parametrize("size", SIZES)
def test_fast_and_dense_paths_and_the_released_arithmetic_agree_at_any_setting(size, mu, lambda_, order, gamma):
    kwargs = {"mu": mu, "lambda_": lambda_, "order": order, "gamma": gamma}
    expected = value_and_gradients(lambda a, b: reference_official(a, b, **kwargs), *views(*size))
    for loss in (matrix_ssl_loss, dense_matrix_ssl_loss):
        assert_same(value_and_gradients(lambda a, b, loss=loss: loss(a, b, **kwargs), *views(*size)), expected)
    z = views(*size)
    parts = matrix_uniformity_loss(*z, mu=mu, lambda_=lambda_, order=order) + matrix_alignment_loss(
        *z, mu=mu, order=order, gamma=gamma
    )
    torch.testing.assert_close(parts, expected[0])


@pytest.mark.parametrize("size", [(5, 40), (15, 20), (20, 20), (30, 6)])
def test_the_papers_preset_equals_the_dense_one_through_every_gram_matrix(size):
    def call(loss):
        return value_and_gradients(lambda a, b: loss(a, b, preset="paper", lambda_=0.05, gamma=0.4), *views(*size))

    assert_same(call(matrix_ssl_loss), call(dense_matrix_ssl_loss))


def bottleneck(count, width, rank):
    """Features of a predictor whose hidden layer is narrower: rank-deficient whatever the batch."""
    return rows(count, rank, 1) @ rows(rank, width, 2)


@pytest.mark.parametrize("lambda_", [1.0, 1e-3])
def test_the_frechet_gradient_on_rank_deficient_features_is_the_finite_difference(lambda_):
    """C22 + lambda I has lambda 5 times over; autograd through eigh gives NaN or noise there."""
    target, online = rows(9, 7), bottleneck(9, 7, rank=2)

    def loss(z):
        return matrix_alignment_loss(target, z, preset="paper", lambda_=lambda_)

    _, (gradient,) = value_and_gradients(loss, online)
    step = 1e-6
    for seed in range(5):
        direction = rows(9, 7, seed=20 + seed)
        slope = (loss(online + step * direction) - loss(online - step * direction)) / (2 * step)
        assert slope.item() == pytest.approx((gradient * direction).sum().item(), rel=1e-6, abs=1e-7)
    assert gradient.norm() > 1e-2


def test_equal_rows_have_finite_losses_and_gradients():
    """Full collapse: every covariance is zero."""
    for name, (loss, _) in CASES.items():
        value, gradients = value_and_gradients(loss, torch.ones(4, 3, dtype=F64), torch.ones(4, 3, dtype=F64))
        assert torch.isfinite(value), name
        assert all(torch.isfinite(g).all() for g in gradients), name


def test_the_taylor_series_converges_to_the_exact_logarithm():
    z1, z2 = views(9, 4)
    c12, c11, c22 = (covariance(a, b) for a, b in ((z1, z2), (z1, z1), (z2, z2)))
    eye = torch.eye(4, dtype=F64)
    uniformity, alignment = -torch.linalg.slogdet(eye + c12).logabsdet, -((eye + c11) * matrix_log(eye + c22)).sum()
    coding = -(64 / 4) * torch.linalg.slogdet(torch.eye(9, dtype=F64) + unit(z1) @ unit(z2).T * 4 / (9 * 64)).logabsdet
    for exact, call in (
        (uniformity, lambda k: matrix_uniformity_loss(z1, z2, order=k)),
        (alignment, lambda k: matrix_alignment_loss(z1, z2, order=k)),
        (coding, lambda k: mec_loss(z1, z2, order=k)),
    ):
        errors = [abs(call(k) - exact).item() for k in (1, 2, 4, 8, 16, 40)]
        assert all(b < a or b < 1e-12 for a, b in itertools.pairwise(errors)), errors
        assert errors[0] > 1e-3
        assert errors[-1] < 1e-9
    torch.testing.assert_close(mec_loss(z1, z2, order=None), coding)


def test_the_series_at_ridge_one_over_d_is_not_the_logarithm():
    """The trap of eq. 12 with a Taylor series: eigenvalues near 1 / d are outside where order 4 is accurate."""
    z = rows(64, 8)
    series = matrix_uniformity_loss(z, z, mu=1 / 2048, lambda_=1.0) / 8
    exact = matrix_uniformity_loss(z, z, preset="paper", lambda_=1 / 2048) - covariance(z, z).trace() - 8 / 2048
    assert series < exact - 0.15


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("barlow_twins", "vicreg", "moco", "swav")])
def test_a_rotation_of_the_features_changes_nothing(name):
    rotation = torch.linalg.qr(rows(5, 5, seed=3)).Q
    z1, z2 = views(6, 5)
    torch.testing.assert_close(CASES[name][0](z1 @ rotation, z2 @ rotation), CASES[name][0](z1, z2))


@pytest.mark.parametrize("name", CASES)
def test_a_permutation_of_the_batch_changes_nothing_but_one_of_a_single_view_does(name):
    z1, z2 = views(6, 5)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    loss = CASES[name][0]
    torch.testing.assert_close(loss(z1[order], z2[order]), loss(z1, z2))
    assert abs(loss(z1[order], z2) - loss(z1, z2)) > 1e-4


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("barlow_twins", "vicreg", "swav")])
def test_the_norm_of_a_row_changes_nothing(name):
    z1, z2 = views(6, 5)
    factor = torch.tensor([0.1, 1, 2, 3, 4, 500], dtype=F64).unsqueeze(1)
    torch.testing.assert_close(CASES[name][0](z1 * factor, z2 * factor.flip(0)), CASES[name][0](z1, z2))


@pytest.mark.parametrize("size", [(9, 4), (4, 9), (3, 9)])
def test_uniformity_of_equal_views_is_theorem_3_1_with_its_errata(size):
    """MCE(I / d, C + lambda I) = -log lambda - 2 / d TCR(Z) + tr C + d lambda, with eps^2 = d lambda."""
    z, lambda_, width = rows(*size), 0.07, size[1]
    centred = unit(z) - unit(z).mean(0)
    rate = total_coding_rate(centred, eps_squared=width * lambda_)
    expected = -math.log(lambda_) - 2 / width * rate + covariance(z, z).trace() + width * lambda_
    torch.testing.assert_close(matrix_uniformity_loss(z, z, preset="paper", lambda_=lambda_), expected)


def test_mec_of_equal_views_is_twice_the_coding_rate():
    """logdet(I + d / (B eps) Z Z^T) = 2 TCR(Z); the presets differ in scale alone."""
    z = rows(6, 4)
    rate = total_coding_rate(unit(z), eps_squared=3.0)
    torch.testing.assert_close(mec_loss(z, z, eps=3.0, order=None), -3.0 / 4 * 2 * rate)
    torch.testing.assert_close(mec_loss(z, z, eps=3.0, order=None, preset="paper"), -(6 + 4) / 2 * 2 * rate)


def test_alignment_is_smallest_where_the_views_agree():
    """MCE(P, .) is convex and smallest at P (prop. 2.6): the online branch cannot beat the target's own covariance."""
    z1, z2 = views(12, 4)
    least = matrix_alignment_loss(z1, z1, preset="paper", lambda_=0.1) + covariance(z1, z1).trace()
    for t in (0.1, 0.5, 1.0):
        mixed = (1 - t) * z1 + t * z2
        assert matrix_alignment_loss(z1, mixed, preset="paper", lambda_=0.1) + covariance(z1, mixed).trace() > least


@pytest.mark.parametrize("order", range(1, 10))
def test_polynomials_with_few_products_equal_the_chain(order):
    c = rows(4, 4) / 4
    a = log_series(order, shift=-0.3)
    shifted = c - 0.3 * torch.eye(4, dtype=F64)
    chain = sum((-1) ** (j + 1) / j * torch.linalg.matrix_power(shifted, j) for j in range(1, order + 1))
    torch.testing.assert_close(polynomial(c, a), chain)
    torch.testing.assert_close(trace_of_powers(c, a), chain.trace() - 4 * a[0])
    assert torch.autograd.gradcheck(lambda x: trace_of_powers(x, a), (c.requires_grad_(),))
    assert torch.autograd.gradcheck(gram, (c[:3].detach().requires_grad_(),))


class Products(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default and all(a.shape == self.shape for a in args):
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("batch", [40, 9])
def test_order_4_uniformity_takes_one_product_forward_and_one_backward(batch):
    """Of matrices as wide as the smaller of B and d = 17; the released chain takes four, and one with P."""
    z1, z2 = (z.requires_grad_() for z in views(batch, 17))
    with Products(torch.Size((min(batch, 17), min(batch, 17)))) as products:
        value = matrix_uniformity_loss(z1, z2)
        assert products.count == 1
        value.backward()
    assert products.count == 2


def test_swav_assignments_share_the_prototypes_equally():
    q = sinkhorn(rows(12, 4), epsilon=0.5, iterations=200)
    torch.testing.assert_close(q.sum(1), torch.ones(12, dtype=F64))
    torch.testing.assert_close(q.sum(0), torch.full((4,), 3.0, dtype=F64), rtol=1e-6, atol=0)
    assert torch.isfinite(sinkhorn(1000 * rows(4, 3))).all()


def test_the_scale_of_barlow_twins_scales_value_and_gradient():
    z = views(6, 3)
    (value, (grad, _)), (scaled, (scaled_grad, _)) = (
        value_and_gradients(lambda a, b, s=s: barlow_twins_loss(a, b, scale=s), *z) for s in (1.0, 0.025)
    )
    torch.testing.assert_close(scaled, 0.025 * value)
    torch.testing.assert_close(scaled_grad, 0.025 * grad)


def test_no_gradient_reaches_a_stopped_branch():
    z1, z2 = (z.requires_grad_() for z in views(4, 3))
    queue = QUEUE[:, :3].clone().requires_grad_()
    (moco_loss(z1, z2, queue) + byol_loss(z1, z2) + simsiam_loss(z1, z1, z2, z2)).backward()
    assert z2.grad is None
    assert queue.grad is None
    assert z1.grad.abs().max() > 0


@pytest.mark.parametrize("name", CASES)
def test_autocast_and_half_precision_rows_give_float32(name):
    z1, z2 = (z.float() for z in views(12, 5))
    expected = CASES[name][0](z1, z2)
    assert expected.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(CASES[name][0](z1, z2), expected)
    assert CASES[name][0](z1.bfloat16(), z2.bfloat16()).dtype == torch.float32
    assert CASES[name][0](z1.double(), z2.double()).dtype == F64


POISONED = torch.tensor([[1.0, 1, 1], [1, 1, math.nan], [1, 1, 1], [math.inf, 1, 1]])
ONE, FOUR = torch.ones(1, 3), torch.ones(4, 3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        *((lambda name=name: CASES[name][0](FOUR, torch.ones(4, 2)), r"row i of each|width") for name in CASES),
        *((lambda name=name: CASES[name][0](FOUR, POISONED), "NaN or infinity in 2 of 4 rows") for name in CASES),
        *(
            (lambda name=name: CASES[name][0](ONE, ONE), "batch of 1.*drop_last")
            for name in CASES
            if name not in ("moco", "byol", "simsiam")
        ),
        (lambda: matrix_ssl_loss(torch.ones(3), FOUR), r"target must be \(B, d\)"),
        (lambda: matrix_ssl_loss(FOUR.long(), FOUR), "int64"),
        (lambda: matrix_ssl_loss(FOUR, FOUR, preset="papers"), "'official', 'paper'"),
        (lambda: matrix_ssl_loss(FOUR, FOUR, order=0), "order=0"),
        (
            lambda: matrix_ssl_loss(FOUR[:3], FOUR[:3], preset="paper", lambda_=0.0),
            r"lambda_=0\.0.*at most 2.*lambda_ > 0",
        ),
        (lambda: mec_loss(FOUR, FOUR, eps=0.0), "eps=0.0"),
        (lambda: nt_xent_loss(FOUR, FOUR, temperature=-1.0), "temperature=-1.0"),
        (lambda: moco_loss(FOUR, FOUR, torch.ones(3, 9)), r"queue is \(3, 9\)"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_row_wise_losses_take_a_single_row():
    assert byol_loss(ONE, -ONE).item() == pytest.approx(4)
    assert simsiam_loss(ONE, ONE, ONE, ONE).item() == pytest.approx(-1)
    assert moco_loss(ONE, ONE, torch.zeros(0, 3)).item() == 0


def test_torch_alone_is_imported():
    code = "import sys, matrix_llm.ssl.losses, matrix_llm.ssl.metrics; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "False"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Two real processes (gloo), started once for all losses."""
    folder = tmp_path_factory.mktemp("ranks")
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, str(SUPPORT / "ssl_distributed_run.py")]
    processes = [
        subprocess.Popen(
            [*command, str(rank), "2", str(folder / "store"), str(folder)], env=env, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=600)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", ssl_distributed_run.LOSSES)
def test_two_ranks_with_half_the_rows_equal_one_in_loss_and_averaged_gradient(ranks, name):
    value, gradient = ssl_distributed_run.gradients()[name]
    for rank in ranks:
        torch.testing.assert_close(rank["gathered"][name][0], value, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(rank["gathered"][name][1], gradient, rtol=1e-9, atol=1e-9)
    wrong = ranks[0]["own rows kept"][name][1]
    torch.testing.assert_close(ranks[0]["own rows kept"][name][0], value, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(2 * wrong, gradient, rtol=1e-9, atol=1e-9)  # the plain gather: world size too small
    assert gradient.abs().max() > 1e-3


def test_ranks_of_different_batch_size_are_refused_on_every_rank(ranks):
    for rank in ranks:
        assert "[[2], [3]]" in rank["refusal"]
        assert "drop_last" in rank["refusal"]
