"""Runs of train.py: inside the tests' own process, or as Lightning's two."""

import os
import subprocess
import sys
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

import train as script
from hmm_speech.configuration import CLONE, plain
from hmm_speech.presets import without_leftovers

SMALL = ("debug=tiny", "trainer.enable_progress_bar=false", "callbacks.progress=null", "figures=false")
NETWORKS = ("emission.dim=16", "emission.blocks=1", "transition.dim=16", "transition.blocks=1")


def composed(run: Path, *overrides: str) -> DictConfig:
    """The configuration that `python train.py OVERRIDES hydra.run.dir=run` composes, Hydra's own set as well."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CLONE / "configs"), version_base="1.3"):
        config = compose("train", overrides=list(overrides), return_hydra_config=True)
        without_leftovers(config, config.hydra.runtime.choices, overrides)
    with open_dict(config):
        config.hydra.runtime.output_dir = str(run)
    HydraConfig.instance().set_config(config)
    with open_dict(config):
        del config.hydra
    return config


def train(folder: Path, *overrides: str) -> None:
    """Run train.py with overrides in a run folder."""
    config = composed(folder, *overrides)
    folder.mkdir(exist_ok=True)
    script.train(plain(config), folder)


def train_in_two_processes(folder: Path, *overrides: str) -> None:
    """Run train.py with overrides in a run folder, as Lightning's DDP on the CPU."""
    line = [sys.executable, str(CLONE / "train.py"), *SMALL, *overrides, f"hydra.run.dir={folder}"]
    line += ["trainer=ddp_cpu", "trainer.devices=2"]
    environment = os.environ | {"PYTHONPATH": str(CLONE), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=folder.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
