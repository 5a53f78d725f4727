"""Cloned states: how they are shared out, what they emit, and where their transitions start."""

import math

import numpy as np
import pytest
import torch

from hmm_speech.data.synthetic import sample_corpus
from hmm_speech.errors import UserError
from hmm_speech.hmm import HMM, Active
from hmm_speech.nn import ClonedEmission, ClonedTopology, Topology, TransitionTable
from hmm_speech.nn.initialise import bigram_tables, cloned_tables
from hmm_speech.nn.topology import build_topology, resolve_topology, share_out

TRAIN = [utterance.units for utterance in sample_corpus(seed=1).split("train")]
V = 20
CLONES = ClonedTopology((2, 1, 3))


def test_states_are_sorted_by_unit() -> None:
    unit, clone = CLONES.factors()
    assert unit.tolist() == [0, 0, 1, 2, 2, 2] and clone.tolist() == [0, 1, 0, 0, 1, 2]
    assert CLONES.num_states == CLONES.labels == 6 and CLONES.arcs().all() and CLONES.starts().all()
    assert CLONES.label_of(torch.tensor([4, -1])).tolist() == [4, -1]


def test_clones_go_with_the_square_root_of_the_count() -> None:
    copies = share_out(np.array([9_999, 99, 0]), 223, minimum=1)
    assert copies.sum() == 223
    np.testing.assert_allclose(copies / 223, np.array([100, 10, 1]) / 111, atol=0.01)
    assert share_out(np.array([5, 0, 0]), 2, minimum=2).tolist() == [2, 2, 2]


def test_a_topology_takes_its_clones_from_the_training_split() -> None:
    plain = resolve_topology({"states": 50, "minimum": 2}, TRAIN, V)
    assert sum(plain["clones"]) == 50 and min(plain["clones"]) >= 2 and len(plain["clones"]) == V
    assert build_topology(plain) == ClonedTopology(tuple(plain["clones"]))
    assert resolve_topology({"states": 50, "minimum": 2, "labels": 3}, TRAIN, V) == plain
    assert resolve_topology({"labels": 3, "substates": 2}, TRAIN, V) == {"labels": 3, "substates": 2}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"states": 0}, r"topology\.states is 0"),
        ({"states": 9, "state": 3}, "state does not go with states"),
        ({"states": 9, "minimum": -1}, r"topology\.minimum is -1"),
    ],
)
def test_a_wrong_number_of_states_is_told(config: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve_topology(config, TRAIN, V)


@pytest.mark.parametrize("config", [{}, {"clones": [2, 0]}, {"labels": 3, "minimum": 2}])
def test_a_wrong_topology_is_told(config: dict) -> None:
    with pytest.raises(UserError, match="topology"):
        build_topology(config)


def test_a_state_emits_its_unit_and_no_other() -> None:
    emission = ClonedEmission(CLONES, 3)
    units = torch.tensor([[2, 0, 1], [1, 1, 2]])
    active = emission(units)
    assert isinstance(active, Active)
    expected = torch.where(CLONES.factors()[0] == units[..., None], 0.0, -math.inf)
    assert torch.equal(active.dense(6), expected)
    assert torch.equal(emission.predict(torch.arange(6), units[:, :0]).argmax(-1), CLONES.factors()[0])
    transition, initial = torch.randn(6, 6), torch.randn(6)
    torch.testing.assert_close(
        HMM(initial, transition, active).log_partition(), HMM(initial, transition, expected).log_partition()
    )


def test_emission_and_topology_must_fit() -> None:
    with pytest.raises(UserError, match="needs topology=cloned"):
        ClonedEmission(Topology(4), 4)
    with pytest.raises(UserError, match="3 entries, the vocabulary 4 units"):
        ClonedEmission(CLONES, 4)


def test_without_noise_clones_are_a_bigram() -> None:
    topology = build_topology(resolve_topology({"states": 50}, TRAIN, V))
    initial, transition = (torch.from_numpy(table).log() for table in bigram_tables(TRAIN, topology))
    torch.testing.assert_close(transition.exp().sum(-1), torch.ones(50, dtype=torch.float64))
    unigram, bigram = bigram_tables(TRAIN, ClonedTopology((1,) * V))
    units = torch.as_tensor(TRAIN[0], dtype=torch.int64)
    expected = math.log(unigram[units[0]]) + np.log(bigram[units[:-1], units[1:]]).sum()
    emission = ClonedEmission(topology, V)(units[None])
    hmm = HMM(initial, transition, Active(emission.states, emission.scores.double()))
    assert float(hmm.log_partition()) == pytest.approx(expected)


def test_noise_tells_clones_apart() -> None:
    topology = build_topology(resolve_topology({"states": 50}, TRAIN, V))
    tables = cloned_tables(TRAIN, V, topology)
    table = TransitionTable(topology)
    table.assign(tables[1])
    torch.testing.assert_close(table().exp().sum(-1), torch.ones(50))
    assert not torch.allclose(table()[0], table()[1])
