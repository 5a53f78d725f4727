"""What emissions over frames share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hmm_speech.errors import UserError
from hmm_speech.nn.topology import AnyTopology


class FrameEmission(nn.Module):
    """log p(x_t | z_t) of frames (B, T, D), float; a subclass gives ``scores`` and ``draw``.

    Raises:
        UserError: frames of another dimension than D.
    """

    observes = "frames"

    def __init__(self, topology: AnyTopology, dimension: int) -> None:
        super().__init__()
        self.num_states, self.dimension = topology.num_states, dimension

    def forward(self, frames_BTD: Tensor) -> Tensor:
        """(B, T, N) log-probabilities or log-densities, in nats."""
        if frames_BTD.shape[-1] != self.dimension:
            raise UserError(
                f"frames: each has {frames_BTD.shape[-1]} numbers, the emission was made for {self.dimension}; give a "
                "unit file with the features that the model was trained on (hmm-speech units --keep-frames)"
            )
        return self.scores(frames_BTD)

    def scores(self, frames_BTD: Tensor) -> Tensor:
        """(B, T, N) of frames whose dimension was checked."""
        raise NotImplementedError

    def draw(self, states_B: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A frame from each state's distribution: (B,) -> (B, D)."""
        raise NotImplementedError

    def standardise(self, frames_FD: Tensor) -> None:
        """Learn units of measurement from all frames of the training split; by default there is nothing to learn."""

    def points(self, frames_FD: Tensor) -> Tensor:
        """(F, E): where squared distances between frames mean something, for k-means."""
        raise NotImplementedError
