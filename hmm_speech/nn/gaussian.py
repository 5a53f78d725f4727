"""p(x_t | z_t) over frames as Gaussians with one of four covariances, by gradients or by exact EM.

Shapes: B utterances, T frames, N states, D numbers a frame.

With squares multiplied out, every kind is one or two matrix products over all frames and states; no B x T x N x D
tensor arises. Each kind of covariance is a module of its own with

    scores(x, mean_ND)            (..., N): log N(x; mean_z, covariance_z) + D/2 log 2 pi
    second                        the shape of its second moments: (N, D), (D, D) or ()
    quadratic(x, weight)          (..., N) or (..., 1): -1/2 <weight, x x^T> for a weight of that shape
    maximise(count_N, mean_ND, second, prior, lr)    the M-step, from moments summed over frames
    colour(noise_BD, states_B)    noise of variance 1, given the covariance of each state
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hmm_speech.errors import UserError
from hmm_speech.nn.frames import FrameEmission
from hmm_speech.nn.topology import AnyTopology
from hmm_speech.optim import Statistics

SMALLEST = 0.01  # of the floor: what a learned variance above it is held to
FEWEST = 1e-6  # frames; a state with fewer keeps its mean and variance


class Diagonal(nn.Module):
    """A variance for each state and dimension, floor + exp(log_excess)."""

    def __init__(self, num_states: int, dimension: int, floor: float) -> None:
        super().__init__()
        self.floor, self.second = floor, (num_states, dimension)
        self.log_excess = nn.Parameter(torch.zeros(num_states, dimension))

    def variance(self) -> Tensor:
        return self.floor + self.log_excess.exp()

    def scores(self, x: Tensor, mean_ND: Tensor) -> Tensor:
        weight = self.variance().reciprocal()
        linear = weight * mean_ND
        return x @ linear.T + self.quadratic(x, weight) + 0.5 * (weight.log() - linear * mean_ND).sum(-1)

    def quadratic(self, x: Tensor, weight_ND: Tensor) -> Tensor:
        return -0.5 * x.square() @ weight_ND.T

    def maximise(self, count_N: Tensor, mean_ND: Tensor, second_ND: Tensor, prior: float, lr: float) -> None:
        count = count_N.unsqueeze(-1)
        variance = (second_ND - count * mean_ND.square() + prior) / (count + prior).clamp(min=FEWEST)
        mixed = (1 - lr) * self.variance() + lr * variance
        excess = (mixed - self.floor).clamp(min=SMALLEST * self.floor)
        self.log_excess.copy_(torch.where(count > FEWEST, excess.log(), self.log_excess))

    def colour(self, noise_BD: Tensor, states_B: Tensor) -> Tensor:
        return noise_BD * self.variance()[states_B].sqrt()


class Tied(nn.Module):
    """One full covariance for all states, floor * I + F F^T with F lower triangular."""

    def __init__(self, num_states: int, dimension: int, floor: float) -> None:
        super().__init__()
        self.floor, self.second = floor, (dimension, dimension)
        rows, columns = torch.tril_indices(dimension, dimension)
        self.register_buffer("place", rows * dimension + columns, persistent=False)
        self.register_buffer("identity", torch.eye(dimension), persistent=False)
        self.factor = nn.Parameter(torch.eye(dimension).flatten()[self.place])

    def cholesky(self) -> Tensor:
        """(D, D) L, lower triangular: the covariance is L L^T."""
        size = len(self.identity)
        factor = self.factor.new_zeros(size * size).index_put((self.place,), self.factor).view(size, size)
        return torch.linalg.cholesky(factor @ factor.T + self.floor * self.identity)

    def scores(self, x: Tensor, mean_ND: Tensor) -> Tensor:
        """Squared distances of whitened frames, L^-1 x, from whitened means."""
        cholesky = self.cholesky()
        whitener = torch.linalg.solve_triangular(cholesky, self.identity, upper=False)
        frames, mean = x @ whitener.T, mean_ND @ whitener.T
        constant = -0.5 * mean.square().sum(-1) - cholesky.diagonal().log().sum()
        return frames @ mean.T - 0.5 * frames.square().sum(-1, keepdim=True) + constant

    def quadratic(self, x: Tensor, weight_DD: Tensor) -> Tensor:
        return -0.5 * (x @ weight_DD * x).sum(-1, keepdim=True)

    def maximise(self, count_N: Tensor, mean_ND: Tensor, second_DD: Tensor, prior: float, lr: float) -> None:
        scatter = second_DD - mean_ND.T @ (count_N.unsqueeze(-1) * mean_ND) + prior * self.identity
        covariance = scatter / (count_N.sum() + prior).clamp(min=FEWEST)
        cholesky = self.cholesky().double()
        mixed = (1 - lr) * cholesky @ cholesky.T + lr * (covariance + covariance.T) / 2
        values, vectors = torch.linalg.eigh(mixed)
        excess = (values - self.floor).clamp(min=SMALLEST * self.floor)
        factor = torch.linalg.cholesky(vectors * excess @ vectors.T)
        self.factor.copy_(factor.flatten()[self.place])

    def colour(self, noise_BD: Tensor, states_B: Tensor) -> Tensor:
        return noise_BD @ self.cholesky().T


class Spherical(nn.Module):
    """One variance for all states and dimensions, floor + exp(log_excess), or 1 and not learned."""

    def __init__(self, num_states: int, dimension: int, floor: float, learned: bool = True) -> None:
        super().__init__()
        self.floor, self.second = floor, ()
        self.log_excess = nn.Parameter(torch.zeros(())) if learned else None

    def variance(self) -> Tensor | float:
        return 1.0 if self.log_excess is None else self.floor + self.log_excess.exp()

    def scores(self, x: Tensor, mean_ND: Tensor) -> Tensor:
        variance = torch.as_tensor(self.variance(), dtype=x.dtype, device=x.device)
        constant = -0.5 * (mean_ND.square().sum(-1) / variance + x.shape[-1] * variance.log())
        return x @ (mean_ND / variance).T + self.quadratic(x, 1 / variance) + constant

    def quadratic(self, x: Tensor, weight: Tensor) -> Tensor:
        return -0.5 * weight * x.square().sum(-1, keepdim=True)

    def maximise(self, count_N: Tensor, mean_ND: Tensor, second: Tensor, prior: float, lr: float) -> None:
        if self.log_excess is not None:
            size = mean_ND.shape[-1]
            scatter = (second - (count_N.unsqueeze(-1) * mean_ND.square()).sum()) / size
            variance = (scatter + prior) / (count_N.sum() + prior).clamp(min=FEWEST)
            mixed = (1 - lr) * self.variance() + lr * variance
            self.log_excess.copy_((mixed - self.floor).clamp(min=SMALLEST * self.floor).log())

    def colour(self, noise_BD: Tensor, states_B: Tensor) -> Tensor:
        return noise_BD * torch.as_tensor(self.variance()).sqrt()


class Unit(Spherical):
    """Variance 1: log p(x | z) = -|x - mean_z|^2 / 2 - const, the codebook of co-training."""

    def __init__(self, num_states: int, dimension: int, floor: float) -> None:
        super().__init__(num_states, dimension, floor, learned=False)


COVARIANCES: dict[str, type[nn.Module]] = {
    "diagonal": Diagonal,
    "tied": Tied,
    "spherical": Spherical,
    "unit": Unit,
}


class GaussianEmission(FrameEmission):
    """log N(x; mean_z, covariance) in nats, constants included (Rabiner 1989, section IV-A, with one component).

    Frames are standardised first: means and variances are those of (x - centre) / scale, with ``centre`` and ``scale``
    of the training split (:meth:`standardise`), and densities those of x itself. So no features need special settings.

    In float32, a density is off by up to some 1e-7 of the largest |mean|^2 / variance of standardised frames: squares
    are multiplied out.

    With ``unit`` covariances, states are codes in the space of the input, scored by their squared distance: the
    codebook of co-training (Yeh and Tang 2022, arXiv:2203.15840).

    Exact EM. A Gaussian is an exponential family, log p(x | z) = bias_z + linear_z . x - 1/2 <weight_z, x x^T>. With
    ``counting`` set, these natural parameters are shifted by ``statistics``, a parameter that is zero. The derivative
    of the log-likelihood with respect to a natural parameter is the expected sufficient statistic that belongs to it,
    sum_t p(z_t = z | x) times 1, x_t and -1/2 x_t x_t^T, so that backpropagation is the E-step as it is for tables
    (:class:`hmm_speech.optim.EM`), and :meth:`maximise` the M-step.

    Args:
        dimension: D.
        covariance: ``diagonal`` (for each state), ``tied`` (one full covariance for all states), ``spherical`` (one
            variance for everything) or ``unit`` (that variance is 1 and not learned).
        floor: least variance, of standardised frames: in tied covariances, in any direction.

    Raises:
        UserError: another covariance, a floor that is not positive, frames of another dimension.
    """

    def __init__(self, topology: AnyTopology, dimension: int, covariance: str = "tied", floor: float = 1e-3) -> None:
        super().__init__(topology, dimension)
        if covariance not in COVARIANCES:
            raise UserError(f"emission.covariance is {covariance!r}; expected one of {', '.join(COVARIANCES)}")
        if not 0 < floor < 1:
            raise UserError(f"emission.floor is {floor!r}; expected more than 0 and less than 1 (frames have 1)")
        self.register_buffer("centre", torch.zeros(dimension))
        self.register_buffer("scale", torch.ones(dimension))
        self.mean = nn.Parameter(torch.randn(self.num_states, dimension))
        self.covariance = COVARIANCES[covariance](self.num_states, dimension, floor)
        self._shapes = [(self.num_states,), (self.num_states, dimension), self.covariance.second]
        self.statistics = Statistics(sum(math.prod(shape) for shape in self._shapes), self.maximise)

    @property
    def counting(self) -> bool:
        """Whether gradients are statistics for EM; set before DDP wraps the model."""
        return self.statistics.requires_grad

    @counting.setter
    def counting(self, value: bool) -> None:
        for parameter in self.parameters():
            parameter.requires_grad_(value == (parameter is self.statistics))

    def _split(self, flat: Tensor) -> list[Tensor]:
        """Pieces for bias, linear and weight of a flat tensor like ``statistics``."""
        parts = flat.split([math.prod(shape) for shape in self._shapes])
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def scores(self, frames_BTD: Tensor) -> Tensor:
        x = (frames_BTD - self.centre) / self.scale
        found = self.covariance.scores(x, self.mean)
        if self.counting:
            bias, linear, weight = self._split(self.statistics)
            found = found + (x @ linear.T + self.covariance.quadratic(x, weight) + bias)
        return found - (0.5 * self.dimension * math.log(2 * math.pi) + self.scale.log().sum())

    @torch.no_grad()
    def maximise(self, expected: Tensor, pseudocount: float, lr: float) -> None:
        """The M-step: means and covariances of expected statistics (flat, as ``statistics``; counts in frames).

        A pseudocount adds that many frames of variance 1 around each state's own mean. With ``lr`` below 1, means and
        covariances move that part of the way.

        Raises:
            UserError: the counts have both signs.
        """
        count, first, second = (part.double() for part in self._split(expected))
        if count.min() < -1e-3 * count.abs().max():
            raise UserError(
                "EM: the gradient of a Gaussian emission has both signs, so it is not made of expected counts; "
                "minimise the negative log-likelihood alone, without regularisers"
            )
        count = count.clamp(min=0)
        mean = first / count.clamp(min=FEWEST).unsqueeze(-1)
        self.covariance.maximise(count, mean, -2 * second, pseudocount, lr)
        moved = (1 - lr) * self.mean + lr * mean
        self.mean.copy_(torch.where(count.unsqueeze(-1) > FEWEST, moved, self.mean))

    @torch.no_grad()
    def standardise(self, frames_FD: Tensor) -> None:
        """Take centre and scale from all frames of the training split; a number that does not vary keeps its scale."""
        deviation, mean = torch.std_mean(frames_FD.double(), 0, correction=0)
        self.centre.copy_(mean)
        self.scale.copy_(torch.where(deviation > 1e-5, deviation, 1.0))

    def points(self, frames_FD: Tensor) -> Tensor:
        """Standardised frames."""
        return (frames_FD - self.centre) / self.scale

    @torch.no_grad()
    def draw(self, states_B: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A frame from each state's Gaussian: (B,) -> (B, D)."""
        like = {"dtype": self.mean.dtype, "device": self.mean.device}
        noise = torch.randn(len(states_B), self.dimension, generator=generator, **like)
        return (self.mean[states_B] + self.covariance.colour(noise, states_B)) * self.scale + self.centre
