"""Deterministic annealing of the negative log-likelihood."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hmm_speech.errors import UserError
from hmm_speech.hmm import HMM
from hmm_speech.nn.composition import Chain, Composition
from hmm_speech.objective.likelihood import Likelihood, plain_chain


class Annealed(Likelihood):
    r"""-log p(x) at a temperature that falls to 1: :math:`-\tau \log \sum_z p(x, z)^{1 / \tau}`.

    That is the least of E_q[-log p(x, z)] - tau H(q) over distributions q of paths: their entropy counts tau-fold. The
    free energy of deterministic annealing (Ueda and Nakano 1998, eq. 12, with beta = 1 / tau). Its gradients are
    expected counts under p(z | x)^(1 / tau), so that optimizer=em takes its M-steps as ever. While the temperature is
    high, paths are hardly decided, and where training started matters less.

    Args:
        parts: the model that is trained.
        temperature: tau at the start, at least 1; it falls by an equal factor in each epoch.
        until: share of training after which it is 1.
        regularisers: of :class:`Likelihood`.
    """

    def __init__(
        self, parts: Composition, temperature: float = 10.0, until: float = 0.5, **regularisers: float
    ) -> None:
        super().__init__(parts, **regularisers)
        if not 1 <= temperature < float("inf"):
            raise UserError(f"objective.temperature is {temperature!r}; expected a finite number of at least 1")
        if not 0 < until <= 1:
            raise UserError(f"objective.until is {until!r}; expected a share of training, more than 0 and at most 1")
        self.temperature, self.until = temperature, until

    def cost(self, model: Any, hmm: HMM | Chain) -> Tensor:
        now = self.temperature ** max(0.0, 1 - model.progress / self.until)
        if now == 1:
            return super().cost(model, hmm)
        return -plain_chain(hmm, "objective=annealed").smooth_viterbi(now)
