"""Whole runs with structured transitions: they train, and evaluate, decode and sample take their checkpoints."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from hmm_speech.checkpoint import load
from hmm_speech.data.synthetic import sample_corpus
from hmm_speech.errors import UserError
from hmm_speech.inference import decode, evaluate, sample

Train = Callable[..., None]
BRIEF = ("trainer.max_epochs=2", "data.utterances=33", "data.frames=30")
NETWORK = ("transition.dim=8", "transition.blocks=1")
FULL = ("topology=full", "topology.labels=6", "topology.substates=1", "emission=table")
EM = ("transition.dim=null", "optimizer=em", "callbacks.initialise=null")
COMPOSITIONS = {
    "low_rank": (*FULL, "transition=low_rank", "transition.rank=4", *NETWORK),
    "large": (*FULL, "transition=low_rank", "topology.labels=1100", *NETWORK),
    "low_rank_em": (*FULL, "transition=low_rank", "transition.rank=4", *EM),
    "banded": (*FULL, "transition=banded", "transition.offsets=[0,1,-1]"),
    "semi_markov": (*FULL, "transition=semi_markov", "transition.longest=6", *NETWORK),
    "semi_markov_em": (*FULL, "transition=semi_markov", "transition.shortest=2", *EM),
    "cloned": ("topology=cloned", "topology.states=60", "emission=cloned", "transition=cloned", *NETWORK),
}


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_structured_transitions_train_and_their_checkpoints_serve(name: str, tmp_path: Path, train: Train) -> None:
    steps = () if "callbacks.initialise=null" in COMPOSITIONS[name] else ("callbacks.initialise.steps=20",)
    train(tmp_path, *BRIEF, *COMPOSITIONS[name], *steps, networks=False)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert 0 < metrics["bits_per_frame"] < 5  # 20 units: 4.3 bits when nothing is known

    model = load(tmp_path / "checkpoints" / "best.ckpt")
    corpus = sample_corpus(33, 30, 20, 8, seed=0)
    assert evaluate(model, corpus)["bits_per_frame"] == pytest.approx(metrics["bits_per_frame"], rel=1e-5)
    for found in decode(model, corpus.split("test")):
        assert found.states.min() >= 0 and found.states.max() < model.topology.num_states
        assert found.score <= found.log_likelihood + 1e-3
        assert math.isfinite(found.score)
    drawn = sample(model, 2, 12).utterances
    assert [len(utterance.units) for utterance in drawn] == [12, 12]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("topology=chain", "transition=low_rank"), "forbids arcs"),
        (("topology=chain", "transition=semi_markov"), "forbids arcs"),
        ((*FULL, "transition=cloned"), "transition=cloned needs topology=cloned"),
        (("topology=cloned", "topology.states=60", "emission=cloned", "transition=semi_markov"), "emission="),
        ((*FULL, "transition=semi_markov", "objective=semi_supervised"), "objective=semi_supervised needs a chain"),
        ((*FULL, "transition=semi_markov", "objective=annealed"), "objective=annealed needs a chain"),
        ((*FULL, "transition=semi_markov", "objective.stickiness=1"), "objective.stickiness needs a transition matrix"),
        (("topology=cloned", "topology.states=1100", "emission=cloned", "transition=cloned"), "initialise=null"),
    ],
)
def test_what_does_not_fit_says_why(overrides: tuple[str, ...], message: str, tmp_path: Path, train: Train) -> None:
    with pytest.raises(UserError, match=message) as told:
        train(tmp_path, *BRIEF, "callbacks.initialise.steps=2", *overrides, networks=False)
    assert "\n" not in str(told.value)
