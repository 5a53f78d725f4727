"""Utterances of unequal length as padded batches: every utterance once an epoch, on however many processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Sampler

from hmm_speech.data.unitfile import Utterance
from hmm_speech.errors import UserError


class Batch(NamedTuple):
    """B utterances, padded to the longest."""

    units: Tensor
    """(B, T) int64; 0 past the end."""
    lengths: Tensor
    """(B,) int64."""
    index: Tensor
    """(B,) int64: the place of each utterance in its split."""
    frames: Tensor | None = None
    """(B, T, D) float32, where the unit file has frames; 0 past the end."""
    phones: Tensor | None = None
    """(B, T) int64: each frame's phone in the corpus' inventory; -1 where it has none, and past the end."""


def collate(rows: Sequence[tuple[int, Utterance]], phones: Sequence[np.ndarray] | None = None) -> Batch:
    """Pad (index, utterance) pairs to one batch; ``phones`` holds each utterance's frames' phones, by index."""

    def pad(arrays: Sequence[np.ndarray], dtype: torch.dtype, value: float = 0) -> Tensor:
        tensors = [torch.as_tensor(array, dtype=dtype) for array in arrays]
        return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

    frames = [utterance.frames for _, utterance in rows]
    return Batch(
        units=pad([utterance.units for _, utterance in rows], torch.int64),
        lengths=torch.tensor([len(utterance.units) for _, utterance in rows]),
        index=torch.tensor([index for index, _ in rows]),
        frames=None if any(x is None for x in frames) else pad(frames, torch.float32),
        phones=None if phones is None else pad([phones[index] for index, _ in rows], torch.int64, -1),
    )


class BucketBatchSampler(Sampler[list[int]]):
    """Batches of utterances of similar length; each utterance comes exactly once over all processes together.

    There are ceil(utterances / batch_size) batches, rounded up to a multiple of the number of processes, and the
    utterances are dealt out over them as evenly as possible. So every process has equally many batches (none waits for
    another), and nothing is repeated or dropped to get there, as torch's DistributedSampler would.

    With ``shuffle``, an epoch's order follows from (seed, epoch) alone, on whichever process and whether or not
    training was resumed: lengths are jittered by a tenth before they are sorted, which varies each batch's company, and
    the batches are shuffled. Without, batches go from long to short.

    Args:
        lengths: frames of each utterance.
        batch_size: utterances a batch, at most (a batch may have two where 1 would leave a process without one).
        shuffle: another order every epoch (``set_epoch``).
        seed: of the order.
        rank, world_size: this process and how many there are.

    Raises:
        UserError: there are fewer utterances than processes.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        split: str = "data",
    ) -> None:
        if not isinstance(batch_size, int) or batch_size < 1:
            raise UserError(f"batch_size is {batch_size!r}; expected a positive integer")
        if len(lengths) < world_size:
            raise UserError(
                f"the {split} split has {len(lengths)} utterances for {world_size} processes; every process needs one. "
                "Give more data or lower trainer.devices"
            )
        self.lengths = torch.as_tensor(lengths, dtype=torch.float64)
        self.batch_size, self.shuffle, self.seed, self.epoch = batch_size, shuffle, seed, 0
        self.rank, self.world_size = rank, world_size

    @property
    def sampler(self) -> BucketBatchSampler:
        """Itself: Lightning calls ``batch_sampler.sampler.set_epoch`` at the start of every epoch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        wanted = -(-len(self.lengths) // (self.batch_size * self.world_size))
        return min(wanted, len(self.lengths) // self.world_size)  # no batch may be empty

    def __iter__(self) -> Iterator[list[int]]:
        count = len(self) * self.world_size
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        keys = self.lengths
        if self.shuffle:
            keys = keys * (1 + 0.1 * torch.rand(len(keys), generator=generator, dtype=torch.float64))
        order = torch.argsort(keys, descending=True, stable=True)
        batches = [batch.tolist() for batch in torch.tensor_split(order, count)]
        places = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        for place in places[self.rank :: self.world_size].tolist():
            yield batches[place]
