"""Transitions made a chunk at a time, against the dense chain that they stand for."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import dropout

from hmm_speech.hmm import HMM, Chunked, use_backend
from tests.hmm.problems import INF, problem

BACKENDS = ("native", "reference")
ROOT = Path(__file__).resolve().parents[2]


def both(chunk, batch, time, states, **more):
    """Arguments of HMM with the transition in chunks, and as one tensor; float64 unless told."""
    plain = problem(batch, time, states, "time-varying", **more)
    arcs = plain["transition"]
    return {**plain, "transition": Chunked(lambda start, stop: arcs[:, start:stop], chunk)}, plain


@st.composite
def pairs(draw):
    return both(
        draw(st.integers(1, 9)), draw(st.integers(0, 4)), draw(st.integers(0, 12)), draw(st.integers(1, 5)),
        seed=draw(st.integers(0, 10_000)),
        scale=draw(st.sampled_from([0.1, 1.0, 10.0, 300.0])),
        shift=draw(st.sampled_from([0.0, 1000.0, -1000.0])),
        forbidden=draw(st.sampled_from([0.0, 0.0, 0.1, 0.3])),
        lengths=draw(st.sampled_from(["ragged", "full"])),
        final=draw(st.booleans()),
    )  # fmt: skip


def with_nan_padding(plain):
    """The same problem with NaN past the lengths."""
    if plain["lengths"] is None:
        return plain
    t = torch.arange(plain["emission"].shape[1])
    past = t >= plain["lengths"].unsqueeze(-1)
    arcs = plain["transition"].masked_fill(past[:, 1:, None, None], float("nan"))
    return {**plain, "transition": arcs, "emission": plain["emission"].masked_fill(past.unsqueeze(-1), float("nan"))}


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_answers_are_those_of_the_dense_chain(backend):
    @settings(max_examples=60, deadline=None)
    @given(pair=pairs(), seed=st.integers(0, 100))
    def check(pair, seed):
        chunked, plain = pair
        arcs = with_nan_padding(plain)["transition"]
        chunked["transition"] = Chunked(lambda start, stop: arcs[:, start:stop], chunked["transition"].chunk)
        chunked["emission"] = with_nan_padding(plain)["emission"]
        with use_backend(backend):
            mine, dense = HMM(**chunked), HMM(**plain)
            for method in ("log_partition", "marginals", "edge_marginals", "transition_counts"):
                found, expected = getattr(mine, method)(), getattr(dense, method)()
                torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-9, msg=lambda m, n=method: f"{n}: {m}")
            found, expected = mine.viterbi(), dense.viterbi()
            torch.testing.assert_close(found.score, expected.score, rtol=1e-12, atol=1e-9)
            assert torch.equal(found.states, expected.states)
            draws = [hmm.sample(3, torch.Generator().manual_seed(seed)) for hmm in (mine, dense)]
            assert torch.equal(*draws)

    check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_smallest_state(backend):
    for seed in range(20):
        chunked, plain = both(1 + seed % 4, 3, 11, 4, seed=seed)
        arcs = plain["transition"].round().clamp(-1, 1)
        plain["transition"], plain["emission"] = arcs, plain["emission"].round().clamp(0, 1)
        plain["initial"], plain["final"] = plain["initial"] * 0, None
        chunked = {**plain, "transition": Chunked(lambda a, b, x=arcs: x[:, a:b], chunked["transition"].chunk)}
        with use_backend(backend):
            assert torch.equal(HMM(**chunked).viterbi().states, HMM(**plain).viterbi().states)


def gradients(arguments, arcs, function, upstream, backward):
    tensors = [x for x in (arguments["initial"], arguments["emission"], arguments["final"], arcs) if x is not None]
    for x in tensors:
        x.requires_grad_().grad = None
    z = function(HMM(**arguments))
    value = (torch.where(z.isfinite(), z, 0) * upstream).sum()
    if backward:
        value.backward()
        return [torch.zeros_like(x) if x.grad is None else x.grad for x in tensors]
    found = torch.autograd.grad(value, tensors, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(tensors, found, strict=True)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("backward", [True, False])
def test_gradients(backend, backward):
    """Of a sum with weights of any sign, by backward() and by autograd.grad; the function closes over leaves."""

    @settings(max_examples=40, deadline=None)
    @given(pair=pairs(), sign=st.sampled_from([1.0, -1.0, 0.0]))
    def check(pair, sign):
        chunked, plain = pair
        arcs = plain["transition"]
        upstream = torch.linspace(-1, 2, len(plain["emission"]), dtype=torch.float64) * sign
        with use_backend(backend):
            mine = gradients(
                {**plain, "transition": Chunked(lambda a, b: arcs[:, a:b], chunked["transition"].chunk)},
                arcs, HMM.log_partition, upstream, backward,
            )  # fmt: skip
            dense = gradients(plain, arcs, HMM.log_partition, upstream, backward)
        for found, expected in zip(mine, dense, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)

    check()


def neural(seed=0, batch=2, time=7, states=3):
    """A function of parameters that are not leaves, and its inputs."""
    g = torch.Generator().manual_seed(seed)
    base, u, v = (
        torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_()
        for shape in ((states, states), (batch, time - 1, states), (batch, time - 1, states))
    )
    emission = torch.randn(batch, time, states, generator=g, dtype=torch.float64).requires_grad_()
    return base, u, v, emission


def arcs_of(base, u, v):
    scores = base.tanh() * 2  # not a leaf
    return lambda a, b: scores + u[:, a:b, :, None] * v[:, a:b, None, :].exp()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["log_partition", "marginals", "edge_marginals", "transition_counts"])
def test_first_and_second_derivatives(backend, method):
    lengths = torch.tensor([7, 4])

    def function(base, u, v, emission):
        hmm = HMM(emission[:, 0] * 0, Chunked(arcs_of(base, u, v), 3), emission, lengths)
        return getattr(hmm, method)()

    with use_backend(backend):
        assert torch.autograd.gradcheck(function, neural(), fast_mode=True)
        assert torch.autograd.gradgradcheck(function, neural(), fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_message_whose_gradient_has_both_signs(backend):
    """Which log Z does not ask for, but second derivatives do."""
    from hmm_speech.hmm import chunked as module
    from hmm_speech.hmm import reference

    g = torch.Generator().manual_seed(0)
    message, arcs, emission = (
        torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((4, 5), (4, 3, 5, 5), (4, 3, 5))
    )
    arcs[1, 1, :, 2] = -INF  # a state that cannot be reached, whatever its gradient
    arcs[2, 1] = -INF  # nothing can
    arcs[3, 2] = float("nan")  # past the end
    lengths = torch.tensor([4, 3, 4, 3])
    grad = torch.randn(4, 5, generator=g, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (message, arcs, emission)]
    end = module.Advance.apply(message, arcs, emission, lengths)[0]
    found = torch.autograd.grad(end, inputs, grad)
    expected_end = reference.advance(message, arcs, emission, lengths)[0][-1]
    expected = torch.autograd.grad(expected_end, inputs, torch.where(expected_end > -INF, grad, 0))
    torch.testing.assert_close(end, expected_end)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    assert not found[1][2].any()


def test_dropout_is_repeated():
    base, u, v, emission = neural()
    inner = arcs_of(base, u, v)
    made = []

    def function(start, stop):
        arcs = dropout(inner(start, stop), 0.5)
        made.append(arcs.detach())
        return arcs

    torch.manual_seed(0)
    z = HMM(torch.zeros(3, dtype=torch.float64), Chunked(function, 4), emission).log_partition().sum()
    found = torch.autograd.grad(z, [base, u, v])
    assert len(made) == 4 and torch.equal(made[0], made[3]) and torch.equal(made[1], made[2])
    torch.manual_seed(0)
    inner = arcs_of(base, u, v)
    parts = [dropout(inner(a, b), 0.5) for a, b in ((0, 4), (4, 6))]
    dense = HMM(torch.zeros(3, dtype=torch.float64), torch.cat(parts, 1), emission).log_partition().sum()
    for mine, theirs in zip(found, torch.autograd.grad(dense, [base, u, v]), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_long_sequences_keep_their_precision():
    time = 100_000
    g = torch.Generator().manual_seed(0)
    base, emission = torch.randn(4, 4, generator=g), torch.randn(1, time, 4, generator=g)
    drift = torch.randn(1, time - 1, 4, 1, generator=g)

    def chain(dtype):
        arcs = Chunked(lambda a, b: base.to(dtype) + drift[:, a:b].to(dtype), 1000)
        return HMM(torch.zeros(4, dtype=dtype), arcs, emission.to(dtype))

    narrow, wide = chain(torch.float32), chain(torch.float64)
    expected = wide.log_partition()
    assert ((narrow.log_partition().double() - expected) / expected).abs() < 2e-6
    assert (narrow.marginals().double() - wide.marginals()).abs().max() < 5e-6
    counts = wide.transition_counts()
    assert ((narrow.transition_counts().double() - counts) / counts).abs().max() < 5e-6


MEMORY = """
import resource, torch
from hmm_speech.hmm import HMM, Chunked

B, T, N = 8, {time}, 256
base, final = torch.randn(N, N, requires_grad=True), torch.zeros(N)
u, v = (torch.randn(B, T - 1, N, requires_grad=True) for _ in range(2))
emission = torch.randn(B, T, N, requires_grad=True)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << {shift})

def chain(function, frames):
    arcs = Chunked(lambda a, b: base + u[:, a:b, :, None] * v[:, a:b, None, :], 8)
    return function(HMM(final, arcs, emission[:, :frames])).sum()

for method in {methods}:
    chain(method, 2).backward()
before = peak()
for method in {methods}:
    chain(method, T).backward()
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no module resource")
@pytest.mark.parametrize(
    ("methods", "time", "most"),
    [("[HMM.log_partition]", 1000, 300), ("[lambda h: h.marginals().square()]", 64, 700)],
)
def test_memory_is_that_of_a_chunk(methods, time, most):
    """Materialised, the first would take 2.1 GB for its scores alone; peak resident memory in MiB."""
    code = MEMORY.format(methods=methods, time=time, shift=20 if sys.platform == "darwin" else 10)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < most


def test_inference_without_gradients_never_holds_all_arcs():
    """How many frames' arcs are alive at any time, by weak references to what the function returned."""
    import weakref

    alive, most = weakref.WeakSet(), 0

    class Arcs(torch.Tensor):
        pass

    def function(start, stop):
        nonlocal most
        arcs = torch.randn(2, stop - start, 3, 3, generator=torch.Generator().manual_seed(start)).as_subclass(Arcs)
        alive.add(arcs)
        most = max(most, len(alive))
        return arcs

    hmm = HMM(torch.zeros(3), Chunked(function, 5), torch.randn(2, 101, 3))
    hmm.log_partition(), hmm.marginals(), hmm.transition_counts(), hmm.viterbi(), hmm.sample(2)
    assert most <= 2


def test_compiles_without_a_graph_break():
    base, u, v, emission = (x.detach().float().requires_grad_() for x in neural())

    def loss(base, u, v, emission):
        arcs = Chunked(lambda a, b: base + u[:, a:b, :, None] * v[:, a:b, None, :], 4)
        return HMM(torch.zeros(3), arcs, emission, torch.tensor([7, 4])).log_partition().sum()

    inputs = (base, u, v, emission)
    expected = loss(*inputs)
    wanted = torch.autograd.grad(expected, inputs)
    found = torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(found, expected)
    for mine, theirs in zip(torch.autograd.grad(found, inputs), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_operators():
    g = torch.Generator().manual_seed(0)
    message, arcs, emission = (torch.randn(shape, generator=g) for shape in ((2, 3), (2, 4, 3, 3), (2, 4, 3)))
    lengths = torch.tensor([5, 2])
    operators = torch.ops.hmm_speech
    torch.library.opcheck(operators.advance, (message, arcs, emission, lengths))
    torch.library.opcheck(operators.advance_maximum, (message, arcs, emission, lengths))
    end, _, *rows = operators.advance(message, arcs, emission, lengths)
    for edges in (True, False):
        torch.library.opcheck(operators.retreat, (torch.randn(2, 3, generator=g), arcs, lengths, end, *rows, edges))
    numbers, last = torch.rand(3, 2, 5, generator=g), end.expand(3, 2, 3)
    torch.library.opcheck(operators.walk, (arcs, lengths, rows[0], last, numbers))


def test_what_the_function_returns_is_checked():
    z = torch.zeros

    def value(function, dtype=torch.float32, **more):
        emission = z(2, 6, 3, dtype=dtype)
        return HMM(z(3, dtype=dtype), Chunked(function, 3), emission, **more).log_partition()

    name = r"Chunked: function\(start, stop\)"
    for call, error, message in [
        (lambda: value(lambda a, b: None), TypeError, f"{name}: got NoneType, expected a torch.Tensor"),
        (lambda: value(lambda a, b: z(2, b - a, 3, 3).long()), TypeError, f"{name}: dtype is torch.int64"),
        (lambda: value(lambda a, b: z(2, 3, 3, 3)), ValueError,
         rf"{name}: shape is \(2, 3, 3, 3\) for \(3, 5\), expected \(B, stop - start, N, N\) = \(2, 2, 3, 3\)"),
        (lambda: value(lambda a, b: z(3, 3)), ValueError, rf"{name}: shape is \(3, 3\)"),
        (lambda: value(lambda a, b: z(2, b - a, 3, 3, device="meta")), ValueError, f"{name}: on meta, expected cpu"),
        (lambda: value(lambda a, b: z(2, b - a, 3, 3).double()), TypeError, f"{name}: dtype is torch.float64"),
        (lambda: value(lambda a, b: z(2, b - a, 3, 3), torch.float64), TypeError, f"{name}: dtype is torch.float32"),
        (lambda: value(lambda a, b: z(2, b - a, 3, 3) / 0, check=True), ValueError, rf"{name} at \(0, 3\): holds nan"),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            call()
    half = value(lambda a, b: z(2, b - a, 3, 3, dtype=torch.bfloat16))
    torch.testing.assert_close(half, torch.full((2,), 6 * torch.log(torch.tensor(3.0)).item()))
    past = torch.where(torch.arange(5)[:, None, None] < 3, z(2, 5, 3, 3), float("nan"))
    value(lambda a, b: past[:, a:b], lengths=torch.tensor([4, 0]), check=True)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("frame", range(4))
def test_a_nan_is_passed_on_and_nothing_is_tracked_without_need(backend, frame):
    transition, emission = torch.zeros(2, 3, 2, 2), torch.zeros(2, 4, 2)
    emission[0, frame, 0] = torch.nan
    with use_backend(backend):
        hmm = HMM(torch.zeros(2), Chunked(lambda start, stop: transition[:, start:stop], 1), emission)
        found = (hmm.marginals(), hmm.edge_marginals(), hmm.transition_counts())
    for x in found:
        assert x[0].isnan().any() and x[1].isfinite().all() and not x.requires_grad
    assert found[0][0, frame].isnan().all()


def test_lengths_may_be_changed_before_the_backward_pass():
    diagonal = torch.zeros(2, 2, requires_grad=True)
    lengths = torch.tensor([6, 4])
    chunks = Chunked(lambda start, stop: diagonal.expand(2, stop - start, 2, 2), 2)
    z = HMM(torch.zeros(2), chunks, torch.randn(2, 6, 2), lengths).log_partition()
    lengths[0] = 2
    z.sum().backward()
    assert diagonal.grad.sum().item() == pytest.approx(5 + 3)
