"""Unit files as Lightning data."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from hmm_speech.configuration import CLONE
from hmm_speech.data.batching import Batch, BucketBatchSampler, collate
from hmm_speech.data.splits import hashed_share
from hmm_speech.data.synthetic import sample_corpus
from hmm_speech.data.unitfile import UnitCorpus, Utterance, read_units
from hmm_speech.errors import UserError, check_size


class UnitDataModule(LightningDataModule):
    """The three splits of a unit file.

    Args:
        path: a unit file, a folder of them, or another format that :func:`read_units` reads.
        batch_size: utterances a batch and process.
        num_workers: processes that load data; the units lie in memory, so 0 is fastest.
        seed: of the order of the training batches.
        phones: share of the training utterances whose phones are shown to the model, for objective=semi_supervised.
    """

    def __init__(
        self, path: str, batch_size: int = 16, num_workers: int = 0, seed: int = 0, phones: float = 0.0
    ) -> None:
        super().__init__()
        if not 0 <= phones <= 1:
            raise UserError(f"data.phones is {phones!r}; expected a share from 0 to 1")
        check_size("data.num_workers", num_workers, least=0)
        check_size("data.seed", seed, least=0)
        self.path, self.batch_size, self.num_workers = path, batch_size, num_workers
        self.seed, self.phones = seed, phones

    @functools.cached_property
    def corpus(self) -> UnitCorpus:
        """All utterances, read once."""
        corpus = self.read()
        for split in ("train", "valid", "test"):
            if not corpus.split(split):
                raise UserError(
                    f"{self.path}: no utterance in the {split} split; training needs at least three utterances, and "
                    "where a split is given, all of train, valid and test"
                )
        return corpus

    @property
    def source(self) -> str:
        """Where the corpus comes from, for people."""
        return str(self.path)

    def read(self) -> UnitCorpus:
        """The corpus; a subclass may take it from elsewhere. What lies in outputs/NAME is made by that recipe."""
        path = Path(self.path).expanduser()
        script = CLONE / "recipes" / path.parent.name / "prepare.py"
        if not path.exists() and path.parent == CLONE / "outputs" / path.parent.name and script.exists():
            raise UserError(f"{path}: no such file; `python {script.relative_to(CLONE)}` makes it (in {CLONE})")
        return read_units(path)

    @property
    def train_units(self) -> list[np.ndarray]:
        """The units of each training utterance."""
        return [utterance.units for utterance in self.corpus.split("train")]

    @functools.cached_property
    def dimension(self) -> int | None:
        """Numbers a frame, D; None where an utterance has no frames.

        Raises:
            UserError: utterances differ in it.
        """
        frames = [(utterance.id, utterance.frames) for utterance in self.corpus.utterances]
        if any(x is None for _, x in frames):
            return None
        first = frames[0][1].shape[1]
        for name, x in frames:
            if x.shape[1] != first:
                raise UserError(
                    f"{self.path}: utterance {name!r} has frames of {x.shape[1]} numbers, others of {first}; make all "
                    "of them with the same features"
                )
        return first

    @property
    def frames_per_batch(self) -> float:
        """Training frames in a batch of ``batch_size`` utterances, on average."""
        train = self.corpus.split("train")
        return sum(len(utterance.units) for utterance in train) / len(train) * min(self.batch_size, len(train))

    def shown_phones(self, split: str) -> list[np.ndarray] | None:
        """For each utterance, its frames' phones as numbers, (T,) int64; -1 where not shown. None where none are.

        Which training utterances are shown follows from a hash of their ids, so it does not change with their order.
        """
        if not self.phones or split != "train":
            return None
        from hmm_speech.evaluate.clustering import frame_phones, phone_inventory

        utterances = self.corpus.split(split)
        inventory = phone_inventory([utterance.phones for utterance in self.corpus.utterances])
        if not inventory:
            raise UserError(f"{self.path}: has no phones to show; leave data.phones at 0 or give --alignments")
        return [
            frame_phones(u.phones, len(u.units), self.corpus.frame_rate, inventory)
            if u.phones and hashed_share(u.id) < self.phones
            else np.full(len(u.units), -1)
            for u in utterances
        ]

    def loader(self, split: str, shuffle: bool = False, alone: bool = False) -> DataLoader[Batch]:
        """Each utterance of a split once over all processes, or in this one ``alone``, in padded batches."""
        utterances = self.corpus.split(split)
        together = self.trainer is not None and not alone
        world = (self.trainer.global_rank, self.trainer.world_size) if together else (0, 1)
        sampler = BucketBatchSampler(
            [len(utterance.units) for utterance in utterances],
            self.batch_size,
            shuffle=shuffle,
            seed=self.seed,
            rank=world[0],
            world_size=world[1],
            split=split,
        )
        rows: list[tuple[int, Utterance]] = list(enumerate(utterances))
        with_phones = functools.partial(collate, phones=self.shown_phones(split))
        return DataLoader(rows, batch_sampler=sampler, collate_fn=with_phones, num_workers=self.num_workers)

    def train_dataloader(self) -> DataLoader[Batch]:
        return self.loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        return self.loader("valid")

    def test_dataloader(self) -> DataLoader[Batch]:
        return self.loader("test")


class SyntheticDataModule(UnitDataModule):
    """A corpus sampled from a random HMM: for tests and debugging, with no file.

    Args:
        utterances, frames, vocabulary, labels, numbers: see :func:`sample_corpus`.
        path: not used; there so that ``data.path`` is a key of every dataset.
    """

    def __init__(
        self,
        path: str = "synthetic",
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
        utterances: int = 60,
        frames: int = 80,
        vocabulary: int = 20,
        labels: int = 8,
        numbers: int = 0,
        phones: float = 0.0,
    ) -> None:
        super().__init__(path, batch_size, num_workers, seed, phones)
        self.sizes = (utterances, frames, vocabulary, labels, numbers)

    @property
    def source(self) -> str:
        return "a synthetic corpus"

    def read(self) -> UnitCorpus:
        return sample_corpus(*self.sizes, seed=self.seed)
