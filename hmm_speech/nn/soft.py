"""p(x_t | z_t) where a frame holds more than one unit: a distribution over units, or a code from each codebook.

Shapes: B utterances, T frames, N states, V units, Q codebooks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hmm_speech.errors import UserError
from hmm_speech.nn.blocks import LogTable
from hmm_speech.nn.frames import FrameEmission
from hmm_speech.nn.topology import AnyTopology

_TOLERANCE = 1e-3  # of a distribution's sum: what rounding to half precision may leave


class SoftEmission(FrameEmission):
    """Frames hold a distribution s over V units each: log p(s | z) = sum_v s_v log p(v | z).

    The expected log-probability of a unit drawn from s, and the table's own log-probability where s is one unit. Frames
    of zeros, which pad a batch, have log-probability 0.

    Raises:
        UserError: frames that are no distributions.
    """

    def __init__(self, topology: AnyTopology, dimension: int) -> None:
        super().__init__(topology, dimension)
        self.table = LogTable(self.num_states, dimension)

    def scores(self, frames_BTV: Tensor) -> Tensor:
        self._check(frames_BTV)
        return frames_BTV @ self.table().T

    def points(self, frames_FV: Tensor) -> Tensor:
        """Square roots of the distributions, so that distances are Hellinger's."""
        self._check(frames_FV)
        return frames_FV.sqrt()

    def _check(self, frames: Tensor) -> None:
        total = frames.sum(-1)
        wrong = ~((frames >= 0).all(-1) & ((total - 1).abs().minimum(total.abs()) <= _TOLERANCE))
        if wrong.any():
            raise UserError(
                f"frames: {int(wrong.sum())} of {wrong.numel()} are no distributions over {self.dimension} units; "
                "expected numbers of at least 0 with a sum of 1 in every frame (emission=gaussian takes any frames)"
            )

    @torch.no_grad()
    def draw(self, states_B: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One unit from each state, as a distribution with all its mass on it: (B,) -> (B, V)."""
        units = torch.multinomial(self.table().exp()[states_B], 1, generator=generator).squeeze(-1)
        return F.one_hot(units, self.dimension).to(self.table.logits.dtype)


class ProductEmission(FrameEmission):
    """Frames hold the indices c_1 .. c_Q of a residual quantizer: log p(c | z) = sum_q log p(c_q | z).

    Given the state, codebooks are independent of each other. Indices come as numbers with a fraction of 0, since frames
    are float.

    Args:
        dimension: Q.
        codebooks: the size of each codebook.

    Raises:
        UserError: there are not Q sizes, or a frame holds something else than an index into each codebook.
    """

    def __init__(self, topology: AnyTopology, dimension: int, codebooks: Sequence[int] | None = None) -> None:
        super().__init__(topology, dimension)
        sizes = list(codebooks or ())
        if not sizes or not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes):
            raise UserError(
                f"emission.codebooks is {codebooks}; expected the size of each codebook: emission.codebooks=[1024,1024]"
            )
        if len(sizes) != dimension:
            raise UserError(
                f"emission.codebooks has {len(sizes)} sizes, but frames hold {dimension} numbers each; expected one "
                "size a number"
            )
        self.codebooks = sizes
        self.tables = nn.ModuleList(LogTable(self.num_states, size) for size in sizes)

    def scores(self, frames_BTQ: Tensor) -> Tensor:
        codes = self._codes(frames_BTQ)
        return sum(F.embedding(codes[..., q], table().T) for q, table in enumerate(self.tables))

    def _codes(self, frames: Tensor) -> Tensor:
        """int64 of float indices, checked."""
        sizes = torch.tensor(self.codebooks, device=frames.device)
        wrong = ~((frames >= 0) & (frames < sizes) & (frames == frames.round()))
        if wrong.any():
            q = int(wrong.nonzero()[0, -1])
            raise UserError(
                f"frames: codebook {q} has {float(frames[wrong][0])}, expected integers from 0 to "
                f"{self.codebooks[q] - 1}; correct emission.codebooks, or the frames"
            )
        return frames.long()

    def points(self, frames_FQ: Tensor) -> Tensor:
        """Indicators of the codes, beside each other: half the squared distance is the number of codes that differ."""
        codes = self._codes(frames_FQ)
        return torch.cat([F.one_hot(codes[:, q], size) for q, size in enumerate(self.codebooks)], -1).float()

    @torch.no_grad()
    def draw(self, states_B: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One code from each codebook: (B,) -> (B, Q)."""
        codes = [torch.multinomial(table().exp()[states_B], 1, generator=generator) for table in self.tables]
        return torch.cat(codes, -1).to(self.tables[0].logits.dtype)
