"""The LightningModule: a composition of networks around the HMM layer, trained on its objective."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from hmm_speech.configuration import ALLOWED_TARGETS, instantiate
from hmm_speech.data.batching import Batch
from hmm_speech.hmm import HMM
from hmm_speech.nn.blocks import count
from hmm_speech.nn.composition import PARTS, Chain, build_composition, compose
from hmm_speech.nn.initialise import set_priors
from hmm_speech.nn.topology import build_topology, resolve_topology
from hmm_speech.objective.finite import check_finite
from hmm_speech.optim import Statistics
from hmm_speech.optim.configure import configure_optimizers, is_em

LIKELIHOOD = {"_target_": "hmm_speech.objective.Likelihood"}


class TestResult(NamedTuple):
    """What a test run found, over all processes; each utterance of the split once."""

    bits: float
    """Of all frames together."""
    frames: int
    labels: list[np.ndarray]
    """(T,) int64 for each utterance."""
    index: list[int]
    """The place of each in its split, ascending; all of them unless trainer.limit_test_batches left some out."""


class SpeechHMM(LightningModule):
    """An HMM over discrete units or frames: initial, transition and emission over one topology, perhaps in a context.

    Args:
        vocabulary: number of units, V.
        topology: ``{labels, substates}`` or ``{clones}``, see :mod:`hmm_speech.nn.topology`.
        initial, transition, emission: ``{_target_, ...}`` of modules that give (N,), (N, N) (or a structure of
            :mod:`hmm_speech.hmm`, or :class:`~hmm_speech.nn.composition.Transitions`) and, from units (B, T) or frames
            (B, T, D), log-probabilities (B, T, N) (or an ``Active``).
        context: ``{_target_, ...}`` of a causal network over the past, (B, T, H), or None.
        objective: ``{_target_, ...}`` of what training minimises; the negative log-likelihood by default.
        optimizer: ``{_target_, ..., schedule: {_target_, ...} or None}``; not needed for inference.
        dimension: D, of a unit file with frames.
        frames_per_batch: the loss is the batch's negative log-likelihood in bits over this constant, so that every
            frame of the corpus weighs the same, whatever batch it falls into.
        quantizer: fingerprint of what made the units, where known: others of the same number mean something else.
        seed: of dropout, which draws from (seed, epoch, batch, process), so that a resumed run repeats a whole one.
        allowed: packages from which ``_target_`` may come.

    Arguments are plain values, so that checkpoints load with ``weights_only=True``.
    """

    def __init__(
        self,
        vocabulary: int,
        topology: Mapping[str, Any],
        initial: Mapping[str, Any],
        transition: Mapping[str, Any],
        emission: Mapping[str, Any],
        context: Mapping[str, Any] | None = None,
        objective: Mapping[str, Any] | None = None,
        optimizer: Mapping[str, Any] | None = None,
        dimension: int | None = None,
        frames_per_batch: float = 1.0,
        seed: int = 0,
        quantizer: str | None = None,
        allowed: Sequence[str] = ALLOWED_TARGETS,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["allowed"], logger=False)
        self.allowed = tuple(allowed)
        configs = dict(zip(PARTS, (initial, transition, emission, context), strict=True))
        parts = build_composition(configs, build_topology(topology), vocabulary, dimension, self.allowed)
        self.topology, self.initial, self.transition, self.emission, self.context = parts
        self.objective = instantiate(
            objective or LIKELIHOOD, parts, kind=nn.Module, allowed=self.allowed, where="objective"
        )
        count(self, is_em(optimizer))  # here, since it decides which parameters DDP waits for
        self.test_result: TestResult | None = None
        self._tested: list[tuple[float, dict[int, np.ndarray]]] = []

    @classmethod
    def from_config(cls, config: Mapping[str, Any], data: Any, allowed: Sequence[str]) -> SpeechHMM:
        """The model that a composed configuration and its data module (vocabulary, clones, dimension) describe."""
        corpus = data.corpus
        return cls(
            vocabulary=corpus.vocabulary,
            topology=resolve_topology(config["topology"], data.train_units, corpus.vocabulary),
            **{part: config.get(part) for part in (*PARTS, "objective", "optimizer", "seed")},
            dimension=data.dimension,
            frames_per_batch=data.frames_per_batch,
            quantizer=corpus.made.get("quantizer"),
            allowed=allowed,
        )

    def forward(self, batch: Batch) -> HMM | Chain:
        """The chain of a batch of utterances: its paths are scored by log p(states, observations)."""
        return compose(self, batch)

    @property
    def progress(self) -> float:
        """How much of training is done, 0 to 1."""
        return min(1.0, self.current_epoch / max(1, (self.trainer.max_epochs or 1)))

    @property
    def frames_per_epoch(self) -> float:
        """Training frames, of all processes together."""
        return self.hparams.frames_per_batch * self.trainer.num_training_batches * self.trainer.world_size

    def num_parameters(self) -> int:
        """Trainable numbers; forbidden entries of tables are none, nor is what carries statistics to EM."""
        return sum(int(p.detach().isfinite().sum()) for p in self.parameters() if not isinstance(p, Statistics))

    def setup(self, stage: str) -> None:
        if stage == "fit":  # in a resumed run, too: priors are not in the checkpoint
            set_priors(self, self.trainer.datamodule.train_units)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        # Loaders draw from the same generator, and not equally often in a resumed run: so start anew for every batch.
        place = (self.hparams.seed, self.current_epoch, batch_idx, self.global_rank)
        torch.manual_seed(int.from_bytes(hashlib.blake2b(repr(place).encode(), digest_size=8).digest(), "big"))
        bits_B = self.objective(self, batch) / math.log(2)
        check_finite(bits_B.detach(), batch.index, self.trainer.datamodule.corpus)
        bits = bits_B.sum()
        self._log_bits("train", bits.detach(), batch)
        return bits / self.hparams.frames_per_batch

    def validation_step(self, batch: Batch) -> None:
        self._log_bits("valid", self._bits(batch).sum(), batch)

    def on_test_epoch_start(self) -> None:
        self._tested = []

    def test_step(self, batch: Batch) -> None:
        hmm = self(batch)
        bits = -hmm.log_partition().double().sum() / math.log(2)
        labels = self.topology.label_of(hmm.viterbi().states).cpu().numpy()
        rows = zip(batch.index.tolist(), labels, batch.lengths.tolist(), strict=True)
        self._tested.append((float(bits), {index: row[:length] for index, row, length in rows}))

    def on_test_epoch_end(self) -> None:
        parts = [self._tested]
        if self.trainer.world_size > 1:
            parts = [[] for _ in range(self.trainer.world_size)]
            torch.distributed.all_gather_object(parts, self._tested)
        batches = [batch for part in parts for batch in part]
        labels: dict[int, np.ndarray] = {}
        for _, rows in batches:
            labels.update(rows)
        frames = sum(len(row) for _, rows in batches for row in rows.values())
        bits = math.fsum(bits for bits, _ in batches)
        index = sorted(labels)
        self.test_result = TestResult(bits, frames, [labels[i] for i in index], index)
        self.log("test/bits_per_frame", bits / frames, sync_dist=True)  # the same on every process

    def _bits(self, batch: Batch) -> Tensor:
        """(B,) negative log-likelihood of each utterance in bits."""
        return -self(batch).log_partition() / math.log(2)

    def _log_bits(self, split: str, bits: Tensor, batch: Batch) -> None:
        """Log the epoch's bits per frame: the mean over frames, of all processes together."""
        frames, name = batch.lengths.sum(), f"{split}/bits_per_frame"
        self.log(name, bits / frames, batch_size=frames, on_step=False, on_epoch=True, sync_dist=True, prog_bar=True)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # A schedule's place is restored, its shape follows the configuration: with the same trainer.max_epochs that is
        # the same curve, with another it is stretched, where torch would fail past the old end.
        for state in checkpoint.get("lr_schedulers", ()):
            for key in state.keys() - {"last_epoch", "_step_count", "_last_lr"}:
                del state[key]

    def configure_optimizers(self) -> Any:
        return configure_optimizers(self, self.hparams.optimizer or {})
