"""Lightning callbacks and plugins."""

from hmm_speech.callbacks.checkpoint import AtomicCheckpointIO
from hmm_speech.callbacks.initialise import ClusterInitialisation

__all__ = ["AtomicCheckpointIO", "ClusterInitialisation"]
