"""Every option composes, and mistakes are told without a traceback."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra.errors import HydraException
from omegaconf import OmegaConf

from hmm_speech.configuration import CLONE, check_run, check_targets, instantiate, plain
from hmm_speech.errors import UserError
from hmm_speech.nn.topology import Topology
from tests.runs import composed

GROUPS = sorted(path for path in (CLONE / "configs").glob("*/*.yaml"))
PRESETS = sorted((CLONE / "recipes").glob("*/*.yaml"))


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(CLONE)} | environment
    line = [sys.executable, str(CLONE / "train.py"), *arguments]
    return subprocess.run(line, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("path", GROUPS, ids=lambda path: f"{path.parent.name}={path.stem}")
def test_every_option_composes(path: Path, tmp_path: Path) -> None:
    config = plain(composed(tmp_path, f"{path.parent.name}={path.stem}"))
    check_run(config, None)
    for key in ("max_epochs", "devices", "precision"):
        assert key in config["trainer"]
    assert config["trainer"]["use_distributed_sampler"] is False
    assert {"seed", "ckpt_path"} <= config.keys() and "path" in config["data"]


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_preset_composes_with_other_options(path: Path, tmp_path: Path) -> None:
    preset = f"recipes={path.parent.name}/{path.stem}"
    check_run(plain(composed(tmp_path, preset)), None)
    config = plain(composed(tmp_path, preset, "emission=table", "transition=table", "optimizer=em", "data.path=x"))
    assert config["emission"]["_target_"].endswith("EmissionTable") and config["data"]["path"] == "x"
    assert config["optimizer"]["_target_"] == "hmm_speech.optim.EM" and config["trainer"]["gradient_clip_val"] is None


def test_a_preset_speaks_for_the_options_that_it_chose(tmp_path: Path) -> None:
    own = composed(tmp_path, "recipes=flite/units")
    assert own.optimizer.lr == 0.006 and own.transition["keys"] == "network" and own.trainer.max_epochs == 40
    other = composed(tmp_path, "recipes=flite/units", "optimizer=em", "transition=table", "transition.skip=0.5")
    assert "lr" not in other.optimizer and plain(other.transition) == {
        "_target_": "hmm_speech.nn.TransitionTable",
        "skip": 0.5,
    }
    assert other.trainer.max_epochs == 40 and other.trainer.gradient_clip_val is None
    assert other.data.path == own.data.path and other.emission == own.emission
    assert composed(tmp_path, "recipes=flite/units", "optimizer=adamw").optimizer == own.optimizer
    assert composed(tmp_path, "recipes=flite/units", "optimizer=adam", "optimizer.lr=1").optimizer.lr == 1
    assert plain(composed(tmp_path, "topology=full").topology) == {"labels": 100, "substates": 1}
    assert "labels" not in composed(tmp_path, "topology=cloned").topology
    assert composed(tmp_path, "~recipes", "optimizer=em").optimizer.pseudocount == 0.1
    shown = composed(tmp_path, "data=synthetic", "objective=semi_supervised", "data.utterances=7").data
    assert shown.phones == 0.1 and shown.utterances == 7 and shown.path == "synthetic"


def test_train_py_drops_them(tmp_path: Path) -> None:
    short = ("debug=tiny", "trainer.max_epochs=1", "figures=false")
    done = command("recipes=flite/units", "transition=table", *short, f"hydra.run.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    saved = OmegaConf.load(tmp_path / "config.yaml")
    assert "dropout" not in saved.transition and saved.optimizer.lr == 0.006


def test_the_default_recipe_is_flite_phones(tmp_path: Path) -> None:
    default, named = composed(tmp_path), composed(tmp_path, "recipes=flite/phones")
    assert plain(default) == plain(named)
    assert default.data.path == str(CLONE / "recipes/flite/logmel.parquet")
    assert OmegaConf.to_container(default.topology) == {"labels": 100, "substates": 3}


def test_an_unknown_option_or_key_is_refused(tmp_path: Path) -> None:
    for override in ("emission=nonsense", "emission.nonsense=1", "nonsense=1"):
        with pytest.raises(HydraException):
            composed(tmp_path, override)


def test_help_answers_without_heavy_imports() -> None:
    code = (
        "import runpy, sys\nsys.argv = ['train.py', '--help']\n"
        f"try: runpy.run_path({str(CLONE / 'train.py')!r}, run_name='__main__')\nexcept SystemExit: pass\n"
        "print('HEAVY', sorted({'torch', 'lightning', 'wandb', 'numpy', 'matplotlib'} & sys.modules.keys()))"
    )
    environment = os.environ | {"PYTHONPATH": str(CLONE)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "HEAVY []" in done.stdout
    assert "emission: " in done.stdout and "data.path=" in done.stdout and "hydra.run.dir" in done.stdout


def test_a_mistake_ends_without_a_traceback() -> None:
    wrong = command("emission=nonsense")
    assert wrong.returncode != 0 and "nonsense" in wrong.stderr and "Traceback" not in wrong.stderr


def test_a_target_outside_the_allowed_packages_is_refused_before_it_is_imported(tmp_path: Path) -> None:
    (tmp_path / "stranger.py").write_text("raise SystemExit('imported')")
    run = f"hydra.run.dir={tmp_path}/run"
    done = command("emission._target_=stranger.Network", run, PYTHONPATH=f"{CLONE}{os.pathsep}{tmp_path}")
    assert done.returncode == 1
    assert "stranger.Network" in done.stderr and "allow_targets" in done.stderr and "imported" not in done.stderr
    assert "Traceback" not in done.stderr
    shown = command("emission._target_=stranger.Network", run, HYDRA_FULL_ERROR="1")
    assert shown.returncode != 0 and "Traceback" in shown.stderr


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("os.system", "outside the packages"),
        ("torch.hub.load", "outside the packages"),
        ("torch.nnsomething.Module", "outside the packages"),
        ("hmm_speech.report.logging.FileHandler", "no class of the allowed packages"),
        ("hmm_speech.report.quiet", "no class of the allowed packages"),
        ("hmm_speech.nn.Nonsense", "does not exist"),
        ("torch.nn.Linear", "refuses its arguments"),
        ("hmm_speech.optim.EM", "is no Module"),
        (3, "outside the packages"),
    ],
)
def test_what_instantiate_refuses(target: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        instantiate({"_target_": target}, kind=torch.nn.Module, where="emission")


@pytest.mark.parametrize(
    ("target", "more"),
    [
        ("hmm_speech.nn.EmissionNetwork", {"topology": Topology(2), "vocabulary": 4}),
        ("hmm_speech.nn.GRUContext", {"vocabulary": 4}),
    ],
)
def test_a_share_out_of_range_is_told_before_anything_is_trained(target: str, more: dict) -> None:
    with pytest.raises(UserError, match=r"part: .* refuses its arguments: dropout .* 1\.5"):
        instantiate({"_target_": target, "dropout": 1.5}, where="part", **more)


def test_targets_are_checked_however_deep_they_lie() -> None:
    with pytest.raises(UserError, match=r"config\.a\[1\]\.b\._target_ is 'os\.system'"):
        check_targets({"a": [1, {"b": {"_target_": "os.system"}}]})


def test_a_package_added_to_allow_targets_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text("import torch\nclass Net(torch.nn.Linear): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = {"_target_": "mine.Net", "in_features": 2, "out_features": 3}
    assert instantiate(config, kind=torch.nn.Module, allowed=["mine"]).out_features == 3


def test_a_multirun_with_processes_is_refused(tmp_path: Path) -> None:
    done = command("--multirun", "trainer=ddp_cpu", "seed=0,1", f"hydra.sweep.dir={tmp_path}")
    assert done.returncode != 0 and "--multirun" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["emission.last_unit=true", "emission=table", "transition=table", "optimizer=em"], "EM trains tables"),
        (["optimizer=em"], "EM trains tables"),
        (["topology.labels=0"], "topology.labels is 0"),
        (["data.batch_size=0"], "batch_size is 0"),
        (["trainer.precision=nonsense"], "trainer: lightning.pytorch.Trainer refuses"),
        (["ckpt_path=absent.ckpt"], "absent.ckpt: no such file"),
        (["data=unitfile", "data.path=absent.parquet"], r"absent\.parquet: no such file"),
    ],
)
def test_wrong_values_are_told_by_name(
    tmp_path: Path, train: Callable[..., None], overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train(tmp_path / "run", *overrides, networks=not any("table" in override for override in overrides))
