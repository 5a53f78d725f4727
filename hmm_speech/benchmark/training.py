"""`hmm-speech bench --train`: how much of a training step the layer takes, for each preset of the recipes."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from omegaconf import open_dict
from torch.profiler import ProfilerActivity, profile

from hmm_speech.benchmark.table import growing
from hmm_speech.configuration import CLONE, instantiate, plain
from hmm_speech.data.datamodule import UnitDataModule
from hmm_speech.data.unitfile import atomic_path
from hmm_speech.errors import UserError
from hmm_speech.module import SpeechHMM
from hmm_speech.report import quiet

WARM = 3  # steps before the first that counts
OPERATORS = "hmm_speech::"


@dataclass
class Share:
    """Milliseconds of a training step: all of it, and the kernels of the layer."""

    preset: str
    step_ms: float
    layer_ms: float
    parameters: int
    states: int

    @property
    def share(self) -> float:
        """Of the step, 0 to 1."""
        return self.layer_ms / self.step_ms


class _Clock(Callback):
    """Wall time of each step, and what the profiler saw of all but the first ones."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.profiler = profile(activities=[ProfilerActivity.CPU])

    def on_train_batch_start(self, *_: Any) -> None:
        if len(self.steps) == WARM:
            self.profiler.start()
        self.start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps.append(time.perf_counter() - self.start)

    def on_train_end(self, *_: Any) -> None:
        self.profiler.stop()

    def layer_ms(self) -> float:
        """Time in the layer's operators, forward and backward, in milliseconds a step."""
        found = self.profiler.key_averages()
        total = sum(event.self_cpu_time_total for event in found if OPERATORS in event.key)
        return total / 1e3 / (len(self.steps) - WARM)


def presets() -> list[str]:
    """NAME/PRESET of every recipe in the clone."""
    files = sorted((CLONE / "recipes").glob("*/*.yaml"))
    if not files:
        raise UserError(f"--train: no recipes in {CLONE}; it runs where the project was cloned")
    return [f"{path.parent.name}/{path.stem}" for path in files]


def composed(preset: str) -> dict[str, Any]:
    """The configuration of `python train.py recipes=PRESET`."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CLONE / "configs"), version_base="1.3"):
        config = compose("train", overrides=[f"recipes={preset}"])
    with open_dict(config):
        del config.callbacks, config.logger  # they name the run folder, and there is none
    return plain(config)


def measure(preset: str, steps: int) -> Share | str:
    """The share of one preset, or why there is none."""
    config = composed(preset)
    path = Path(str(config["data"]["path"]))
    if not path.exists():
        return f"no data: {path.relative_to(CLONE) if path.is_relative_to(CLONE) else path}"
    allowed = config["allow_targets"]
    data = instantiate(config["data"], kind=UnitDataModule, allowed=allowed, where="data")
    module = SpeechHMM.from_config(config, data, allowed)
    clock = _Clock()
    quiet()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=WARM + steps,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[clock],
        gradient_clip_val=config["trainer"]["gradient_clip_val"],
    )
    trainer.fit(module, data)
    step_ms = statistics.median(clock.steps[WARM:]) * 1e3
    return Share(preset, step_ms, clock.layer_ms(), module.num_parameters(), module.topology.num_states)


def bench_training(threads: int, steps: int, out: Path | None = None) -> None:
    """Measure every preset, print a table as rows come in, and write them as JSON where `out` says."""
    for name, value in (("--threads", threads), ("--steps", steps)):
        if value < 1:
            raise UserError(f"{name}: got {value}, expected at least 1")
    torch.set_num_threads(threads)
    title = f"a training step, {threads} thread(s)"
    caption = f"median step of {steps} and the mean time in the layer's kernels, under the profiler"
    found = []
    with growing(title, caption, ("preset", "states", "parameters", "step, ms", "layer, ms", "share")) as table:
        for preset in presets():
            row = measure(preset, steps)
            if isinstance(row, str):
                table.add_row(preset, "-", "-", "-", "-", row)
                continue
            found.append(row)
            numbers = (f"{row.step_ms:.1f}", f"{row.layer_ms:.1f}", f"{row.share:.0%}")
            table.add_row(preset, str(row.states), f"{row.parameters:,}", *numbers)
    if out is not None:
        with atomic_path(out) as beside:
            beside.write_text(json.dumps([asdict(row) for row in found], indent=2), encoding="utf-8")
