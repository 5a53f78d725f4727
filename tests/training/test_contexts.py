"""Whole runs with a context: every context, transition and emission that uses one trains, and misfits say why."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hmm_speech.checkpoint import load
from hmm_speech.data.batching import Batch
from hmm_speech.errors import UserError
from hmm_speech.inference import sample

Train = Callable[..., None]
BRIEF = ("trainer.max_epochs=1", "data.utterances=33", "data.frames=30", "topology.labels=4", "topology.substates=1")
# Dimensions are set only where the part has them.
COMPOSITIONS = {
    "gru": ("context=gru", "transition=contextual", "emission=contextual"),
    "lstm": ("context=lstm", "transition=network", "emission=contextual"),
    "convolution": ("context=convolution", "transition=full_contextual", "emission=contextual"),
    "transformer": ("context=transformer", "transition=contextual", "emission=network"),
    "last_unit": ("context=last_unit", "transition=independent", "emission=contextual"),
    "mixture": ("context=none", "transition=independent", "emission=network"),
    "language_model": ("context=gru", "transition=independent", "emission=contextual", "topology.labels=1"),
    "tables": ("context=gru", "transition=contextual", "emission=contextual", "transition.dim=null"),
    "hop": ("context=gru", "context.hop=3", "transition=full_contextual", "emission=autoregressive"),
    "chains": ("context=gru", "transition=contextual", "emission=contextual", "topology.substates=2"),
}


def sizes(overrides: tuple[str, ...]) -> tuple[str, ...]:
    small = ["emission.dim=8", "emission.blocks=1"]
    if "transition=independent" not in overrides:
        small += ["transition.blocks=1", *(() if "transition.dim=null" in overrides else ("transition.dim=8",))]
    return (*small, *(() if "context=none" in overrides else ("context.dim=16",)))


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_every_composition_trains_and_its_checkpoint_opens(name: str, tmp_path: Path, train: Train) -> None:
    overrides = COMPOSITIONS[name]
    train(tmp_path, *BRIEF, *overrides, *sizes(overrides), "callbacks.initialise.steps=5", networks=False)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert 0 < metrics["bits_per_frame"] < 7  # 20 units: 4.3 bits when nothing is known

    model = load(tmp_path / "checkpoints" / "best.ckpt")
    vocabulary, lengths = model.hparams.vocabulary, torch.tensor([3, 3, 1])
    units = torch.tensor([[1, 2, 3], [1, 2, 5], [1, 0, 0]])
    with torch.no_grad():
        together = model(Batch(units, lengths, torch.arange(3))).log_partition()
        for row, length, z in zip(units, lengths, together, strict=True):  # padding changes nothing
            alone = model(Batch(row[None, :length], length[None], torch.zeros(1))).log_partition()
            torch.testing.assert_close(alone[0], z, rtol=1e-5, atol=1e-5)
        pairs = torch.tensor(list(itertools.product(range(vocabulary), repeat=2)))
        every = Batch(pairs, torch.full((len(pairs),), 2), torch.arange(len(pairs)))
        torch.testing.assert_close(model(every).log_partition().exp().sum(), torch.tensor(1.0), rtol=1e-5, atol=1e-5)
    assert [len(drawn.units) for drawn in sample(model, 2, 5).utterances] == [5, 5]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("context=gru", "transition=network", "emission=network"), "neither transition nor emission uses it"),
        (("context=none", "transition=contextual", "emission=network"), "transition needs a context"),
        (("context=none", "transition=network", "emission=contextual"), "emission needs a context"),
        (("context=gru", "transition=independent", "emission=contextual", "topology.substates=2"), "forbids arcs"),
        (("context=gru", "context.observes=frames", "emission=contextual"), "--keep-frames"),
        (("context=gru", "emission=contextual", "transition=table", "optimizer=em"), "EM trains tables"),
    ],
)
def test_parts_that_do_not_fit_together_say_why(
    overrides: tuple[str, ...], message: str, tmp_path: Path, train: Train
) -> None:
    with pytest.raises(UserError, match=message) as told:
        train(tmp_path, *BRIEF, *overrides, networks=False)
    assert "\n" not in str(told.value)
