"""What emission and transition networks share: log-probability tables, state embeddings, residual blocks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hmm_speech.nn.topology import AnyTopology


class LogTable(nn.Module):
    """A trainable table of log-probabilities, normalised along the last dimension; forbidden entries are -inf.

    For gradient optimizers the parameter holds logits and ``forward`` applies log_softmax. For EM
    (:class:`hmm_speech.optim.EM`) ``counting`` is set and ``forward`` returns the parameter itself, so that its
    gradient is minus the expected counts. The parameter starts out normalised, hence both agree.
    """

    def __init__(self, *shape: int, allowed: Tensor | None = None, std: float = 0.1) -> None:
        super().__init__()
        logits = torch.randn(shape) * std
        if allowed is not None:
            logits = logits.masked_fill(~allowed, float("-inf"))
        self.logits = nn.Parameter(logits.log_softmax(-1))
        self.counting = False
        self.register_buffer("prior", None, persistent=False)
        """Probabilities of the same shape that MAP estimation draws the table to; None: all alike."""

    def forward(self) -> Tensor:
        return self.logits if self.counting else self.logits.log_softmax(-1)

    @torch.no_grad()
    def assign(self, log_probs: Tensor) -> None:
        """Take over a table of log-probabilities of the same shape."""
        self.logits.copy_(log_probs)


def count(module: nn.Module, value: bool) -> None:
    """Have every table and every exponential family in a module give their gradients as expected counts, or not."""
    for part in module.modules():
        if hasattr(part, "counting"):
            part.counting = value


def with_priors(module: nn.Module, parameters: Iterable[nn.Parameter]) -> list[tuple[nn.Parameter, Tensor | None]]:
    """Each parameter with the prior of the table that it belongs to, if any."""
    priors = {part.logits: part.prior for part in module.modules() if isinstance(part, LogTable)}
    return [(parameter, priors.get(parameter)) for parameter in parameters]


class StateEmbedding(nn.Module):
    """(N, dim): the sum of two vectors, of a state's label (or unit) and of its substate (or clone), from N(0, std^2).

    A standard deviation of 1 lets states differ from the start; with 0.3 they stay near one another and the fit is
    measurably worse.
    """

    def __init__(self, topology: AnyTopology, dim: int, std: float = 1.0) -> None:
        super().__init__()
        first, second = topology.factors()
        self.register_buffer("first", first, persistent=False)
        self.register_buffer("second", second, persistent=False)
        self.label = nn.Parameter(torch.randn(int(first.max()) + 1, dim) * std)
        self.substate = nn.Parameter(torch.randn(int(second.max()) + 1, dim) * std)

    def forward(self) -> Tensor:
        return self.label[self.first] + self.substate[self.second]


class ResidualBlock(nn.Module):
    """x + W2 dropout(relu(W1 layernorm(x))): a pre-norm residual block, ``(*, dim) -> (*, dim)``."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.inner = nn.Linear(dim, dim)
        self.outer = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(F.relu(self.inner(self.norm(x))))
        return x + self.outer(hidden)


class StateNetwork(nn.Module):
    """(N, dim): state embeddings through ``blocks`` residual blocks and a final layer norm."""

    def __init__(self, topology: AnyTopology, dim: int, blocks: int, dropout: float, std: float) -> None:
        super().__init__()
        self.embedding = StateEmbedding(topology, dim, std)
        self.blocks = nn.Sequential(*(ResidualBlock(dim, dropout) for _ in range(blocks)))
        self.norm = nn.LayerNorm(dim)

    def forward(self) -> Tensor:
        return self.norm(self.blocks(self.embedding()))


class StateScores(nn.Module):
    """(N, M) scores, one row a state: a free table, or U n_z + b with n_z from a network over state embeddings.

    Args:
        outputs: M.
        dim: width of the network; None for a table, drawn from N(0, 0.1^2).
        blocks, dropout, std: of the network, see :class:`StateNetwork`.
    """

    def __init__(
        self,
        topology: AnyTopology,
        outputs: int,
        dim: int | None = 128,
        blocks: int = 2,
        dropout: float = 0.05,
        std: float = 1.0,
    ) -> None:
        super().__init__()
        if dim is None:
            self.table = nn.Parameter(torch.randn(topology.num_states, outputs) * 0.1)
        else:
            self.network = StateNetwork(topology, dim, blocks, dropout, std)
            self.output = nn.Linear(dim, outputs)

    def forward(self) -> Tensor:
        return self.table if hasattr(self, "table") else self.output(self.network())


class ArcScores(StateScores):
    """(N, N) :class:`StateScores` of arcs i -> j, -inf where ``forbidden`` (N, N) says so."""

    def __init__(self, topology: AnyTopology, forbidden: Tensor, **network: Any) -> None:
        super().__init__(topology, topology.num_states, **network)
        self.register_buffer("forbidden", forbidden, persistent=False)

    def forward(self) -> Tensor:
        return super().forward().masked_fill(self.forbidden, -torch.inf)
