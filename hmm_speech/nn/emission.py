"""p(x_t | z_t) and p(x_t | z_t, x_{t-1}) over discrete units: tables, networks over state embeddings, cloned states.

Shapes: B utterances, T frames, N states, V units.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hmm_speech.errors import UserError
from hmm_speech.hmm import Active
from hmm_speech.hmm.products import log_matmul_exp
from hmm_speech.nn.blocks import LogTable, StateNetwork
from hmm_speech.nn.topology import AnyTopology, ClonedTopology


class CategoricalEmission(nn.Module):
    """What table and network share; a subclass gives ``logits() -> (N, V)``.

    Without ``last_unit``: log p(x | z) = e[z, x] - logsumexp_x e[z, x].

    With it, the unit before adds its own logits (an autoregressive HMM, Rabiner 1989, section IV-B, over categories):

        log p(x_t | z_t, x_{t-1} = y) = e[z, x] + C[y, x] - logsumexp_x (e[z, x] + C[y, x])

    The normaliser of all (z, y) pairs is one matrix product, exp(e) exp(C)^T, so no N x V x V tensor arises. An
    utterance's first frame has a row of C of its own (the last one).
    """

    observes = "units"

    def __init__(self, topology: AnyTopology, vocabulary: int, last_unit: bool) -> None:
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

    def predict(self, states_B: Tensor, past_BT: Tensor) -> Tensor:
        """(B, V) log p(x_t | z_t = states, past): ``past_BT`` holds the units before t, of which there may be none."""
        logits_BV = self.logits()[states_B]
        if self.last_unit is not None:
            logits_BV = logits_BV + self.last_unit[past_BT[:, -1] if past_BT.shape[1] else -1]
        return logits_BV.log_softmax(-1)


class EmissionTable(CategoricalEmission):
    """One free number for each state and unit."""

    def __init__(self, topology: AnyTopology, vocabulary: int, last_unit: bool = False) -> None:
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
        topology: AnyTopology,
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


class ClonedEmission(nn.Module):
    """Every state emits its unit with probability 1: log p(x | z) is 0 for the clones of x and -inf for all others.

    So a frame has but few active states, and :class:`hmm_speech.hmm.Active` leaves the others out: a frame costs the
    product of two units' numbers of clones, in place of N^2. There is nothing to train.
    """

    observes = "units"

    def __init__(self, topology: AnyTopology, vocabulary: int) -> None:
        super().__init__()
        if not isinstance(topology, ClonedTopology):
            raise UserError(f"emission=cloned needs topology=cloned, but the topology has {topology}")
        self.vocabulary, self.num_states = vocabulary, topology.num_states
        if len(topology.clones) != vocabulary:
            raise UserError(f"topology.clones has {len(topology.clones)} entries, the vocabulary {vocabulary} units")
        unit, clone = topology.factors()
        slots_VK = torch.full((vocabulary, max(topology.clones)), -1)
        slots_VK[unit, clone] = torch.arange(self.num_states)
        self.register_buffer("slots_VK", slots_VK, persistent=False)
        self.register_buffer("unit_N", unit, persistent=False)

    def forward(self, units_BT: Tensor) -> Active:
        """The clones of each frame's unit, with scores of 0."""
        states_BTK = self.slots_VK[units_BT]
        return Active(states_BTK, torch.zeros_like(states_BTK, dtype=torch.get_default_dtype()))

    def predict(self, states_B: Tensor, past_BT: Tensor) -> Tensor:
        """(B, V): 0 at the unit of each state, -inf elsewhere."""
        return F.one_hot(self.unit_N[states_B], self.vocabulary).float().log()
