"""Emission, transition and initial distributions as tables and networks; plain values in, log-probabilities out."""

from hmm_speech.nn.drift import Drift
from hmm_speech.nn.emission import CategoricalEmission, ClonedEmission, EmissionNetwork, EmissionTable
from hmm_speech.nn.frames import FrameEmission
from hmm_speech.nn.gaussian import GaussianEmission
from hmm_speech.nn.initial import InitialTable
from hmm_speech.nn.soft import ProductEmission, SoftEmission
from hmm_speech.nn.topology import ClonedTopology, Topology
from hmm_speech.nn.transition import TransitionNetwork, TransitionTable

__all__ = [
    "CategoricalEmission",
    "ClonedEmission",
    "ClonedTopology",
    "Drift",
    "EmissionNetwork",
    "EmissionTable",
    "FrameEmission",
    "GaussianEmission",
    "InitialTable",
    "ProductEmission",
    "SoftEmission",
    "Topology",
    "TransitionNetwork",
    "TransitionTable",
]
