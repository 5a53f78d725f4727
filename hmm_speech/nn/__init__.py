"""Emission, transition and initial distributions as tables and networks; plain values in, log-probabilities out."""

from hmm_speech.nn.banded import BandedTransition
from hmm_speech.nn.cloned import ClonedTransition, Products
from hmm_speech.nn.context import (
    Context,
    ConvolutionContext,
    GRUContext,
    LastUnits,
    LSTMContext,
    TransformerContext,
)
from hmm_speech.nn.contextual import (
    ContextualEmission,
    ContextualTransition,
    FullContextualTransition,
    IndependentTransition,
)
from hmm_speech.nn.drift import Drift
from hmm_speech.nn.durations import Durations, SemiMarkovTransition
from hmm_speech.nn.emission import CategoricalEmission, ClonedEmission, EmissionNetwork, EmissionTable
from hmm_speech.nn.frames import FrameEmission
from hmm_speech.nn.gaussian import GaussianEmission
from hmm_speech.nn.initial import InitialTable
from hmm_speech.nn.low_rank import LowRankTransition
from hmm_speech.nn.soft import ProductEmission, SoftEmission
from hmm_speech.nn.topology import ClonedTopology, Topology
from hmm_speech.nn.transition import TransitionNetwork, TransitionTable

__all__ = [
    "BandedTransition",
    "CategoricalEmission",
    "ClonedEmission",
    "ClonedTopology",
    "ClonedTransition",
    "Context",
    "ContextualEmission",
    "ContextualTransition",
    "ConvolutionContext",
    "Drift",
    "Durations",
    "EmissionNetwork",
    "EmissionTable",
    "FrameEmission",
    "FullContextualTransition",
    "GRUContext",
    "GaussianEmission",
    "IndependentTransition",
    "InitialTable",
    "LSTMContext",
    "LastUnits",
    "LowRankTransition",
    "ProductEmission",
    "Products",
    "SemiMarkovTransition",
    "SoftEmission",
    "Topology",
    "TransformerContext",
    "TransitionNetwork",
    "TransitionTable",
]
