"""p(z_1): the distribution of an utterance's first state."""

from __future__ import annotations

from hmm_speech.nn.blocks import LogTable
from hmm_speech.nn.topology import AnyTopology


class InitialTable(LogTable):
    """(N,) log-probabilities of the first state; only states in which the topology lets an utterance begin."""

    def __init__(self, topology: AnyTopology) -> None:
        super().__init__(topology.num_states, allowed=topology.starts())
