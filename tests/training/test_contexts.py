"""Whole runs with a context: every context, transition and emission that uses one trains, and misfits say why."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hmm_speech.checkpoint import load
from hmm_speech.configuration import instantiate, plain
from hmm_speech.data.batching import Batch
from hmm_speech.errors import UserError
from hmm_speech.inference import sample
from hmm_speech.module import SpeechHMM
from tests.runs import composed

Train = Callable[..., None]
BRIEF = ("trainer.max_epochs=1", "data.utterances=33", "data.frames=30")
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
    "clones": ("context=gru", "topology=cloned", "transition=contextual", "emission=cloned", "topology.states=44"),
    "frames": ("context=gru", "context.observes=frames", "transition=contextual", "emission=gaussian"),
    "chains": ("context=gru", "transition=contextual", "emission=contextual", "topology.substates=2"),
}


def small(overrides: tuple[str, ...]) -> list[str]:
    """The overrides, and small sizes of the parts that have any."""
    found = list(overrides)
    for part in ("transition", "emission"):
        if not {f"{part}={kind}" for kind in ("independent", "cloned", "gaussian")} & set(overrides):
            found += [f"{part}.blocks=1", *(() if f"{part}.dim=null" in overrides else (f"{part}.dim=8",))]
    if "context=none" not in overrides:
        found.append("context.dim=16")
    if "topology=cloned" not in overrides:
        found = ["topology.substates=1", "topology.labels=4", *found]
    return [*found, *(("data.numbers=3",) if "emission=gaussian" in overrides else ())]


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_every_composition_trains_and_its_checkpoint_opens(name: str, tmp_path: Path, train: Train) -> None:
    train(tmp_path, *BRIEF, *small(COMPOSITIONS[name]), "callbacks.initialise.steps=5", networks=False)
    model = load(tmp_path / "checkpoints" / "best.ckpt")
    assert [len(drawn.units) for drawn in sample(model, 2, 5).utterances] == [5, 5]

    lengths, generator = torch.tensor([3, 3, 1]), torch.Generator().manual_seed(0)
    frames = torch.randn(3, 3, 3, generator=generator) if name == "frames" else None
    batch = Batch(torch.tensor([[1, 2, 3], [1, 2, 5], [1, 0, 0]]), lengths, torch.arange(3), frames)
    with torch.no_grad():
        together = model(batch).log_partition()
        for k, length in enumerate(lengths.tolist()):  # padding changes nothing
            alone = Batch(*(x if x is None else x[k, None] for x in batch[:4]))
            alone = alone._replace(
                units=alone.units[:, :length], frames=None if frames is None else frames[k, None, :length]
            )
            torch.testing.assert_close(model(alone).log_partition()[0], together[k], rtol=1e-5, atol=1e-5)
        if name == "frames":
            return
        pairs = torch.tensor(list(itertools.product(range(model.hparams.vocabulary), repeat=2)))
        every = Batch(pairs, torch.full((len(pairs),), 2), torch.arange(len(pairs)))
        torch.testing.assert_close(model(every).log_partition().exp().sum(), torch.tensor(1.0), rtol=1e-5, atol=1e-5)
    assert 0 < json.loads((tmp_path / "metrics.json").read_text())["bits_per_frame"] < 7  # 4.3: 20 units alike


def test_what_the_emission_does_not_make_no_context_can_read_in_samples(tmp_path: Path, train: Train) -> None:
    parts = ("context=gru", "context.observes=frames", "transition=contextual", "emission=network")
    train(tmp_path, *BRIEF, *small(parts), "data.numbers=3", "callbacks.initialise=null", networks=False)
    with pytest.raises(UserError, match="makes units, but its context reads frames"):
        sample(load(tmp_path / "checkpoints" / "best.ckpt"), 2, 5)


@pytest.mark.parametrize(("preset", "baseline"), [("context", "gru"), ("order1", "order1_independent")])
def test_presets_and_their_baselines_have_the_same_size(preset: str, baseline: str, tmp_path: Path) -> None:
    sizes = []
    for name in (preset, baseline):
        config = plain(composed(tmp_path, f"recipes=flite/{name}"))
        data = instantiate(config["data"], allowed=config["allow_targets"], where="data")
        sizes.append(SpeechHMM.from_config(config, data, config["allow_targets"]).num_parameters())
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)


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
