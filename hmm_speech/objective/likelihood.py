"""The exact negative log-likelihood and its relatives; each (B,) in nats, from a model and a batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hmm_speech.errors import UserError
from hmm_speech.hmm import HMM
from hmm_speech.nn.blocks import LogTable
from hmm_speech.nn.composition import Chain, Composition
from hmm_speech.nn.topology import ClonedTopology


class Likelihood(nn.Module):
    """-log p(x), and what regularises it.

    Args:
        parts: the model that is trained.
        pseudocount: a Dirichlet prior on every table of log-probabilities theta, -pseudocount * sum log theta, in
            frames: MAP estimation, by gradients what ``optimizer.pseudocount`` is for EM. Spread over the epoch's
            frames, so that it is added once an epoch.
        stickiness: the same for staying alone, -stickiness * sum_i log p(z_t = i | z_{t-1} = i), in frames (the sticky
            prior of Fox et al. 2008); for transitions that are a matrix.
    """

    def __init__(self, parts: Composition, pseudocount: float = 0.0, stickiness: float = 0.0) -> None:
        super().__init__()
        for name, value in (("pseudocount", pseudocount), ("stickiness", stickiness)):
            if not 0 <= value < float("inf"):
                raise UserError(f"objective.{name} is {value!r}; expected a finite number of at least 0")
        self.pseudocount, self.stickiness = pseudocount, stickiness

    def forward(self, model: Any, batch: Any) -> Tensor:
        """(B,) nats."""
        hmm = self.chain(model, batch)
        loss_B = self.cost(model, hmm)
        if self.pseudocount or self.stickiness:
            loss_B = loss_B - self.log_prior(model, hmm) * batch.lengths / model.frames_per_epoch
        return loss_B

    def chain(self, model: Any, batch: Any) -> HMM | Chain:
        """The chain whose paths are summed."""
        return model(batch)

    def cost(self, model: Any, hmm: HMM | Chain) -> Tensor:
        """(B,) nats: what the data cost."""
        return -hmm.log_partition()

    def log_prior(self, model: Any, hmm: HMM | Chain) -> Tensor:
        """The logarithm of the prior but for a constant, in nats."""
        found = torch.zeros((), device=hmm.lengths.device)
        for table in _tables(model) if self.pseudocount else ():
            log_probs = table()
            found = found + self.pseudocount * log_probs[log_probs > -torch.inf].sum()
        if self.stickiness:
            matrix = getattr(hmm, "transition", None)
            if not isinstance(matrix, Tensor) or matrix.dim() != 2:
                raise UserError(
                    "objective.stickiness needs a transition matrix: transition=table or transition=network"
                )
            found = found + self.stickiness * matrix.log_softmax(-1).diagonal().sum()
        return found


class Viterbi(Likelihood):
    """-max_z log p(x, z): hard EM ("Viterbi training", Juang and Rabiner 1990) with optimizer=em, its gradient else."""

    def cost(self, model: Any, hmm: HMM | Chain) -> Tensor:
        return -hmm.viterbi().score


class SemiSupervised(Likelihood):
    """-log p(x, z in the permitted states): label l is phone l; frames whose phone is known permit no other.

    The phones come with ``data.phones``, the share of training utterances whose phones are shown. All others are summed
    over freely. A frame outside every phone permits any state.
    """

    def __init__(self, parts: Composition, **regularisers: float) -> None:
        super().__init__(parts, **regularisers)
        if isinstance(parts.topology, ClonedTopology):
            raise UserError(
                "objective=semi_supervised: each state of topology=cloned emits one unit, so no label can stand for a "
                "phone; take topology=full or topology=chain"
            )
        label_N = parts.topology.label_of(torch.arange(parts.topology.num_states))
        self.register_buffer("label_N", label_N, persistent=False)

    def chain(self, model: Any, batch: Any) -> HMM:
        hmm = model(batch)
        if batch.phones is None:
            return hmm
        plain_chain(hmm, "objective=semi_supervised")
        if (most := int(batch.phones.max())) > int(self.label_N.max()):
            raise UserError(
                f"objective=semi_supervised: the corpus has a phone number {most}, but the topology's labels end at "
                f"{int(self.label_N.max())}; every phone needs a label, so raise topology.labels"
            )
        permitted_BTN = (batch.phones[..., None] == self.label_N) | (batch.phones < 0)[..., None]
        emission_BTN = hmm.emission.masked_fill(~permitted_BTN, -torch.inf)
        return HMM(hmm.initial, hmm.transition, emission_BTN, hmm.lengths)


def _tables(model: nn.Module) -> Iterator[LogTable]:
    return (module for module in model.modules() if isinstance(module, LogTable))


def plain_chain(chain: HMM | Chain, where: str) -> HMM:
    """The chain, if it is one of single frames; a UserError otherwise."""
    if not isinstance(chain, HMM):
        raise UserError(f"{where} needs a chain of single frames over all states; not transition=semi_markov or cloned")
    return chain
