"""Transitions whose scores a context shifts, kept as one shared matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hmm_speech.hmm import HMM, Active, LowRank
from hmm_speech.hmm.products import log_matmul_exp
from hmm_speech.nn.low_rank import LowRankHMM


class Drift(NamedTuple):
    r"""p(z_t = j | z_{t-1} = i, h_t) = softmax_j(A[i, j] + d[t, j]), with a matrix A and a context's drift d.

    The normaliser of state i at time t, :math:`c_t(i) = \log \sum_j \exp(A[i, j] + d_t(j))`, belongs to the frame that
    is left. So the chain is one with the shared transition A and, for each frame, a potential in addition to its
    emission (B, T, N):

    .. math:: d_t(z) - c_{t+1}(z), \quad d_1(z) - c_2(z) - \log \sum_j \exp(\mathrm{initial}(j) + d_1(j)).

    All normalisers are one product of exp(d) (B T, N) and exp(A)^T (N, N); no (B, T, N, N) arises. A sequence's last
    frame has no successor, and so no c. A may be a ``LowRank``; then there are two products, with its factors.
    """

    matrix_NN: Tensor | LowRank
    drift_BTN: Tensor

    def potential(self, initial_N: Tensor, lengths_B: Tensor) -> Tensor:
        """(B, T, N): what the emission gets in addition; ``initial_N`` are log-probabilities."""
        drift_BTN = self.drift_BTN
        if not drift_BTN.shape[1]:
            return drift_BTN
        normaliser_BTN = self.normalisers(drift_BTN[:, 1:])
        follows_BT = torch.arange(1, drift_BTN.shape[1], device=lengths_B.device) < lengths_B[:, None]
        normaliser_BTN = torch.where(follows_BT[..., None], normaliser_BTN, 0)
        start_B = torch.logsumexp(initial_N + drift_BTN[:, 0], -1)
        potential_BTN = drift_BTN - F.pad(normaliser_BTN, (0, 0, 0, 1))
        return torch.cat([potential_BTN[:, :1] - start_B[:, None, None], potential_BTN[:, 1:]], 1)

    def normalisers(self, drift_BTN: Tensor) -> Tensor:
        """(B, T, N): log sum_j exp(A[i, j] + d_t(j))."""
        if isinstance(self.matrix_NN, LowRank):
            return log_matmul_exp(log_matmul_exp(drift_BTN, self.matrix_NN.right), self.matrix_NN.left)
        return log_matmul_exp(drift_BTN, self.matrix_NN)

    def chain(self, initial_N: Tensor, emission: Tensor | Active, lengths_B: Tensor) -> HMM | LowRankHMM:
        """The chain of a batch."""
        potential_BTN = self.potential(initial_N, lengths_B)
        if isinstance(emission, Active):
            at_BTK = potential_BTN.gather(2, emission.states.clamp(min=0))
            emission = Active(emission.states, emission.scores + torch.where(emission.states < 0, 0, at_BTK))
        else:
            emission = emission + potential_BTN
        kind = LowRankHMM if isinstance(self.matrix_NN, LowRank) else HMM
        return kind(initial_N, self.matrix_NN, emission, lengths_B)

    def following(self, initial_N: Tensor, states_BT: Tensor) -> Tensor:
        """(B, N) log p(z_t | z_{t-1}, h_t) at the drift's last frame, after states of which there may be none."""
        if not states_BT.shape[1]:
            before = initial_N
        elif isinstance(self.matrix_NN, LowRank):
            before = log_matmul_exp(self.matrix_NN.left[states_BT[:, -1]], self.matrix_NN.right.T)
        else:
            before = self.matrix_NN[states_BT[:, -1]]
        return (before + self.drift_BTN[:, -1]).log_softmax(-1)
