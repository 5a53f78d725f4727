"""One sequence through two factors in log space, in float64: exact for any scores. N R exps a half step, no (N, N)."""

from __future__ import annotations

import torch
from torch import Tensor


class Sequence:
    """Messages of sequence b: alpha_t = log a_t (L, N), its maximum 0, half_t = log u_t (L, R), and what centring took
    out, (L,); scores x_t = e_t, with f at the last frame."""

    def __init__(self, initial, factors, emission, lengths, final, b: int):
        self.length = int(lengths[b])
        left, self.right = (factors[b] if factors.dim() == 3 else factors).double().chunk(2)
        self.left = left.T
        self.scores = emission[b, : self.length].to(torch.float64, copy=True)
        if final is not None:
            self.scores[-1] += final[b] if final.dim() == 2 else final
        self.alpha, self.half = torch.empty_like(self.scores), self.scores.new_empty(self.length, self.right.shape[0])
        self.centre = self.scores.new_empty(self.length)
        new = (initial[b] if initial.dim() == 2 else initial).double()
        for t in range(self.length):
            if t:
                self.half[t] = (self.alpha[t - 1].unsqueeze(-1) + self.left).logsumexp(0)
                new = (self.half[t].unsqueeze(-1) + self.right).logsumexp(0)
            new = new + self.scores[t]
            self.centre[t] = new.max()
            if not bool(self.centre[t] > -torch.inf):  # infeasible, or NaN
                self.log_partition = self.mass = self.centre[t]
                return
            self.alpha[t] = new - self.centre[t]
        self.mass = self.alpha[-1].logsumexp(0)
        self.log_partition = self.centre.sum() + self.mass

    def backward(self, grad: float, state: Tensor, edge: Tensor | None) -> None:
        """Writes grad times the posteriors to state (T, N), and adds grad times the counts to edge (2 R, N)."""
        if not bool(self.log_partition.isfinite()):
            fill = torch.nan if bool(self.log_partition.isnan()) else 0
            state[: self.length] = fill
            if edge is not None:
                edge += fill
            return
        beta, rank = torch.zeros_like(self.scores[0]), self.right.shape[0]
        counts = None if edge is None else self.scores.new_zeros(edge.shape)
        for t in reversed(range(self.length)):
            state[t] = grad * (self.alpha[t] + beta).softmax(0)
            if t == 0:
                break
            after = self.scores[t] + beta - self.centre[t]
            classes = (self.right + after).logsumexp(1)
            into = self.left + classes
            if counts is not None:
                counts[:rank] += (self.alpha[t - 1].unsqueeze(-1) + into - self.mass).exp().T
                counts[rank:] += (self.half[t].unsqueeze(-1) + self.right + after - self.mass).exp()
            beta = into.logsumexp(1)
        if counts is not None:
            edge += grad * counts
