import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hmm_speech.nn import (
    CategoricalEmission,
    EmissionNetwork,
    EmissionTable,
    InitialTable,
    Topology,
    TransitionNetwork,
    TransitionTable,
)
from hmm_speech.nn.blocks import log_matmul_exp

CHAIN = Topology(labels=4, substates=3)
V = 7


def emissions(last_unit: bool) -> list[CategoricalEmission]:
    torch.manual_seed(0)
    parts = [EmissionTable(CHAIN, V, last_unit), EmissionNetwork(CHAIN, V, last_unit, dim=8, blocks=2, dropout=0)]
    for part in parts:
        if last_unit:
            torch.nn.init.normal_(part.last_unit, std=2)
    return parts


@pytest.mark.parametrize("topology", [CHAIN, Topology(5)])
def test_transitions_and_starts_are_normalised_and_stay_in_the_topology(topology: Topology) -> None:
    for transition in (TransitionTable(topology), TransitionNetwork(topology, dim=8, blocks=2)):
        scores = transition()
        torch.testing.assert_close(scores.exp().sum(-1), torch.ones(topology.num_states))
        assert torch.equal(scores > -torch.inf, topology.arcs())
    initial = InitialTable(topology)()
    torch.testing.assert_close(initial.exp().sum(), torch.tensor(1.0))
    assert torch.equal(initial > -torch.inf, topology.starts())


@pytest.mark.parametrize("part", [0, 1])
def test_emissions_without_context_are_normalised(part: int) -> None:
    emission = emissions(last_unit=False)[part]
    everything = emission(torch.arange(V)[None])[0]  # one frame a unit: (V, N)
    torch.testing.assert_close(everything.exp().sum(0), torch.ones(CHAIN.num_states))


@pytest.mark.parametrize("part", [0, 1])
def test_emissions_with_the_last_unit_are_normalised_for_every_last_unit(part: int) -> None:
    emission = emissions(last_unit=True)[part]
    pairs = torch.cartesian_prod(torch.arange(V), torch.arange(V))  # (y, x)
    scores = emission(pairs)[:, 1].view(V, V, -1)
    torch.testing.assert_close(scores.exp().sum(1), torch.ones(V, CHAIN.num_states))
    first = emission(torch.arange(V)[:, None])[:, 0]
    torch.testing.assert_close(first.exp().sum(0), torch.ones(CHAIN.num_states))


@pytest.mark.parametrize("last_unit", [False, True])
@pytest.mark.parametrize("part", [0, 1])
def test_predict_agrees_with_forward(part: int, last_unit: bool) -> None:
    emission = emissions(last_unit)[part]
    units = torch.tensor([[3, 1, 1, 6], [0, 5, 2, 4]])
    scores = emission(units)
    for t in range(4):
        for state in range(CHAIN.num_states):
            predicted = emission.predict(torch.tensor([state, state]), units[:, :t])
            torch.testing.assert_close(scores[:, t, state], predicted.gather(1, units[:, t, None])[:, 0])


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 300), st.integers(0, 2**16))
def test_normaliser_is_safe_against_underflow(spread: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(5, 6, generator=generator) * spread
    right = torch.randn(4, 6, generator=generator) * spread
    expected = torch.logsumexp(left.double()[:, None] + right.double()[None], -1)
    torch.testing.assert_close(log_matmul_exp(left, right).double(), expected, rtol=1e-5, atol=1e-5)


def test_normaliser_gradient_where_the_product_would_underflow() -> None:
    left = torch.tensor([[0.0, -200.0]], requires_grad=True)
    right = torch.tensor([[-200.0, 0.0]], requires_grad=True)
    log_matmul_exp(left, right).sum().backward()
    torch.testing.assert_close(left.grad, torch.tensor([[0.5, 0.5]]))
    torch.testing.assert_close(right.grad, torch.tensor([[0.5, 0.5]]))
