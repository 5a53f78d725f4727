"""What training minimises, beside its definition."""

import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch

from hmm_speech.data.batching import Batch
from hmm_speech.errors import UserError
from hmm_speech.hmm import HMM
from hmm_speech.nn import Topology
from hmm_speech.nn.blocks import LogTable
from hmm_speech.nn.composition import build_composition, compose
from hmm_speech.objective import Likelihood, SemiSupervised, Viterbi

V = 4
CONFIGS = {
    "initial": {"_target_": "hmm_speech.nn.InitialTable"},
    "transition": {"_target_": "hmm_speech.nn.TransitionTable"},
    "emission": {"_target_": "hmm_speech.nn.EmissionTable"},
}


class Model(torch.nn.Module):
    """What an objective sees of a LightningModule."""

    def __init__(self, topology: Topology, progress: float = 0.0, frames_per_epoch: float = 10.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts = build_composition(CONFIGS, topology, V, None, ("hmm_speech",))
        self.modules_ = torch.nn.ModuleList(part for part in self.parts[1:] if part is not None)
        self.progress, self.frames_per_epoch = progress, frames_per_epoch

    def forward(self, batch: Batch) -> HMM:
        return compose(self.parts, batch)


def batch(phones: torch.Tensor | None = None) -> Batch:
    units = torch.tensor([[0, 3, 1, 2], [2, 2, 1, 0]])
    return Batch(units, torch.tensor([4, 3]), torch.arange(2), phones=phones)


def test_likelihood_is_minus_log_z() -> None:
    model = Model(Topology(3))
    torch.testing.assert_close(Likelihood(model.parts)(model, batch()), -model(batch()).log_partition())


def test_viterbi_costs_the_best_path() -> None:
    model = Model(Topology(2, 2))
    torch.testing.assert_close(Viterbi(model.parts)(model, batch()), -model(batch()).viterbi().score)


@pytest.mark.parametrize(("progress", "weight"), [(0.0, 0.8), (0.25, 0.4), (0.5, 0.0), (1.0, 0.0)])
def test_the_entropy_of_the_paths_fades_by_the_middle(progress: float, weight: float) -> None:
    model = Model(Topology(3), progress)
    hmm = model(batch())
    found = Likelihood(model.parts, entropy=0.8)(model, batch())
    torch.testing.assert_close(found, -hmm.log_partition() - weight * hmm.entropy().to(found))


def test_priors_are_added_once_an_epoch() -> None:
    model = Model(Topology(2, 2), frames_per_epoch=7.0)  # the two utterances are the epoch
    plain = Likelihood(model.parts)(model, batch()).sum()
    tables = [module() for module in model.modules() if isinstance(module, LogTable)]
    everything = sum(table[table > -math.inf].sum() for table in tables)
    found = Likelihood(model.parts, pseudocount=0.3)(model, batch()).sum()
    torch.testing.assert_close(found, plain - 0.3 * everything)
    sticky = Likelihood(model.parts, stickiness=2.0)(model, batch()).sum()
    torch.testing.assert_close(sticky, plain - 2 * model.parts.transition().diagonal().sum())


def test_known_phones_permit_their_label_alone() -> None:
    topology = Topology(3, 2)
    model = Model(topology)
    phones = torch.tensor([[-1, 2, 2, -1], [0, 0, -1, 1]])  # the last frame of the second is past its end
    found = SemiSupervised(model.parts)(model, batch(phones))
    hmm = model(batch())
    for b, length in enumerate([4, 3]):
        scores = []
        for path in itertools.product(range(topology.num_states), repeat=length):
            labels = [state // 2 for state in path]
            if all(p in (-1, label) for p, label in zip(phones[b, :length].tolist(), labels, strict=True)):
                states = torch.tensor([list(path) + [0] * (4 - length)] * 2)
                scores.append(hmm.score(states)[b])
        torch.testing.assert_close(found[b], -torch.stack(scores).logsumexp(0))
    assert (found > -hmm.log_partition()).all()


def test_phones_without_a_label_and_wrong_weights_are_told() -> None:
    model = Model(Topology(2))
    with pytest.raises(UserError, match="phone number 5"):
        SemiSupervised(model.parts)(model, batch(torch.full((2, 4), 5)))
    with pytest.raises(UserError, match=r"objective\.entropy is -1"):
        Likelihood(model.parts, entropy=-1)
    with pytest.raises(UserError, match="stickiness needs a transition matrix"):
        Likelihood(model.parts, stickiness=1.0).log_prior(
            model, SimpleNamespace(transition=None, initial=torch.zeros(2))
        )


def test_shown_phones_raise_what_states_know_of_phones(tmp_path, train) -> None:
    found = []
    for share in (0.1, 1):
        run = tmp_path / str(share)
        tables = ("emission=table", "transition=table", "optimizer=em", "topology.substates=1")
        train(run, "objective=semi_supervised", f"data.phones={share}", *tables, networks=False)
        found.append(json.loads((run / "metrics.json").read_text())["states"]["pnmi"])
    assert found[1] > found[0] + 0.05
