"""Exact expectation-maximisation as a torch optimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hmm_speech.errors import UserError

_TOLERANCE = 1e-3


class Statistics(nn.Parameter):
    """A shift of natural parameters that is always 0, so that its gradient is minus the expected sufficient statistics.

    What a table of log-probabilities is to :class:`EM`, for any exponential family p(x | z) = exp(eta . t(x) - A(eta)):
    d log p(x) / d eta = sum_z p(z | x) t(x). A part that is used with eta + statistics is given them by the M-step.

    Args:
        size: how many numbers, in one row.
        maximise: called by EM with (expected statistics, pseudocount, lr); sets the part's own parameters.
    """

    maximise: Callable[[Tensor, float, float], None]

    def __new__(cls, size: int, maximise: Callable[[Tensor, float, float], None]) -> Statistics:
        found = super().__new__(cls, torch.zeros(size), requires_grad=False)
        found.maximise = maximise
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> Statistics:
        found = Statistics(len(self), copy.deepcopy(self.maximise, memo))  # of the copied part, not of this one
        found.data = self.data.clone()
        return found.requires_grad_(self.requires_grad)


class EM(Optimizer):
    """The M-step of Baum-Welch, from gradients that backpropagation left in log-probability tables.

    Why it is exact. For a model p(x) = sum_z prod_k theta_k^{n_k(x, z)} over events k (a start, a transition, an
    emission), the derivative of the log-likelihood with respect to a log-probability is the expected count that the
    E-step wants:

        d log p(x) / d log theta_k = sum_z p(z | x) n_k(x, z) = E[n_k | x]

    (Salakhutdinov, Roweis and Ghahramani 2003, eq. 5; Eisner 2016, section 4: the backward pass is the E-step). The
    M-step (Dempster, Laird and Rubin 1977) makes each distribution proportional to its expected counts:

        theta_k <- (E[n_k] + pseudocount) / sum over k' of the same distribution of (E[n_k'] + pseudocount)

    So each parameter must be used as it is, as a table of log-probabilities normalised along its last dimension
    (``LogTable`` with ``counting`` set), and the loss be the negative log-likelihood times any positive constant.
    Counts add up over accumulated batches, and DDP's average is their sum but for a constant, so automatic
    optimisation, gradient accumulation and checkpoints work as with any optimizer. One step after all batches is
    EM; the likelihood never falls (with a pseudocount, the likelihood times its Dirichlet prior). Entries of -inf
    have no counts and stay; a distribution that was never used keeps its values. What is no table, such as a Gaussian,
    gives its :class:`Statistics` instead and has an M-step of its own.

    Args:
        params: tables of log-probabilities and statistics, or parameter groups of them.
        pseudocount: in frames. A parameter group with a ``prior``, probabilities of its parameters' shape, adds
            pseudocount * prior to the counts: MAP estimation, drawn to the prior as by that many frames in each row.
            Without one, the pseudocount is added to each entry that is not -inf.
        scale: what the gradients must be multiplied with to be minus the counts, in frames: the loss' divisor.
            Matters only together with a pseudocount.
        lr: 1 is EM; below, the probabilities move that part of the way.
        stepwise: for a step after each mini-batch, the exponent of its weight, more than 0.5 and at most 1: counts are
            a running average, s <- (1 - eta) s + eta counts with eta = (k + 2)^-stepwise in step k = 0, 1, ... (Cappe
            and Moulines 2009; Liang and Klein 2009, section 3). ``scale`` then turns a gradient into the counts of a
            whole epoch. None: a step after all batches.

    Raises:
        UserError: a parameter is not a table of log-probabilities, or its gradient is not made of counts.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        pseudocount: float = 0.0,
        scale: float = 1.0,
        lr: float = 1.0,
        stepwise: float | None = None,
    ) -> None:
        if not 0 <= pseudocount < float("inf"):
            raise UserError(f"EM: pseudocount is {pseudocount}; expected a finite number of at least 0")
        if not 0 < lr <= 1:
            raise UserError(f"EM: lr is {lr}; expected more than 0 and at most 1, and 1 for exact EM")
        if stepwise is not None and not 0.5 < stepwise <= 1:
            raise UserError(f"EM: stepwise is {stepwise}; expected more than 0.5, at most 1, or null")
        defaults = {"lr": lr, "pseudocount": pseudocount, "scale": scale, "stepwise": stepwise, "prior": None}
        super().__init__(params, defaults)
        for group in self.param_groups:
            for parameter in group["params"]:
                if not isinstance(parameter, Statistics):
                    _check_table(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One M-step; with a closure, after calling it (the E-step)."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                counts = parameter.grad * -group["scale"]
                if group["stepwise"] is not None:
                    counts = self._averaged(parameter, counts, group["stepwise"])
                if isinstance(parameter, Statistics):
                    parameter.maximise(counts, group["pseudocount"], group["lr"])
                else:
                    _maximise(parameter, counts, group)
        return loss

    def _averaged(self, parameter: Tensor, counts: Tensor, stepwise: float) -> Tensor:
        """The running average of counts, which this step moves."""
        state = self.state[parameter]
        step = state.get("step", 0)
        if step == 0:  # nothing to average with
            state["counts"] = counts.clone()
        else:
            state["counts"].lerp_(counts, (step + 2) ** -stepwise)
        state["step"] = step + 1
        return state["counts"]


def _check_table(parameter: Tensor) -> None:
    total = torch.logsumexp(parameter.detach().double(), -1) if parameter.dim() else parameter.new_ones(())
    if not torch.all(total.abs() < _TOLERANCE):
        raise UserError(
            f"EM trains tables of log-probabilities, but a parameter of shape {tuple(parameter.shape)} is none: its "
            "last dimension does not sum to 1. Use emission=table (or gaussian, soft, product), transition=table and "
            "initial=table with optimizer=em, or a gradient optimizer (optimizer=adamw)"
        )


def _maximise(parameter: Tensor, counts: Tensor, group: dict[str, Any]) -> None:
    if counts.min() < -_TOLERANCE * counts.abs().max():
        raise UserError(
            f"EM: the gradient of a parameter of shape {tuple(parameter.shape)} has both signs, so it is not made of "
            "expected counts. Pass the table to the HMM as it is, without log_softmax, and minimise the negative "
            "log-likelihood alone, without regularisers"
        )
    prior = (parameter > -torch.inf) if group["prior"] is None else group["prior"].to(parameter)
    counts = counts.clamp(min=0) + group["pseudocount"] * prior
    total = counts.sum(-1, keepdim=True)
    updated = counts.log() - total.log()
    if group["lr"] != 1:
        updated = ((1 - group["lr"]) * parameter.exp() + group["lr"] * updated.exp()).log()
    parameter.copy_(torch.where(total > 0, updated, parameter))
