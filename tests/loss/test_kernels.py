"""The Triton kernels against the torch path: in Triton's interpreter, on a GPU if there is one, and compiled for one.

Tests marked `gpu` are the comparisons. Without a GPU they are skipped here, and the first test runs them in a process
with TRITON_INTERPRET set: it must be set before Triton is imported, and would change every other test's Triton.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="the kernels need Triton; the loss does not")

from triton import language as tl  # noqa: E402

from matrix_llm.loss import kernels, linear, solvers  # noqa: E402
from matrix_llm.loss.solvers import solve_head_tail  # noqa: E402
from matrix_llm.loss.vocabulary import GROUPS, find_likeliest, summarise  # noqa: E402
from matrix_llm.mce import TrainedPositions, linear_matrix_cross_entropy  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"
needs_cuda = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
real_triton = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET is set")


def compared(test):
    unable = pytest.mark.skipif(
        not (ON_GPU or INTERPRETED), reason="needs a CUDA device; without one the interpreter's process runs it"
    )
    return pytest.mark.gpu(unable(test))


# Two gaps of the interpreter: it truncates float32 to bfloat16 where a GPU rounds, and multiplies bfloat16 as integers.
if INTERPRETED:
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    narrow, multiply = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def rounded(self, src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return narrow(self, src, dst_type)
        data = torch.from_numpy(np.atleast_1d(src.data)).bfloat16().view(torch.int16).numpy().view(np.uint16)
        return TensorHandle(data.reshape(np.shape(src.data)), tl.bfloat16)

    def widened(self, a, b, *args):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (narrow(self, x, tl.float32) for x in (a, b))
        return multiply(self, a, b, *args)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = rounded, widened


@real_triton
@pytest.mark.slow
def test_in_the_interpreter_every_kernel_equals_torch():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-W", "ignore", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) >= 30, run.stdout


def test_the_loss_needs_no_triton_on_a_cpu():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, matrix_llm.mce as m\n"
        "h, w = torch.randn(3, 8, requires_grad=True), torch.randn(2000, 8)\n"
        "m.linear_matrix_cross_entropy(h, w, torch.tensor([1, 2, 3])).loss.backward()\n"
        "assert 'matrix_llm.loss.kernels' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ------------------------------------------------------------------------------------------------------ wide rows


def logits_and_labels(v, c=7, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    z = (4 * torch.randn(c, v, generator=g)).to(dtype)
    return z.to(DEVICE), torch.randint(0, v, (c,), generator=g).to(DEVICE)


@compared
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("c", "v"), [(1, 37), (3, 512), (7, 1000), (3, 4099)])
def test_statistics_are_those_of_the_softmax(c, v, dtype):
    z, labels = logits_and_labels(v, c, dtype)
    if c > 1:
        z[0, : v // 2] = -torch.inf
        z[1] = -torch.inf
        z[1, v - 1] = 60.0
    if c > 2:
        z[2] = torch.linspace(-300, 300, v).to(z)  # a larger logit turns up in every tile
    got, wide = kernels.logit_statistics(z, labels), z.double()
    q = wide.softmax(-1)
    torch.testing.assert_close(got.largest, wide.amax(-1).float(), rtol=0, atol=0)
    torch.testing.assert_close(got.of_label, wide.gather(1, labels[:, None]).squeeze(1).float(), rtol=0, atol=0)
    torch.testing.assert_close(got.log_z, wide.logsumexp(-1).float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.entropy, -torch.special.xlogy(q, q).sum(-1).float(), rtol=2e-6, atol=2e-6)
    depth = v // GROUPS
    if depth:
        torch.testing.assert_close(
            got.group_max, z[:, : depth * GROUPS].unflatten(1, (depth, GROUPS)).amax(1).float(), rtol=0, atol=0
        )


@compared
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("v", [37, 4099])
def test_a_broken_logit_breaks_its_row_and_no_other(v, bad):
    z, labels = logits_and_labels(v, 3)
    z[1, v // 2] = bad
    labels[1] = 0  # the label's own logit is sound
    got = kernels.logit_statistics(z, labels)
    for statistic in (got.largest, got.log_z, got.entropy):
        assert torch.isnan(statistic).tolist() == [False, True, False]
    if bad != bad and v > GROUPS:
        assert torch.isnan(got.group_max).nonzero().tolist() == [[1, v // 2 % GROUPS]]


@compared
def test_a_row_of_minus_infinities_has_no_distribution():
    z, labels = logits_and_labels(600, 2)
    z[0] = -torch.inf
    got = kernels.logit_statistics(z, labels)
    assert torch.isnan(got.log_z).tolist() == torch.isnan(got.entropy).tolist() == [True, False]


@compared
@pytest.mark.parametrize("v", [1024, 1500, 4099])
def test_the_likeliest_tokens_need_no_second_pass(v):
    z, labels = logits_and_labels(v, 3)
    z[0, -3:] = 50.0  # outside the groups
    values, ids = find_likeliest(z, 16, kernels.logit_statistics(z, labels).group_max)
    expected = z.topk(16)
    assert torch.equal(values, expected.values)
    assert torch.equal(z.gather(1, ids), expected.values)


@compared
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (7.0, 0.3)])
def test_probabilities_and_gradient_are_rounded_once(dtype, softcap, scale):
    z, labels = logits_and_labels(5000, 3)
    z[0, 7] = -torch.inf if softcap is None else z[0, 7]
    log_z = kernels.logit_statistics(z, labels).log_z
    q = (z.double() - log_z.double()[:, None]).exp()
    constant = torch.tensor([[0.5], [-3.0], [20.0]], device=DEVICE)
    form, features = torch.randn(3, 37, device=DEVICE), torch.randn(5000, 40, device=DEVICE).to(dtype)
    form[1] *= 1e9  # beyond float16
    features[7] = 0
    largest = form.abs().amax(1, keepdim=True)
    rounded = (form / largest).to(dtype).double() * largest.double()
    factor = constant.double() + rounded @ features[:, :37].double().T
    gradient = q * factor * scale * (1 if softcap is None else 1 - (z.double() / softcap) ** 2)
    buffer = torch.full((3, 6000), 9.0, dtype=dtype, device=DEVICE)
    out = buffer[:, :5000]  # rows apart, as in a buffer
    ulp = {torch.float32: 1e-5, torch.float16: 2**-11 + 1e-5, torch.bfloat16: 2**-8 + 1e-5}[dtype]  # half of one
    kernels.probabilities(z, log_z, out)
    torch.testing.assert_close(out.double(), q, rtol=ulp, atol=3e-8)
    if dtype == torch.float16:  # the derivative of an unlikely target exceeds it here
        buffer = buffer.float()
        out = buffer[:, :5000]
    apart = torch.zeros(3, 5100, dtype=z.dtype, device=DEVICE)[:, :5000].copy_(z)  # a stride of its own
    kernels.logit_gradient(apart, log_z, constant, form, features, out, softcap=softcap, logit_scale=scale)
    assert (buffer[:, 5000:] == 9.0).all()  # nothing is written beside them
    size = q * (constant.abs() + rounded.abs() @ features[:, :37].double().abs().T)  # sums cancel
    assert ((out.double() - gradient).abs() <= ulp * gradient.abs() + (1e-5 if softcap else 3e-6) * size + 3e-8).all()


# -------------------------------------------------------------------------------------------------- small problems


def small_problem(c, s, d, v, seed=0, dtype=torch.float32, *, norm=1.0, scale=3.0, common=None):
    """Genuine heads and tails of softmax distributions over random rows, some of them zero, some of them equal.

    With `common`, which is added to every number, the rows are centred.
    """
    g = torch.Generator().manual_seed(seed)
    source = norm * (torch.randn(v, d, generator=g) + (common or 0.0))
    source[3] = 0
    source[v // 2] = source[v // 2 + 1] = source[1]
    source = source.to(dtype).to(DEVICE)
    summary = summarise(source, torch.float32, centred=common is not None)
    q = (scale * torch.randn(c, v, generator=g)).softmax(-1).to(DEVICE)
    top, ids = q.topk(s)
    moments = q.scatter(1, ids, 0.0) @ summary.features
    labels = ids[:, s // 2].clone()
    return top, ids, labels, moments, source, summary


def solved_by_both(problem, steps, monkeypatch):
    monkeypatch.setattr(solvers, "kernels_for", lambda tensor: kernels)
    ours = solve_head_tail(*problem, steps)
    monkeypatch.setattr(solvers, "kernels_for", lambda tensor: None)
    return ours, solve_head_tail(*problem, steps)


def assert_equal_solutions(ours, torchs):
    for name in ("value", "at_kept", "tail", "form"):
        a, b = getattr(ours, name), getattr(torchs, name)
        assert a.dtype == b.dtype == torch.float32
        torch.testing.assert_close(
            a, b, rtol=1e-5, atol=1e-5, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert ours.at_vectors is None


@compared
@pytest.mark.parametrize(
    ("c", "s", "d", "v", "steps"),
    [
        (1, 4, 5, 37, 1),
        (7, 4, 5, 37, 2),
        (3, 4, 20, 512, 6),
        (3, 16, 70, 1000, 6),
        (1, 16, 20, 4099, 2),
        (1, 33, 40, 100, 12),
        (1, 3, 2, 9, 16),
    ],
)
def test_the_small_problem_is_solved_as_by_torch(c, s, d, v, steps, monkeypatch):
    assert_equal_solutions(*solved_by_both(small_problem(c, s, d, v, seed=v), steps, monkeypatch))


@compared
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows_are_read_without_another_rounding(dtype, monkeypatch):
    assert_equal_solutions(*solved_by_both(small_problem(2, 16, 70, 300, dtype=dtype), 3, monkeypatch))


@compared
@pytest.mark.parametrize("norm", [1e-25, 1.0, 1e25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("s", "d"), [(4, 5), (16, 70), (33, 20)])
def test_centred_rows_are_those_of_torch_even_close_to_their_mean(s, d, dtype, norm, monkeypatch):
    """Mean cosine 0.99: products of the differences rounded to bfloat16 would be off by far more."""
    ours, torchs = solved_by_both(small_problem(2, s, d, 300, dtype=dtype, norm=norm, common=10.0), 3, monkeypatch)
    assert torch.isfinite(torchs.value).all()
    assert_equal_solutions(ours, torchs)


@compared
@pytest.mark.parametrize("norm", [1e-25, 1e25])
def test_rows_of_any_norm_neither_vanish_nor_overflow(norm, monkeypatch):
    ours, torchs = solved_by_both(small_problem(2, 8, 20, 60, norm=norm), 3, monkeypatch)
    assert torch.isfinite(torchs.value).all()
    assert_equal_solutions(ours, torchs)


@compared
def test_zero_confident_and_broken_positions_end_as_in_torch(monkeypatch):
    q, ids, labels, moments, source, summary = small_problem(5, 8, 20, 60)
    ids[0, 2], labels[0] = 3, 3  # the target's row is zero
    q[1], moments[1] = 0.0, 0.0  # q_y = 1 to the last bit
    q[1, 4] = 1.0
    q[2] = torch.nan
    ids[3, :3] = torch.tensor([1, 30, 31], device=DEVICE)  # one vector three times
    labels[3] = 30
    moments[4] = torch.nan
    ours, torchs = solved_by_both((q, ids, labels, moments, source, summary), 6, monkeypatch)
    assert_equal_solutions(ours, torchs)
    assert ours.value[0] == 0
    assert abs(ours.value[1]) < 1e-6
    assert torch.isnan(ours.value).tolist() == [False, False, True, False, True]


@compared
@pytest.mark.parametrize("steps", [2, 6, 16])
def test_the_eigenproblem_keeps_small_eigenvalues(steps, monkeypatch):
    """Tail directions spread over eight decades and a target almost without mass: log's steep end decides the value."""
    q, ids, _, moments, source, summary = small_problem(1, 4, 40, 60)
    p = summary.directions.shape[1]
    spectrum = torch.logspace(-1, -8, p, device=DEVICE)
    upper = torch.triu_indices(p, p)
    moments[:, :-1] = torch.diag(spectrum)[upper[0], upper[1]]
    moments[:, -1] = spectrum.sum() + 1e-9
    q[0] = torch.tensor([0.5, 1e-3, 1e-6, 1e-9], device=DEVICE)
    ours, torchs = solved_by_both((q, ids, ids[:, 3].contiguous(), moments, source, summary), steps, monkeypatch)
    torch.testing.assert_close(ours.value, torchs.value, rtol=1e-5, atol=0)
    for name in ("at_kept", "tail", "form"):
        torch.testing.assert_close(getattr(ours, name), getattr(torchs, name), rtol=1e-4, atol=1e-5)


@compared
def test_large_heads_many_steps_and_float64_stay_with_torch():
    assert kernels.can_solve(64, 16, torch.float32)
    assert not kernels.can_solve(65, 6, torch.float32)
    assert not kernels.can_solve(16, 17, torch.float32)
    assert not kernels.can_solve(16, 6, torch.float64)


# ------------------------------------------------------------------------------------------------------ the whole loss


def losses(
    monkeypatch, use_kernels, *, dtype, v=1100, n=5, h=24, biased=False, hidden_nan=False, reduction="mean", **kwargs
):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(n, h, generator=g), 0.5 * torch.randn(v, h, generator=g)
    bias, labels = torch.randn(v, generator=g), torch.randint(0, v, (n,), generator=g)
    bias[5] = -torch.inf
    labels[0], labels[2] = (hidden @ weight.T + (bias if biased else 0))[0].argmax(), -100
    if hidden_nan:
        hidden[3, 0] = torch.nan
    leaves = [hidden.to(dtype), weight.to(dtype)] + ([bias] if biased else [])
    leaves = [x.to(DEVICE).requires_grad_() for x in leaves]
    monkeypatch.setattr(solvers, "kernels_for", lambda tensor: kernels if use_kernels else None)
    monkeypatch.setattr(linear, "positions_per_chunk", lambda *_, **__: 3)  # four trained positions: 3 + 1
    out = linear_matrix_cross_entropy(
        *leaves[:2],
        labels.to(DEVICE),
        bias=leaves[2] if biased else None,
        mce_weight=0.7,
        reduction=reduction,
        steps=3,
        **kwargs,
    )
    weights = torch.linspace(1, 2, n, device=DEVICE) if reduction == "none" else 3.0
    grads = torch.autograd.grad((out.loss * weights).sum(), leaves)
    assert all(a.dtype == b.dtype for a, b in zip(grads, leaves, strict=True))
    return out, [x.float() for x in grads]


VARIANTS = [
    {},
    {"biased": True, "softcap": 6.0, "logit_scale": 0.7},
    {"reduction": "none", "biased": True},
    {"top_k": 70},
]


@compared
@pytest.mark.parametrize("kwargs", VARIANTS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-2)], ids=str
)
def test_loss_and_gradients_by_kernels_equal_those_by_torch(kwargs, dtype, tolerance, monkeypatch):
    if dtype == torch.float16 and kwargs:
        pytest.skip("one variant is enough for float16")
    ours, our_grads = losses(monkeypatch, True, dtype=dtype, **kwargs)
    torchs, torch_grads = losses(monkeypatch, False, dtype=dtype, **kwargs)
    for name in ("cross_entropy", "entropy"):  # statistics are float32 whatever the inputs
        torch.testing.assert_close(getattr(ours, name), getattr(torchs, name), rtol=1e-5, atol=1e-5)
    assert torch.equal(ours.is_top1, torchs.is_top1)
    assert ours.is_top1[0]
    for a, b in [
        (ours.matrix_cross_entropy, torchs.matrix_cross_entropy),
        (ours.loss, torchs.loss),
        *zip(our_grads, torch_grads, strict=True),
    ]:
        assert torch.isfinite(a).all()
        assert (a - b).norm() <= tolerance * b.norm()


@compared
def test_a_position_of_nan_stays_alone(monkeypatch):
    out, _ = losses(monkeypatch, True, dtype=torch.float32, hidden_nan=True)
    for statistic in (out.cross_entropy, out.matrix_cross_entropy, out.entropy):
        assert torch.isnan(statistic).nonzero().flatten().tolist() == [3]


@compared
def test_half_precision_logits_are_not_copied(monkeypatch):
    """A chunk has two (C, V) buffers: the float32 logits, and one for q and the gradient in the products' dtype."""
    from torch.utils._python_dispatch import TorchDispatchMode

    made = []

    class Allocations(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape == (3, 1100):
                made.append((out.data_ptr(), out.dtype))
            return out

    with Allocations():
        losses(monkeypatch, True, dtype=torch.bfloat16)
    assert {dtype for _, dtype in made} == {torch.float32, torch.bfloat16}
    if ON_GPU:  # the CPU has no product of half-precision factors into float32, and widens them
        assert len(set(made)) == 2


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("made_before", [True, False], ids=["summary_given", "summary_made"])
def test_the_host_never_waits_for_the_device(dtype, made_before):
    hidden = torch.randn(300, 64, device=DEVICE, dtype=dtype, requires_grad=True)
    weight = torch.randn(5000, 64, device=DEVICE, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, 5000, (300,), device=DEVICE)

    def step():
        trained = TrainedPositions(labels, 5000)
        summary = summarise(weight.detach(), torch.float32) if made_before else None
        torch.cuda.set_sync_debug_mode("error" if strict else "default")
        try:
            linear_matrix_cross_entropy(hidden, weight, labels, trained=trained, summary=summary).loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    strict = False
    step()  # compiles, and fills caches
    strict = True
    step()


# ------------------------------------------------------------------------------------------------------------ compiled

F32 = "*fp32"
WIDTH = 4096
STATISTICS = {"labels": "*i64", "largest": F32, "log_z": F32, "entropy": F32, "of_label": F32, "group_max": F32}
GRAM = {"inverse_norm": F32, "centre": F32, "kept": "*i64", "out": F32}
SOLVE = dict.fromkeys(("gram", "q", "moments", "coordinates", "value", "at_kept", "tail", "form"), F32) | {
    "kept": "*i64",
    "labels": "*i64",
}
BLOCKS = {"BLOCK": kernels.BLOCK, "num_warps": 8}
BUILDS = {
    "solve-16-6": (
        kernels.solve_kernel,
        SOLVE,
        kernels.solve_tiles(16, 12, 6),
    ),  # its inputs are float32 whatever the rows
    "solve-32-8": (kernels.solve_kernel, SOLVE, kernels.solve_tiles(32, 12, 8)),
}
for data in ("fp32", "bf16"):
    at = {"z": F32, "log_z": F32, "out": f"*{data}"}
    gradient = dict.fromkeys(("z", "log_z", "constant", "slope"), F32) | dict.fromkeys(
        ("form", "features", "out"), f"*{data}"
    )
    gradient_tiles = kernels.gradient_tiles(79)
    tiles = {"GROUPS": GROUPS, "LEVELS": kernels.LEVELS, "num_warps": 8}
    BUILDS[f"statistics-{data}"] = (kernels.statistics_kernel, {"z": f"*{data}"} | STATISTICS, tiles)
    BUILDS[f"probabilities-{data}"] = (kernels.probabilities_kernel, at, BLOCKS)
    BUILDS[f"gradient-{data}"] = (kernels.gradient_kernel, gradient, gradient_tiles | {"CAPPED": False})
    BUILDS[f"gradient-capped-{data}"] = (kernels.gradient_kernel, gradient, gradient_tiles | {"CAPPED": True})
    for size in (16, 64):
        of = {"vectors": f"*{data}"} | GRAM
        for name, centred in (("gram", False), ("gram-centred", True)):
            tiles = kernels.gram_tiles(size, WIDTH) | {"CENTRED": centred}
            BUILDS[f"{name}-{size}-{data}"] = (kernels.gram_kernel, of, tiles)


@real_triton
@pytest.mark.parametrize("build", BUILDS)
def test_compiles_for_a_gpu_that_is_not_here(build, tmp_path, record_property, monkeypatch):
    """Down to machine code for compute capability 9.0, with at most a few registers spilled."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, signature, constants = BUILDS[build]
    warps = constants["num_warps"]
    names = kernel.arg_names
    constants = {(names.index(name),): value for name, value in constants.items() if name != "num_warps"}
    scalars = {
        "positions": "i32",
        "stride": "i32",
        "out_stride": "i32",
        "form_stride": "i32",
        "feature_stride": "i32",
        "vocabulary": "i32",
        "width": "i32",
        "cap": "fp32",
        "scale": "fp32",
    }
    types = {name: signature.get(name, scalars.get(name, "constexpr")) for name in names}
    aligned = [
        i for i, name in enumerate(names) if types[name][0] in "*i"
    ]  # the widths and strides of real heads are multiples of 16
    source = ASTSource(
        fn=kernel, signature=types, constexprs=constants, attrs={(i,): [["tt.divisibility", 16]] for i in aligned}
    )
    made = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "enable_fp_fusion": True}
    )
    assert len(made.asm["cubin"]) > 1000
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not cuobjdump.exists():
        return
    (tmp_path / "kernel").write_bytes(made.asm["cubin"])
    usage = subprocess.run(
        [cuobjdump, "--dump-resource-usage", tmp_path / "kernel"], capture_output=True, text=True, check=True
    ).stdout
    registers, stack = (int(x) for x in re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    print(f"{build}: {warps} warps, {registers} registers, {stack} bytes of stack")
    record_property("registers", registers)
    assert stack <= 128
