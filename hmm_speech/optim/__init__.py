"""Optimizers that torch does not have."""

from hmm_speech.optim.em import EM

__all__ = ["EM"]
