import copy
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import distributions

from hmm_speech.errors import UserError
from hmm_speech.hmm import HMM
from hmm_speech.nn import GaussianEmission, InitialTable, Topology, TransitionTable
from hmm_speech.nn.blocks import count
from hmm_speech.nn.gaussian import COVARIANCES
from hmm_speech.optim import EM

D = 3
TOPOLOGY = Topology(labels=3, substates=2)
LEARNED = [name for name in COVARIANCES if name != "unit"]


def gaussian(covariance: str, topology: Topology = TOPOLOGY, seed: int = 0, **config: float) -> GaussianEmission:
    """A Gaussian emission in float64 with parameters of its own and frames in other units."""
    torch.manual_seed(seed)
    emission = GaussianEmission(topology, D, covariance, **config).double()
    with torch.no_grad():
        for parameter in emission.covariance.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    emission.standardise(torch.randn(50, D).double() * torch.tensor([0.1, 1.0, 20.0]) + torch.tensor([5.0, 0, -3]))
    return emission


def covariance_ND_D(emission: GaussianEmission) -> torch.Tensor:
    """(N, D, D): each state's covariance in the units of the frames, from the definition of its kind."""
    kind, floor = emission.covariance, emission.covariance.floor
    name = type(kind).__name__.lower()
    eye = torch.eye(D).double()
    if name == "tied":
        factor = torch.zeros(D, D).double()
        factor[tuple(torch.tril_indices(D, D))] = kind.factor.detach()
        standard = (factor @ factor.T + floor * eye).expand(emission.num_states, D, D)
    elif name == "diagonal":
        standard = torch.diag_embed(kind.log_excess.detach().exp() + floor)
    else:
        variance = 1.0 if name == "unit" else floor + float(kind.log_excess.detach().exp())
        standard = (variance * eye).expand(emission.num_states, D, D)
    return standard * emission.scale[:, None] * emission.scale


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("counting", [False, True])
def test_densities_are_those_of_torch(covariance: str, counting: bool) -> None:
    emission = gaussian(covariance)
    emission.counting = counting
    frames = torch.randn(2, 5, D).double() * emission.scale + emission.centre
    mean = emission.mean.detach() * emission.scale + emission.centre
    expected = distributions.MultivariateNormal(mean, covariance_ND_D(emission)).log_prob(frames[:, :, None])
    torch.testing.assert_close(emission(frames).detach(), expected)


def test_a_unit_variance_is_the_squared_distance_to_a_code() -> None:
    emission = GaussianEmission(Topology(4), D, "unit")
    frames = torch.randn(1, 6, D)
    distance = (frames[:, :, None] - emission.mean).square().sum(-1)
    torch.testing.assert_close(emission(frames), -distance / 2 - D / 2 * math.log(2 * math.pi))
    assert [name for name, _ in emission.covariance.named_parameters()] == []


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_gradients_reach_every_parameter(covariance: str) -> None:
    emission = gaussian(covariance)
    trained = [p for p in emission.parameters() if p.requires_grad]
    assert not any(p is emission.statistics for p in trained)
    frames = torch.randn(1, 4, D).double() * emission.scale + emission.centre
    assert torch.autograd.gradcheck(lambda *_: emission(frames), trained)
    emission(frames).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in trained)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_draws_have_the_moments_of_their_state(covariance: str) -> None:
    emission = gaussian(covariance)
    expected = covariance_ND_D(emission)
    for state in (0, 5):
        drawn = emission.draw(torch.full((40_000,), state), torch.Generator().manual_seed(1))
        mean = (emission.mean[state] * emission.scale + emission.centre).detach()
        deviation = expected[state].diagonal().sqrt()
        # four standard errors: 1 / 200 of a deviation for means, less than 1 / 100 for covariances
        assert ((drawn.mean(0) - mean).abs() < 0.02 * deviation).all()
        error = (drawn.T.cov() - expected[state]) / (deviation[:, None] * deviation)
        assert error.abs().max() < 0.04
    again = emission.draw(torch.full((40_000,), 5), torch.Generator().manual_seed(1))
    assert torch.equal(drawn, again)


def plain_em(initial, transition, mean, covariance, sequences, kind, floor):
    """One textbook iteration in float64 numpy, on probabilities; covariance (N, D, D)."""
    num_states = len(initial)
    starts, arcs = np.zeros(num_states), np.zeros((num_states, num_states))
    frames, gammas = [], []
    for x in sequences:
        difference = x[:, None] - mean
        distance = np.einsum("tnd,nde,tne->tn", difference, np.linalg.inv(covariance), difference)
        score = np.exp(-0.5 * distance - 0.5 * np.linalg.slogdet(2 * math.pi * covariance)[1])
        alpha = [initial * score[0]]
        for row in score[1:]:
            alpha.append(alpha[-1] @ transition * row)
        beta = [np.ones(num_states)]
        for row in score[:0:-1]:
            beta.insert(0, transition @ (row * beta[0]))
        alpha, beta = np.array(alpha), np.array(beta)
        gamma = alpha * beta / alpha[-1].sum()
        for t in range(1, len(x)):
            arcs += np.outer(alpha[t - 1], score[t] * beta[t]) * transition / alpha[-1].sum()
        starts += gamma[0]
        frames.append(x)
        gammas.append(gamma)
    x, gamma = np.concatenate(frames), np.concatenate(gammas)
    weight = gamma.sum(0)
    mean = gamma.T @ x / weight[:, None]
    scatter = np.stack([(gamma[:, n, None] * (x - mean[n])).T @ (x - mean[n]) for n in range(num_states)])
    if kind == "diagonal":
        found = np.einsum("ndd->nd", scatter) / weight[:, None]
        covariance = np.stack([np.diag(np.maximum(row, 1.01 * floor)) for row in found])
    elif kind == "tied":
        covariance = np.repeat(scatter.sum(0)[None] / weight.sum(), num_states, 0)
    else:
        variance = np.trace(scatter.sum(0)) / weight.sum() / D
        covariance = np.repeat(variance * np.eye(D)[None], num_states, 0)
    return starts / starts.sum(), arcs / arcs.sum(1, keepdims=True), mean, covariance


def em_parts(covariance: str, floor: float = 1e-3) -> tuple[InitialTable, TransitionTable, GaussianEmission]:
    torch.manual_seed(0)
    parts = InitialTable(TOPOLOGY).double(), TransitionTable(TOPOLOGY).double()
    emission = GaussianEmission(TOPOLOGY, D, covariance, floor).double()
    for part in (*parts, emission):
        count(part, True)
    return *parts, emission


def em_frames(count_: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    lengths = [11, 7, 9, 1, 12, 8][:count_]
    return [2 * torch.randn(length, D, generator=generator).double() for length in lengths]


def step(parts: tuple, optimizer: EM, sequences: list[torch.Tensor], divisor: float = 1.0) -> float:
    initial, transition, emission = parts
    optimizer.zero_grad()
    padded = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    total = 0.0
    for rows in (slice(0, 2), slice(2, None)):  # statistics add up over batches
        lengths = torch.tensor([len(x) for x in sequences[rows]])
        likelihood = HMM(initial(), transition(), emission(padded[rows]), lengths).log_partition().sum()
        (-likelihood / divisor).backward()
        total += float(likelihood.detach())
    optimizer.step()
    return total


def em_parameters(parts: tuple) -> list[torch.nn.Parameter]:
    return [p for part in parts for p in part.parameters() if p.requires_grad]


@pytest.mark.parametrize("covariance", LEARNED)
def test_a_step_is_baum_welch(covariance: str) -> None:
    parts = em_parts(covariance)
    initial, transition, emission = parts
    start = initial().detach().exp(), transition().detach().exp(), emission.mean.detach()
    sequences = em_frames()
    expected = plain_em(
        *(x.numpy().copy() for x in start), covariance_ND_D(emission).numpy(), [x.numpy() for x in sequences],
        covariance, emission.covariance.floor,
    )  # fmt: skip
    step(parts, EM(em_parameters(parts)), sequences, divisor=7.0)  # a constant divisor does not matter
    found = initial().detach().exp(), transition().detach().exp(), emission.mean.detach(), covariance_ND_D(emission)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.numpy(), other, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_the_likelihood_never_falls(covariance: str) -> None:
    parts = em_parts(covariance)
    optimizer = EM(em_parameters(parts))
    found = [step(parts, optimizer, em_frames()) for _ in range(30)]
    assert all(later >= earlier - 1e-9 * abs(earlier) for earlier, later in pairwise(found))
    assert found[-1] > found[0] + 10
    with torch.no_grad():
        values = torch.linalg.eigvalsh(covariance_ND_D(parts[2]))
    assert values.min() >= parts[2].covariance.floor


@pytest.mark.parametrize("covariance", LEARNED)
def test_variances_stop_at_the_floor_and_states_without_frames_stay(covariance: str) -> None:
    parts = em_parts(covariance, floor=0.01)
    emission = parts[2]
    with torch.no_grad():
        emission.mean[1] = 1e3  # never visited
    before = emission.mean[1].detach().clone()
    same = [torch.ones(6, D).double()] * 3
    optimizer = EM(em_parameters(parts))
    for _ in range(3):
        step(parts, optimizer, same)
    values = torch.linalg.eigvalsh(covariance_ND_D(emission))
    torch.testing.assert_close(values[0], torch.full((D,), 0.0101).double())
    assert torch.equal(emission.mean[1].detach(), before)


def test_a_pseudocount_is_worth_frames_of_variance_1() -> None:
    emission = em_parts("diagonal")[2]
    weight = torch.zeros(TOPOLOGY.num_states).double()
    weight[0] = 3.0
    frames = torch.tensor([[1.0, 0, 0], [3.0, 0, 0], [2.0, 0, 0]]).double()
    for pseudocount, expected in ((0.0, [2 / 3, 0.00101, 0.00101]), (2.0, [4 / 5, 2 / 5, 2 / 5])):
        emission.statistics.grad = None
        (-emission(frames[None])[0, :, 0].sum()).backward()
        EM([emission.statistics], pseudocount=pseudocount).step()
        variance = emission.covariance.variance()[0].detach()
        torch.testing.assert_close(variance, torch.tensor(expected).double())
        torch.testing.assert_close(emission.mean[0].detach(), torch.tensor([2.0, 0, 0]).double())


@pytest.mark.parametrize("covariance", LEARNED)
def test_a_rate_moves_part_of_the_way(covariance: str) -> None:
    whole, part = em_parts(covariance), em_parts(covariance)
    start = copy.deepcopy(part[2])
    for parts, lr in ((whole, 1.0), (part, 0.25)):
        step(parts, EM(em_parameters(parts), lr=lr), em_frames())
    with torch.no_grad():
        torch.testing.assert_close(part[2].mean, 0.75 * start.mean + 0.25 * whole[2].mean)
        mixed = 0.75 * covariance_ND_D(start) + 0.25 * covariance_ND_D(whole[2])
        torch.testing.assert_close(covariance_ND_D(part[2]), mixed)


@pytest.mark.parametrize("covariance", LEARNED)
def test_steps_after_mini_batches_average_their_moments(covariance: str) -> None:
    emission = em_parts(covariance)[2]
    batches = [x[:7] for x in (em_frames()[0], em_frames()[2])]
    optimizer = EM([emission.statistics], stepwise=0.8)
    for frames in batches:
        optimizer.zero_grad()
        (-emission(frames[None])[0, :, 0].sum()).backward()  # every frame is of state 0
        optimizer.step()
    rate = 3**-0.8
    mean, moments = (
        (1 - rate) * a + rate * b for a, b in zip(*((x.mean(0), x.T @ x / len(x)) for x in batches), strict=True)
    )
    torch.testing.assert_close(emission.mean[0].detach(), mean)
    expected = moments - mean[:, None] * mean
    if covariance != "tied":
        expected = torch.diag(expected.diagonal())
    if covariance == "spherical":
        expected = expected.diagonal().mean() * torch.eye(D).double()
    torch.testing.assert_close(covariance_ND_D(emission)[0], expected)


def test_a_copy_has_an_m_step_of_its_own() -> None:
    emission = em_parts("tied")[2]
    other = copy.deepcopy(emission)
    (-other(em_frames(1)[0][None]).sum()).backward()
    EM([other.statistics]).step()
    assert not torch.equal(other.mean, emission.mean)
    assert torch.equal(emission.mean, em_parts("tied")[2].mean)


def test_gradients_that_are_no_counts_are_refused() -> None:
    emission = em_parts("tied")[2]
    optimizer = EM([emission.statistics])
    (emission(em_frames(1)[0][None])[..., 0] - emission(em_frames(1)[0][None])[..., 1]).sum().backward()
    with pytest.raises(UserError, match="both signs"):
        optimizer.step()


def test_forced_chains_with_frames_far_from_every_state_but_one_are_exact_in_float32() -> None:
    """Diagonal Gaussians in a left-to-right chain: probabilities of a frame differ by e^1000 between states."""
    torch.manual_seed(0)
    emission = GaussianEmission(TOPOLOGY, D, "diagonal", floor=1e-3)
    with torch.no_grad():
        emission.mean.mul_(5)
        emission.covariance.log_excess.fill_(math.log(0.01))
    transition, initial = TransitionTable(TOPOLOGY), InitialTable(TOPOLOGY)
    frames = emission.mean.detach()[torch.tensor([[0, 1, 1, 4, 5, 2, 3, 0, 1]])] + 0.1 * torch.randn(1, 9, D)
    scores = initial().detach(), transition().detach(), emission(frames).detach()
    assert (scores[2].amax(-1) - scores[2].amin(-1)).max() > 1000
    found, wide = HMM(*scores), HMM(*(x.double() for x in scores))
    torch.testing.assert_close(found.log_partition().double(), wide.log_partition(), rtol=2e-6, atol=0)
    torch.testing.assert_close(found.marginals().double(), wide.marginals(), rtol=0, atol=5e-6)


def test_mistakes_are_told() -> None:
    with pytest.raises(UserError, match=r"emission\.covariance is 'full'; expected one of diagonal, tied"):
        GaussianEmission(TOPOLOGY, D, "full")
    with pytest.raises(UserError, match=r"emission\.floor is 0"):
        GaussianEmission(TOPOLOGY, D, floor=0)
    with pytest.raises(UserError, match="each has 2 numbers, the emission was made for 3"):
        GaussianEmission(TOPOLOGY, D)(torch.zeros(1, 4, 2))
