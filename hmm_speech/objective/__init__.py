"""What training minimises: the negative log-likelihood, bounds on it, and what else is asked of a model."""

from hmm_speech.objective.annealed import Annealed
from hmm_speech.objective.co_training import CoTraining
from hmm_speech.objective.likelihood import Likelihood, SemiSupervised, Viterbi
from hmm_speech.objective.vq_apc import VQAPC

__all__ = ["VQAPC", "Annealed", "CoTraining", "Likelihood", "SemiSupervised", "Viterbi"]
