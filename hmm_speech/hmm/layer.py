"""A module for those who just want a layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .api import HMM


class HMMLayer(nn.Module):
    r"""Initial and transition parameters of a chain of N states; called with emission scores it gives an :class:`HMM`.

    Args:
        num_states: N.
        normalised: take the parameters through a log-softmax, so that they are log-probabilities (a hidden Markov
            model, if the emission scores are log-likelihoods); False leaves them free potentials (a linear-chain CRF).

    Parameters start at N(0, 0.1^2).

    >>> import torch
    >>> from hmm_speech.hmm import HMMLayer
    >>> layer = HMMLayer(4)
    >>> emission = torch.zeros(2, 5, 4)
    >>> layer(emission, torch.tensor([5, 3])).log_partition().detach().round(decimals=4) + 0
    tensor([0., 0.])
    """

    def __init__(self, num_states: int, normalised: bool = True) -> None:
        super().__init__()
        if isinstance(num_states, bool) or not isinstance(num_states, int) or num_states < 1:
            raise ValueError(f"num_states: got {num_states!r}, expected an integer of at least 1")
        self.num_states, self.normalised = num_states, normalised
        self.initial = nn.Parameter(0.1 * torch.randn(num_states))
        self.transition = nn.Parameter(0.1 * torch.randn(num_states, num_states))

    def forward(self, emission: Tensor, lengths: Tensor | None = None) -> HMM:
        """The chain for emission scores (B, T, N) and lengths (B,)."""
        if self.normalised:
            return HMM(self.initial.log_softmax(-1), self.transition.log_softmax(-1), emission, lengths)
        return HMM(self.initial, self.transition, emission, lengths)

    def extra_repr(self) -> str:
        return f"{self.num_states}, normalised={self.normalised}"
