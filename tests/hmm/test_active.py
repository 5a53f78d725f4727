"""Emissions of which K of the N states take part: the kernels against the reference over slots and enumeration."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hmm_speech.hmm import HMM, Active, backend, use_backend
from tests.hmm.problems import INF, problem
from tests.hmm.structured import leaves, structured
from tests.oracle import enumerate_paths

KINDS = ("shared", "per-sequence")
DEFAULT = {"log_partition": 1e-11, "posterior": 1e-10}
FLOAT = {"log_partition": 2e-6, "posterior": 5e-6}  # the contract of section 3, counts in units of their mass


def solve(arguments, which="native"):
    """log Z, its gradients by name, posteriors, counts and Viterbi scores of a problem."""
    inputs = leaves(arguments)
    with use_backend(which):
        hmm = HMM(**arguments)
        z = hmm.log_partition()
        found = torch.autograd.grad(torch.where(z.isfinite(), z, 0).sum(), list(inputs.values()), allow_unused=True)
        gradients = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs.values(), found, strict=True)]
        posteriors = {"marginals": hmm.marginals(), "counts": hmm.transition_counts()}
        best = hmm.viterbi()
    return z.detach(), dict(zip(inputs, gradients, strict=True)) | posteriors, best


def widened(arguments):
    """The same problem in float64, with leaves of its own."""
    return {
        k: x.map(lambda s: s.detach().double()) if hasattr(x, "map")
        else x.detach().double() if x is not None and x.is_floating_point() else x
        for k, x in arguments.items()
    }  # fmt: skip


def compare(arguments, log_partition, posterior):
    """The kernels against the reference in float64."""
    z, found, best = solve(arguments)
    exact, expected, exact_best = solve(widened(arguments), "reference")
    assert torch.equal(z.isfinite(), exact.isfinite())
    torch.testing.assert_close(z.double(), exact, rtol=log_partition, atol=log_partition)
    torch.testing.assert_close(best.score.double(), exact_best.score, rtol=log_partition, atol=log_partition)
    for name, x in found.items():
        mass = max(1.0, float(expected[name].detach().abs().max()))
        torch.testing.assert_close(
            x.detach().double(),
            expected[name].detach(),
            rtol=0,
            atol=posterior * mass,
            msg=lambda m, n=name: f"{n}: {m}",
        )
    feasible = exact.isfinite() & (arguments["emission"].states.shape[1] > 0)
    with torch.no_grad():
        along = HMM(**arguments).score(best.states.clamp(min=0))
    torch.testing.assert_close(along[feasible], best.score.detach()[feasible], rtol=1e-5, atol=1e-5)
    return best


def blocked(batch, time, blocks, width, seed=0, dtype=torch.float64, kind="shared", scale=1.0, shorter=0.0, **more):
    """A chain whose states come in blocks of consecutive ones, each frame using one; `shorter`: share of pads."""
    arguments = problem(batch, time, blocks * width, kind, seed, dtype, scale, **more)
    g = torch.Generator().manual_seed(seed + 7)
    states = torch.randint(0, blocks, (batch, time, 1), generator=g) * width + torch.arange(width)
    kept = torch.where(torch.rand(batch, time, 1, generator=g) < shorter, 1 + width // 2, width)
    states = torch.where(torch.arange(width) < kept, states, -1)
    scores = (torch.randn(batch, time, width, generator=g, dtype=torch.float64) * scale).to(dtype)
    arguments["emission"] = Active(states, torch.where(states < 0, torch.nan, scores))
    return arguments


@st.composite
def active_problems(draw, dtype):
    """Runs, gathers and both; tables and single blocks; every width of the vectors."""
    seed, kind = draw(st.integers(0, 10_000)), draw(st.sampled_from(KINDS))
    scale, forbidden = draw(st.sampled_from([0.1, 1.0, 10.0, 200.0])), draw(st.sampled_from([0.0, 0.0, 0.3]))
    if dtype == torch.float32 and scale > 10:
        scale = 10.0  # rounding of the scores themselves grows with them
    common = {"scale": scale, "forbidden": forbidden, "final": draw(st.booleans())}
    batch, time = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    if draw(st.booleans()):
        width = draw(st.sampled_from([1, 2, 7, 8, 9, 16, 17, 33, 70]))
        return blocked(batch, time, draw(st.integers(1, 4)), width, seed, dtype, kind, shorter=0.3, **common)
    states = draw(st.integers(1, 40))
    return structured("dense", "active", batch, time, states, kind, seed, dtype, **common)[0]


@settings(max_examples=150, deadline=None)
@given(arguments=active_problems(torch.float64))
def test_kernels_equal_the_reference(arguments):
    compare(arguments, **DEFAULT)


@settings(max_examples=100, deadline=None)
@given(arguments=active_problems(torch.float32))
def test_float32_keeps_the_contract(arguments):
    compare(arguments, **FLOAT)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_long_benign_sequences_stay_on_the_fast_path(kind, dtype):
    arguments = blocked(5, 400, 12, 10, 3, dtype, kind, lengths="full", shorter=0.1)
    arguments["transition"] = arguments["transition"].log_softmax(-1)
    before = backend().redone
    compare(arguments, **(FLOAT if dtype == torch.float32 else DEFAULT))
    assert backend().redone == before


def test_float32_over_a_hundred_thousand_frames():
    arguments = blocked(1, 100_000, 6, 5, 1, torch.float32, lengths="full")
    arguments["transition"] = arguments["transition"].log_softmax(-1)
    with torch.no_grad():
        found, exact = HMM(**arguments), HMM(**widened(arguments))
        torch.testing.assert_close(found.log_partition().double(), exact.log_partition(), rtol=2e-6, atol=0)
        torch.testing.assert_close(found.marginals().double(), exact.marginals(), rtol=0, atol=5e-6)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), kind=st.sampled_from(KINDS), forbidden=st.sampled_from([0.0, 0.3]))
def test_against_enumeration(seed, kind, forbidden):
    arguments, plain = structured("dense", "active", 3, 1 + seed % 5, 4, kind, seed, forbidden=forbidden)
    expected = enumerate_paths(**plain)
    for which in ("native", "reference"):
        z, found, best = solve(arguments, which)
        torch.testing.assert_close(z, expected.log_partition, rtol=1e-12, atol=1e-9)
        torch.testing.assert_close(found["marginals"].detach(), expected.marginals, rtol=0, atol=1e-9)
        torch.testing.assert_close(found["counts"].detach(), expected.edges.sum(1), rtol=0, atol=1e-9)
        torch.testing.assert_close(best.score.detach(), expected.best, rtol=1e-12, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [3, 10, 20])
def test_emissions_far_apart_and_forbidden_arcs_are_redone(dtype, width):
    """The state that is 500 nats behind wins later, since the arcs of the other are forbidden."""
    arguments = blocked(4, 30, 3, width, 5, dtype, lengths="full", forbidden=0.4, final=False)
    g = torch.Generator().manual_seed(1)
    gaps = (torch.rand(4, 30, width, generator=g) < 0.5).to(dtype) * -(500.0 if dtype == torch.float32 else 5000.0)
    arguments["emission"] = Active(arguments["emission"].states, arguments["emission"].scores + gaps)
    arguments["initial"] = torch.zeros(3 * width, dtype=dtype)
    before = backend().redone
    compare(arguments, log_partition=2e-6 if dtype == torch.float32 else 1e-10, posterior=5e-5)
    assert backend().redone > before


def test_arcs_too_weak_for_scaled_probabilities():
    """An arc of e^-200 beside others of 1 is not forbidden: it is all that a path has."""
    transition = torch.zeros(6, 6)
    transition[0, 2:] = transition[1, 2:4] = -200.0
    transition[1, 4:] = -INF
    states = torch.tensor([[[0, 1], [2, 3], [0, 1], [4, 5]]])
    arguments = {"initial": torch.zeros(6), "transition": transition, "emission": Active(states, torch.zeros(1, 4, 2))}
    compare(arguments | {"lengths": None, "final": None}, **FLOAT)


@pytest.mark.parametrize("behind", ["emission", "arc"])
def test_what_scaling_makes_up_does_not_come_back(behind):
    """A state 300 nats behind, more than scaled probabilities hold, that then gains 20 a frame: it never catches up."""
    transition, states, scores = (
        torch.eye(4).log(),
        torch.tensor([0, 1]).expand(1, 14, 2).clone(),
        torch.zeros(1, 14, 2),
    )
    states[:, 0], scores[:, 2:, 1] = torch.tensor([2, 3]), 20.0
    transition[2, 0], transition[3, 1] = 0, -300.0 if behind == "arc" else 0
    if behind == "emission":
        scores[:, 1, 1] = -300.0
    transition[3, 0] = 0  # the origin of its column, beside which the other arc is weak
    transition[2, 1] = -INF
    arguments = {"initial": torch.zeros(4), "transition": transition, "emission": Active(states, scores)}
    before = backend().redone
    compare(arguments | {"lengths": None, "final": None}, **FLOAT)
    assert backend().redone > before


def test_large_scores_of_one_sign_keep_their_differences():
    arguments = blocked(4, 60, 5, 8, 3, torch.float32, lengths="full")
    emission = arguments["emission"]
    arguments["transition"] = arguments["transition"] + 777.0
    arguments["emission"] = Active(emission.states, emission.scores + 1000.0)
    before = backend().redone
    compare(arguments, **FLOAT)
    assert backend().redone == before


@pytest.mark.parametrize("offset", [10.0, 100.0, 1000.0])
def test_column_offsets_that_emissions_cancel(offset):
    arguments = blocked(4, 60, 5, 8, 3, torch.float32)
    columns = (torch.rand(40, generator=torch.Generator().manual_seed(1)) * 2 - 1) * offset
    states, scores = arguments["emission"].states, arguments["emission"].scores
    arguments["transition"], arguments["initial"] = arguments["transition"] + columns, arguments["initial"] + columns
    arguments["emission"] = Active(states, scores - columns[states.clamp(min=0)])
    before = backend().redone
    # log Z is the sum of 60 frames whose scores carry a rounding of 6e-8 * offset each, whatever computes it.
    compare(arguments, log_partition=2e-6 * max(1, offset / 100), posterior=5e-6)
    assert backend().redone == before


@pytest.mark.parametrize("which", ["native", "reference"])
def test_frames_that_no_state_can_emit(which):
    arguments = blocked(3, 6, 3, 4, 1, lengths="full")
    states = arguments["emission"].states.clone()
    states[1, 3] = -1
    arguments["emission"] = Active(states, arguments["emission"].scores)
    z, found, best = solve(arguments, which)
    assert z[1] == -INF and z[0].isfinite() and z[2].isfinite()
    assert best.score[1] == -INF and (best.states[1] == -1).all()
    assert all(x.isfinite().all() for x in found.values())
    assert not found["emission.scores"][1].any() and not found["marginals"][1].any() and not found["counts"][1].any()
    with use_backend(which):
        assert (HMM(**arguments).sample(2)[:, 1] == -1).all()


@pytest.mark.parametrize("which", ["native", "reference"])
@pytest.mark.parametrize("transition", ["dense", "low-rank", "banded", "chunked"])
def test_what_lies_past_the_end_is_not_read(which, transition):
    arguments, _ = structured(transition, "active", 3, 6, 5, seed=4)
    arguments["lengths"] = torch.tensor([4, 0, 6])
    past = (torch.arange(6) >= arguments["lengths"].unsqueeze(-1)).unsqueeze(-1)
    results = []
    for states, score in ((-1, 0.0), (123456789, torch.nan)):
        emission = arguments["emission"]
        changed = Active(torch.where(past, states, emission.states), torch.where(past, score, emission.scores).detach())
        results.append(solve(arguments | {"emission": changed}, which))
    (z, found, best), (other, others, other_best) = results
    assert torch.equal(z, other) and torch.equal(best.states, other_best.states)
    assert all(torch.equal(x, others[name]) for name, x in found.items())
    assert not found["emission.scores"][past.expand_as(found["emission.scores"])].any()
    with use_backend(which):
        hmm = HMM(**arguments | {"emission": changed})
        assert hmm.edge_marginals().isfinite().all() and hmm.topk(2).states.max() < 5 and hmm.sample(2).max() < 5


@pytest.mark.parametrize("method", ["log_partition", "viterbi", "sample", "marginals"])
@pytest.mark.parametrize("state", [5, 2**40])
def test_kernels_look_at_states_themselves(method, state):
    """As they must where nobody has: in a compiled graph, or after states were changed in place."""
    arguments, _ = structured("dense", "active", 2, 4, 5, seed=4)
    arguments["lengths"] = torch.tensor([4, 3])
    hmm = HMM(**arguments)
    hmm._chain.emission.states[1, 3, 0] = state  # past the end
    getattr(hmm, method)()
    hmm._chain.emission.states[1, 2, 0] = state
    with pytest.raises(RuntimeError, match="states out of range"):
        getattr(hmm, method)()


@pytest.mark.parametrize("which", ["native", "reference"])
def test_ties_go_to_the_smallest_state(which):
    states = torch.tensor([[[4, 1, 3], [2, -1, 0], [3, 4, -1]]])
    with use_backend(which):
        found = HMM(torch.zeros(5), torch.zeros(5, 5), Active(states, torch.zeros(1, 3, 3))).viterbi()
    assert found.states.tolist() == [[1, 0, 3]] and found.score.tolist() == [0]


@pytest.mark.parametrize("which", ["native", "reference"])
def test_samples_follow_the_posterior(which):
    arguments, _ = structured("dense", "active", 2, 5, 6, seed=8)
    arguments["lengths"] = torch.tensor([5, 3])
    with use_backend(which):
        hmm = HMM(**arguments)
        drawn = hmm.sample(20_000, torch.Generator().manual_seed(0))
        share = torch.nn.functional.one_hot(drawn + 1, 7)[..., 1:].double().mean(0)
        torch.testing.assert_close(share, hmm.marginals(), rtol=0, atol=0.02)


@pytest.mark.parametrize("anything", [float("nan"), INF, 1e30])
@pytest.mark.parametrize("width", [3, 9, 16])
def test_arcs_of_states_that_no_frame_uses_may_hold_anything(width, anything):
    """Kernels read whole vectors of a row, past the states of a frame."""
    arguments = blocked(2, 5, 1, width, seed=1, dtype=torch.float32)
    found = []
    for beside in (0.0, anything):
        scores = torch.nn.functional.pad(arguments["transition"], (0, 20), value=beside)
        scores = torch.nn.functional.pad(scores, (0, 0, 0, 20))
        ends = {k: torch.nn.functional.pad(arguments[k], (0, 20)) for k in ("initial", "final")}
        hmm = HMM(**ends, transition=scores, emission=arguments["emission"])
        found.append(
            (*hmm.viterbi(), hmm.log_partition(), hmm.marginals(), hmm.sample(3, torch.Generator().manual_seed(0)))
        )
    assert found[0][0].isfinite().all()
    for plain, other in zip(*found, strict=True):
        assert torch.equal(plain, other)


@pytest.mark.parametrize("method", ["log_partition", "marginals", "transition_counts"])
@pytest.mark.parametrize("kind", KINDS)
def test_first_and_second_derivatives(kind, method):
    arguments = blocked(2, 3, 3, 2, 2, kind=kind, shorter=0.2)
    arguments["lengths"] = torch.tensor([3, 2])
    states = arguments["emission"].states
    inputs = leaves(arguments)

    def function(*values):
        new = dict(zip(inputs, values, strict=True))
        emission = Active(states, torch.where(states < 0, 0, new["emission.scores"]))
        rest = {k: new[k] for k in ("initial", "transition", "final")}
        return getattr(HMM(**rest, emission=emission, lengths=arguments["lengths"]), method)()

    inputs["emission.scores"].detach().nan_to_num_()
    assert torch.autograd.gradcheck(function, tuple(inputs.values()))
    assert torch.autograd.gradgradcheck(function, tuple(inputs.values()), fast_mode=True)


@pytest.mark.parametrize("scale", [1e-30, 1e-7, -1.0, 1e7, 1e30])
def test_upstream_gradients_of_any_size(scale):
    arguments = blocked(3, 20, 3, 5, 2, torch.float32, lengths="full")
    inputs = leaves(arguments)
    z = HMM(**arguments).log_partition()
    one = torch.autograd.grad(z, list(inputs.values()), torch.ones(3), retain_graph=True)
    many = torch.autograd.grad(z, list(inputs.values()), torch.full((3,), scale))
    for x, y in zip(one, many, strict=True):
        torch.testing.assert_close(y.double() / scale, x.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("batch", "time", "states", "slots"), [(0, 3, 4, 2), (2, 0, 4, 2), (0, 0, 1, 1), (2, 1, 1, 1)])
@pytest.mark.parametrize("which", ["native", "reference"])
def test_nothing_to_do(which, batch, time, states, slots):
    arguments = {
        "initial": torch.zeros(states), "transition": torch.zeros(states, states), "lengths": None, "final": None,
        "emission": Active(torch.zeros(batch, time, slots, dtype=torch.int64), torch.zeros(batch, time, slots)),
    }  # fmt: skip
    z, found, best = solve(arguments, which)
    assert z.shape == (batch,) and not z.any() and best.states.shape == (batch, time)
    assert found["marginals"].shape == (batch, time, states) and found["counts"].shape == (batch, states, states)
    assert not found["transition"].any()
    with use_backend(which):
        hmm = HMM(**arguments)
        assert hmm.sample(2).shape == (2, batch, time) and hmm.topk(2).states.shape == (2, batch, time)
        assert hmm.edge_marginals().shape == (batch, max(time - 1, 0), states, states)


def test_threads_share_the_work():
    """The bits are those of the number of threads; a gradient summed over the batch has partial sums, one a share."""
    arguments = blocked(7, 40, 5, 10, 3, torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3, 3):
            torch.set_num_threads(threads)
            results.append(solve(arguments))
    finally:
        torch.set_num_threads(before)
    for name, x in results[1][1].items():
        assert torch.equal(x, results[2][1][name]), name
        torch.testing.assert_close(x, results[0][1][name], rtol=1e-5, atol=1e-5)
    assert torch.equal(results[0][0], results[1][0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operators_are_registered_as_torch_expects(kind, dtype):
    arguments = structured("dense", "active", 3, 5, 4, kind, 1, dtype)[0]
    emission = arguments["emission"].map(torch.nan_to_num)
    initial, transition, lengths, final = (arguments[k] for k in ("initial", "transition", "lengths", "final"))
    scores = (initial, transition, emission.states, emission.scores, lengths, final)
    ops = torch.ops.hmm_speech
    torch.library.opcheck(ops.active_forward.default, scores)
    _, *messages = ops.active_forward(*scores)
    for edges in ("none", "like", "each"):
        torch.library.opcheck(ops.active_backward.default, (torch.ones(3, dtype=dtype), *scores, *messages, edges))
    torch.library.opcheck(ops.active_viterbi.default, scores)
    torch.library.opcheck(ops.active_sample.default, (*scores, torch.rand(2, 3, 5, dtype=dtype)))


def test_compiled_as_one_graph():
    arguments = blocked(3, 8, 4, 3, 1, torch.float32)
    states, scores = arguments["emission"].states, arguments["emission"].scores.nan_to_num()
    initial, final = arguments["initial"], arguments["final"]

    def function(transition, scores):
        hmm = HMM(initial, transition, Active(states, scores), arguments["lengths"], final)
        z = hmm.log_partition().sum()
        with torch.no_grad():
            return z, hmm.marginals(), hmm.viterbi().states

    results = []
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        inputs = [x.clone().requires_grad_() for x in (arguments["transition"], scores)]
        z, marginals, best = run(*inputs)
        results.append((z.detach(), marginals, best, *torch.autograd.grad(z, inputs)))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y)
