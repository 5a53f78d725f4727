"""Which states there are, which arcs between them are allowed, and which label each belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hmm_speech.errors import UserError, check_size


@dataclass(frozen=True)
class Topology:
    """Labels, each a left-to-right chain of ``substates`` states; N = labels * substates.

    State ``label * substates + s`` is substate s of its label. Every state may repeat; a substate that is not the
    last goes on to the next; the last one leaves into the first substate of any label, its own included. With
    ``substates=1`` that is the fully connected HMM, so the two need no separate code. An utterance begins in a first
    substate: its start is a boundary, and a label entered in its middle would have no beginning. It may end anywhere,
    since recordings are cut.

    A chain of S substates holds a label for at least S frames, which is what keeps labels as long as phones
    (minimum-duration HMM: Rabiner 1989, section IV-D).
    """

    labels: int
    substates: int = 1

    def __post_init__(self) -> None:
        for name in ("labels", "substates"):
            check_size(f"topology.{name}", getattr(self, name))

    @property
    def num_states(self) -> int:
        """N."""
        return self.labels * self.substates

    @property
    def is_full(self) -> bool:
        """Whether every state may follow every state; told without the (N, N) arcs."""
        return self.substates == 1

    def arcs(self) -> Tensor:
        """(N, N) bool: ``[i, j]`` tells whether state i may be followed by state j."""
        states = torch.arange(self.num_states)
        substate = states % self.substates
        is_last, is_first = substate == self.substates - 1, substate == 0
        follows = ~is_last[:, None] & (states[None, :] == states[:, None] + 1)
        return torch.eye(self.num_states, dtype=torch.bool) | follows | (is_last[:, None] & is_first[None, :])

    def starts(self) -> Tensor:
        """(N,) bool: the states in which an utterance may begin."""
        return torch.arange(self.num_states) % self.substates == 0

    def label_of(self, states: Tensor) -> Tensor:
        """The label of each state, same shape; padding (-1) stays -1."""
        return torch.div(states, self.substates, rounding_mode="floor")

    def factors(self) -> tuple[Tensor, Tensor]:
        """What a state is made of, two (N,) int64: its label and its substate."""
        states = torch.arange(self.num_states)
        return states // self.substates, states % self.substates

    def __str__(self) -> str:
        return f"{self.labels} labels x {self.substates} states"


@dataclass(frozen=True)
class ClonedTopology:
    """Each unit v has ``clones[v]`` states that emit it and nothing else; every state may follow every other.

    A cloned HMM (Dedieu et al. 2019, arXiv:1905.00507): which clone a frame is in can remember what came long before
    it, which a bigram of units cannot. States are sorted by their unit; each is a label of its own.
    """

    clones: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "clones", tuple(self.clones))
        for unit, count in enumerate(self.clones):
            check_size(f"topology.clones[{unit}]", count)

    @property
    def num_states(self) -> int:
        """N."""
        return sum(self.clones)

    @property
    def labels(self) -> int:
        """As many as states."""
        return self.num_states

    @property
    def is_full(self) -> bool:
        """True."""
        return True

    def arcs(self) -> Tensor:
        """(N, N) bool: all."""
        return torch.ones(self.num_states, self.num_states, dtype=torch.bool)

    def starts(self) -> Tensor:
        """(N,) bool: all."""
        return torch.ones(self.num_states, dtype=torch.bool)

    def label_of(self, states: Tensor) -> Tensor:
        """The states themselves."""
        return states

    def factors(self) -> tuple[Tensor, Tensor]:
        """What a state is made of, two (N,) int64: its unit and its number among the unit's clones."""
        clones = torch.tensor(self.clones)
        unit = torch.repeat_interleave(torch.arange(len(clones)), clones)
        return unit, torch.arange(self.num_states) - (clones.cumsum(0) - clones)[unit]

    def __str__(self) -> str:
        return f"{self.num_states} states, {min(self.clones)} to {max(self.clones)} clones of each unit"


AnyTopology = Topology | ClonedTopology


def build_topology(config: Mapping[str, Any]) -> AnyTopology:
    """The topology of plain values: ``{labels, substates}`` or ``{clones}``."""
    kinds = {"labels": Topology, "clones": ClonedTopology}
    for key, kind in kinds.items():
        if key in config:
            try:
                return kind(**config)
            except TypeError as error:
                raise UserError(f"topology: {dict(config)}: {error}") from error
    raise UserError(
        f"topology is {dict(config)}; expected labels and substates, or clones (topology=full|chain|cloned)"
    )


def resolve_topology(config: Mapping[str, Any], sequences: Sequence[np.ndarray], vocabulary: int) -> dict[str, Any]:
    """A configured topology with what the training split decides: ``{states: N}`` becomes ``{clones: [...]}``.

    Clones are shared out in proportion to the square root of a unit's count; each unit has ``minimum`` at least, which
    may make more states than asked for where the vocabulary is large. With ``states``, the labels and substates that a
    preset for chains may have left in the configuration do not count.
    """
    if "states" not in config:
        return dict(config)
    unknown = config.keys() - {"states", "minimum", "labels", "substates"}
    if unknown:
        raise UserError(
            f"topology: {', '.join(sorted(unknown))} does not go with states; see configs/topology/cloned.yaml"
        )
    states, minimum = config["states"], config.get("minimum", 1)
    check_size("topology.states", states)
    check_size("topology.minimum", minimum)
    counts = np.bincount(np.concatenate(list(sequences)), minlength=vocabulary)
    return {"clones": share_out(counts, states, minimum).tolist()}


def share_out(counts: np.ndarray, total: int, minimum: int = 1) -> np.ndarray:
    """(V,) int: ``total`` copies dealt to V units in proportion to the square roots of their counts."""
    copies = np.full(len(counts), minimum, dtype=np.int64)
    roots = np.sqrt(counts + 1.0)
    while copies.sum() < total:
        copies[np.argmax(roots / copies)] += 1
    return copies
