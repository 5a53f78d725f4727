"""A differentiable hidden Markov model layer: exact, fast, on torch alone."""

from .api import HMM, HMMForward, TopK, Viterbi, log_partition
from .layer import HMMLayer
from .library import Backend, backend, use_backend

__all__ = ["HMM", "Backend", "HMMForward", "HMMLayer", "TopK", "Viterbi", "backend", "log_partition", "use_backend"]
