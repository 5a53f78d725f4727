"""A loss that is not finite is told at once, with the utterance that has it."""

from __future__ import annotations

from torch import Tensor

from hmm_speech.data.unitfile import UnitCorpus
from hmm_speech.errors import UserError


def check_finite(loss_B: Tensor, index_B: Tensor, corpus: UnitCorpus) -> None:
    """Raise a UserError that names training utterances of a batch whose loss is infinite or NaN."""
    if loss_B.sum().isfinite():
        return
    utterances = corpus.split("train")
    names = ", ".join(repr(utterances[k].id) for k in index_B[~loss_B.isfinite()].tolist()[:3])
    raise UserError(
        f"training: the loss of utterance {names} is not finite: no path of states can make it (forbidden arcs, or "
        "known phones shorter than their labels' chains), or training diverged. Allow more arcs "
        "(topology.substates=1), or lower optimizer.lr; the last checkpoint is that of the epoch before"
    )
