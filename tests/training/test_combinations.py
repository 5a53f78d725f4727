"""Any topology, transition, emission, context and objective train together, or say in one line why they do not."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from hmm_speech.configuration import ALLOWED_TARGETS, CLONE
from hmm_speech.data.batching import collate
from hmm_speech.data.synthetic import sample_corpus
from hmm_speech.errors import UserError
from hmm_speech.module import SpeechHMM

V = 6
SMALL = {"dim": 8, "blocks": 1, "rank": 3, "labels": 4, "states": 14, "minimum": 2, "longest": 4, "heads": 2}
SMALL |= {"codebooks": [V, V], "chunk": 3, "offsets": [0, 1, 2]}


def options(group: str) -> dict[str, dict]:
    """Every option of a group, in a small size."""
    found = {}
    for path in sorted((CLONE / "configs" / group).glob("*.yaml")):
        config = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        if "defaults" in config:  # of one option on another
            base = OmegaConf.to_container(OmegaConf.load(path.parent / f"{config.pop('defaults')[0]}.yaml"))
            config = base | config
        config = config.get(group, config)
        if config is not None:
            found[path.stem] = {key: SMALL.get(key, value) for key, value in config.items()}
    return found


@pytest.fixture(scope="module")
def corpus():
    corpus = sample_corpus(12, 7, V, 3, seed=0)
    generator = np.random.default_rng(0)
    for utterance in corpus.utterances:
        utterance.frames = generator.dirichlet(np.ones(V), len(utterance.units)).astype(np.float32)
    return corpus


def attempt(corpus, emission: str, **config) -> torch.Tensor:
    """The loss of a batch, in nats, after its backward pass."""
    utterances = corpus.split("train")
    phones = [np.full(len(u.units), k % 3 - 1) for k, u in enumerate(utterances)]
    batch = collate(list(enumerate(utterances)), phones)
    dimension = V
    if emission == "product":
        codes = torch.stack([batch.units, batch.units.flip(0)], -1)
        batch, dimension = batch._replace(frames=codes.float()), 2
    data = SimpleNamespace(
        corpus=corpus, dimension=dimension, frames_per_batch=50.0, train_units=[u.units for u in utterances]
    )
    module = SpeechHMM.from_config(config, data, ALLOWED_TARGETS)
    loss = module.objective(module, batch)
    loss.sum().backward()
    assert loss.shape == (len(utterances),) and loss.isfinite().all()
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in gradients)
    with torch.no_grad():
        module.eval()
        states = module(batch).viterbi().states
    assert states.shape == batch.units.shape
    return loss


def test_parts_train_together_or_say_why_not(corpus) -> None:
    groups = {name: options(name) for name in ("topology", "transition", "emission", "context")}
    contexts = {"null": None, "gru": groups["context"]["gru"]}
    initial = options("initial")["table"]
    trained, refused = set(), {}
    for topology, transition, emission, context in itertools.product(
        groups["topology"], groups["transition"], groups["emission"], contexts
    ):
        torch.manual_seed(0)
        name = (topology, transition, emission, context)
        try:
            attempt(
                corpus, emission, topology=groups["topology"][topology], initial=initial, context=contexts[context],
                transition=groups["transition"][transition], emission=groups["emission"][emission], seed=0,
            )  # fmt: skip
            trained.add(name)
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) > 30, name
            refused[name] = str(error)
    for group in range(4):  # nothing is there that nothing goes with
        every = {name[group] for name in trained | refused.keys()}
        assert {name[group] for name in trained} == every, refused
    assert len(trained) > 100, refused


def test_objectives_train_with_parts_or_say_why_not(corpus) -> None:
    groups = {name: options(name) for name in ("topology", "transition", "emission", "context", "objective")}
    initial = options("initial")["table"]
    trained = set()
    for objective, transition, emission, context in itertools.product(
        groups["objective"], groups["transition"], ("network", "contextual", "cloned", "gaussian"), (None, "gru")
    ):
        torch.manual_seed(0)
        topology = "cloned" if emission == "cloned" else "full"
        try:
            attempt(
                corpus, emission, topology=groups["topology"][topology], initial=initial,
                context=context and groups["context"][context], transition=groups["transition"][transition],
                emission=groups["emission"][emission], objective=groups["objective"][objective], seed=0,
            )  # fmt: skip
            trained.add(objective)
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) > 30
    assert trained == groups["objective"].keys()
