"""Whole runs over frames, and what the commands make of their checkpoints."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from hmm_speech.callbacks import ClusterInitialisation
from hmm_speech.checkpoint import load
from hmm_speech.cli import app
from hmm_speech.configuration import CLONE
from hmm_speech.data.synthetic import sample_corpus
from hmm_speech.data.unitfile import read_units, write_units
from hmm_speech.errors import UserError
from hmm_speech.module import SpeechHMM
from hmm_speech.report import learning_curve
from tests import runs

from .test_run import Kill, assert_same, checkpoint

Train = Callable[..., None]
FRAMES = ("data.numbers=4", "transition=table", "emission=gaussian")
EM = (*FRAMES, "optimizer=em")


def command(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(x) for x in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path]:
    """(run folder, unit file with frames) of Gaussian chains trained by EM."""
    folder = tmp_path_factory.mktemp("frames")
    units, run = folder / "units.parquet", folder / "run"
    write_units(sample_corpus(60, 40, 12, 4, numbers=3, seed=0), units)
    overrides = [
        "recipes=flite/frames",
        f"data.path={units}",
        "transition=table",
        "topology.labels=4",
        "topology.substates=2",
    ]
    overrides += ["trainer.max_epochs=4", "trainer.enable_progress_bar=false", "callbacks.progress=null"]
    runs.train(run, *overrides)
    return run, units


def test_what_does_not_apply_to_densities_is_null_and_labels_are_found(trained: tuple[Path, Path]) -> None:
    run, units = trained
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["bits_per_frame"] is None and metrics["perplexity"] is None
    assert metrics["baselines"] == {"unigram": None, "bigram": None, "trigram": None}
    assert metrics["frames"] == sum(len(u.units) for u in read_units(units).split("test"))
    # initial 4 starts; 8 states that stay or go, half of them to 4 labels; 8 means; one covariance of 3 numbers
    assert metrics["parameters"] == 4 + 8 + 4 + 4 * 4 + 8 * 3 + 6
    assert metrics["states"]["pnmi"] > 0.6 and metrics["units"]["pnmi"] is not None
    assert {"learning_curve.png", "utterance.png"} <= {path.name for path in (run / "figures").iterdir()}
    assert json.loads(command("evaluate", run / "checkpoints/best.ckpt", units, "--json")) == metrics


def test_decode_writes_the_labels(trained: tuple[Path, Path], tmp_path: Path) -> None:
    run, units = trained
    command("decode", run / "checkpoints/best.ckpt", units, "--out", tmp_path, "--split", "test")
    rows = pq.read_table(tmp_path / "decoded.parquet").to_pylist()
    test = read_units(units).split("test")
    assert [len(row["labels"]) for row in rows] == [len(u.units) for u in test]
    assert all(row["log_likelihood"] >= row["score"] for row in rows)
    assert {label for row in rows for label in row["labels"]} <= set(range(4))


def test_samples_hold_frames_and_their_labels_as_units(trained: tuple[Path, Path], tmp_path: Path) -> None:
    run, _ = trained
    best = run / "checkpoints/best.ckpt"
    command("sample", best, "--num", 30, "--frames", 100, "--out", tmp_path / "drawn.parquet")
    drawn = read_units(tmp_path / "drawn.parquet")
    assert drawn.vocabulary == 4
    assert all(u.frames.shape == (100, 3) and u.frames.dtype == np.float32 for u in drawn.utterances)
    model = load(best)
    units, frames = (np.concatenate([getattr(u, x) for u in drawn.utterances]) for x in ("units", "frames"))
    weights = np.bincount(units, minlength=4)
    for label in np.flatnonzero(weights > 100):
        state = model.emission.mean[2 * label : 2 * label + 2].detach() * model.emission.scale + model.emission.centre
        low, high = state.min(0).values.numpy(), state.max(0).values.numpy()
        found = frames[units == label].mean(0)  # lies between the means of the label's two states
        assert (found > low - 0.3).all() and (found < high + 0.3).all()
    # a file of samples is a unit file for the model: its own labels are mostly found again
    command("decode", best, tmp_path / "drawn.parquet", "--out", tmp_path)
    rows = pq.read_table(tmp_path / "decoded.parquet").to_pylist()
    agree = np.mean(
        [np.mean(np.array(row["labels"]) == u.units) for row, u in zip(rows, drawn.utterances, strict=True)]
    )
    assert agree > 0.8


@pytest.mark.parametrize(
    ("numbers", "message"), [(0, "has no frames, the model reads frames of 3"), (2, "has frames of 2 numbers")]
)
def test_a_file_without_these_frames_is_refused(
    trained: tuple[Path, Path], tmp_path: Path, numbers: int, message: str
) -> None:
    write_units(sample_corpus(10, 20, 12, 4, numbers=numbers), tmp_path / "other.parquet")
    result = CliRunner().invoke(
        app, ["evaluate", str(trained[0] / "checkpoints/best.ckpt"), f"{tmp_path}/other.parquet"]
    )
    assert isinstance(result.exception, UserError) and message in str(result.exception)
    assert "\n" not in str(result.exception)


def test_training_without_frames_is_refused(tmp_path: Path, train: Train) -> None:
    with pytest.raises(UserError, match="emission reads frames, but the unit file has none"):
        train(tmp_path / "run", "transition=table", "emission=gaussian", "optimizer=em", networks=False)


def test_the_file_of_a_recipe_that_is_not_there_is_made_by_its_script(tmp_path: Path) -> None:
    absent = CLONE / "outputs/flite/absent.parquet"
    with pytest.raises(UserError, match=r"absent\.parquet: no such file; `python recipes/flite/prepare\.py` makes it"):
        runs.train(tmp_path, "recipes=flite/frames", f"data.path={absent}")


@pytest.mark.parametrize("batch", [0, 2])
def test_em_over_frames_resumes_bit_for_bit(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    overrides = (*EM, "trainer.max_epochs=3", "data.batch_size=8")
    train(tmp_path / "whole", *overrides, networks=False)

    def die(module: SpeechHMM, _: object, batch_idx: int) -> None:
        if module.current_epoch == 2 and batch_idx == batch:
            raise Kill

    with monkeypatch.context() as patched, pytest.raises(Kill):
        patched.setattr(SpeechHMM, "on_train_batch_start", die)
        train(tmp_path / "cut", *overrides, networks=False)
    train(tmp_path / "cut", *overrides, f"ckpt_path={tmp_path}/cut/checkpoints/last.ckpt", networks=False)
    for name in ("best", "last"):
        whole, cut = checkpoint(tmp_path / "whole", name), checkpoint(tmp_path / "cut", name)
        for key in ("state_dict", "optimizer_states", "epoch", "global_step"):
            assert_same(whole[key], cut[key], f"{name}.{key}")


def test_gradients_train_gaussians_too(tmp_path: Path, train: Train) -> None:
    overrides = ("data.numbers=4", "emission=gaussian", "emission.covariance=diagonal", "transition.dim=16")
    train(tmp_path / "run", *overrides, "transition.blocks=1", "callbacks.initialise.steps=20", networks=False)
    found = checkpoint(tmp_path / "run", "best")["state_dict"]
    assert found["emission.statistics"].count_nonzero() == 0
    log = (tmp_path / "run" / "logs" / "version_0" / "metrics.csv").read_text().splitlines()
    column = log[0].split(",").index("train/bits_per_frame")
    bits = [float(row.split(",")[column]) for row in log[1:] if row.split(",")[column]]
    assert bits[-1] < bits[0]


def test_two_processes_take_the_steps_of_one(tmp_path: Path, train: Train) -> None:
    overrides = ("data.utterances=33", *EM, "trainer.max_epochs=2")
    train(tmp_path / "one", *overrides, networks=False)
    runs.train_in_two_processes(tmp_path / "two", *overrides)
    one, two = (checkpoint(tmp_path / name, "best")["state_dict"] for name in ("one", "two"))
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-4, atol=1e-5)


def test_annealed_em_ends_where_the_data_are_likely(tmp_path: Path, train: Train) -> None:
    bits = {}
    for name, temperature in (("plain", 1), ("annealed", 8)):
        overrides = ("objective=annealed", f"objective.temperature={temperature}", "callbacks.early_stopping=null")
        train(tmp_path / name, *EM, *overrides, "trainer.max_epochs=10", networks=False)
        bits[name] = [row["valid/bits_per_frame"] for row in learning_curve(tmp_path / name)]
    assert bits["annealed"][0] > bits["plain"][0] + 0.05  # still hot
    assert bits["annealed"][-1] == pytest.approx(bits["plain"][-1], abs=0.3)  # of some 9


def test_the_start_can_be_left_out(tmp_path: Path, train: Train) -> None:
    assert ClusterInitialisation is not None
    train(tmp_path / "run", *EM, "callbacks.initialise=null", "trainer.max_epochs=1", networks=False)
    assert torch.equal(checkpoint(tmp_path / "run", "best")["state_dict"]["emission.scale"], torch.ones(4))
