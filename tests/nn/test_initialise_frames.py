from typing import Any

import numpy as np
import pytest
import torch

from hmm_speech.data.batching import collate
from hmm_speech.data.synthetic import sample_corpus
from hmm_speech.errors import UserError
from hmm_speech.evaluate import label_report
from hmm_speech.module import SpeechHMM
from hmm_speech.nn import Topology
from hmm_speech.nn.initialise_frames import cluster_frames, initialise_frames, run_tables, spread_runs

CORPUS = sample_corpus(utterances=60, numbers=4, seed=1)
TRAIN = CORPUS.split("train")
FRAMES = [utterance.frames for utterance in TRAIN]


def model(optimizer: str = "torch.optim.AdamW", network: bool = False, **emission: Any) -> SpeechHMM:
    torch.manual_seed(0)
    transition = {"_target_": "hmm_speech.nn.TransitionTable"}
    if network:
        transition = {"_target_": "hmm_speech.nn.TransitionNetwork", "dim": 32, "blocks": 1, "dropout": 0.0}
    return SpeechHMM(
        CORPUS.vocabulary,
        {"labels": 8, "substates": 2},
        {"_target_": "hmm_speech.nn.InitialTable"},
        transition,
        {"_target_": "hmm_speech.nn.GaussianEmission"} | emission,
        optimizer={"_target_": optimizer},
        dimension=4,
    )


def likelihood(module: SpeechHMM) -> float:
    with torch.no_grad():
        return float(module(collate(list(enumerate(TRAIN)))).log_partition().sum())


def test_runs_go_through_their_substates() -> None:
    labels = np.array([4, 4, 4, 4, 4, 4, 1, 2, 2])
    assert spread_runs(labels, 3).tolist() == [12, 12, 13, 13, 14, 14, 4, 6, 8]
    assert spread_runs(labels, 1).tolist() == labels.tolist()


def test_tables_follow_the_runs() -> None:
    topology = Topology(3, 2)
    initial, transition = run_tables([np.array([0, 0, 1, 1, 0, 1, 2, 2])], topology)
    for table in (initial, transition):
        torch.testing.assert_close(table.exp().sum(-1), torch.ones(table.shape[:-1]))
    assert torch.equal(transition > -torch.inf, topology.arcs())
    assert torch.equal(initial > -torch.inf, topology.starts())
    exits = transition[1, [0, 2, 4]]
    assert exits.argmax() == 1  # after label 0 comes label 1


def test_clusters_are_the_same_every_time_and_need_enough_frames() -> None:
    first, again = (cluster_frames(FRAMES, 5, seed=3) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert len(np.unique(np.concatenate(first))) == 5
    with pytest.raises(UserError, match=r"topology\.labels is 100, but the train split has 9 frames"):
        cluster_frames([np.zeros((9, 2), np.float32)], 100, 0)


@pytest.mark.parametrize("covariance", ["tied", "diagonal", "spherical", "unit"])
def test_the_start_is_far_above_noise_and_iterations_raise_the_likelihood(covariance: str) -> None:
    noise = likelihood(model(covariance=covariance))
    found = []
    for iterations in (0, 1, 3):
        module = model(covariance=covariance)
        initialise_frames(module, FRAMES, iterations, steps=0, lr=0.0)
        assert not module.emission.counting  # the optimizer trains by gradients, and goes on to
        found.append(likelihood(module))
    assert noise < found[0] < found[1] < found[2]
    with torch.no_grad():
        states = module(collate(list(enumerate(TRAIN)))).viterbi().states
    labels = [row[: len(x)].numpy() for row, x in zip(module.topology.label_of(states), FRAMES, strict=True)]
    report = label_report(labels, [utterance.phones for utterance in TRAIN], CORPUS.frame_rate)
    assert report["pnmi"] > 0.5


def test_units_of_measurement_do_not_matter() -> None:
    """Numbers c times as large have a density of 1 / c each, and nothing else changes."""
    found = []
    for scale in (np.ones(4), np.array([1.0, 100.0, 0.01, 5.0])):
        module = model()
        initialise_frames(module, [(scale * x + 7).astype(np.float32) for x in FRAMES], 2, steps=0, lr=0.0)
        batch = collate(list(enumerate(TRAIN)))
        with torch.no_grad():
            batch = batch._replace(frames=torch.as_tensor(scale).float() * batch.frames + 7)
            found.append(float(module(batch).log_partition().sum()) + sum(map(len, FRAMES)) * np.log(scale).sum())
    assert found[1] == pytest.approx(found[0], rel=1e-3)  # 7 leaves 0.01 five digits


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_start_is_found_in_float32_whatever_the_model_is_trained_in(dtype: torch.dtype) -> None:
    single, other = model(), model().to(dtype)
    for module in (single, other):
        initialise_frames(module, FRAMES, 1, steps=0, lr=0.0)
    for a, b in zip(single.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a.to(b.dtype), b)


def test_networks_are_fitted_and_nothing_depends_on_the_generator() -> None:
    tables, network = model(), model(network=True)
    initialise_frames(tables, FRAMES, 1, steps=0, lr=0.0)
    initialise_frames(network, FRAMES, 1, steps=300, lr=5e-3)
    assert abs(likelihood(network) - likelihood(tables)) < 0.05 * sum(map(len, FRAMES))
    again = model()
    torch.manual_seed(17)
    initialise_frames(again, FRAMES, 1, steps=0, lr=0.0)
    assert all(
        torch.equal(a, b) for a, b in zip(tables.state_dict().values(), again.state_dict().values(), strict=True)
    )


def test_soft_units_and_codes_start_from_clusters_too() -> None:
    units = [utterance.units for utterance in TRAIN]
    kinds = {
        "SoftEmission": ([np.eye(20, dtype=np.float32)[x] for x in units], {}),
        "ProductEmission": ([np.stack([x // 5, x % 5], 1).astype(np.float32) for x in units], {"codebooks": [4, 5]}),
    }
    for name, (frames, config) in kinds.items():
        found = []
        for iterations in (0, 2):
            module = SpeechHMM(
                20,
                {"labels": 8, "substates": 2},
                {"_target_": "hmm_speech.nn.InitialTable"},
                {"_target_": "hmm_speech.nn.TransitionTable"},
                {"_target_": f"hmm_speech.nn.{name}", **config},
                dimension=frames[0].shape[1],
            )
            initialise_frames(module, frames, iterations, steps=0, lr=0.0)
            rows = [(k, u) for k, u in enumerate(TRAIN)]
            batch = collate(rows)._replace(
                frames=torch.nn.utils.rnn.pad_sequence([torch.from_numpy(x) for x in frames], batch_first=True)
            )
            with torch.no_grad():
                found.append(float(module(batch).log_partition().sum()))
        assert found[1] > found[0]


def test_what_cannot_start_from_frames_is_told() -> None:
    module = model()
    module.emission = torch.nn.Identity()
    with pytest.raises(UserError, match=r"callbacks\.initialise cannot start Identity"):
        initialise_frames(module, FRAMES, 1, 1, 1e-3)
