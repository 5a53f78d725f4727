"""A model is a composition: a topology, p(z_1), p(z_t | z_{t-1}, h_t), p(x_t | z_t, h_t) and, perhaps, a context h."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from hmm_speech.configuration import find_class, instantiate
from hmm_speech.errors import UserError
from hmm_speech.hmm import HMM, Active, LowRank
from hmm_speech.nn.low_rank import LowRankHMM
from hmm_speech.nn.topology import AnyTopology

PARTS = ("initial", "transition", "emission", "context")


class Chain(Protocol):
    """What a model makes of a batch: an :class:`hmm_speech.hmm.HMM`, or what answers the same questions."""

    lengths: Tensor
    """(B,) int64."""

    def log_partition(self) -> Tensor:
        """(B,) log p(observations)."""

    def viterbi(self) -> tuple[Tensor, Tensor]:
        """A best path: its ``score`` (B,) and its ``states`` (B, T) int64, -1 past the end."""


class Transitions(Protocol):
    """What a transition gives that is neither a matrix nor a structure of the layer, such as a ``Drift``."""

    def chain(self, initial_N: Tensor, emission: Tensor | Active, lengths_B: Tensor) -> Chain:
        """The chain of a batch, from log-probabilities and what the emission gave."""

    def following(self, initial_N: Tensor, states_BT: Tensor) -> Tensor:
        """(B, N) log p(next state | states so far), of which there may be none."""


class Composition(NamedTuple):
    """The parts of a model, made to fit together."""

    topology: AnyTopology
    initial: nn.Module
    """() -> (N,) log-probabilities."""
    transition: nn.Module
    """(context,) or () -> (N, N) log-probabilities, a structure of :mod:`hmm_speech.hmm`, or :class:`Transitions`."""
    emission: nn.Module
    """(observed, context) or (observed,) -> (B, T, N) log-probabilities or densities, or an ``Active``."""
    context: nn.Module | None
    """observed -> (B, T, H), from frames before t alone."""


def build_composition(
    configs: Mapping[str, Mapping[str, Any] | None],
    topology: AnyTopology,
    vocabulary: int,
    dimension: int | None,
    allowed: Sequence[str],
) -> Composition:
    """Build every part from its configuration.

    Raises:
        UserError: a part needs a context and there is none, or there is one that no part uses, or a part reads frames
            and the data have none.
    """
    classes = {
        part: find_class(config, kind=nn.Module, allowed=allowed, where=part)
        for part, config in configs.items()
        if config is not None
    }
    for part, kind in classes.items():
        if reads_frames(kind) and dimension is None:
            raise UserError(
                f"{part} reads frames, but the unit file has none; make one with `hmm-speech units --keep-frames`, or "
                f"choose an option of {part} that reads units"
            )
        if uses_context(kind) and "context" not in classes and not getattr(kind, "context_is_optional", False):
            raise UserError(f"{part} needs a context, and there is none; add one, such as context=gru")

    def build(part: str, *args: Any, **sizes: int | None) -> Any:
        return instantiate(configs[part], *args, kind=nn.Module, allowed=allowed, where=part, **sizes)

    context, width = None, {}
    if "context" in classes:
        if not uses_context(classes["transition"]) and not uses_context(classes["emission"]):
            raise UserError(
                "there is a context, but neither transition nor emission uses it; add transition=contextual or "
                "emission=contextual, or leave the context out (context=none)"
            )
        context = build("context", vocabulary=vocabulary, dimension=dimension)
        width = {"context_dim": context.dim}
    initial = build("initial", topology)
    transition = build("transition", topology, **(width if uses_context(classes["transition"]) else {}))
    size = {"dimension": dimension} if reads_frames(classes["emission"]) else {"vocabulary": vocabulary}
    emission = build("emission", topology, **size, **(width if uses_context(classes["emission"]) else {}))
    return Composition(topology, initial, transition, emission, context)


def uses_context(part: nn.Module | type) -> bool:
    """Whether a part, or its class, takes the context as an argument."""
    return getattr(part, "uses_context", False)


def reads_frames(part: nn.Module | type) -> bool:
    """Whether a part, or its class, reads frames and not units."""
    return getattr(part, "observes", "units") == "frames"


def observed(part: nn.Module, batch: Any) -> Tensor:
    """What a part reads of a batch: units (B, T) or frames (B, T, D)."""
    return batch.frames if reads_frames(part) else batch.units


class Scores(NamedTuple):
    """What the parts say of a batch, before they are put together."""

    initial_N: Tensor
    """Log-probabilities."""
    transition: Any
    """(N, N) log-probabilities, a structure of :mod:`hmm_speech.hmm`, or :class:`Transitions`."""
    emission: Tensor | Active
    """(B, T, N) log-probabilities or densities, or an ``Active``."""

    def chain(self, lengths_B: Tensor) -> HMM | Chain:
        """The chain of a batch: paths are scored by log p(states, observations)."""
        initial_N, transition, emission = self
        if hasattr(transition, "chain"):
            return transition.chain(initial_N, emission, lengths_B)
        if isinstance(transition, LowRank):
            if isinstance(emission, Active):  # 2 N R a frame; over the active states alone, scores are K^2 sums over R
                emission = emission.dense(len(initial_N))
            return LowRankHMM(initial_N, transition, emission, lengths_B)
        return HMM(initial_N, transition, emission, lengths_B)


def score_parts(model: Any, batch: Any) -> Scores:
    """What each part of a :class:`Composition`, or of a module with the same parts, says of a batch."""
    context_BTH = None if model.context is None else model.context(observed(model.context, batch))
    transition = model.transition(context_BTH) if uses_context(model.transition) else model.transition()
    what = observed(model.emission, batch)
    emission = model.emission(what, context_BTH) if uses_context(model.emission) else model.emission(what)
    return Scores(model.initial(), transition, emission)


def compose(model: Any, batch: Any) -> HMM | Chain:
    """The chain of a batch: paths are scored by log p(states, observations)."""
    return score_parts(model, batch).chain(batch.lengths)
