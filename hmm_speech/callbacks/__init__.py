"""Lightning callbacks and plugins."""

from hmm_speech.callbacks.checkpoint import AtomicCheckpointIO
from hmm_speech.callbacks.from_checkpoint import CheckpointInitialisation
from hmm_speech.callbacks.initialise import ClusterInitialisation
from hmm_speech.callbacks.pseudocount import ChoosePseudocount

__all__ = ["AtomicCheckpointIO", "CheckpointInitialisation", "ChoosePseudocount", "ClusterInitialisation"]
