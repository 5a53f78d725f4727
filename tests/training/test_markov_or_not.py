"""The comparison of recipes/markov_or_not on a tiny corpus, its measures against known answers, its presets' sizes."""

import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hmm_speech.checkpoint import load
from hmm_speech.configuration import CLONE, plain
from hmm_speech.data.batching import collate
from hmm_speech.data.synthetic import sample_corpus
from hmm_speech.errors import UserError
from hmm_speech.evaluate.clustering import clustering_scores
from hmm_speech.module import SpeechHMM
from tests.runs import composed

FOLDER = CLONE / "recipes" / "markov_or_not"
sys.path.insert(0, str(FOLDER))
import measures  # noqa: E402
import outcome  # noqa: E402
from outcome import Row  # noqa: E402

# By its path: another recipe has a compare.py, too.
specification = importlib.util.spec_from_file_location("compare_markov_or_not", FOLDER / "compare.py")
compare = importlib.util.module_from_spec(specification)
specification.loader.exec_module(compare)

Train = Callable[..., None]
PRESETS = [f"{model}{suffix}" for suffix in compare.SIZES.values() for model in compare.MODELS]
TINY = (
    "data.numbers=4", "data.frames=30", "data.utterances=36", "topology.labels=6", "context.dim=8", "context.layers=1",
    "callbacks.initialise.steps=5", "trainer.max_epochs=2",
)  # fmt: skip


def model_of(folder: Path, *overrides: str, dimension: int = 40) -> SpeechHMM:
    config = plain(composed(folder, *overrides))
    parts = ("topology", "initial", "transition", "emission", "context", "objective")
    return SpeechHMM(vocabulary=20, dimension=dimension, **{name: config[name] for name in parts})


def test_models_have_equally_many_parameters_within_a_percent(tmp_path: Path) -> None:
    for suffix in compare.SIZES.values():
        counts = [model_of(tmp_path, f"recipes=markov_or_not/{m}{suffix}").num_parameters() for m in compare.MODELS]
        assert max(counts) < 1.01 * min(counts), counts
    assert counts[0] > 6e6  # the size of the co-training paper


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_differ_in_what_they_compare_alone(preset: str, tmp_path: Path) -> None:
    def settings(name: str) -> dict:
        config = plain(composed(tmp_path, f"recipes=markov_or_not/{name}"))
        config["context"].pop("dim")
        return {key: config[key] for key in ("data", "topology", "emission", "context", "optimizer", "trainer")}

    assert settings(preset) == settings(PRESETS[0] if preset in PRESETS[:3] else PRESETS[3])


def test_one_command_trains_evaluates_and_writes_and_does_nothing_twice(tmp_path: Path, train: Train) -> None:
    trained: list[Path] = []

    def tiny(folder: Path, overrides: Sequence[str]) -> None:
        trained.append(folder)
        train(folder, *overrides, networks=False)

    arguments = (tmp_path, compare.MODELS, [2], [0], TINY)
    rows = compare.compare(*arguments, train=tiny)
    assert len(trained) == 3
    table = (tmp_path / "table.md").read_text()
    assert "| 2 | vq_apc, codes from h | 1 |" in table and "Markov against independent" in table
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert {(row.model, row.hop) for row in rows} == {
        *((model, 2) for model in (*compare.MODELS, "vq_apc, codes from h")), (outcome.FRAMES, None),
    }  # fmt: skip
    for row in rows:
        for key in row.measures.keys() - {"parameters", "nats", "r_value", "codes"}:
            assert 0 <= row.measures[key] <= 1, (row, key)
    # Nothing is trained or evaluated again.
    scores = tmp_path / "markov_hop2_seed0" / "scores.json"
    told = json.loads(scores.read_text())
    told["model"]["nats"] = -123.0
    scores.write_text(json.dumps(told))
    again = compare.compare(*arguments, train=tiny)
    assert len(trained) == 3
    assert [row.measures["nats"] for row in again if (row.model, row.hop) == ("markov", 2)] == [-123.0]
    # What stopped on its way goes on from its last checkpoint.
    (tmp_path / "markov_hop2_seed0" / "metrics.json").unlink()
    seen: list[Sequence[str]] = []
    compare.finished_run(
        trained[1], json.loads((trained[1] / "overrides.json").read_text()), lambda _, given: seen.append(given)
    )
    assert seen[0][-1] == f"ckpt_path={trained[1]}/checkpoints/last.ckpt"
    with pytest.raises(UserError, match=r"was trained with .* give another --out"):
        compare.compare(tmp_path, ["markov"], [2], [0], (*TINY, "optimizer.lr=0.5"), train=tiny)


def test_co_training_trains_with_a_network_of_its_own(tmp_path: Path, train: Train) -> None:
    options = ("objective=co_training", "objective.dim=8", "objective.temperature=0.5", "context.hop=2")
    train(tmp_path, "recipes=markov_or_not/markov", *TINY, *options, networks=False)
    model = load(tmp_path / "checkpoints" / "best.ckpt")
    assert sum(p.numel() for p in model.objective.parameters()) == 4 * 8 + 8 + 8 * 6 + 6
    batch = collate(list(enumerate(sample_corpus(6, 20, numbers=4).utterances)))
    with torch.no_grad():
        model.objective.temperature = None  # the bound itself, in place of a draw
        assert (model.objective(model, batch) > -model(batch).log_partition()).all()


@pytest.mark.parametrize("hop", [1, 3])
def test_views_are_what_the_model_knows_at_each_frame(hop: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = ("topology.labels=6", "context.dim=8", "context.layers=1", f"context.hop={hop}")
    model = model_of(tmp_path, "recipes=markov_or_not/vq_apc", *small, dimension=4).eval()
    utterances = sample_corpus(6, 20, numbers=4).utterances
    found = measures.views(model, utterances)
    for k, utterance in enumerate(utterances):
        batch, time = collate([(0, utterance)]), len(utterance.units)
        with torch.no_grad():
            hmm = model(batch)
            torch.testing.assert_close(torch.from_numpy(found.posterior[k]), hmm.marginals()[0], rtol=1e-4, atol=1e-5)
            # Row s has seen frame s, and no later one.
            context = model.context(F.pad(batch.frames, (0, 0, 0, hop)))[0]
            other = batch.frames.clone()
            other[:, time // 2] += 1
            changed = (model.context(F.pad(other, (0, 0, 0, hop)))[0] - context).abs().sum(-1)[hop:] > 0
        torch.testing.assert_close(torch.from_numpy(found.context[k]), context[hop:], rtol=1e-4, atol=1e-5)
        assert changed.tolist() == [t >= time // 2 for t in range(time)]
        scores = model.transition(context[None]).drift_BTN[0]
        assert found.past_codes[k].tolist() == scores[hop:].argmax(-1).tolist()  # past the first frame: no initial
    with torch.no_grad():
        total = sum(float(model(collate([(0, u)])).log_partition()) for u in utterances)
    assert found.nats == pytest.approx(-total, rel=1e-5)


def test_a_linear_probe_tells_what_is_linear_and_no_more() -> None:
    generator = np.random.default_rng(0)
    targets = [generator.integers(3, size=200) for _ in range(4)]
    mixing = generator.standard_normal((3, 5))
    shown = [np.eye(3)[y] @ mixing + 0.01 * generator.standard_normal((200, 5)) for y in targets]
    for k in (1, 3):  # most frames of one phone lie outside phones: neither learned from nor scored
        targets[k] = np.where((targets[k] == 2) & (np.arange(200) > 20), -1, targets[k])
    targets[0] = np.where(targets[0] == 2, -1, targets[0])
    assert measures.probe(shown[:2], shown[2:], targets[:2], targets[2:]) == 1.0
    noise = [generator.standard_normal((200, 5)) for _ in targets]
    assert measures.probe(noise[:2], noise[2:], targets[:2], targets[2:]) < 0.5


def test_nmi_is_that_of_scikit_learn() -> None:
    from sklearn.metrics import normalized_mutual_info_score

    labels, phones = (np.random.default_rng(seed).integers(4, size=300) for seed in (0, 1))
    phones[:200] = labels[:200] // 2
    joint = np.zeros((4, 4))
    np.add.at(joint, (labels, phones), 1)
    assert measures.nmi(joint) == pytest.approx(normalized_mutual_info_score(phones, labels))
    assert measures.nmi(joint) != pytest.approx(clustering_scores(joint)["pnmi"], abs=0.01)


def test_the_verdict_says_what_the_numbers_say() -> None:
    def rows(model: str, hop: int, f1: Sequence[float]) -> list[Row]:
        return [Row(model, hop, seed, {"f1": value}) for seed, value in enumerate(f1)]

    told = outcome.verdict(
        [
            *rows("markov", 1, (0.5, 0.6)), *rows("independent", 1, (0.3, 0.4)), *rows("vq_apc", 1, (0.7, 0.8)),
            *rows("markov", 2, (0.7, 0.9)), *rows("independent", 2, (0.6, 0.8)), *rows("vq_apc", 2, (0.1, 0.1)),
        ]
    )  # fmt: skip
    line = next(line for line in told.splitlines() if line.startswith("- F1"))
    assert "Markov against independent: ahead at hop 1; level at hop 2;" in line
    assert "Markov against vq_apc: ahead at hop 2; behind at hop 1;" in line
    assert "best hop of Markov: 2 of 1, 2" in line


def test_cells_are_mean_and_half_the_range() -> None:
    assert outcome.cell([0.5, 0.6], "f1") == "0.550 ± 0.050"
    assert outcome.cell([0.5], "f1") == "0.500"
    assert outcome.cell([None], "f1") == "-"
    assert outcome.cell([284480, 284480], "parameters") == "284,480"
