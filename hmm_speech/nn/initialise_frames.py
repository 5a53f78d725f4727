"""Where training over frames starts: labels from k-means, chains from their runs, and a few EM iterations.

As :mod:`hmm_speech.nn.initialise` does for units. Only the frames of the training split are used.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from hmm_speech.errors import UserError
from hmm_speech.hmm import HMM
from hmm_speech.nn.blocks import count
from hmm_speech.nn.frames import FrameEmission
from hmm_speech.nn.initial import InitialTable
from hmm_speech.nn.initialise import (
    FLOOR,
    PSEUDOCOUNT,
    by_length,
    chain_probabilities,
    change_counts,
    fit_tables,
    log_table,
)
from hmm_speech.nn.topology import Topology
from hmm_speech.nn.transition import TransitionTable
from hmm_speech.optim import EM

SAMPLE = 100_000  # frames that k-means runs on: half an hour of speech


def cluster_frames(points: Sequence[np.ndarray], labels: int, seed: int) -> list[np.ndarray]:
    """(T,) int for each utterance: the nearest of ``labels`` k-means centroids of its points (T, E).

    Raises:
        UserError: there are fewer frames than labels.
    """
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    every = np.concatenate(list(points))
    if len(every) < labels:
        raise UserError(f"topology.labels is {labels}, but the train split has {len(every)} frames; lower it")
    if len(every) > SAMPLE:
        every = every[np.random.default_rng(seed).choice(len(every), SAMPLE, replace=False)]
    with threadpool_limits(1):  # sums in one order give the same result on every run
        model = KMeans(labels, n_init=1, max_iter=50, random_state=seed).fit(every)
        return [model.predict(x) for x in points]


def spread_runs(labels: np.ndarray, substates: int) -> np.ndarray:
    """(T,) states of labels (T,): each run of a label goes through the label's substates in equal parts."""
    starts = np.flatnonzero(np.diff(labels, prepend=labels[0] - 1))
    lengths = np.diff(starts, append=len(labels))
    place = (np.arange(len(labels)) - np.repeat(starts, lengths) + 0.5) / np.repeat(lengths, lengths)
    return labels * substates + (place * substates).astype(np.int64)


def run_tables(sequences: Sequence[np.ndarray], topology: Topology) -> tuple[Tensor, Tensor]:
    """Log-probabilities (N,) and (N, N) of chains that follow each other as the runs of labels do."""
    share = np.bincount(np.concatenate(list(sequences)), minlength=topology.labels) + 0.5
    share = share / share.sum()
    changes = change_counts(sequences, topology.labels) + 1e-3
    exits = (1 - FLOOR) * changes / changes.sum(1, keepdims=True) + FLOOR * share
    starts, transition = chain_probabilities(share, exits, topology)
    return log_table(starts), log_table(transition)


def _batches(frames: Sequence[Tensor], states: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Padded frames and states (-1 past the end), and lengths."""
    for rows in by_length(frames):
        yield (
            nn.utils.rnn.pad_sequence([frames[row] for row in rows], batch_first=True),
            nn.utils.rnn.pad_sequence([states[row] for row in rows], batch_first=True, padding_value=-1),
            torch.tensor([len(frames[row]) for row in rows]),
        )


def initialise_frames(
    module: nn.Module, sequences: Sequence[np.ndarray], iterations: int, steps: int, lr: float, seed: int = 0
) -> None:
    """Standardise, cluster, take the emission of each chain from its runs, then ``iterations`` of EM.

    Networks for p(z_1) and the transitions are fitted to the tables found, by ``steps`` of Adam.

    Args:
        sequences: the frames (T, D) of each training utterance.

    Raises:
        UserError: the emission is none that EM can train, or states are clones of units.
    """
    if not isinstance(module.emission, FrameEmission) or not isinstance(module.topology, Topology):
        raise UserError(
            f"callbacks.initialise cannot start {type(module.emission).__name__} on {module.topology} from clusters of "
            "frames; choose emission=gaussian, soft or product and topology=chain or full, or callbacks.initialise=null"
        )
    # A copy, since DDP watches the original; in float32, whatever the model is trained in.
    topology, emission = module.topology, copy.deepcopy(module.emission).float()
    device = next(emission.parameters()).device
    frames = [torch.as_tensor(x, dtype=torch.float32, device=device) for x in sequences]
    emission.standardise(torch.cat(frames))
    labels = cluster_frames([emission.points(x).cpu().numpy() for x in frames], topology.labels, seed)
    states = [torch.as_tensor(spread_runs(x, topology.substates), device=device) for x in labels]

    initial, transition = InitialTable(topology).to(device), TransitionTable(topology).to(device)
    for part, table in zip((initial, transition), run_tables(labels, topology), strict=True):
        part.assign(table)
    parts = nn.ModuleList([initial, transition, emission])
    count(parts, True)
    optimizer = EM([p for p in parts.parameters() if p.requires_grad], pseudocount=PSEUDOCOUNT)
    for iteration in range(iterations + 1):
        optimizer.zero_grad()
        for x, path, lengths in _batches(frames, states):
            scores = emission(x)
            if iteration == 0:  # the paths are known: the emission's statistics alone
                found = scores.gather(2, path.clamp(min=0).unsqueeze(-1)).squeeze(-1)[path >= 0]
            else:
                found = HMM(initial(), transition(), scores, lengths).log_partition()
            found.sum().neg().backward()
        optimizer.step()
    module.emission.load_state_dict(emission.state_dict())
    tables = (initial.logits.detach().cpu(), transition.logits.detach().cpu(), None)
    fit_tables(module, tables, steps, lr)
