"""Emission, transition and initial distributions as tables and networks; plain values in, log-probabilities out."""

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
    "Context",
    "ContextualEmission",
    "ContextualTransition",
    "ConvolutionContext",
    "Drift",
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
    "ProductEmission",
    "SoftEmission",
    "Topology",
    "TransformerContext",
    "TransitionNetwork",
    "TransitionTable",
]
