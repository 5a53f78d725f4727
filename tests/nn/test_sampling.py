"""Draws follow the model: pairs of units beside their exact probabilities, for every kind of transition."""

from types import SimpleNamespace

import pytest
import torch

from hmm_speech.nn import Topology
from hmm_speech.nn.composition import build_composition, compose
from hmm_speech.nn.sampling import draw_sequences

V, MANY = 3, 20_000
PARTS = {"initial": {"_target_": "hmm_speech.nn.InitialTable"}, "emission": {"_target_": "hmm_speech.nn.EmissionTable"}}
LAST = {"_target_": "hmm_speech.nn.context.LastUnits", "dim": 4, "dropout": 0.0}
CASES = {
    "table": ({"_target_": "hmm_speech.nn.TransitionTable"}, None),
    "network": ({"_target_": "hmm_speech.nn.TransitionNetwork", "dim": 8, "blocks": 1, "keys": "network"}, None),
    "drift": ({"_target_": "hmm_speech.nn.contextual.ContextualTransition", "dim": None}, LAST),
    "independent": ({"_target_": "hmm_speech.nn.contextual.IndependentTransition"}, None),
    "chunked": ({"_target_": "hmm_speech.nn.contextual.FullContextualTransition", "dim": None, "rank": 2}, LAST),
}


@pytest.mark.parametrize("name", CASES)
def test_pairs_of_units_are_as_frequent_as_they_are_probable(name: str) -> None:
    torch.manual_seed(0)
    transition, context = CASES[name]
    configs = PARTS | {"transition": transition, "context": context}
    model = build_composition(configs, Topology(2), V, None, ("hmm_speech",))
    for part in model[1:]:
        if part is not None:
            part.eval()
            for parameter in part.parameters():
                torch.nn.init.normal_(parameter, std=1.5)
    pairs = torch.cartesian_prod(torch.arange(V), torch.arange(V))
    batch = SimpleNamespace(units=pairs, frames=None, lengths=torch.full((V * V,), 2))
    with torch.no_grad():
        expected = compose(model, batch).log_partition().exp()
        drawn = draw_sequences(model, MANY, 2, torch.Generator().manual_seed(1))
    assert float(expected.sum()) == pytest.approx(1, abs=1e-5)
    found = torch.bincount(drawn.units_BT @ torch.tensor([V, 1]), minlength=V * V) / MANY
    torch.testing.assert_close(found, expected, atol=0.015, rtol=0)  # four standard deviations of 20,000 draws
