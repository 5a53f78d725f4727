"""How strongly EM's tables are drawn to their prior, chosen on the valid split."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from hmm_speech.data.batching import Batch
from hmm_speech.errors import UserError
from hmm_speech.optim import EM

CANDIDATES = (1, 3, 7, 15, 30, 60, 120, 250, 500)


class ChoosePseudocount(Callback):
    """Before the first epoch, try pseudocounts in ascending order and keep the one with the fewest bits on valid.

    Each is tried by a few EM iterations from where the model starts; what they did is undone. Two in a row that are
    worse than the best end the search. So one preset serves corpora of any size: where rows of a table were seen
    rarely, more of the prior is wanted. A resumed run takes the choice from its checkpoint.

    Args:
        candidates: pseudocounts, in frames.
        iterations: of EM for each.
    """

    def __init__(self, candidates: Sequence[float] = CANDIDATES, iterations: int = 12) -> None:
        if not candidates or any(not 0 <= c < math.inf for c in candidates):
            raise UserError(f"pseudocount.candidates is {candidates!r}; expected finite numbers of at least 0")
        if iterations < 1:
            raise UserError(f"pseudocount.iterations is {iterations!r}; expected a positive integer")
        self.candidates, self.iterations = sorted(candidates), iterations

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        optimizer = trainer.optimizers[0]
        if not isinstance(optimizer, EM):
            raise UserError("callbacks.pseudocount chooses what optimizer=em adds to its counts; take it out (=null)")
        if trainer.ckpt_path is not None:
            return
        best = 0.0
        if trainer.is_global_zero:
            best = self._search(trainer, pl_module, optimizer)
            logging.getLogger("train").info("pseudocount %g, chosen on the valid split", best)
        best = trainer.strategy.broadcast(best)
        for group in optimizer.param_groups:
            group["pseudocount"] = best

    def _search(self, trainer: Trainer, module: LightningModule, optimizer: EM) -> float:
        train, valid = ([*trainer.datamodule.loader(split, alone=True)] for split in ("train", "valid"))
        start = {name: x.clone() for name, x in module.state_dict().items()}
        best, fewest, worse = self.candidates[0], math.inf, 0
        for candidate in self.candidates:
            for group in optimizer.param_groups:
                group["pseudocount"] = candidate
            for _ in range(self.iterations):
                optimizer.zero_grad()
                for batch in train:
                    (cost(module, batch) / optimizer.param_groups[0]["scale"]).backward()
                optimizer.step()
            with torch.no_grad():
                bits = sum(float(cost(module, batch)) for batch in valid)
            module.load_state_dict(start)
            optimizer.zero_grad()
            optimizer.state.clear()
            worse = worse + 1 if bits >= fewest else 0
            if bits < fewest:
                best, fewest = candidate, bits
            if worse == 2:
                break
        return best


def cost(module: LightningModule, batch: Batch) -> Tensor:
    """-log p(batch) in nats."""
    return -module(batch).log_partition().sum()
