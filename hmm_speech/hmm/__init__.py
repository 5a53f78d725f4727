"""A differentiable hidden Markov model layer: exact, fast, on torch alone."""

from .api import HMM, HMMForward, Viterbi, log_partition
from .library import Backend, backend, use_backend

__all__ = ["HMM", "Backend", "HMMForward", "Viterbi", "backend", "log_partition", "use_backend"]
