"""Inputs that once broke the layer, or were built to break its certificates; each against the reference in float64."""

import math

import pytest
import torch

from hmm_speech.hmm import HMM, SemiMarkovHMM, backend, log_partition, use_backend
from tests.hmm.problems import KINDS, problem, solve
from tests.hmm.test_contract import compare

LN2 = math.log(2)


@pytest.mark.parametrize("bits", [20, 40, 50, 60, 70, 77])
def test_what_scaling_makes_up_does_not_come_back(bits):
    """A state with weight e^-1000 at one frame must not win later through an arc `bits` better than the rest."""
    transition = torch.zeros(4, 4)
    transition[0, 0] = -47.9 * LN2
    transition[0, 2] = transition[3, 2] = -bits * LN2
    emission = torch.full((1, 5, 4), -1000.0)
    emission[0, 0, 0] = emission[0, 1, 0] = emission[0, 2, 2] = emission[0, 2, 3] = 0
    emission[0, 3:, 2], emission[0, 3:, 3] = 0, -47.9 * LN2
    initial = torch.tensor([0.0, -1000.0, -1000.0, -1000.0])
    compare({"initial": initial, "transition": transition, "emission": emission, "lengths": None, "final": None})


@pytest.mark.parametrize("offset", [10.0, 100.0, 1000.0])
def test_column_offsets_that_emissions_cancel(offset):
    arguments = problem(4, 60, 20, "shared", 3, torch.float32)
    columns = (torch.rand(20, generator=torch.Generator().manual_seed(1)) * 2 - 1) * offset
    arguments["transition"], arguments["emission"] = arguments["transition"] + columns, arguments["emission"] - columns
    before = backend().redone
    # log Z is the sum of 60 frames whose scores carry a rounding of 6e-8 * offset each, whatever computes it.
    compare(arguments, log_partition=2e-6 * max(1, offset / 100))
    assert backend().redone == before


def test_a_state_that_cannot_be_reached_may_overflow():
    """Going backward, the score of a state that emissions favour but no path reaches grows without bound."""
    transition = torch.full((2, 2), -math.inf).fill_diagonal_(0)
    emission = torch.zeros(1, 80, 2)
    emission[..., 1] = 5
    initial = torch.tensor([0.0, -math.inf])
    before = backend().redone
    compare({"initial": initial, "transition": transition, "emission": emission, "lengths": None, "final": None})
    assert backend().redone == before


@pytest.mark.parametrize("states", [20, 50, 128])
def test_benign_long_sequences_stay_on_the_fast_path(states):
    arguments = problem(8, 400, states, "shared", 1, torch.float32, lengths="full")
    arguments["transition"] = arguments["transition"].log_softmax(-1)
    before = backend().redone
    log_partition(**arguments)
    assert backend().redone == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-7, 1e7, 1e30])
def test_upstream_gradients_of_any_size(kind, scale):
    arguments = problem(3, 20, 6, kind, 2, torch.float32, lengths="full")
    _, expected = solve(arguments, torch.ones(3))
    _, found = solve(arguments, torch.full((3,), scale))
    for name, gradient in found.items():
        torch.testing.assert_close(gradient.double() / scale, expected[name].double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gap", [80.0, 86.0, 87.2, 120.0])
def test_a_vanishing_share_of_a_mixture_has_a_gradient(gap):
    arguments = problem(2, 5, 6, "time-varying", 2, torch.float32, lengths="full")
    arguments["transition"].requires_grad_()
    z = HMM(**arguments).log_partition()
    shares = torch.stack([torch.tensor(0.0), (z[0] - z[1]).detach() - gap])
    torch.logsumexp(z + shares, 0).backward()
    assert arguments["transition"].grad.isfinite().all()
    torch.testing.assert_close(arguments["transition"].grad[0].sum(), torch.tensor(4.0))


@pytest.mark.parametrize("axis", ["batch", "time"])
def test_expanded_transitions_get_the_gradient_of_each_block(axis):
    transition = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    expanded = transition.expand(3, 4, 4) if axis == "batch" else transition.expand(3, 4, 4, 4)
    emission = torch.randn(3, 5, 4, dtype=torch.float64)
    initial = torch.zeros(4, dtype=torch.float64)
    HMM(initial, expanded, emission).log_partition().sum().backward()
    torch.testing.assert_close(transition.grad.sum(), torch.tensor(12.0, dtype=torch.float64))
    counts = HMM(initial, expanded.detach(), emission).transition_counts()
    torch.testing.assert_close(counts, HMM(initial, transition.detach(), emission).transition_counts())


@pytest.mark.parametrize("name", ["native", "reference"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 5), (0, 0, 5)])
def test_nothing_to_do(name, kind, shape):
    arguments = problem(*shape, kind, 1, torch.float32, lengths="full")
    with use_backend(name):
        hmm = HMM(**arguments)
        assert hmm.transition_counts().shape == (shape[0], 5, 5) and (hmm.transition_counts() == 0).all()
        solve(arguments, torch.ones(shape[0]))


def test_results_may_be_changed_in_place():
    arguments = problem(3, 5, 4, "shared", 1, torch.float32)
    arguments["emission"].requires_grad_()
    z = HMM(**arguments).log_partition()
    z /= 5
    z.sum().backward()
    inside = torch.arange(5) < arguments["lengths"][:, None]
    torch.testing.assert_close(arguments["emission"].grad.sum(-1), inside.float() / 5)


def test_lengths_of_a_subclass_are_checked():
    with pytest.raises(ValueError, match="lengths: holds 9, expected 0 to 5"):
        arguments = problem(2, 5, 3, "shared", 1, torch.float32)
        HMM(**{**arguments, "lengths": torch.nn.Parameter(torch.tensor([5, 9]), requires_grad=False)})


def test_compiles_without_a_graph_break():
    arguments = problem(3, 7, 5, "shared", 1, torch.float32)
    arguments["emission"].requires_grad_()

    def loss(initial, transition, emission, lengths, final):
        hmm = HMM(initial, transition.log_softmax(-1), emission * 2, lengths, final)
        return hmm.log_partition().sum(), hmm.viterbi().states

    eager, states = loss(**arguments)
    (expected,) = torch.autograd.grad(eager, arguments["emission"])
    compiled, found_states = torch.compile(loss, fullgraph=True, backend="aot_eager")(**arguments)
    (found,) = torch.autograd.grad(compiled, arguments["emission"])
    torch.testing.assert_close((compiled, found, found_states), (eager, expected, states))


def test_posteriors_compile_without_a_graph_break():
    arguments = problem(3, 7, 5, "shared", 1, torch.float32)
    arguments["emission"].requires_grad_()

    def loss(initial, transition, emission, lengths, final):
        hmm = HMM(initial, transition, emission * 2, lengths, final)
        return (hmm.marginals() ** 2).sum() + (hmm.transition_counts() ** 2).sum()

    eager = loss(**arguments)
    (expected,) = torch.autograd.grad(eager, arguments["emission"])
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(**arguments)
    (found,) = torch.autograd.grad(compiled, arguments["emission"])
    torch.testing.assert_close((compiled, found), (eager, expected))


def test_scores_of_paths_compile_as_one_graph_and_are_nan_for_states_that_are_none():
    emission, lengths = torch.randn(2, 7, 5), torch.tensor([7, 4])
    states = torch.randint(0, 5, (2, 7))

    def both(emission, states):
        plain = HMM(torch.zeros(5), torch.zeros(5, 5), emission, lengths).log_prob(states)
        segments = SemiMarkovHMM(torch.zeros(5), torch.zeros(5, 5), emission, torch.zeros(5, 7), lengths)
        return plain, segments.log_prob(states)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(emission, states), both(emission, states))
    states[1, 4:] = 9  # past the end
    torch.testing.assert_close(compiled(emission, states), both(emission, states))
    states[1, 3] = 9
    for x in compiled(emission, states):
        assert x[0].isfinite() and x[1].isnan()
