"""What a run leaves behind: config.yaml, metrics.json, figures and a table on the terminal."""

from __future__ import annotations

import contextlib
import csv
import logging
import shlex
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import OmegaConf

from hmm_speech.data.unitfile import UnitCorpus, atomic_path
from hmm_speech.errors import UserError
from hmm_speech.nn.composition import reads_frames, uses_context

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from hmm_speech.data.datamodule import UnitDataModule
    from hmm_speech.module import SpeechHMM, TestResult


MOST_STATES_DRAWN = 2048


def quiet() -> None:
    """Silence the advice that Lightning gives on choices made here on purpose; real warnings remain."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*number of training batches .* is smaller than the logging interval.*",
        ".*using `DistributedSampler` with the dataloaders.*",
        ".*The dirpath has changed from.*",
        ".*Experiment logs directory .* exists.*",
        ".*isinstance.treespec, LeafSpec.*",
    ):
        warnings.filterwarnings("ignore", message)


def check_accelerator(trainer: Mapping[str, Any]) -> None:
    """Raise a UserError where a GPU is asked for and torch finds none."""
    found = torch.cuda.is_available() or torch.backends.mps.is_available()
    if trainer.get("accelerator") in ("gpu", "cuda") and not found:
        raise UserError(
            f"trainer.accelerator is {trainer['accelerator']}, and torch finds no GPU here; "
            "take trainer=cpu, or trainer=ddp_cpu for several processes"
        )


def announce(module: SpeechHMM, data: UnitDataModule, run: Path) -> None:
    """Say what is trained on what, and where it goes, before anything takes time; to the run's log, too."""
    corpus = data.corpus
    splits = " / ".join(str(len(corpus.split(name))) for name in ("train", "valid", "test"))
    logger = logging.getLogger("train")
    logger.info("%s: %s utterances (train / valid / test), %d units", data.source, splits, corpus.vocabulary)
    logger.info("%s, %s parameters", module.topology, f"{module.num_parameters():,}")
    logger.info("run folder: %s", run)


def best_checkpoint(trainer: Trainer, run: Path) -> str:
    """The run's best checkpoint. One that went on in a new folder and never got better has none: the best before."""
    best = run / "checkpoints" / "best.ckpt"
    known = [callback.best_model_path for callback in trainer.checkpoint_callbacks if callback.monitor]
    return next((path for path in (str(best), *known) if Path(path).is_file()), str(trainer.ckpt_path))


@contextlib.contextmanager
def resumable(trainer: Trainer, run: Path, overrides: Sequence[str]) -> Iterator[None]:
    """Around fit: an interrupted run says how it goes on, and ends with 130."""
    try:
        yield
    except ValueError as error:
        # torch's, of a schedule that is as long as the run was when it began.
        if "total steps is" not in str(error):
            raise
        raise UserError(
            f"{trainer.ckpt_path}: the learning rate's schedule that goes on from it has no more steps. Give the "
            "overrides of that run (.hydra/overrides.yaml in its run folder), data.batch_size above all, or start anew"
        ) from error
    except (SystemExit, KeyboardInterrupt):
        if not trainer.interrupted:
            raise
        last = run / "checkpoints" / "last.ckpt"
        if trainer.is_global_zero and last.exists():
            same = [override for override in overrides if not override.startswith("ckpt_path=")]
            command = shlex.join(["python", "train.py", *same, f"ckpt_path={last}", f"hydra.run.dir={run}"])
            print(f"\nstopped; go on with: {command}", file=sys.stderr)
        elif trainer.is_global_zero:
            print("\nstopped in the first epoch: there is nothing to go on from", file=sys.stderr)
        sys.exit(130)


def save_config(config: Mapping[str, Any], run: Path) -> None:
    """Write the configuration, every interpolation resolved, to config.yaml in the run folder."""
    with atomic_path(run / "config.yaml") as path:
        path.write_text(OmegaConf.to_yaml(OmegaConf.create(dict(config))), encoding="utf-8")


def test_metrics(module: SpeechHMM, corpus: UnitCorpus) -> dict[str, Any]:
    """The object of metrics.json for the test split; bits of densities compare with nothing and are null."""
    from hmm_speech.evaluate import build_metrics, label_report, ngram_baselines, uniform_report

    result: TestResult = module.test_result
    over_frames = reads_frames(module.emission)
    split = corpus.split("test")
    test = [split[index] for index in result.index]
    units = [utterance.units for utterance in test]
    phones = [utterance.phones for utterance in test]
    known = any(phone is not None for phone in phones)
    splits = [[utterance.units for utterance in corpus.split(name)] for name in ("train", "valid", "test")]
    return build_metrics(
        bits_per_frame=None if over_frames else result.bits / result.frames,
        frames=result.frames,
        parameters=module.num_parameters(),
        baselines=None if over_frames else ngram_baselines(*splits, corpus.vocabulary),
        states=label_report(result.labels, phones, corpus.frame_rate) if known else None,
        units=label_report(units, phones, corpus.frame_rate) if known else None,
        uniform=uniform_report(phones, corpus.frame_rate) if known else None,
    )


def report_run(module: SpeechHMM, corpus: UnitCorpus, run: Path, figures: bool = True) -> None:
    """After a test: write metrics.json and figures/ to the run folder and print the table (one process)."""
    from hmm_speech.evaluate import print_metrics, write_metrics

    rank = module.global_rank
    if torch.distributed.is_initialized():  # every process knows all results, and metrics must not wait for the others
        torch.distributed.destroy_process_group()
    if rank != 0:
        return
    metrics = test_metrics(module, corpus)
    write_metrics(run / "metrics.json", metrics)
    print_metrics(metrics)
    if figures:
        draw_figures(module, corpus, run, metrics)
    print(f"run folder: {run}")


def draw_figures(module: SpeechHMM, corpus: UnitCorpus, run: Path, metrics: Mapping[str, Any]) -> None:
    """Write PNG files to figures/: learning curve, transitions between labels and, with phones, states against them."""
    from hmm_speech.evaluate import figures
    from hmm_speech.evaluate.labels import joint_counts

    folder = run / "figures"
    folder.mkdir(exist_ok=True)
    split, labels = corpus.split("test"), module.test_result.labels
    test = [split[index] for index in module.test_result.index]
    names = None
    if any(utterance.phones for utterance in test):
        rows = [utterance.phones for utterance in test]
        joint, phones = joint_counts(labels, rows, corpus.frame_rate, module.topology.labels)
        names = figures.label_phones(joint, phones)
        figures.states_against_phones(joint, phones, folder / "states_against_phones.png")
    state_labels = module.topology.label_of(torch.arange(module.topology.num_states)).tolist()
    if (matrix := transition_matrix(module)) is not None:
        transition = figures.label_transitions(matrix, state_labels)
        figures.transition_matrix(transition, folder / "transition_matrix.png", names=names)
    figures.utterance(
        labels[0], test[0].units, test[0].phones, corpus.frame_rate, folder / "utterance.png", names=names
    )
    if history := learning_curve(run):
        figures.learning_curve(history, folder / "learning_curve.png", baselines=metrics["baselines"])


@torch.no_grad()
def transition_matrix(module: SpeechHMM) -> torch.Tensor | None:
    """(N, N) log-probabilities, where the transitions are one matrix whatever the context and the states are few."""
    if uses_context(module.transition) or module.topology.num_states > MOST_STATES_DRAWN:
        return None
    transition = module.transition()
    return (transition if isinstance(transition, torch.Tensor) else transition.dense()).cpu()


def learning_curve(run: Path) -> list[dict[str, float]]:
    """One row an epoch, ``{epoch, train/..., valid/...}``, from the CSV logs of a run and of its resumptions."""
    curves = ("train/bits_per_frame", "valid/bits_per_frame")
    rows: dict[int, dict[str, float]] = {}
    logs = sorted(run.glob("logs/version_*/metrics.csv"), key=lambda path: int(path.parent.name.split("_")[1]))
    for log in logs:
        with log.open(newline="", encoding="utf-8") as file:
            for line in csv.DictReader(file):
                values = {key: float(line[key]) for key in curves if line.get(key)}
                if values:
                    rows.setdefault(int(line["epoch"]), {"epoch": float(line["epoch"])}).update(values)
    return [rows[epoch] for epoch in sorted(rows)]
