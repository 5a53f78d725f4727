"""p(x_t | z_t) over frames as Gaussians with one of four covariances, by gradients or by exact EM.

Shapes: B utterances, T frames, N states, D numbers a frame.

A Gaussian is an exponential family: with natural parameters,

    log p(x | z) = linear_z . y - 1/2 <weight_z, y y^T> + bias_z,        y = x, or x whitened by a shared covariance

which is one matrix product over all frames and states; no B x T x N x D tensor arises.
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
    """A variance for each state and dimension, floor + exp(log_excess): weight (N, D)."""

    def __init__(self, num_states: int, dimension: int, floor: float) -> None:
        super().__init__()
        self.floor, self.second = floor, (num_states, dimension)
        self.log_excess = nn.Parameter(torch.zeros(num_states, dimension))

    def variance(self) -> Tensor:
        return self.floor + self.log_excess.exp()

    def natural(self, x: Tensor, mean_ND: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """y, bias (N,), linear (N, D) and weight (N, D)."""
        weight = self.variance().reciprocal()
        linear = weight * mean_ND
        return x, 0.5 * (weight.log() - linear * mean_ND).sum(-1), linear, weight

    def quadratic(self, y: Tensor, weight_ND: Tensor) -> Tensor:
        return -0.5 * y.square() @ weight_ND.T

    def maximise(self, count_N: Tensor, mean_ND: Tensor, second_ND: Tensor, prior: float, lr: float) -> Tensor:
        """Set the variances from sum(posterior x^2); returns the means in the frames' coordinates."""
        count = count_N.unsqueeze(-1)
        variance = (second_ND - count * mean_ND.square() + prior) / (count + prior).clamp(min=FEWEST)
        mixed = (1 - lr) * self.variance() + lr * variance
        excess = (mixed - self.floor).clamp(min=SMALLEST * self.floor)
        self.log_excess.copy_(torch.where(count > FEWEST, excess.log(), self.log_excess))
        return mean_ND

    def colour(self, noise_BD: Tensor, states_B: Tensor) -> Tensor:
        return noise_BD * self.variance()[states_B].sqrt()


class Tied(nn.Module):
    """One full covariance for all states, floor * I + F F^T with F lower triangular: weight (D, D) after whitening.

    y = L^-1 x with L the Cholesky factor of the covariance, so that weight is the identity.
    """

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

    def natural(self, x: Tensor, mean_ND: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """y, bias (N,), linear (N, D) and weight (D, D)."""
        cholesky = self.cholesky()
        whitener = torch.linalg.solve_triangular(cholesky, self.identity, upper=False)
        linear = mean_ND @ whitener.T
        bias = -0.5 * linear.square().sum(-1) - cholesky.diagonal().log().sum()
        return x @ whitener.T, bias, linear, self.identity

    def quadratic(self, y: Tensor, weight_DD: Tensor) -> Tensor:
        return -0.5 * (y @ weight_DD * y).sum(-1, keepdim=True)

    def maximise(self, count_N: Tensor, mean_ND: Tensor, second_DD: Tensor, prior: float, lr: float) -> Tensor:
        """Set the covariance from sum(posterior y y^T); returns the means in the frames' coordinates."""
        cholesky = self.cholesky().double()
        scatter = second_DD - mean_ND.T @ (count_N.unsqueeze(-1) * mean_ND)
        scatter = cholesky @ scatter @ cholesky.T + prior * self.identity
        covariance = scatter / (count_N.sum() + prior).clamp(min=FEWEST)
        mixed = (1 - lr) * cholesky @ cholesky.T + lr * (covariance + covariance.T) / 2
        values, vectors = torch.linalg.eigh(mixed)
        excess = (values - self.floor).clamp(min=SMALLEST * self.floor)
        factor = torch.linalg.cholesky(vectors * excess @ vectors.T)
        self.factor.copy_(factor.flatten()[self.place])
        return mean_ND @ cholesky.T

    def colour(self, noise_BD: Tensor, states_B: Tensor) -> Tensor:
        return noise_BD @ self.cholesky().T


class Spherical(nn.Module):
    """One variance for all states and dimensions, floor + exp(log_excess), or 1 and not learned: weight ()."""

    def __init__(self, num_states: int, dimension: int, floor: float, learned: bool = True) -> None:
        super().__init__()
        self.floor, self.second = floor, ()
        self.log_excess = nn.Parameter(torch.zeros(())) if learned else None

    def variance(self) -> Tensor | float:
        return 1.0 if self.log_excess is None else self.floor + self.log_excess.exp()

    def natural(self, x: Tensor, mean_ND: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """y, bias (N,), linear (N, D) and weight ()."""
        variance = torch.as_tensor(self.variance(), dtype=x.dtype, device=x.device)
        linear = mean_ND / variance
        bias = -0.5 * ((linear * mean_ND).sum(-1) + x.shape[-1] * variance.log())
        return x, bias, linear, variance.reciprocal()

    def quadratic(self, y: Tensor, weight: Tensor) -> Tensor:
        return -0.5 * weight * y.square().sum(-1, keepdim=True)

    def maximise(self, count_N: Tensor, mean_ND: Tensor, second: Tensor, prior: float, lr: float) -> Tensor:
        """Set the variance from sum(posterior |x|^2); returns the means in the frames' coordinates."""
        if self.log_excess is not None:
            size = mean_ND.shape[-1]
            scatter = (second - (count_N.unsqueeze(-1) * mean_ND.square()).sum()) / size
            variance = (scatter + prior) / (count_N.sum() + prior).clamp(min=FEWEST)
            mixed = (1 - lr) * self.variance() + lr * variance
            self.log_excess.copy_((mixed - self.floor).clamp(min=SMALLEST * self.floor).log())
        return mean_ND

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

    Exact EM. With ``counting`` set, natural parameters are shifted by ``statistics``, a parameter that is zero. The
    derivative of the log-likelihood with respect to a natural parameter is the expected sufficient statistic that
    belongs to it, sum_t p(z_t = z | x) times 1, y_t and -1/2 y_t y_t^T, so that backpropagation is the E-step as it is
    for tables (:class:`hmm_speech.optim.EM`), and :meth:`maximise` the M-step.

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
            raise UserError(f"emission.floor is {floor!r}; expected more than 0 and less than 1, the variance of frames")
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
        y, *natural = self.covariance.natural((frames_BTD - self.centre) / self.scale, self.mean)
        if self.counting:
            natural = [a + b for a, b in zip(natural, self._split(self.statistics), strict=True)]
        bias, linear, weight = natural
        constant = 0.5 * self.dimension * math.log(2 * math.pi) + self.scale.log().sum()
        return y @ linear.T + self.covariance.quadratic(y, weight) + (bias - constant)

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
        found = first / count.clamp(min=FEWEST).unsqueeze(-1)
        mean = self.covariance.maximise(count, found, -2 * second, pseudocount, lr)
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
