"""p(x_t | z_t) and p(x_t | z_t, x_{t-1}) over discrete units, as tables and as networks over state embeddings.

Shapes: B utterances, T frames, N states, V units.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hmm_speech.nn.blocks import LogTable, StateNetwork
from hmm_speech.nn.topology import Topology

_SAFE = 1e-30  # a sum above this lost at most V * 1e-38 / 1e-30 to underflow, far below float32's rounding


def log_matmul_exp(left_NV: Tensor, right_YV: Tensor) -> Tensor:
    """(N, Y): log sum_v exp(left[n, v] + right[y, v]), as one scaled matrix product.

    Row maxima are taken out first, so every factor lies in (0, 1]. Where a row of ``left`` peaks far from the peaks of
    ``right`` (some 70 nats) the product would underflow; then the sum is taken in log space instead.
    """
    left_max, right_max = left_NV.detach().amax(-1, keepdim=True), right_YV.detach().amax(-1, keepdim=True)
    product = (left_NV - left_max).exp() @ (right_YV - right_max).exp().T
    if product.detach().amin() > _SAFE:
        return product.log() + left_max + right_max.T
    return torch.stack([torch.logsumexp(left_NV + row, -1) for row in right_YV], -1)


class CategoricalEmission(nn.Module):
    """What table and network share; a subclass gives ``logits() -> (N, V)``.

    Without ``last_unit``: log p(x | z) = e[z, x] - logsumexp_x e[z, x].

    With it, the unit before adds its own logits (an autoregressive HMM, Rabiner 1989, section IV-B, over categories):

        log p(x_t | z_t, x_{t-1} = y) = e[z, x] + C[y, x] - logsumexp_x (e[z, x] + C[y, x])

    The normaliser of all (z, y) pairs is one matrix product, exp(e) exp(C)^T, so no N x V x V tensor arises. An
    utterance's first frame has a row of C of its own (the last one).
    """

    def __init__(self, topology: Topology, vocabulary: int, last_unit: bool) -> None:
        super().__init__()
        self.num_states, self.vocabulary = topology.num_states, vocabulary
        self.last_unit = nn.Parameter(torch.zeros(vocabulary + 1, vocabulary)) if last_unit else None

    def logits(self) -> Tensor:
        """(N, V) scores of each unit in each state; log-probabilities where there is no last unit."""
        raise NotImplementedError

    def forward(self, units_BT: Tensor) -> Tensor:
        """(B, T, N) log-probability of each frame's unit in each state."""
        logits_NV = self.logits()
        emission_BTN = F.embedding(units_BT, logits_NV.T)
        if self.last_unit is None:
            return emission_BTN
        last_BT = F.pad(units_BT[:, :-1], (1, 0), value=self.vocabulary)
        normaliser_NY = log_matmul_exp(logits_NV, self.last_unit)
        return emission_BTN + self.last_unit[last_BT, units_BT, None] - F.embedding(last_BT, normaliser_NY.T)

    def conditional(self, last_B: Tensor | None = None) -> Tensor:
        """(B, N, V) log p(x | z, last unit); ``last_B`` holds units, or None for an utterance's first frame (B = 1)."""
        logits_NV = self.logits()
        if self.last_unit is None:
            return logits_NV.log_softmax(-1).expand(1 if last_B is None else len(last_B), -1, -1)
        row = self.last_unit[-1:] if last_B is None else self.last_unit[last_B]
        return (logits_NV + row[:, None]).log_softmax(-1)


class EmissionTable(CategoricalEmission):
    """One free number for each state and unit."""

    def __init__(self, topology: Topology, vocabulary: int, last_unit: bool = False) -> None:
        super().__init__(topology, vocabulary, last_unit)
        self.table = LogTable(topology.num_states, vocabulary)

    def logits(self) -> Tensor:
        return self.table()

    def assign(self, log_probs: Tensor) -> None:
        """Take over (N, V) log-probabilities."""
        self.table.assign(log_probs)


class EmissionNetwork(CategoricalEmission):
    """e[z, x] = (W h_z + b)[x] with h_z from a network over state embeddings."""

    def __init__(
        self,
        topology: Topology,
        vocabulary: int,
        last_unit: bool = False,
        dim: int = 128,
        blocks: int = 5,
        dropout: float = 0.05,
        std: float = 1.0,
    ) -> None:
        super().__init__(topology, vocabulary, last_unit)
        self.network = StateNetwork(topology, dim, blocks, dropout, std)
        self.output = nn.Linear(dim, vocabulary)

    def logits(self) -> Tensor:
        logits = self.output(self.network())
        return logits if self.last_unit is not None else logits.log_softmax(-1)
