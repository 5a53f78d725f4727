"""The optimizer and the learning rates of a run, from its configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from hmm_speech.configuration import instantiate
from hmm_speech.nn.blocks import with_priors
from hmm_speech.optim.em import EM


def is_em(config: Mapping[str, Any] | None) -> bool:
    """Whether an optimizer's configuration names EM: gradients are then to be expected counts."""
    return (config or {}).get("_target_") in (f"{EM.__module__}.EM", "hmm_speech.optim.EM")


def configure_optimizers(module: Any, config: Mapping[str, Any]) -> Any:
    """What ``LightningModule.configure_optimizers`` returns."""
    config, trainer = dict(config), module.trainer
    schedule = config.pop("schedule", None)
    parameters: list[Any] = [p for p in module.parameters() if p.requires_grad]
    extra: dict[str, Any] = {}
    if is_em(config):
        parameters = [{"params": [p], "prior": prior} for p, prior in with_priors(module, parameters)]
        # What turns a gradient back into counts of the frames of a step or, for steps after mini-batches, of an epoch.
        frames = module.hparams.frames_per_batch * trainer.accumulate_grad_batches * trainer.world_size
        steps = trainer.estimated_stepping_batches / trainer.max_epochs if config.get("stepwise") else 1
        extra["scale"] = math.log(2) * frames * steps
    where = {"allowed": module.allowed, "where": "optimizer"}
    optimizer = instantiate(config, parameters, kind=Optimizer, **where, **extra)
    if schedule is None:
        return optimizer
    total = {"total_steps": int(trainer.estimated_stepping_batches)}
    scheduler = instantiate(
        schedule, optimizer, kind=LRScheduler, allowed=module.allowed, where="optimizer.schedule", **total
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
