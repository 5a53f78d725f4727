"""Optimizers that torch does not have."""

from hmm_speech.optim.em import EM, Statistics

__all__ = ["EM", "Statistics"]
