"""Whole runs: what they leave behind, and that a run cut short ends where a whole one does."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hmm_speech.callbacks import ClusterInitialisation
from hmm_speech.checkpoint import load
from hmm_speech.data.batching import collate
from hmm_speech.data.datamodule import SyntheticDataModule
from hmm_speech.errors import UserError, report_user_errors
from hmm_speech.module import SpeechHMM
from tests.runs import NETWORKS, train_in_two_processes

Train = Callable[..., None]


def checkpoint(run: Path, name: str) -> dict[str, Any]:
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)


def assert_same(first: Any, second: Any, where: str = "") -> None:
    assert type(first) is type(second), where
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_same(first[key], second[key], f"{where}.{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for index, (a, b) in enumerate(zip(first, second, strict=True)):
            assert_same(a, b, f"{where}[{index}]")
    else:
        assert first == second or first != first, where


def test_a_run_leaves_its_folder(tmp_path: Path, train: Train) -> None:
    train(tmp_path / "run", "figures=true")
    found = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*") if path.is_file()}
    pictures = {f"figures/{name}.png" for name in ("transition_matrix", "states_against_phones", "utterance")}
    expected = {"checkpoints/best.ckpt", "checkpoints/last.ckpt", "config.yaml", "metrics.json"}
    assert expected | pictures | {"figures/learning_curve.png", "logs/version_0/metrics.csv"} <= found
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert set(metrics) == {
        "bits_per_frame", "perplexity", "frames", "parameters", "baselines", "states", "units", "uniform"
    }  # fmt: skip
    data = SyntheticDataModule()
    test = data.corpus.split("test")
    assert metrics["frames"] == sum(len(utterance.units) for utterance in test)
    assert metrics["states"]["pnmi"] > 0

    module = load(tmp_path / "run" / "checkpoints" / "best.ckpt")
    bits = 0.0
    with torch.no_grad():
        for utterance in test:
            bits -= float(module(collate([(0, utterance)])).log_partition()) / math.log(2)
    assert metrics["bits_per_frame"] == pytest.approx(bits / metrics["frames"], rel=1e-5)
    assert metrics["parameters"] == module.num_parameters()


class Kill(Exception):
    pass


@pytest.mark.parametrize("optimizer", ["adamw", "em"])
@pytest.mark.parametrize("batch", [0, 2])
def test_a_run_cut_short_and_resumed_ends_bit_for_bit_where_a_whole_one_does(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch, optimizer: str, batch: int
) -> None:
    tables = ("emission=table", "transition=table", "optimizer=em") if optimizer == "em" else ("emission.dropout=0.1",)
    overrides = (*tables, "trainer.max_epochs=4", "data.batch_size=8")
    train(tmp_path / "whole", *overrides, networks=optimizer != "em")

    def die(module: SpeechHMM, _: Any, batch_idx: int) -> None:
        if module.current_epoch == 2 and batch_idx == batch:
            raise Kill

    with monkeypatch.context() as patched, pytest.raises(Kill):
        patched.setattr(SpeechHMM, "on_train_batch_start", die)
        train(tmp_path / "cut", *overrides, networks=optimizer != "em")
    last = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    assert checkpoint(tmp_path / "cut", "last")["epoch"] == 1

    def never(*_: Any) -> None:
        raise AssertionError("a resumed run must not start from clusters again")

    torch.rand(7)  # a new process would not have the same generator state either
    with monkeypatch.context() as patched:
        patched.setattr("hmm_speech.callbacks.initialise.initialise", never)
        train(tmp_path / "cut", *overrides, f"ckpt_path={last}", networks=optimizer != "em")
    for name in ("best", "last"):
        whole, cut = checkpoint(tmp_path / "whole", name), checkpoint(tmp_path / "cut", name)
        for key in ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step"):
            assert_same(whole[key], cut[key], f"{name}.{key}")
    assert (tmp_path / "whole" / "metrics.json").read_text() == (tmp_path / "cut" / "metrics.json").read_text()


def test_more_epochs_stretch_the_schedule(tmp_path: Path, train: Train) -> None:
    train(tmp_path / "run", "trainer.max_epochs=1")
    train(tmp_path / "run", "trainer.max_epochs=2", f"ckpt_path={tmp_path}/run/checkpoints/last.ckpt")
    assert checkpoint(tmp_path / "run", "last")["epoch"] == 1


def test_a_model_does_not_go_on_from_another(tmp_path: Path, train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "run", "trainer.max_epochs=1")
    with pytest.raises(SystemExit) as ended, report_user_errors():
        train(tmp_path / "other", "topology.labels=5", f"ckpt_path={tmp_path}/run/checkpoints/last.ckpt")
    told = capsys.readouterr().err
    assert ended.value.code == 1 and "cannot be resumed" in told and "Traceback" not in told
    assert "'labels': 8" in told and "'labels': 5" in told
    assert not (tmp_path / "other" / "checkpoints").exists()


def test_the_same_seed_gives_the_same_run_and_another_does_not(tmp_path: Path, train: Train) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train(tmp_path / name, f"seed={seed}", "trainer.max_epochs=1")
    first, again, other = (checkpoint(tmp_path / name, "last")["state_dict"] for name in "abc")
    assert_same(first, again)
    assert not torch.equal(first["emission.output.weight"], other["emission.output.weight"])


def test_processes_count_each_test_frame_once(tmp_path: Path, train: Train) -> None:
    """Two processes: the EM run of one process, to the last digits, and the same number of test frames."""
    overrides = ("data.utterances=33", "emission=table", "transition=table", "optimizer=em", "trainer.max_epochs=2")
    train(tmp_path / "one", *overrides, networks=False)
    train_in_two_processes(tmp_path / "two", *overrides)
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert one["frames"] == two["frames"]
    assert two["bits_per_frame"] == pytest.approx(one["bits_per_frame"], rel=1e-5)
    assert two["states"] == one["states"]


def test_checkpoints_are_plain_and_what_is_not_allowed_is_refused(tmp_path: Path, train: Train) -> None:
    train(tmp_path / "run", "trainer.max_epochs=1")
    content = checkpoint(tmp_path / "run", "best")
    content["hyper_parameters"]["emission"]["_target_"] = "hmm_speech.module.torch.nn.Linear"
    torch.save(content, tmp_path / "forged.ckpt")
    with pytest.raises(UserError, match="no class of the allowed packages"):
        load(tmp_path / "forged.ckpt", allowed=("hmm_speech",))
    content["hyper_parameters"]["emission"]["_target_"] = "os.system"
    torch.save(content, tmp_path / "forged.ckpt")
    with pytest.raises(UserError, match="outside the packages of allow_targets"):
        load(tmp_path / "forged.ckpt")
    torch.save({"weights": ClusterInitialisation()}, tmp_path / "pickled.ckpt")
    with pytest.raises(UserError, match="opened safely"):
        load(tmp_path / "pickled.ckpt")
    with pytest.raises(UserError, match="no such file"):
        load(tmp_path / "absent.ckpt")


def test_a_run_starts_from_the_parts_of_another(tmp_path: Path, train: Train, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path / "first", "trainer.max_epochs=2")
    best = tmp_path / "first" / "checkpoints" / "best.ckpt"
    run = ("callbacks=from_checkpoint", f"callbacks.from_checkpoint.path={best}", "optimizer.lr=1e-9")
    with caplog.at_level("INFO", logger="train"):
        train(tmp_path / "second", "transition=table", *run, "trainer.max_epochs=1", *NETWORKS[:2], networks=False)
    assert "initial, emission" in caplog.text
    before, after = load(best), load(tmp_path / "second" / "checkpoints" / "last.ckpt")
    torch.testing.assert_close(after.emission.logits(), before.emission.logits(), atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="no part of it fits"):
        train(tmp_path / "third", "topology.labels=9", *run, "trainer.max_epochs=1")


def test_a_run_that_goes_on_is_told_what_is_left_of_it(
    tmp_path: Path, train: Train, caplog: pytest.LogCaptureFixture
) -> None:
    train(tmp_path / "run", "trainer.max_epochs=2", "data.batch_size=4")
    last = f"ckpt_path={tmp_path}/run/checkpoints/last.ckpt"
    with pytest.raises(UserError, match=r"was trained for 2 epochs, trainer\.max_epochs is 1"):
        train(tmp_path / "run", "trainer.max_epochs=1", last)
    train(tmp_path / "again", "trainer.max_epochs=2", "data.batch_size=4", last)  # nothing better: tested as it is
    assert "trained for 2 of 2 epochs" in caplog.text and (tmp_path / "again/metrics.json").exists()
    with pytest.raises(UserError, match=r"data\.batch_size"):
        train(tmp_path / "other", "trainer.max_epochs=3", "data.batch_size=64", last)


def test_a_gpu_that_is_not_there(tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match="take trainer=cpu"):
        train(tmp_path / "run", "trainer=gpu")


@pytest.mark.parametrize("seed", ["x", "-1", "1.5"])
def test_a_seed_is_a_number(tmp_path: Path, train: Train, seed: str) -> None:
    with pytest.raises(UserError, match="seed is"):
        train(tmp_path / "run", f"seed={seed}")
