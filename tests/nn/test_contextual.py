"""Parts that depend on a context, against the distributions that they stand for."""

import itertools

import pytest
import torch
from torch import Tensor

from hmm_speech.errors import UserError
from hmm_speech.hmm import HMM, LowRank
from hmm_speech.nn.context import GRUContext, LastUnits
from hmm_speech.nn.contextual import (
    ContextualEmission,
    ContextualTransition,
    FullContextualTransition,
    IndependentTransition,
)
from hmm_speech.nn.drift import Drift
from hmm_speech.nn.initial import InitialTable
from hmm_speech.nn.topology import Topology

V, H = 3, 5
SMALL = Topology(3)
CHAIN = Topology(labels=3, substates=2)
NETWORK = {"dim": 8, "blocks": 1, "dropout": 0.0}


def chain(initial: Tensor, transition: object, emission: Tensor, lengths: Tensor | None = None) -> HMM:
    if isinstance(transition, Drift):
        lengths = torch.full(emission.shape[:1], emission.shape[1]) if lengths is None else lengths
        return transition.chain(initial, emission, lengths)
    return HMM(initial, transition, emission, lengths, check=True)


@pytest.mark.parametrize("topology", [SMALL, CHAIN], ids=["full", "chain"])
@pytest.mark.parametrize("spread", [1.0, 40.0, 300.0])
def test_a_drift_is_the_chain_of_its_normalised_transitions(topology: Topology, spread: float) -> None:
    torch.manual_seed(0)
    batch, time, states = 3, 6, topology.num_states
    matrix = torch.randn(states, states).masked_fill(~topology.arcs(), -torch.inf).requires_grad_()
    drift = (torch.randn(batch, time, states) * spread).requires_grad_()
    initial, emission = InitialTable(topology)().detach(), torch.randn(batch, time, states)
    lengths = torch.tensor([6, 1, 4])

    def gradients(z: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(z.sum(), (matrix, drift)))

    z = chain(initial, Drift(matrix, drift), emission, lengths).log_partition()
    dense = (matrix + drift[:, 1:, None]).log_softmax(-1)
    first = (initial + drift[:, 0]).log_softmax(-1)
    expected = HMM(first, dense, emission, lengths).log_partition()
    torch.testing.assert_close(z, expected, rtol=1e-5, atol=1e-4)
    # Scores of 300 nats are rounded at 3e-5; a posterior between two near ties moves by as much.
    for found, wanted in zip(gradients(z), gradients(expected), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_a_drift_over_low_rank_scores_is_that_over_their_matrix() -> None:
    torch.manual_seed(0)
    scores = LowRank(torch.randn(4, 2), torch.randn(2, 4))
    drift, emission = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    initial, lengths = torch.randn(4).log_softmax(-1), torch.tensor([5, 3])
    found, expected = (Drift(matrix, drift) for matrix in (scores, scores.dense()))
    chains = [each.chain(initial, emission, lengths) for each in (found, expected)]
    torch.testing.assert_close(chains[0].log_partition(), chains[1].log_partition())
    assert torch.equal(chains[0].viterbi().states, chains[1].viterbi().states)
    for states in (torch.zeros(2, 0, dtype=torch.int64), torch.tensor([[0, 3], [2, 1]])):
        torch.testing.assert_close(found.following(initial, states), expected.following(initial, states))


def transitions(topology: Topology) -> dict[str, torch.nn.Module]:
    torch.manual_seed(1)
    made = {
        "contextual": ContextualTransition(topology, H, **NETWORK),
        "contextual_table": ContextualTransition(topology, H, dim=None),
        "full": FullContextualTransition(topology, H, rank=2, chunk=2, **NETWORK),
    }
    if topology is SMALL:
        made |= {"independent": IndependentTransition(topology, H), "without": IndependentTransition(topology)}
    return made


def rows(transition: object, t: int) -> Tensor:
    """(B, N, N): log p(z_t = j | z_{t-1} = i, h_t)."""
    if isinstance(transition, Drift):
        matrix = transition.matrix_NN
        matrix = matrix.dense() if isinstance(matrix, LowRank) else matrix
        return (matrix + transition.drift_BTN[:, t, None]).log_softmax(-1)
    if isinstance(transition, LowRank):
        return transition.dense()[None]
    return transition.function(t - 1, t)[:, 0]


@pytest.mark.parametrize("name", ["contextual", "contextual_table", "full"])
def test_transitions_are_normalised_stay_in_the_topology_and_follow_the_context(name: str) -> None:
    transition, context = transitions(CHAIN)[name], torch.randn(2, 4, H)
    probabilities = rows(transition(context), 2).exp()
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, CHAIN.num_states))
    assert torch.equal(probabilities > 0, CHAIN.arcs().expand(2, -1, -1))
    for t, depends in ((1, False), (2, True)):  # the arc into a frame is that frame's context's
        other = context.clone()
        other[:, t] += 1
        assert torch.allclose(probabilities, rows(transition(other), 2).exp()) != depends


def test_additive_and_full_transitions_are_what_they_say() -> None:
    context = torch.randn(2, 4, H)
    additive, full = transitions(SMALL)["contextual"], transitions(SMALL)["full"]
    scores = additive.scores()[None] + (context[:, 2] @ additive.drift.weight.T)[:, None]
    torch.testing.assert_close(rows(additive(context), 2), scores.log_softmax(-1))
    features = context[:, 2] @ full.features.weight.T
    scores = full.scores() + sum(features[:, r, None, None] * full.change_RNN[r] for r in range(2))
    torch.testing.assert_close(rows(full(context), 2), scores.log_softmax(-1))


@pytest.mark.parametrize("name", ["contextual", "contextual_table", "full", "independent", "without"])
@pytest.mark.parametrize("table", [False, True])
def test_probabilities_of_all_sequences_sum_to_one(name: str, table: bool) -> None:
    transition = transitions(SMALL)[name]
    context, initial = GRUContext(V, dim=H).eval(), InitialTable(SMALL)
    emission = ContextualEmission(SMALL, V, H, **(NETWORK | {"dim": None} if table else NETWORK))
    for parameter in emission.parameters():
        torch.nn.init.normal_(parameter)
    units = torch.tensor(list(itertools.product(range(V), repeat=3)))
    h = context(units)
    z = chain(initial(), transition(h), emission(units, h)).log_partition()
    torch.testing.assert_close(z.exp().sum(), torch.tensor(1.0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("table", [False, True])
def test_predictions_agree_with_the_scores_of_the_units(table: bool) -> None:
    torch.manual_seed(0)
    emission = ContextualEmission(CHAIN, V, H, **(NETWORK | {"dim": None} if table else NETWORK))
    units, context = torch.randint(V, (4, 5)), torch.randn(4, 5, H)
    scores = emission(units, context)
    assert scores.shape == (4, 5, CHAIN.num_states)
    for t, state in itertools.product(range(5), range(CHAIN.num_states)):
        predicted = emission.predict(torch.full((4,), state), units[:, :t], context[:, t])
        torch.testing.assert_close(predicted.exp().sum(-1), torch.ones(4))
        torch.testing.assert_close(predicted.gather(1, units[:, t, None])[:, 0], scores[:, t, state])


def test_independent_transitions_are_a_mixture_a_frame() -> None:
    torch.manual_seed(0)
    emission, context = torch.randn(2, 5, 3), torch.randn(2, 5, H)
    transition = IndependentTransition(SMALL, H)
    torch.nn.init.normal_(transition.bias)
    weights = (context @ transition.drift.weight.T + transition.bias).log_softmax(-1)
    initial = torch.zeros(3).log_softmax(-1)
    z = chain(initial, transition(context), emission).log_partition()
    mixture = (weights + emission).logsumexp(-1).sum(-1)
    torch.testing.assert_close(z, mixture)  # the initial distribution is uniform, so h_0 alone decides

    transition = IndependentTransition(SMALL)
    weights = transition.bias.log_softmax(-1)
    z = chain(initial, transition(), emission).log_partition()
    torch.testing.assert_close(
        z, (initial + emission[:, 0]).logsumexp(-1) + (weights + emission[:, 1:]).logsumexp(-1).sum(-1)
    )


def test_independence_of_a_chain_of_substates_is_refused() -> None:
    with pytest.raises(UserError, match=r"transition=independent: the topology.*topology=full"):
        IndependentTransition(CHAIN)
    with pytest.raises(UserError, match=r"transition.chunk is 0"):
        FullContextualTransition(SMALL, H, chunk=0)


@pytest.mark.parametrize("name", ["contextual", "full", "independent"])
def test_every_parameter_learns(name: str) -> None:
    torch.manual_seed(0)
    context, transition = LastUnits(V, dim=H), transitions(SMALL)[name]
    emission, initial = ContextualEmission(SMALL, V, H, **NETWORK), InitialTable(SMALL)
    units = torch.randint(V, (2, 7))
    h = context(units)
    chain(initial(), transition(h), emission(units, h)).log_partition().sum().neg().backward()
    for part in (context, transition, emission, initial):
        assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in part.parameters())
