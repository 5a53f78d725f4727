"""Chains through two factors: scaled products and their certificates against dense twins in float64.

Enumeration, the dense chain's gradients and second derivatives are in test_structures.py.
"""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hmm_speech.hmm import HMM, Active, LowRank, backend, library, low_rank_ops, low_rank_sweeps, use_backend
from hmm_speech.hmm.structures import log_product
from tests.hmm.problems import INF, problem

KINDS = ("shared", "per-sequence")


def low_rank(batch, time, states, rank, kind="shared", seed=0, dtype=torch.float32, forbidden=0.0, scale=1.0, **more):
    arguments = problem(batch, time, states, "shared", seed, dtype, forbidden=forbidden, **more)
    g = torch.Generator().manual_seed(seed + 1)
    leading = {"shared": (), "per-sequence": (batch,), "time-varying": (batch, max(time - 1, 0))}[kind]

    def factor(*shape):
        x = torch.randn(*leading, *shape, generator=g, dtype=torch.float64).to(dtype) * scale
        return x.masked_fill(torch.rand(x.shape, generator=g) < forbidden, -INF)

    return {**arguments, "transition": LowRank(factor(states, rank), factor(rank, states))}


def mapped(arguments, function):
    changed = {}
    for name, x in arguments.items():
        floating = isinstance(x, torch.Tensor) and x.is_floating_point()
        changed[name] = x.map(function) if isinstance(x, LowRank) else function(x) if floating else x
    return changed


def solve(arguments, grad, dense=False):
    """log Z, the marginals, and the gradients of sum(grad * log Z) over the feasible sequences, by name."""
    arguments = mapped(arguments, lambda x: x.detach().clone().requires_grad_())
    transition = arguments["transition"]
    plain = {**arguments, "transition": log_product(transition.left, transition.right)} if dense else arguments
    hmm = HMM(**plain)
    z, state = hmm.log_partition(), hmm.marginals()
    leaves = {k: x for k, x in arguments.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}
    leaves |= {"left": transition.left, "right": transition.right}
    total = (torch.where(z.isfinite(), z, 0) * grad.to(z.dtype)).sum()
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return z.detach(), state.detach(), dict(zip(leaves, found, strict=True))


def compare(arguments, grad=None, log_partition=2e-6, marginals=5e-6):
    batch = arguments["emission"].shape[0]
    grad = torch.linspace(-1, 1.5, batch, dtype=torch.float64) if grad is None else grad
    z, state, expected = solve(mapped(arguments, torch.Tensor.double), grad, dense=True)
    found_z, found_state, found = solve(arguments, grad)
    feasible = z.isfinite()
    assert (found_z.isfinite() == feasible).all() and (found_z[~feasible] == z[~feasible].float()).all()
    torch.testing.assert_close(found_z[feasible].double(), z[feasible], rtol=log_partition, atol=log_partition)
    torch.testing.assert_close(found_state.double(), state, rtol=0, atol=marginals)
    for name, theirs in expected.items():
        # A gradient that sums over frames and sequences carries their rounding: relative to its size beyond 1.
        torch.testing.assert_close(found[name].double(), theirs, rtol=marginals, atol=2 * marginals)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 9),
    time=st.integers(1, 20),
    states=st.integers(1, 40),
    rank=st.integers(1, 9),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 1000),
    forbidden=st.sampled_from([0.0, 0.2, 0.5]),
)
def test_benign_scores(batch, time, states, rank, kind, seed, forbidden):
    compare(low_rank(batch, time, states, rank, kind, seed, forbidden=forbidden))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gap", [50.0, 500.0])
@pytest.mark.parametrize("forbidden", [0.0, 0.3])
def test_emissions_far_apart(kind, gap, forbidden):
    """A mixing chain keeps the fast path; with forbidden arcs, what could have been lost is done again."""
    arguments = low_rank(5, 40, 20, 4, kind, 1, forbidden=forbidden, lengths="full", final=False)
    arguments["emission"] = arguments["emission"] * gap
    before = backend().redone
    compare(arguments)
    assert (backend().redone > before) == (forbidden > 0)


def states_that_never_meet():
    """Two chains: what scaling loses in the first half, and backward in the second, is the answer."""
    apart = torch.full((2, 2), -INF).fill_diagonal_(0)
    emission = torch.zeros(1, 150, 2)
    emission[0, :25, 0], emission[0, 25:125, 1], emission[0, 125:, 0] = 8, 8, 8
    return {"initial": torch.zeros(2), "transition": LowRank(apart, apart), "emission": emission,
            "lengths": torch.tensor([150]), "final": None}  # fmt: skip


def test_a_flushed_state_that_wins_later():
    before = backend().redone
    compare(states_that_never_meet())
    assert backend().redone > before


def many_classes_into_a_vanishing_state(classes=8, others=8, time=12):
    """From the start all classes lead to A and to others, which have a weight of e^-500 there and win later: lifted to
    2^-126, it stands before a product of `classes` times what a message may have, and is no small number."""
    states, rank = 2 + others, classes + 2
    left, right = torch.full((states, rank), -INF), torch.full((rank, states), -INF)
    left[0, :classes], right[:classes, 1:] = 0, 0
    left[1, classes] = right[classes, 1] = 0  # A stays
    left[2:, classes + 1] = right[classes + 1, 2:] = 0  # the others stay among themselves
    initial, emission = torch.full((states,), -INF), torch.zeros(1, time, states)
    initial[0], emission[0, 1, 2:], emission[0, 2:, 1] = 0, -500, -10
    lengths = torch.tensor([time])
    return {"initial": initial, "transition": LowRank(left, right), "emission": emission, "lengths": lengths,
            "final": None}  # fmt: skip


@pytest.mark.parametrize(("classes", "others", "time"), [(8, 8, 12), (4, 16, 11), (8, 8, 60)])
@pytest.mark.parametrize("native", [True, False])
def test_a_weight_that_was_lifted_is_not_believed(monkeypatch, classes, others, time, native):
    if not native:
        monkeypatch.setattr(library, "use_native", lambda *_: False)
    compare(many_classes_into_a_vanishing_state(classes, others, time))


def a_narrow_way_on(bits):
    """A state that hardly any path takes wins since only it has a way on: beyond the certificate it is redone."""
    left = torch.zeros(3, 2)
    left[0, 1] = left[1, 1] = -bits * math.log(2)
    right = torch.tensor([[0.0, 0.0, -300.0], [-300.0, -300.0, 0.0]])
    emission = torch.zeros(2, 6, 3)
    emission[0, 2:, :2] = -150
    emission[1, 3:, 2] = 90
    return {"initial": torch.zeros(3), "transition": LowRank(left, right), "emission": emission, "lengths": None,
            "final": None}  # fmt: skip


@pytest.mark.parametrize("bits", [20, 40, 60, 77, 100])
def test_left_factors_of_any_range(bits):
    compare(a_narrow_way_on(bits))


@pytest.mark.parametrize("offset", [10.0, 100.0, 1000.0])
def test_column_offsets_that_emissions_cancel(offset):
    arguments = low_rank(4, 60, 20, 3, seed=3)
    columns = (torch.rand(20, generator=torch.Generator().manual_seed(1)) * 2 - 1) * offset
    arguments["transition"] = LowRank(arguments["transition"].left, arguments["transition"].right + columns)
    arguments["emission"] = arguments["emission"] - columns
    # log Z is the sum of 60 frames whose scores carry a rounding of 6e-8 * offset each, whatever computes it.
    compare(arguments, log_partition=2e-6 * max(1, offset / 100))


@pytest.mark.parametrize("shift", [1000.0, -1000.0])
def test_scores_around_a_thousand(shift):
    compare(low_rank(5, 30, 9, 3, seed=3, shift=shift))


def test_a_hundred_thousand_frames():
    arguments = low_rank(1, 100_000, 4, 2, seed=7, lengths="full")
    arguments["transition"] = arguments["transition"].map(lambda x: x.log_softmax(-1))
    z, state, found = solve(arguments, torch.ones(1))
    exact, exact_state, expected = solve(mapped(arguments, torch.Tensor.double), torch.ones(1), dense=True)
    torch.testing.assert_close(z.double(), exact, rtol=2e-6, atol=0)
    torch.testing.assert_close(state.double(), exact_state, rtol=0, atol=5e-6)
    for name in ("left", "right"):
        torch.testing.assert_close(found[name].double(), expected[name], rtol=5e-6, atol=5e-6)


@pytest.mark.parametrize("kind", (*KINDS, "time-varying"))
@pytest.mark.parametrize("name", ["native", "reference"])
def test_padding_is_never_read(kind, name):
    arguments = low_rank(4, 9, 5, 2, kind, 2)
    arguments["lengths"] = torch.tensor([9, 0, 1, 4])
    expected = solve(arguments, torch.ones(4))
    inside = torch.arange(9) < arguments["lengths"][:, None]
    arguments["emission"][~inside] = float("nan")
    if kind == "time-varying":
        arguments["transition"].left[~inside[:, 1:]] = float("nan")
    with use_backend(name):
        z, state, found = solve(arguments, torch.ones(4))
    torch.testing.assert_close((z, state), expected[:2], atol=1e-6, rtol=1e-5)
    assert z[1] == 0 and (found["emission"][~inside] == 0).all()
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, expected[2][key], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["edge_marginals", "transition_counts", "entropy", "viterbi", "topk"])
@pytest.mark.parametrize("active", [False, True])
def test_gradients_of_what_takes_single_arcs_do_not_read_the_padding(method, active):
    arguments = low_rank(3, 6, 4, 2, "time-varying", 3)
    arguments["lengths"] = torch.tensor([6, 0, 3])
    if active:
        states = torch.arange(4).expand(3, 6, 4).contiguous()
        arguments["emission"] = Active(states, arguments["emission"])
    past = torch.arange(1, 6) >= arguments["lengths"][:, None]
    gradients = []
    for padding in (0.0, float("nan")):
        factors = arguments["transition"].map(lambda x: x.clone().requires_grad_())
        filled = factors.map(lambda x, fill=padding: x.masked_fill(past[..., None, None], fill))
        result = getattr(HMM(**arguments | {"transition": filled}), method)(*[2] * (method == "topk"))
        result = result if isinstance(result, torch.Tensor) else result.score
        gradients.append(torch.autograd.grad(result.square().sum(), (factors.left, factors.right)))
    for found, expected in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(found, expected)
        assert expected.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [INF, float("nan")])
@pytest.mark.parametrize("where", ["emission", "left", "right", "initial"])
def test_bad_scores_give_nan_and_forbidden_ones_nothing(kind, bad, where):
    arguments = low_rank(3, 5, 4, 2, kind, 1, lengths="full", final=False)
    tensor = arguments[where] if where in arguments else getattr(arguments["transition"], where)
    tensor.view(-1)[1] = bad
    arguments["emission"][1, 2] = -INF
    z, _, found = solve(arguments, torch.ones(3))
    assert z[0].isnan()
    if where == "emission":
        assert z[1] == -INF and z[2].isfinite() and (found["emission"][1] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0), (2, 1)])
def test_little_or_nothing_to_do(kind, shape):
    _, _, found = solve(low_rank(*shape, 5, 2, kind, 1, lengths="full"), torch.ones(shape[0]))
    assert (found["left"] == 0).all() and (found["right"] == 0).all()


@pytest.mark.parametrize("scale", [1e-30, 1e-7, 1e7, 1e30])
@pytest.mark.parametrize("kind", KINDS)
def test_upstream_gradients_of_any_size(kind, scale):
    arguments = low_rank(3, 20, 6, 2, kind, 2, lengths="full")
    expected = solve(arguments, torch.ones(3))[2]
    for name, gradient in solve(arguments, torch.full((3,), scale))[2].items():
        torch.testing.assert_close(gradient.double() / scale, expected[name].double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operators_are_registered_as_torch_expects(kind, dtype):
    arguments = low_rank(3, 5, 4, 2, kind, 1, dtype)
    factors = torch.cat([arguments["transition"].left.transpose(-1, -2), arguments["transition"].right], -2)
    scores = (arguments["initial"], factors, arguments["emission"], torch.tensor([5, 0, 3]), arguments["final"])
    ops = torch.ops.hmm_speech
    torch.library.opcheck(ops.low_rank_forward.default, scores)
    messages = ops.low_rank_forward(*scores)
    for edges in (True, False):
        torch.library.opcheck(ops.low_rank_backward.default, (torch.ones(3, dtype=dtype), *scores, *messages, edges))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("forbidden", [0.0, 0.3])
@pytest.mark.parametrize("gap", [1.0, 300.0])
def test_sweeps_without_the_library_give_the_same(monkeypatch, kind, forbidden, gap):
    arguments = low_rank(5, 12, 20, 3, kind, 4, forbidden=forbidden)
    arguments["emission"] = arguments["emission"] * gap
    grad = torch.tensor([1.0, 0.0, -2.0, 0.5, 3.0])
    expected = solve(arguments, grad)
    monkeypatch.setattr(library, "use_native", lambda *_: False)
    z, state, found = solve(arguments, grad)
    torch.testing.assert_close((z, state), expected[:2], rtol=2e-6, atol=1e-5)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[2][name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sweep", ["native", "torch"])
def test_messages_and_certificate_of_both_sweeps(sweep):
    """u_t from a_{t-1}, and a_t from u_t up to scale, wherever the messages came from."""
    arguments = low_rank(3, 6, 20, 5, seed=2, dtype=torch.float64, lengths="full", final=False)
    transition, emission = arguments["transition"], arguments["emission"]
    made = low_rank_ops.Factors(torch.cat([transition.left.T, transition.right]), 6)
    forward = low_rank_ops._native_forward if sweep == "native" else low_rank_sweeps.forward
    _, alpha, half, method = forward(made, arguments["initial"], emission, torch.tensor([6, 0, 4]), None)
    assert method.tolist() == [0, 0, 0] and (alpha[1] == 0).all() and (alpha[2, 4:] == 0).all()
    torch.testing.assert_close(half[0, 1:], alpha[0, :-1] @ made.left)
    expected = (half[0, 1:] @ made.right) * (emission[0, 1:] + made.shift).exp()
    torch.testing.assert_close(
        alpha[0, 1:] / alpha[0, 1:].sum(-1, keepdim=True), expected / expected.sum(-1, keepdim=True)
    )


def test_two_threads_give_the_same_bits_every_time():
    arguments = low_rank(9, 40, 50, 7, seed=5)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first = solve(arguments, torch.ones(9))
        for _ in range(5):
            z, state, found = solve(arguments, torch.ones(9))
            assert torch.equal(z, first[0]) and torch.equal(state, first[1])
            assert all(torch.equal(x, first[2][name]) for name, x in found.items())
    finally:
        torch.set_num_threads(threads)


def test_no_arc_matrix_is_formed():
    """N = 20000 would take 1.6 GB for one (N, N); all of this takes less than 400 MB beyond what the import does."""
    program = """
import resource, torch
from hmm_speech.hmm import HMM, LowRank
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
scores = [torch.randn(*shape, requires_grad=True) for shape in ((20000, 4), (4, 20000), (2, 3, 20000))]
before = peak()
HMM(torch.zeros(20000), LowRank(*scores[:2]), scores[2]).log_partition().sum().backward()
assert all(x.grad.isfinite().all() for x in scores)
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 400 << 20


def test_compiles_without_a_graph_break():
    arguments = low_rank(3, 7, 5, 2, seed=1)
    transition = arguments.pop("transition")
    left, right = transition.left.requires_grad_(), transition.right

    def loss(left, right, initial, emission, lengths, final):
        return HMM(initial, LowRank(left.log_softmax(-1), right), emission * 2, lengths, final).log_partition().sum()

    eager = loss(left, right, **arguments)
    (expected,) = torch.autograd.grad(eager, left)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(left, right, **arguments)
    torch.testing.assert_close((compiled, *torch.autograd.grad(compiled, left)), (eager, expected))
