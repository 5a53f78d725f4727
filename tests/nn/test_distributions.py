import pytest
import torch

from hmm_speech.errors import UserError
from hmm_speech.hmm import HMM
from hmm_speech.nn import (
    CategoricalEmission,
    EmissionNetwork,
    EmissionTable,
    InitialTable,
    Topology,
    TransitionNetwork,
    TransitionTable,
)

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


@pytest.mark.parametrize("substates", [3, 5])
def test_skips_have_their_probability_and_em_counts_what_is_left(substates: int) -> None:
    topology = Topology(2, substates)
    table = TransitionTable(topology, skip=0.1)
    scores = table().exp().detach()
    torch.testing.assert_close(scores.sum(-1), torch.ones(topology.num_states))
    for state in range(topology.num_states):
        if state % substates < substates - 2:
            assert scores[state, state + 2] == pytest.approx(0.1)
    skips = sum(substates - 2 for _ in range(2))
    assert int((scores > 0).sum()) == int(topology.arcs().sum()) + skips
    assert table.logits.isfinite().sum() == topology.arcs().sum()

    table.counting = True
    initial, emission = InitialTable(topology)().detach(), torch.randn(1, 9, topology.num_states)
    counts = HMM(initial, table().detach(), emission).transition_counts()[0]
    HMM(initial, table(), emission).log_partition().sum().backward()
    torch.testing.assert_close(table.logits.grad, torch.where(topology.arcs(), counts, 0.0))


def test_skips_that_cannot_be_are_refused() -> None:
    with pytest.raises(UserError, match=r"transition\.skip is 1; expected a probability"):
        TransitionTable(CHAIN, skip=1)
    with pytest.raises(UserError, match=r"transition\.skip is 0\.1, but 4 labels x 2 states have no substate"):
        TransitionTable(Topology(4, 2), skip=0.1)


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
