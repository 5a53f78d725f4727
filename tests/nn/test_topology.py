import pytest
import torch

from hmm_speech.errors import UserError
from hmm_speech.nn import Topology


def test_chain_arcs_are_stay_advance_and_exit() -> None:
    topology = Topology(labels=2, substates=3)
    expected = torch.tensor(
        [
            [1, 1, 0, 0, 0, 0],
            [0, 1, 1, 0, 0, 0],
            [1, 0, 1, 1, 0, 0],
            [0, 0, 0, 1, 1, 0],
            [0, 0, 0, 0, 1, 1],
            [1, 0, 0, 1, 0, 1],
        ],
        dtype=torch.bool,
    )
    assert torch.equal(topology.arcs(), expected)
    assert topology.starts().tolist() == [True, False, False, True, False, False]


def test_one_substate_is_the_full_topology() -> None:
    topology = Topology(labels=4)
    assert topology.arcs().all() and topology.starts().all()


def test_labels_of_states_keep_padding() -> None:
    assert Topology(2, 3).label_of(torch.tensor([0, 2, 3, 5, -1])).tolist() == [0, 0, 1, 1, -1]


@pytest.mark.parametrize("values", [(0, 3), (5, 0), (5, 2.0), (True, 1), ("5", 1)])
def test_sizes_must_be_positive_integers(values: tuple) -> None:
    with pytest.raises(UserError, match=r"topology\.(labels|substates) is"):
        Topology(*values)
