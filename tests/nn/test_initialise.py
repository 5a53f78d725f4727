import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hmm_speech.data.batching import Batch
from hmm_speech.data.synthetic import sample_corpus
from hmm_speech.errors import UserError
from hmm_speech.hmm import HMM
from hmm_speech.module import SpeechHMM
from hmm_speech.nn import Topology
from hmm_speech.nn.initialise import class_tables, cluster_tables, cluster_units, em_tables, fit_tables, initialise

TRAIN = [utterance.units for utterance in sample_corpus(seed=1).split("train")]
V = 20


def likelihood(tables: tuple[torch.Tensor, ...]) -> float:
    initial, transition, emission = tables
    scores = [HMM(initial, transition, emission.T[torch.as_tensor(u).long()][None]).log_partition() for u in TRAIN]
    return float(torch.cat(scores).sum())


@pytest.mark.parametrize("labels", [5, 20, 33])
def test_every_unit_belongs_to_labels_and_every_label_has_units(labels: int) -> None:
    member = cluster_units(TRAIN, V, labels)
    assert member.shape == (labels, V)
    np.testing.assert_allclose(member.sum(0), 1)
    assert (member.sum(1) > 0).all()


def test_units_that_keep_the_same_company_are_clustered() -> None:
    generator = np.random.default_rng(0)
    blocks = np.repeat(generator.integers(0, 3, size=2000), 2)  # units 2b and 2b + 1 occur in the same places
    member = cluster_units([2 * blocks + generator.integers(0, 2, size=4000)], 6, 3)
    assert all(np.array_equal(member[:, 2 * block], member[:, 2 * block + 1]) for block in range(3))


@pytest.mark.parametrize("topology", [Topology(5, 3), Topology(20, 1), Topology(24, 2)])
def test_tables_are_normalised_within_the_topology(topology: Topology) -> None:
    initial, transition, emission = cluster_tables(TRAIN, V, topology)
    for table in (initial, transition, emission):
        torch.testing.assert_close(table.exp().sum(-1), torch.ones(table.shape[:-1]))
    assert torch.equal(transition > -torch.inf, topology.arcs())
    assert torch.equal(initial > -torch.inf, topology.starts())


def test_iterations_raise_the_likelihood_and_networks_come_close_to_the_tables() -> None:
    topology = {"labels": 8, "substates": 2}
    start = cluster_tables(TRAIN, V, Topology(**topology))
    tables = em_tables(start, TRAIN, Topology(**topology), 3)
    assert likelihood(tables) > likelihood(start) + 10
    torch.manual_seed(0)
    module = SpeechHMM(
        V,
        topology,
        {"_target_": "hmm_speech.nn.InitialTable"},
        {"_target_": "hmm_speech.nn.TransitionNetwork", "dim": 32, "blocks": 1, "dropout": 0.0},
        {"_target_": "hmm_speech.nn.EmissionNetwork", "dim": 32, "blocks": 1, "dropout": 0.0, "last_unit": True},
    )
    left = fit_tables(module, tables, steps=200, lr=5e-3)
    assert left < 0.02
    frames = sum(len(units) for units in TRAIN)
    fitted = (
        module.initial().detach(),
        module.transition().detach(),
        module.emission.logits().log_softmax(-1).detach(),
    )
    assert abs(likelihood(fitted) - likelihood(tables)) / frames < 0.05 * math.log(2)


def test_tables_are_taken_over_and_nothing_depends_on_the_generator() -> None:
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        module = SpeechHMM(
            V,
            {"labels": 5, "substates": 2},
            {"_target_": "hmm_speech.nn.InitialTable"},
            {"_target_": "hmm_speech.nn.TransitionTable"},
            {"_target_": "hmm_speech.nn.EmissionTable"},
        )
        initialise(module, TRAIN, iterations=1, steps=5, lr=5e-3)
        found.append(module.state_dict())
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


@pytest.mark.parametrize(("labels", "rank"), [(60, 40), (33, 24), (8, 5)])
@pytest.mark.parametrize("dim", [None, 32])
def test_transitions_through_classes_start_from_the_bigram(labels: int, rank: int, dim: int | None) -> None:
    torch.manual_seed(0)
    module = SpeechHMM(
        V,
        {"labels": labels},
        {"_target_": "hmm_speech.nn.InitialTable"},
        {"_target_": "hmm_speech.nn.LowRankTransition", "rank": rank, "dim": dim, "blocks": 1, "dropout": 0.0},
        {"_target_": "hmm_speech.nn.EmissionTable"},
    )

    def nats() -> float:
        rows = [torch.as_tensor(units).long()[None] for units in TRAIN]
        batches = [Batch(row, torch.tensor([row.shape[1]]), torch.zeros(1)) for row in rows]
        with torch.no_grad():
            return -float(torch.cat([module(batch).log_partition() for batch in batches]).sum())

    before = nats()
    initialise(module, TRAIN, iterations=0, steps=200, lr=1e-2)
    for table in class_tables(TRAIN, V, labels, rank):
        torch.testing.assert_close(table.exp().sum(-1), torch.ones(table.shape[0]))
    frames = sum(map(len, TRAIN))
    assert before / frames > 2.9  # unigram: 2.50 nats, bigram: 2.23
    # fewer classes than units know less of what follows
    assert nats() / frames < (2.4 if rank >= V else 2.7)


def test_many_states_without_classes_are_refused() -> None:
    module = SimpleNamespace(
        topology=Topology(5000), transition=None, emission=SimpleNamespace(vocabulary=V), initial=None
    )
    with pytest.raises(UserError, match=r"callbacks\.initialise=null"):
        initialise(module, TRAIN, iterations=0, steps=1, lr=1e-2)
