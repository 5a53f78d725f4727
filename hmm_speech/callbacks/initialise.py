"""Start training from tables found in the training units, not from noise."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

from hmm_speech.nn.initialise import initialise


class ClusterInitialisation(Callback):
    """Before the first epoch, fit the model to chain tables made from clusters of units; see ``initialise``.

    A resumed run skips this. The first process computes it, from the whole training split, and the others take it over;
    no phones are used.

    Args:
        iterations: EM iterations of the tables.
        steps: Adam steps that fit the networks to the tables.
        lr: their learning rate.
        seed: of the batches' order and of what tells copies of a unit apart.
    """

    def __init__(self, iterations: int = 3, steps: int = 300, lr: float = 5e-3, seed: int = 0) -> None:
        self.iterations, self.steps, self.lr, self.seed = iterations, steps, lr, seed

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.ckpt_path is not None:  # known from here on; not yet in setup
            return
        if trainer.is_global_zero:
            train = [utterance.units for utterance in trainer.datamodule.corpus.split("train")]
            initialise(pl_module, train, self.iterations, self.steps, self.lr, self.seed)
        if trainer.world_size > 1:
            pl_module.load_state_dict(trainer.strategy.broadcast(pl_module.state_dict()))
