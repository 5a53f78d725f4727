"""Train a neural hidden Markov model over discrete speech units: `python train.py --help`."""

import os
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from hmm_speech.configuration import check_run, instantiate, instantiate_all, plain
from hmm_speech.errors import report_user_errors
from hmm_speech.presets import without_leftovers

# Threads that wait by spinning cost a factor of ten where other programs use the cores; torch reads this when imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(config: DictConfig) -> None:
    with report_user_errors():
        hydra_config = HydraConfig.get()
        config = without_leftovers(config, hydra_config.runtime.choices, hydra_config.overrides.task)
        train(plain(config), Path(hydra_config.runtime.output_dir))


def train(config: dict, run: Path) -> None:
    """Fit, test, report; every file goes to the folder ``run``."""
    allowed = check_run(config, HydraConfig.get().mode)

    # Imported here, so that --help and mistakes in the configuration are answered at once.
    from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
    from lightning.pytorch.loggers import Logger

    from hmm_speech.callbacks import AtomicCheckpointIO
    from hmm_speech.checkpoint import check_resume
    from hmm_speech.module import SpeechHMM
    from hmm_speech.report import (
        announce,
        best_checkpoint,
        check_accelerator,
        quiet,
        report_run,
        resumable,
        save_config,
    )

    quiet()
    check_accelerator(config["trainer"])
    seed_everything(config["seed"], workers=True)

    data = instantiate(config["data"], kind=LightningDataModule, allowed=allowed, where="data")
    module = SpeechHMM.from_config(config, data, allowed)
    if config["ckpt_path"] is not None:  # what cannot go on is told now
        check_resume(config["ckpt_path"], module, config["trainer"].get("max_epochs"))
    callbacks = instantiate_all(config.get("callbacks"), kind=Callback, allowed=allowed, where="callbacks")
    loggers = instantiate_all(config.get("logger"), kind=Logger, allowed=allowed, where="logger")
    trainer = instantiate(
        config["trainer"],
        kind=Trainer,
        allowed=allowed,
        where="trainer",
        callbacks=callbacks,
        logger=loggers,
        plugins=[AtomicCheckpointIO()],
        default_root_dir=str(run),
    )
    if trainer.is_global_zero:
        save_config(config, run)
        announce(module, data, run)

    with resumable(trainer, run, HydraConfig.get().overrides.task):
        trainer.fit(module, data, ckpt_path=config["ckpt_path"], weights_only=True)

    best = None if trainer.fast_dev_run else best_checkpoint(trainer, run)
    trainer.test(module, data, ckpt_path=best, weights_only=True, verbose=False)
    report_run(module, data.corpus, run, figures=config["figures"])


if __name__ == "__main__":
    main()
