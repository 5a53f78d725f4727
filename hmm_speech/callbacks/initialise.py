"""Start training from clusters of the training data, not from noise."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

from hmm_speech.nn.composition import reads_frames
from hmm_speech.nn.initialise import initialise
from hmm_speech.nn.initialise_frames import initialise_frames


class ClusterInitialisation(Callback):
    """Before the first epoch, fit the model to chains made from clusters of units, or of frames where it reads those.

    See ``initialise`` and ``initialise_frames``. A resumed run skips this. The first process computes it, from the
    whole training split, and the others take it over; no phones are used.

    Args:
        iterations: EM iterations of the tables.
        steps: Adam steps that fit the networks to the tables.
        lr: their learning rate.
        seed: of the batches' order and of what tells copies of a unit apart; of k-means.
    """

    def __init__(self, iterations: int = 3, steps: int = 300, lr: float = 5e-3, seed: int = 0) -> None:
        self.iterations, self.steps, self.lr, self.seed = iterations, steps, lr, seed

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.ckpt_path is not None:  # known from here on; not yet in setup
            return
        if trainer.is_global_zero:
            train = trainer.datamodule.corpus.split("train")
            settings = (self.iterations, self.steps, self.lr, self.seed)
            if reads_frames(pl_module.emission):
                initialise_frames(pl_module, [utterance.frames for utterance in train], *settings)
            else:
                initialise(pl_module, [utterance.units for utterance in train], *settings)
        if trainer.world_size > 1:
            pl_module.load_state_dict(trainer.strategy.broadcast(pl_module.state_dict()))
