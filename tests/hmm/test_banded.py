"""Chains that move along a few diagonals: the kernels against dense twins in float64, and what is theirs alone.

Enumeration and the dense chain's gradients are in test_structures.py, for small problems of every kind.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hmm_speech.hmm import HMM, Banded, use_backend
from tests.hmm.problems import INF, KINDS, problem

BACKENDS = ("native", "reference")


def banded(batch, time, states, offsets, kind="shared", seed=0, dtype=torch.float32, forbidden=0.0, **more):
    arguments = problem(batch, time, states, "shared", seed, dtype, forbidden=forbidden, **more)
    g = torch.Generator().manual_seed(seed + 1)
    leading = {"shared": (), "per-sequence": (batch,), "time-varying": (batch, max(time - 1, 0))}[kind]
    diagonals = torch.randn(*leading, len(offsets), states, generator=g, dtype=torch.float64).to(dtype)
    diagonals[torch.rand(diagonals.shape, generator=g) < forbidden] = -INF
    return {**arguments, "transition": Banded(diagonals, offsets)}


def mapped(arguments, function):
    """The problem with every score tensor x replaced by function(x)."""
    changed = {}
    for name, x in arguments.items():
        floating = isinstance(x, torch.Tensor) and x.is_floating_point()
        changed[name] = x.map(function) if isinstance(x, Banded) else function(x) if floating else x
    return changed


def solve(arguments, grad):
    """log Z, and the gradients of sum(grad * log Z) over the feasible sequences, by name."""
    arguments = mapped(arguments, lambda x: x.detach().clone().requires_grad_())
    z = HMM(**arguments).log_partition()
    leaves = {
        name: x.diagonals if isinstance(x, Banded) else x
        for name, x in arguments.items()
        if isinstance(x, Banded) or (x is not None and x.is_floating_point())
    }
    total = (torch.where(z.isfinite(), z, 0) * grad.to(z.dtype)).sum()
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return z.detach(), dict(zip(leaves, found, strict=True))


def dense_twin(arguments):
    """log Z and gradients by the dense chain in float64, those of the diagonals through ``Banded.dense``."""
    arguments = mapped(arguments, lambda x: x.detach().double().requires_grad_())
    return arguments, HMM(**{**arguments, "transition": arguments["transition"].dense()})


def compare(arguments, grad=None, log_partition=2e-6, marginals=5e-6):
    batch = arguments["emission"].shape[0]
    grad = torch.linspace(-1, 1.5, batch, dtype=torch.float64) if grad is None else grad
    wide, dense = dense_twin(arguments)
    z = dense.log_partition()
    feasible = z.isfinite()
    leaves = {
        k: x.diagonals if isinstance(x, Banded) else x for k, x in wide.items() if k != "lengths" and x is not None
    }
    total = (torch.where(feasible, z, 0) * grad).sum()
    expected = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    with use_backend("native"):
        found_z, found = solve(arguments, grad)
        hmm = HMM(**arguments)
        state, viterbi = hmm.marginals(), hmm.viterbi()
    assert (found_z.isfinite() == feasible).all() and (found_z[~feasible] == z[~feasible].float()).all()
    torch.testing.assert_close(found_z[feasible].double(), z[feasible], rtol=log_partition, atol=log_partition)
    torch.testing.assert_close(state.double(), dense.marginals().detach(), rtol=0, atol=marginals)
    torch.testing.assert_close(viterbi.score.double(), dense.viterbi().score.detach(), rtol=log_partition, atol=1e-5)
    for name, theirs in zip(leaves, expected, strict=True):
        # A gradient that sums over frames and sequences carries their rounding: relative to its size beyond 1.
        torch.testing.assert_close(found[name].double(), theirs, rtol=marginals, atol=2 * marginals)


@settings(max_examples=80, deadline=None)
@given(
    batch=st.integers(1, 9),
    time=st.integers(1, 30),
    states=st.integers(1, 70),
    offsets=st.lists(st.integers(-75, 75), min_size=1, max_size=5, unique=True),
    near=st.booleans(),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 1000),
    forbidden=st.sampled_from([0.0, 0.2, 0.5]),
)
def test_benign_scores(batch, time, states, offsets, near, kind, seed, forbidden):
    offsets = list(dict.fromkeys(k % 5 - 2 if near else k for k in offsets))
    compare(banded(batch, time, states, offsets, kind, seed, forbidden=forbidden))


def aligner(states, time, gap, batch=2, offsets=(0, 1), seed=0):
    """Left to right from the first state to the last, with emissions `gap` nats apart."""
    g = torch.Generator().manual_seed(seed)
    diagonals = torch.randn(len(offsets), states, generator=g).log_softmax(0)
    initial, final = torch.full((states,), -INF), torch.full((states,), -INF)
    initial[0] = final[-1] = 0
    return {"initial": initial, "transition": Banded(diagonals, offsets), "final": final, "lengths": None,
            "emission": torch.randn(batch, time, states, generator=g) * gap}  # fmt: skip


@pytest.mark.parametrize("gap", [1.0, 3.0, 50.0, 500.0])
@pytest.mark.parametrize("offsets", [(0, 1), (0, 1, 2), (2, -1, 1)])
def test_left_to_right_chains(gap, offsets):
    """The path that wins is, for a while, thousands of nats behind those that cannot reach the end."""
    compare(aligner(60, 300, gap, offsets=offsets))


@pytest.mark.parametrize("kind", KINDS)
def test_a_hundred_thousand_frames(kind):
    arguments = banded(1, 100_000, 5, (0, 1, -2), kind, 7, lengths="full")
    z, found = solve(arguments, torch.ones(1))
    exact, expected = solve(mapped(arguments, torch.Tensor.double), torch.ones(1))
    torch.testing.assert_close(z.double(), exact, rtol=2e-6, atol=0)
    torch.testing.assert_close(found["emission"].double(), expected["emission"], rtol=0, atol=5e-6)
    torch.testing.assert_close(found["transition"].double(), expected["transition"], rtol=5e-6, atol=5e-6)
    one = mapped(arguments, lambda x: x[:, :150] if x.shape[:2] == (1, 100_000) else x)
    compare(one if kind != "time-varying" else {**one, "transition": one["transition"].map(lambda x: x[:, :149])})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_leads_nowhere_and_the_padding_are_never_read(backend, kind):
    arguments = banded(4, 9, 20, (1, -2, 0, 25), kind, 2)
    arguments["lengths"] = torch.tensor([9, 0, 1, 4])
    expected, gradients = solve(arguments, torch.ones(4))
    paths = HMM(**arguments).viterbi().states
    inside = torch.arange(9) < arguments["lengths"][:, None]
    diagonals = arguments["transition"].diagonals.clone()
    used = arguments["transition"].inside().expand_as(diagonals)
    if kind == "time-varying":
        used = used & inside[:, 1:, None, None]
    diagonals[~used] = float("nan")
    arguments["transition"] = Banded(diagonals, arguments["transition"].offsets)
    arguments["emission"][~inside] = float("nan")
    with use_backend(backend):
        z, found = solve(arguments, torch.ones(4))
        hmm = HMM(**arguments, check=True)
        states, samples = hmm.viterbi().states, hmm.sample(3)
    torch.testing.assert_close(z, expected)
    assert z[1] == 0 and torch.equal(states, paths) and ((samples >= 0) == inside).all()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, gradients[name], atol=1e-6, rtol=1e-5)
    assert (found["transition"][~used] == 0).all() and (found["emission"][~inside] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", KINDS)
@pytest.mark.parametrize("forbidden", [0.0, 0.6])
def test_what_is_said_of_arcs_is_that_of_the_dense_chain(backend, kind, other, forbidden):
    """Counts, edges and entropies never form the dense scores; what leads nowhere is NaN, as is the padding."""
    offsets = (1, -2, 0, 25)
    p, q = (banded(5, 6, 8, offsets, k, s, torch.float64, forbidden) for k, s in ((kind, 2), (other, 5)))
    p["lengths"] = q["lengths"] = torch.tensor([6, 0, 1, 4, 6])
    dense = [HMM(**{**x, "transition": x["transition"].dense()}) for x in (p, q)]
    padding = torch.arange(6) >= p["lengths"][:, None]
    for x in (p, q):
        diagonals = x["transition"].diagonals.clone()
        diagonals[..., ~x["transition"].inside()] = float("nan")
        x["transition"] = Banded(diagonals, offsets)
        x["emission"] = x["emission"].masked_fill(padding.unsqueeze(-1), float("nan"))
    with use_backend(backend):
        mine = [HMM(**p), HMM(**q)]
        for method in ("edge_marginals", "transition_counts", "entropy"):
            torch.testing.assert_close(getattr(mine[0], method)(), getattr(dense[0], method)())
        for method in ("cross_entropy", "kl_divergence"):
            torch.testing.assert_close(getattr(mine[0], method)(mine[1]), getattr(dense[0], method)(dense[1]))
    assert (dense[0].log_partition() == -INF).any() == bool(forbidden)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_infeasible_sequences(backend, kind):
    arguments = banded(3, 5, 4, (0, 1), kind, 1, lengths="full")
    arguments["emission"][1, 2] = -INF
    with use_backend(backend):
        hmm = HMM(**arguments)
        assert hmm.log_partition()[1] == -INF and hmm.log_partition()[[0, 2]].isfinite().all()
        assert (hmm.marginals()[1] == 0).all() and (hmm.transition_counts()[1] == 0).all()
        assert hmm.viterbi().score[1] == -INF and (hmm.viterbi().states[1] == -1).all()
        assert (hmm.sample(2)[:, 1] == -1).all()
        _, found = solve(arguments, torch.ones(3))
    assert (found["emission"][1] == 0).all() and not found["transition"].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_too_few_frames_to_reach_the_end(backend):
    with use_backend(backend):
        assert (HMM(**aligner(12, 11, 1.0)).log_partition() == -INF).all()
        assert HMM(**aligner(12, 12, 1.0)).log_partition().isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [INF, float("nan")])
@pytest.mark.parametrize("where", ["emission", "transition.diagonals", "initial"])
def test_bad_scores_give_nan_or_an_error(backend, bad, where):
    arguments = banded(2, 4, 3, (0, 1), seed=1, lengths="full", final=False)
    tensor = arguments["transition"].diagonals if "." in where else arguments[where]
    tensor.view(-1)[1] = bad
    with use_backend(backend):
        assert HMM(**arguments).log_partition()[0].isnan()
        with pytest.raises(ValueError, match=f"{where}: holds"):
            HMM(**arguments, check=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offsets", [(0, 1, -1), (-1, 1, 0), (1, 0, -1), (2, -3, 0)])
def test_ties_go_to_the_smallest_state(backend, offsets):
    arguments = {
        "initial": torch.zeros(6),
        "transition": Banded(torch.zeros(3, 6), offsets),
        "emission": torch.zeros(1, 5, 6),
    }
    expected = HMM(**{**arguments, "transition": arguments["transition"].dense()}).viterbi()
    with use_backend(backend):
        torch.testing.assert_close(HMM(**arguments).viterbi(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_beyond_the_states(backend):
    arguments = banded(2, 6, 5, (0, 1), seed=3)
    wide = torch.cat([arguments["transition"].diagonals, torch.zeros(3, 5)])
    with use_backend(backend):
        expected = HMM(**arguments)
        hmm = HMM(**{**arguments, "transition": Banded(wide, (0, 1, 5, -5, -(2**62)))})
        torch.testing.assert_close(hmm.log_partition(), expected.log_partition())
        torch.testing.assert_close(hmm.viterbi(), expected.viterbi())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 5), (0, 0, 5), (2, 1, 1)])
def test_little_or_nothing_to_do(backend, kind, shape):
    arguments = banded(*shape, (0, 1), kind, 1, lengths="full")
    with use_backend(backend):
        _, found = solve(arguments, torch.ones(shape[0]))
        hmm = HMM(**arguments)
        assert hmm.sample(2).shape == (2, *shape[:2]) and hmm.viterbi().states.shape == shape[:2]
    assert (found["transition"] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_samples_follow_the_marginals(backend, kind):
    arguments = banded(2, 12, 4, (0, 1, -1), kind, 5)
    arguments["lengths"] = torch.tensor([12, 7])
    with use_backend(backend):
        hmm = HMM(**arguments)
        samples = hmm.sample(2000, generator=torch.Generator().manual_seed(0))
    share = torch.nn.functional.one_hot(samples.clamp(min=0), 4).float() * (samples >= 0).unsqueeze(-1)
    # 2,000 draws: five standard errors of a share are at most 5 * 0.5 / sqrt(2000).
    torch.testing.assert_close(share.mean(0), hmm.marginals(), atol=0.056, rtol=0)
    assert hmm.score(samples[0]).isfinite().all()


@pytest.mark.parametrize("scale", [1e-30, 1e-7, 1e7, 1e30])
@pytest.mark.parametrize("kind", KINDS)
def test_upstream_gradients_of_any_size(kind, scale):
    arguments = banded(3, 20, 6, (0, 1, 3), kind, 2, lengths="full")
    _, expected = solve(arguments, torch.ones(3))
    _, found = solve(arguments, torch.full((3,), scale))
    for name, gradient in found.items():
        torch.testing.assert_close(gradient.double() / scale, expected[name].double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_any_number_of_threads_gives_the_same_bits_again(kind, threads):
    saved = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        arguments = banded(11, 20, 10, (0, 1), kind, threads)
        compare(arguments)
        first, again = solve(arguments, torch.ones(11)), solve(arguments, torch.ones(11))
    finally:
        torch.set_num_threads(saved)
    assert torch.equal(first[0], again[0]) and all(torch.equal(x, again[1][k]) for k, x in first[1].items())


@pytest.mark.parametrize("axis", ["batch", "time"])
def test_expanded_and_strided_diagonals(axis):
    diagonals = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    expanded = diagonals.expand(3, 2, 4) if axis == "batch" else diagonals.expand(3, 4, 2, 4)
    emission, initial = torch.randn(3, 5, 4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    z = HMM(initial, Banded(expanded, (0, -1)), emission).log_partition()
    strided = expanded.transpose(-1, -2).contiguous().transpose(-1, -2)
    torch.testing.assert_close(HMM(initial, Banded(strided, (0, -1)), emission).log_partition(), z)
    (found,) = torch.autograd.grad(z.sum(), diagonals)
    torch.testing.assert_close(found.sum(), torch.tensor(12.0, dtype=torch.float64))
    (expected,) = torch.autograd.grad(
        HMM(initial, Banded(diagonals, (0, -1)), emission).log_partition().sum(), diagonals
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["log_partition", "marginals"])
def test_first_and_second_derivatives(kind, method):
    arguments = banded(2, 3, 4, (1, 0, -2), kind, 1, torch.float64)
    arguments["lengths"] = torch.tensor([3, 2])
    names = ("initial", "emission", "final")
    inputs = (arguments["transition"].diagonals.requires_grad_(), *(arguments[k].requires_grad_() for k in names))

    def function(diagonals, *values):
        changed = dict(zip(names, values, strict=True)) | {"transition": Banded(diagonals, (1, 0, -2))}
        return getattr(HMM(**{**arguments, **changed}), method)()

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operators_are_registered_as_torch_expects(kind, dtype):
    arguments = banded(3, 5, 4, (0, 1, -1), kind, 1, dtype)
    lengths = torch.tensor([5, 0, 3])
    diagonals = arguments["transition"].diagonals
    scores = (arguments["initial"], diagonals, [0, 1, -1], arguments["emission"], lengths, arguments["final"])
    ops = torch.ops.hmm_speech
    torch.library.opcheck(ops.banded_forward.default, scores)
    messages = ops.banded_forward(*scores)
    for edges in (True, False):
        torch.library.opcheck(ops.banded_backward.default, (torch.ones(3, dtype=dtype), *scores, *messages, edges))
    torch.library.opcheck(ops.banded_viterbi.default, scores)
    torch.library.opcheck(ops.banded_sample.default, (*scores, torch.rand(2, 3, 5, dtype=dtype)))


def test_results_may_be_changed_in_place_and_halves_are_computed_in_float32():
    arguments = mapped(banded(3, 5, 4, (0, 1), seed=1), torch.Tensor.bfloat16)
    arguments["emission"].requires_grad_()
    z = HMM(**arguments).log_partition()
    z /= 5
    z.sum().backward()
    gradient = arguments["emission"].grad
    inside = torch.arange(5) < arguments["lengths"][:, None]
    assert z.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient.float().sum(-1), inside.float() / 5, atol=2e-3, rtol=0)


def test_compiles_without_a_graph_break():
    arguments = banded(3, 7, 5, (0, 1), seed=1)
    diagonals = arguments.pop("transition").diagonals.requires_grad_()

    def loss(diagonals, initial, emission, lengths, final):
        hmm = HMM(initial, Banded(diagonals.log_softmax(-2), (0, 1)), emission * 2, lengths, final)
        return hmm.log_partition().sum(), hmm.viterbi().states

    eager, states = loss(diagonals, **arguments)
    (expected,) = torch.autograd.grad(eager, diagonals)
    compiled, found_states = torch.compile(loss, fullgraph=True, backend="aot_eager")(diagonals, **arguments)
    (found,) = torch.autograd.grad(compiled, diagonals)
    torch.testing.assert_close((compiled, found, found_states), (eager, expected, states))
