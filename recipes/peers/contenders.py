"""hmm_speech, its peers, and the loop that one writes in torch: each answers the same problem by its public interface.

A peer that is not installed is left out. Where an interface lacks something (lengths, final scores, potentials that are
no probabilities), its contender does exactly that outside: `folded`, and one call for each sequence.
"""

from __future__ import annotations

import importlib.metadata

import numpy as np
import torch
from cases import Answer, Problem

from hmm_speech.hmm import HMM


class Contender:
    """A name, the distribution that must be installed, and `answer`."""

    name: str
    distribution: str | None = None

    @classmethod
    def version(cls) -> str | None:
        """The installed version, None where absent."""
        try:
            return importlib.metadata.version(cls.distribution or "torch")
        except importlib.metadata.PackageNotFoundError:
            return None

    def answer(self, problem: Problem) -> Answer:
        raise NotImplementedError


class Layer(Contender):
    name = "hmm_speech"

    def answer(self, problem: Problem) -> Answer:
        initial, transition, emission, final = single(problem)
        hmm = HMM(initial, transition, emission, problem.lengths, final)
        z = hmm.log_partition()
        (gradient,) = torch.autograd.grad((z * problem.upstream.float()).sum(), emission)
        return Answer(z.detach().double(), hmm.marginals().detach().double(), gradient.double())


class TorchLoop(Contender):
    """The forward algorithm in log space, a torch.logsumexp a frame, as one writes it; autograd does the rest."""

    name = "loop in torch"

    def answer(self, problem: Problem) -> Answer:
        initial, transition, emission, final = single(problem)
        z = self.log_partition(initial, transition, emission, problem.lengths, final)
        (marginals,) = torch.autograd.grad(z.sum(), emission, retain_graph=True)
        (gradient,) = torch.autograd.grad((z * problem.upstream.float()).sum(), emission)
        return Answer(z.detach().double(), marginals.double(), gradient.double())

    @staticmethod
    def log_partition(initial, transition, emission, lengths, final):
        frames = emission.unbind(1)
        arcs = transition.unbind(1) if transition.dim() == 4 else [transition] * (len(frames) - 1)
        alpha = initial + frames[0]
        for t in range(1, len(frames)):
            new = torch.logsumexp(alpha.unsqueeze(-1) + arcs[t - 1], 1) + frames[t]
            alpha = torch.where((t < lengths).unsqueeze(-1), new, alpha)
        z = torch.logsumexp(alpha if final is None else alpha + final, -1)
        return torch.where(lengths > 0, z, 0)


class TorchStruct(Contender):
    """LinearChainCRF, whose potentials are edges (B, T-1, N, N), [z_{t+1}, z_t]: unary scores go on the edges."""

    name, distribution = "torch-struct", "torch-struct"

    def answer(self, problem: Problem) -> Answer:
        from torch_struct import LinearChainCRF

        initial, transition, emission, final = single(problem)
        crf = LinearChainCRF(self.edges(initial, transition, emission, problem.lengths, final), problem.lengths)
        z = crf.partition
        (gradient,) = torch.autograd.grad((z * problem.upstream.float()).sum(), emission)
        edges = crf.marginals.detach().double()
        marginals = torch.cat([edges[:, :1].sum(2), edges.sum(3)], 1)
        return Answer(z.detach().double(), marginals, gradient.double())

    @staticmethod
    def edges(initial, transition, emission, lengths, final):
        arcs = transition.transpose(-1, -2)  # (..., to, from)
        scores = (arcs if arcs.dim() == 4 else arcs.expand(len(emission), emission.shape[1] - 1, -1, -1)).clone()
        scores = scores + emission[:, 1:].unsqueeze(-1)
        scores[:, 0] = scores[:, 0] + (initial + emission[:, 0]).unsqueeze(-2)
        if final is not None:
            scores[torch.arange(len(lengths)), lengths - 2] += final.unsqueeze(-1)
        return scores


class Dynamax(Contender):
    """hmm_filter and hmm_smoother of dynamax.hidden_markov_model, float32 as jax comes; jax.grad through the filter."""

    name, distribution = "dynamax", "dynamax"
    x64 = False

    def answer(self, problem: Problem) -> Answer:
        import jax
        import jax.numpy as jnp
        from dynamax.hidden_markov_model import hmm_filter, hmm_smoother

        def log_partition(e, start, arcs):
            return hmm_filter(start, arcs, e).marginal_loglik

        def one(start, arcs, e):
            z, gradient = jax.value_and_grad(log_partition)(e, start, arcs)
            return z, hmm_smoother(start, arcs, e).smoothed_probs, gradient

        dtype = jnp.float64 if self.x64 else jnp.float32
        with jax.enable_x64(self.x64):
            return per_sequence(problem, lambda *x: one(*(jnp.asarray(y, dtype) for y in x)))


class Dynamax64(Dynamax):
    name, x64 = "dynamax, float64", True


class HmmLearn(Contender):
    """A BaseHMM whose log-likelihoods are the scores: observation t is t. float64, no gradients."""

    name, distribution, implementation = "hmmlearn", "hmmlearn", "log"

    def answer(self, problem: Problem) -> Answer:
        def one(start, arcs, e):
            if arcs.ndim == 3:
                raise NotImplementedError("transitions that vary over time")
            z, posteriors = self.model(start, arcs, e).score_samples(np.arange(len(e))[:, None])
            return z, posteriors, None

        return per_sequence(problem, one)

    def model(self, start, arcs, e):
        from hmmlearn.base import BaseHMM

        class Scores(BaseHMM):
            def _compute_log_likelihood(self, X):
                return e[X[:, 0]]

        model = Scores(len(start), implementation=self.implementation)
        model.startprob_, model.transmat_ = start, arcs
        return model


class HmmLearnScaling(HmmLearn):
    name, implementation = "hmmlearn, scaling", "scaling"


CONTENDERS: tuple[type[Contender], ...] = (
    Layer, TorchLoop, TorchStruct, Dynamax, Dynamax64, HmmLearn, HmmLearnScaling,
)  # fmt: skip


def present() -> list[Contender]:
    """The contenders that can run here."""
    return [kind() for kind in CONTENDERS if kind.version() is not None]


def single(problem: Problem):
    """The scores in float32; the emission takes a gradient."""
    final = None if problem.final is None else problem.final.float()
    return problem.initial.float(), problem.transition.float(), problem.emission.float().requires_grad_(), final


def folded(initial, transition, emission, final):
    """Probabilities of starting and of arcs, emission scores and a constant that together score paths the same.

    Arcs out of a state are divided by their sum, which goes to the emission of the frame that they leave.
    """
    outgoing = transition.logsumexp(-1)
    emission = emission.clone()
    if len(emission) > 1:
        emission[:-1] += outgoing
    if final is not None:
        emission[-1] += final
    probability = (transition - outgoing.unsqueeze(-1)).exp()
    return initial.softmax(-1), probability, emission, float(initial.logsumexp(-1))


def per_sequence(problem: Problem, one) -> Answer:
    """Answer with one(start, arcs, emission) -> (log Z, marginals (L, N), gradient or None) of each sequence."""
    z, marginals, gradient = [], torch.zeros_like(problem.emission), torch.zeros_like(problem.emission)
    differentiable = True
    for b, length in enumerate(problem.lengths.tolist()):
        if length == 0:  # no sequence, nothing to ask for
            z.append(0.0)
            continue
        arcs = problem.transition if problem.transition.dim() == 2 else problem.transition[b, : length - 1]
        start, probability, emission, constant = folded(
            problem.initial, arcs, problem.emission[b, :length], problem.final
        )
        log_z, m, g = one(start.numpy(), probability.numpy(), emission.numpy())
        z.append(float(log_z) + constant)
        marginals[b, :length] = torch.from_numpy(np.array(m, np.float64))
        differentiable = differentiable and g is not None
        if g is not None:
            gradient[b, :length] = torch.from_numpy(np.array(g, np.float64)) * problem.upstream[b]
    return Answer(torch.tensor(z, dtype=torch.float64), marginals, gradient if differentiable else None)
