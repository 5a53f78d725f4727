"""Co-training and VQ-APC against the exact likelihood and against the sum over all paths."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from hmm_speech.data.batching import Batch
from hmm_speech.errors import UserError
from hmm_speech.nn.composition import Composition, compose
from hmm_speech.nn.context import GRUContext
from hmm_speech.nn.contextual import ContextualEmission, ContextualTransition, FullContextualTransition
from hmm_speech.nn.contextual import IndependentTransition as Independent
from hmm_speech.nn.emission import ClonedEmission, EmissionTable
from hmm_speech.nn.gaussian import GaussianEmission
from hmm_speech.nn.initial import InitialTable
from hmm_speech.nn.topology import AnyTopology, ClonedTopology, Topology
from hmm_speech.nn.transition import TransitionTable
from hmm_speech.objective import VQAPC, CoTraining
from hmm_speech.objective.vq_apc import code_log_probs

N, V, D, H, T = 3, 5, 2, 6, 4
FULL = Topology(N)
KINDS = ("table", "mixture", "independent", "contextual", "full_contextual")


def parts_of(kind: str, over: str = "frames") -> Composition:
    """A small model whose scores differ enough for mistakes to show."""
    torch.manual_seed(0)
    context = None
    if kind in ("independent", "contextual", "full_contextual"):
        context = GRUContext(V, D, observes=over, dim=H, dropout=0.0)
    transition: nn.Module = {
        "table": lambda: TransitionTable(FULL),
        "mixture": lambda: Independent(FULL),
        "independent": lambda: Independent(FULL, context_dim=H),
        "contextual": lambda: ContextualTransition(FULL, context_dim=H, dim=None),
        "full_contextual": lambda: FullContextualTransition(FULL, context_dim=H, rank=2, chunk=2, dim=None),
    }[kind]()
    emission = GaussianEmission(FULL, D, covariance="unit") if over == "frames" else EmissionTable(FULL, V)
    model = Composition(FULL, InitialTable(FULL), transition, emission, context)
    with torch.no_grad():
        for module in (model.initial, model.transition, model.emission):
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter))
    return model


def batch_of(lengths: tuple[int, ...] = (T, 2, 1)) -> Batch:
    torch.manual_seed(1)
    rows, lengths_B = len(lengths), torch.tensor(lengths)
    inside_BT = torch.arange(max(lengths)) < lengths_B[:, None]
    units_BT = torch.randint(V, (rows, max(lengths))) * inside_BT
    frames_BTD = torch.randn(rows, max(lengths), D) * inside_BT[..., None]
    return Batch(units_BT, lengths_B, torch.arange(rows), frames_BTD)


def by_all_paths(model: Composition, batch: Batch, log_q_BTN: Tensor) -> Tensor:
    """(B,): sum over paths of q(z) (log q(z) - log p(x, z)), each path scored by itself."""
    hmm = compose(model, batch)
    bounds = []
    for b, length in enumerate(batch.lengths.tolist()):
        paths = torch.tensor(list(itertools.product(range(N), repeat=length)))
        total = torch.zeros(())
        for path in paths:
            states = torch.full((len(batch.lengths), batch.units.shape[1]), -1)
            for row, row_length in enumerate(batch.lengths.tolist()):
                states[row, :row_length] = 0
            states[b, :length] = path
            log_q = log_q_BTN[b, torch.arange(length), path].sum()
            total = total + log_q.exp() * (log_q - hmm.score(states)[b])
        bounds.append(total)
    return torch.stack(bounds)


@pytest.mark.parametrize("dim", [None, 4], ids=["codebook", "network"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_co_training_is_the_sum_over_all_paths_and_bounds_the_likelihood(kind: str, dim: int | None) -> None:
    model, batch = parts_of(kind), batch_of()
    objective = CoTraining(model, dim=dim)
    found = objective(model, batch)
    log_q = objective.guess(model, batch, model.emission(batch.frames))
    torch.testing.assert_close(found, by_all_paths(model, batch, log_q), rtol=1e-5, atol=1e-5)
    exact = -compose(model, batch).log_partition()
    assert (found > exact + 1e-4).all()  # q is not the posterior, so that some gap must be left


@pytest.mark.parametrize("over", ["frames", "units"])
@pytest.mark.parametrize("kind", ["mixture", "independent"])
def test_co_training_is_tight_where_the_guess_is_the_posterior(kind: str, over: str) -> None:
    model, batch = parts_of(kind, over), batch_of()

    class Knowing(CoTraining):
        """Independent states: the posterior is independent over frames, so that q can be it."""

        def guess(self, model: Composition, batch: Batch, emission_BTN: Tensor) -> Tensor:
            return compose(model, batch).marginals().clamp(min=1e-30).log()

    found, exact = Knowing(model)(model, batch), -compose(model, batch).log_partition()
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)
    # Where the gap is least its gradient is zero, and so both have one gradient.
    parameters = [p for part in (model.transition, model.emission) for p in part.parameters() if p.requires_grad]
    bound, likelihood = (torch.autograd.grad(x.sum(), parameters, allow_unused=True) for x in (found, exact))
    for ours, wanted in zip(bound, likelihood, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_distances_to_codes_are_the_posterior_where_all_codes_are_as_frequent() -> None:
    model, batch = parts_of("mixture"), batch_of()
    model.transition.bias.zero_()
    model.initial.logits.zero_()
    q = CoTraining(model).guess(model, batch, model.emission(batch.frames))
    torch.testing.assert_close(q, (-(torch.cdist(batch.frames, model.emission.mean) ** 2) / 2).log_softmax(-1))
    exact = -compose(model, batch).log_partition()
    torch.testing.assert_close(CoTraining(model)(model, batch), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gumbel_draws_estimate_the_bound(kind: str) -> None:
    model, batch = parts_of(kind), batch_of((T,) * 2)
    many = Batch(*(x.repeat_interleave(4000, 0) for x in batch[:4]))
    with torch.no_grad():
        drawn = CoTraining(model, temperature=0.5)(model, many).view(2, 4000)
        exact = CoTraining(model)(model, batch)
    error = drawn.std(1) / 4000**0.5
    assert ((drawn.mean(1) - exact).abs() < 4 * error).all()
    assert (drawn.std(1) > 0.01).all()
    CoTraining(model, temperature=0.5)(model, batch).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.emission.parameters() if p.requires_grad)


@torch.no_grad()
def test_padding_changes_nothing() -> None:
    model, batch = parts_of("contextual"), batch_of()
    objective = CoTraining(model)
    for row, wanted in enumerate(objective(model, batch)):
        length = int(batch.lengths[row])
        alone = Batch(*(x[row : row + 1] for x in batch[:4]))
        alone = alone._replace(units=alone.units[:, :length], frames=alone.frames[:, :length])
        torch.testing.assert_close(objective(model, alone)[0], wanted, rtol=1e-5, atol=1e-5)


def test_a_network_of_the_objective_learns() -> None:
    model, batch = parts_of("contextual"), batch_of()
    objective = CoTraining(model, dim=4)
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.05)
    gaps = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = objective(model, batch).sum()
        loss.backward()
        optimizer.step()
        gaps.append(float(loss.detach() + compose(model, batch).log_partition().sum().detach()))
    assert 0 < gaps[-1] < 0.5 * gaps[0]  # the model stands still: the guess comes near its posterior


@torch.no_grad()
def test_vq_apc_averages_to_the_expected_cost_of_a_code_and_bounds_the_likelihood() -> None:
    model, batch = parts_of("independent"), batch_of((T, 2))
    many = Batch(*(x.repeat_interleave(4000, 0) for x in batch[:4]))
    drawn = VQAPC(model)(model, many).view(2, 4000)
    drift_BTN = model.transition(model.context(batch.frames)).drift_BTN
    p_BTN = torch.cat([(model.initial() + drift_BTN[:, 0])[:, None], drift_BTN[:, 1:]], 1).softmax(-1)
    cost_BT = -(p_BTN * model.emission(batch.frames)).sum(-1)
    expected = torch.stack([row[:length].sum() for row, length in zip(cost_BT, batch.lengths, strict=True)])
    error = drawn.std(1) / 4000**0.5
    assert ((drawn.mean(1) - expected).abs() < 4 * error).all()
    assert (expected > -compose(model, batch).log_partition()).all()
    # Those codes' probabilities are the model's own: with them the likelihood is that of a mixture a frame.
    mixture_BT = (code_log_probs(model.initial(), drift_BTN) + model.emission(batch.frames)).logsumexp(-1)
    mixture = torch.stack([row[:length].sum() for row, length in zip(mixture_BT, batch.lengths, strict=True)])
    torch.testing.assert_close(mixture, compose(model, batch).log_partition(), rtol=1e-5, atol=1e-5)


def test_vq_apc_trains_codes_and_the_choice_of_them() -> None:
    model, batch = parts_of("independent"), batch_of()
    VQAPC(model, temperature=0.7)(model, batch).sum().backward()
    for part in (model.context, model.transition.drift, model.emission.mean):
        parameters = [part] if isinstance(part, nn.Parameter) else list(part.parameters())
        assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in parameters)


def cloned() -> Composition:
    topology: AnyTopology = ClonedTopology((1, 2, 1, 1, 1))
    context = GRUContext(V, dim=H)
    emission = ClonedEmission(topology, V)
    return Composition(topology, InitialTable(topology), Independent(topology, context_dim=H), emission, context)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: VQAPC(parts_of("contextual")), "needs transition=independent and a context"),
        (lambda: VQAPC(parts_of("mixture")), "needs transition=independent and a context"),
        (
            lambda: VQAPC(parts_of("independent", "units")._replace(emission=ContextualEmission(FULL, V, H))),
            "emission without a context",
        ),
        (lambda: VQAPC(parts_of("independent"), temperature=0), "temperature is 0; expected a positive number$"),
        (lambda: VQAPC(cloned())(cloned(), batch_of()), "has few a frame"),
        (lambda: CoTraining(cloned())(cloned(), batch_of()), "has few a frame"),
        (lambda: CoTraining(parts_of("table")._replace(topology=Topology(3, 2))), "take topology=full"),
        (lambda: CoTraining(parts_of("table"), dim=0), "dim is 0; expected a positive integer, or null"),
        (lambda: CoTraining(parts_of("table"), temperature=-1.0), "temperature is -1.0; .* or null"),
    ],
)
def test_what_does_not_fit_says_why_in_one_line(build, message: str) -> None:
    with pytest.raises(UserError, match=message) as told:
        build()
    assert "\n" not in str(told.value)
