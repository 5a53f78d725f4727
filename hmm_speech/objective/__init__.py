"""What training minimises: the negative log-likelihood, and what else is asked of a model."""

from hmm_speech.objective.annealed import Annealed
from hmm_speech.objective.likelihood import Likelihood, SemiSupervised, Viterbi

__all__ = ["Annealed", "Likelihood", "SemiSupervised", "Viterbi"]
