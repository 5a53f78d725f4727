"""Co-training: a variational bound on the likelihood, with a second view of each frame as the posterior.

Yeh and Tang 2022, "Autoregressive Co-Training for Learning Discrete Speech Representations", arXiv:2203.15840; for
Markov states as in Yeh and Tang 2022, "Learning Dependencies of Discrete Speech Representations with Neural Hidden
Markov Models", arXiv:2210.16659.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hmm_speech.errors import UserError
from hmm_speech.hmm import HMM, Banded, Chunked
from hmm_speech.nn.composition import Composition, observed, reads_frames, score_parts
from hmm_speech.objective.likelihood import plain_chain


class CoTraining(nn.Module):
    r"""An upper bound on -log p(x), from a guess q(z_t | x_t) at each state from its own frame (B,), in nats:

    .. math:: E_q[-\log p(x | z)] + E_q[-\log p(z)] - H(q)

    reconstruction, cross-entropy between what the frame and what the past says of the state, and entropy. As q is
    independent over frames, E_q[log p(z_t | z_{t-1})] is q_{t-1}^T A_t q_t: no recursion, one product with A. The gap
    to -log p(x) is KL(q || p(z | x)), which is 0 where q is the posterior.

    Args:
        parts: the model that is trained.
        dim: width of a network of one hidden layer that guesses the state from the frame, trained with the model; None:
            q(z | x) is proportional to p(x | z), which for ``gaussian`` emissions with ``unit`` or ``spherical``
            covariance is the softmax of negative squared distances to the codes.
        temperature: None: expectations are exact. A number: each state is drawn from q by Gumbel-softmax of that
            temperature, straight through (Jang et al. 2017, arXiv:1611.01144), as unbiased an estimate.

    Raises:
        UserError: the topology forbids arcs or starts, which q would go through all the same, or an emission is over
            some states only.
    """

    def __init__(self, parts: Composition, dim: int | None = None, temperature: float | None = None) -> None:
        super().__init__()
        topology = parts.topology
        if not topology.is_full:
            raise UserError(
                f"objective=co_training: the topology, {topology}, forbids arcs, but the guess at a state knows "
                "nothing of the one before; take topology=full"
            )
        check_temperature(temperature, optional=True)
        self.temperature = temperature
        self.network = None if dim is None else _network(parts, dim)

    def forward(self, model: Any, batch: Any) -> Tensor:
        """(B,) nats."""
        scores = score_parts(model, batch)
        hmm = plain_chain(scores.chain(batch.lengths), "objective=co_training")
        if not isinstance(scores.emission, Tensor):
            raise UserError("objective=co_training needs an emission over all states; emission=cloned has few a frame")
        if isinstance(scores.transition, Banded):
            raise UserError(
                "objective=co_training: transition=banded forbids arcs, but the guess at a state knows nothing of the "
                "one before; take transition=table or transition=network"
            )
        log_q_BTN = self.guess(model, batch, scores.emission)
        weight_BTN = self._weights(log_q_BTN)
        inside_BT = torch.arange(log_q_BTN.shape[1], device=log_q_BTN.device) < batch.lengths[:, None]
        entropy_BT = -(log_q_BTN.exp() * log_q_BTN).sum(-1)
        entropy_B = torch.where(inside_BT, entropy_BT, 0).sum(-1)
        return -expected_score(hmm, weight_BTN) - entropy_B

    def guess(self, model: Any, batch: Any, emission_BTN: Tensor) -> Tensor:
        """(B, T, N) log q(z_t | x_t)."""
        if self.network is None:
            return emission_BTN.log_softmax(-1)
        return self.network(observed(model.emission, batch)).log_softmax(-1)

    def _weights(self, log_q_BTN: Tensor) -> Tensor:
        if self.temperature is None:
            return log_q_BTN.exp()
        return F.gumbel_softmax(log_q_BTN, self.temperature, hard=True)


def expected_score(hmm: HMM, weight_BTN: Tensor) -> Tensor:
    r"""(B,): E[log p(z, x)] where state z_t has probability w_t, independently of all others.

    .. math:: w_1 \cdot \pi + \sum_t w_t \cdot e_t + \sum_{t \ge 2} w_{t-1}^T A_t w_t

    With one-hot rows it is the score of a path, linear in each row.
    """
    inside_BT = torch.arange(weight_BTN.shape[1], device=weight_BTN.device) < hmm.lengths[:, None]
    weight_BTN = weight_BTN * inside_BT[..., None]
    first = (weight_BTN[:, :1] * hmm.initial).sum((1, 2))
    return first + (weight_BTN * hmm.emission).sum((1, 2)) + _expected_arcs(hmm.transition, weight_BTN)


def _expected_arcs(transition: Any, weight_BTN: Tensor) -> Tensor:
    """(B,): sum over t of w_{t-1}^T A_t w_t."""
    left_BTN, right_BTN = weight_BTN[:, :-1], weight_BTN[:, 1:]
    if isinstance(transition, Chunked):
        parts = [
            torch.einsum("bti,btij,btj->b", left_BTN[:, a:b], transition.function(a, b), right_BTN[:, a:b])
            for a, b in transition.spans(weight_BTN.shape[1])
        ]
        return sum(parts, weight_BTN.new_zeros(len(weight_BTN)))
    arcs = transition if isinstance(transition, Tensor) else transition.dense()
    if arcs.dim() == 4:
        return torch.einsum("bti,btij,btj->b", left_BTN, arcs, right_BTN)
    return ((left_BTN @ arcs) * right_BTN).sum((1, 2))


def check_temperature(value: float | None, *, optional: bool = False) -> None:
    """Raise a UserError for a temperature that is not positive."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise UserError(
            f"objective.temperature is {value!r}; expected a positive number{', or null' if optional else ''}"
        )


def _network(parts: Composition, dim: int) -> nn.Module:
    """(B, T, N) scores from units (B, T) or frames (B, T, D)."""
    if not isinstance(dim, int) or isinstance(dim, bool) or dim < 1:
        raise UserError(f"objective.dim is {dim!r}; expected a positive integer, or null")
    emission = parts.emission
    read = nn.Linear(emission.dimension, dim) if reads_frames(emission) else nn.Embedding(emission.vocabulary, dim)
    return nn.Sequential(read, nn.ReLU(), nn.Linear(dim, parts.topology.num_states))
