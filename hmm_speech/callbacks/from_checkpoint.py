"""Start training from what another model learned."""

from __future__ import annotations

import logging

from lightning.pytorch import Callback, LightningModule, Trainer

from hmm_speech.errors import UserError
from hmm_speech.nn.composition import PARTS


class CheckpointInitialisation(Callback):
    """Before the first epoch, take over every part (initial, transition, emission, context) that a checkpoint has too.

    A part is taken over whole, where its parameters have the same names and shapes in both; the others stay as they
    are. So a transition may be new while the emission goes on, or a model go on with another optimizer or objective.
    A resumed run skips this.

    Args:
        path: a run's checkpoints/best.ckpt.

    Raises:
        UserError: there is no such checkpoint, or no part of it fits.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.ckpt_path is not None:
            return
        from hmm_speech.checkpoint import read_checkpoint

        found = read_checkpoint(self.path)["state_dict"]
        taken = []
        for name in PARTS:
            part = getattr(pl_module, name)
            if part is None:
                continue
            values = {key.removeprefix(f"{name}."): x for key, x in found.items() if key.startswith(f"{name}.")}
            if {k: x.shape for k, x in part.state_dict().items()} == {k: x.shape for k, x in values.items()}:
                part.load_state_dict(values)
                taken.append(name)
        if not taken:
            raise UserError(
                f"{self.path}: no part of it fits this model; give a checkpoint whose initial, transition, emission or "
                "context has the same configuration and sizes"
            )
        if trainer.is_global_zero:
            logging.getLogger("train").info("taken over from %s: %s", self.path, ", ".join(taken))
