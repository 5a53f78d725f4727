"""A differentiable hidden Markov model layer: exact, fast, on torch alone."""

from .api import HMM, HMMForward, TopK, Viterbi, log_partition
from .filter import HMMFilter
from .layer import HMMLayer
from .library import Backend, backend, use_backend
from .semi_markov import Segmentation, SemiMarkovHMM
from .structures import Active, Banded, Chunked, LowRank

__all__ = [
    "HMM",
    "Active",
    "Backend",
    "Banded",
    "Chunked",
    "HMMFilter",
    "HMMForward",
    "HMMLayer",
    "LowRank",
    "Segmentation",
    "SemiMarkovHMM",
    "TopK",
    "Viterbi",
    "backend",
    "log_partition",
    "use_backend",
]
