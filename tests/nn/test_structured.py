"""Transitions with structure, against the matrices that they stand for."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from hmm_speech.data.batching import Batch
from hmm_speech.errors import UserError
from hmm_speech.hmm import HMM
from hmm_speech.nn import (
    BandedTransition,
    ClonedEmission,
    ClonedTopology,
    ClonedTransition,
    EmissionTable,
    InitialTable,
    LowRankTransition,
    Products,
    SemiMarkovTransition,
    Topology,
    cloned,
    low_rank,
)
from hmm_speech.nn.composition import Composition, compose
from hmm_speech.nn.sampling import draw_sequences
from hmm_speech.optim import EM

V = 3
FULL, CHAIN, CLONES = Topology(6), Topology(2, 3), ClonedTopology((3, 5, 2))
NETWORK = {"dim": 8, "blocks": 1}


def parts(name: str) -> Composition:
    torch.manual_seed(0)
    made = {
        "low_rank": lambda: LowRankTransition(FULL, rank=3, **NETWORK),
        "low_rank_tables": lambda: LowRankTransition(FULL, rank=3, dim=None),
        "banded": lambda: BandedTransition(FULL, (0, 1, 3)),
        "near_diagonal": lambda: BandedTransition(FULL, (-1, 2, 1)),
        "semi_markov": lambda: SemiMarkovTransition(FULL, 2, 4, **NETWORK),
        "semi_markov_tables": lambda: SemiMarkovTransition(FULL, longest=3, dim=None),
        "cloned": lambda: ClonedTransition(CLONES, 0.5, **NETWORK),
        "cloned_low_rank": lambda: LowRankTransition(CLONES, rank=3, **NETWORK),
    }[name]()
    topology = CLONES if "cloned" in name else FULL
    emission = ClonedEmission(CLONES, V) if "cloned" in name else EmissionTable(FULL, V)
    initial = InitialTable(topology)
    for table in (initial, getattr(emission, "table", None)):
        if table is not None:
            nn.init.normal_(table.logits, std=2)
    return Composition(topology, initial, made, emission, None)


PLAIN = ("low_rank", "low_rank_tables", "banded", "near_diagonal", "cloned", "cloned_low_rank")
NAMES = (*PLAIN, "semi_markov", "semi_markov_tables")


def every_sequence(time: int) -> Batch:
    units = torch.tensor(list(itertools.product(range(V), repeat=time)))
    return Batch(units, torch.full((len(units),), time), torch.arange(len(units)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_all_sequences_of_a_length_have_probability_one(name: str, training: bool) -> None:
    model = parts(name)
    model.transition.train(training)
    for time in (1, 2, 5):
        total = compose(model, every_sequence(time)).log_partition().exp().sum()
        torch.testing.assert_close(total, torch.tensor(1.0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PLAIN)
def test_the_chain_is_that_of_the_dense_matrix(name: str) -> None:
    model = parts(name)
    model.transition.eval()
    batch = Batch(torch.tensor([[0, 1, 1, 2, 0], [2, 1, 0, 0, 0]]), torch.tensor([5, 3]), torch.arange(2))
    matrix_NN = model.transition().dense()
    torch.testing.assert_close(matrix_NN.exp().sum(-1), torch.ones(len(matrix_NN)))
    dense = HMM(model.initial(), matrix_NN, model.emission(batch.units), batch.lengths)
    found = compose(model, batch)
    torch.testing.assert_close(found.log_partition(), dense.log_partition())
    assert torch.equal(found.viterbi().states, dense.viterbi().states)
    torch.testing.assert_close(found.viterbi().score, dense.viterbi().score)
    trained = list(model.transition.parameters())
    for one, other in zip(
        *(torch.autograd.grad(x.log_partition().sum(), trained) for x in (found, dense)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_what_follows_in_sampling_is_what_the_chain_expects(name: str) -> None:
    """p(z_1 .. z_T) by the factors that sampling draws from is the path's score without its emissions."""
    model = parts(name)
    model.transition.eval()
    drawn = draw_sequences(model, 40, 7, torch.Generator().manual_seed(0))
    transition, initial_N = model.transition(), model.initial()
    following = getattr(transition, "following", None)
    total_B = torch.zeros(40)
    for t in range(7):
        past = drawn.states_BT[:, :t]
        if following is not None:
            rows = following(initial_N, past)
        else:
            rows = transition.dense()[past[:, -1]] if t else initial_N.expand(40, -1)
        torch.testing.assert_close(rows.exp().sum(-1), torch.ones(40))
        total_B = total_B + rows.gather(1, drawn.states_BT[:, t, None])[:, 0]
    torch.testing.assert_close(total_B, paths_alone(model, drawn.states_BT))


def paths_alone(model: Composition, states_BT: Tensor) -> Tensor:
    """log p(z): the log partition of chains whose emission permits but one path."""
    batch, time = states_BT.shape
    lengths = torch.full((batch,), time)
    only = torch.full((batch, time, model.topology.num_states), -torch.inf).scatter(2, states_BT[..., None], 0)
    transition = model.transition()
    if isinstance(model.topology, ClonedTopology):
        return HMM(model.initial(), transition.dense(), only, lengths).log_partition()
    if hasattr(transition, "chain"):
        return transition.chain(model.initial(), only, lengths).log_partition()
    return HMM(model.initial(), transition, only, lengths).log_partition()


@pytest.mark.parametrize("name", NAMES)
def test_gradient_steps_lower_the_loss(name: str) -> None:
    model = parts(name)
    trained = [p for part in model[1:4] for p in part.parameters()]
    optimizer = torch.optim.Adam(trained, lr=0.05)
    batch = Batch(torch.tensor([[0, 0, 1, 1, 2, 2] * 3]), torch.tensor([18]), torch.arange(1))

    def loss() -> Tensor:
        return -compose(model, batch).log_partition().sum()

    model.transition.eval()
    before = float(loss().detach())
    model.transition.train()
    for _ in range(20):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    model.transition.eval()
    assert float(loss().detach()) < before - 1


@pytest.mark.parametrize("name", ["low_rank_tables", "banded", "semi_markov_tables"])
def test_exact_em_never_falls(name: str) -> None:
    model = parts(name)
    tables = [module for part in model[1:4] for module in part.modules() if hasattr(module, "counting")]
    for table in tables:
        table.logits.data = table.logits.log_softmax(-1)
        table.counting = True
    optimizer = EM([table.logits for table in tables])
    generator = torch.Generator().manual_seed(1)
    batch = Batch(torch.randint(V, (4, 20), generator=generator), torch.tensor([20, 20, 11, 7]), torch.arange(4))
    found = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = -compose(model, batch).log_partition().double().sum()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    assert all(after < before + 1e-4 for before, after in itertools.pairwise(found))
    assert found[-1] < found[0] - 1


def test_state_dropout_keeps_a_part_of_each_units_clones_and_normalises_over_it() -> None:
    model = parts("cloned")
    model.transition.train()
    active = model.transition().active_M
    assert model.transition.unit_N[active].bincount().tolist() == [2, 2, 1]  # halves of 3, 5 and 2, to the even
    assert torch.equal(active, active.sort().values)
    drawn = {tuple(model.transition.draw().tolist()) for _ in range(30)}
    assert len(drawn) > 5
    products = model.transition()
    batch = every_sequence(3)
    found = products.chain(model.initial(), model.emission(batch.units), batch.lengths)
    active = products.active_M
    scores = (products.query_NF @ products.key_NF.T + products.bias_N)[active][:, active].log_softmax(-1)
    allowed = model.transition.unit_N[active] == batch.units[..., None]
    emission = torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)
    dense = HMM(model.initial()[active].log_softmax(-1), scores, emission, batch.lengths)
    torch.testing.assert_close(found.log_partition(), dense.log_partition())
    assert torch.equal(found.viterbi().states, active[dense.viterbi().states])


def test_the_normaliser_is_a_log_sum_in_portions_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cloned, "NUMBERS", 21)  # three rows of seven
    torch.manual_seed(0)
    query, key, bias = (torch.randn(*shape, dtype=torch.float64) * 5 for shape in ((7, 4), (7, 4), (7,)))
    query[0] *= 100  # scores of hundreds of nats
    torch.testing.assert_close(Products(query, key, bias).normaliser(), (query @ key.T + bias).logsumexp(-1))
    query[0] /= 100
    scores = tuple(x.requires_grad_() for x in (query, key, bias))
    assert torch.autograd.gradcheck(lambda *x: Products(*x).normaliser(), scores)


def test_products_are_the_same_in_small_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = parts("cloned"), every_sequence(4)
    model.transition.eval()
    made, results = [], []
    matmul = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda x, y: made.append(x.shape) or matmul(x, y))
    for numbers in (cloned.NUMBERS, 1):
        monkeypatch.setattr(cloned, "NUMBERS", numbers)
        made.clear()
        z = compose(model, batch).log_partition()
        frames = {shape[1] for shape in made}
        assert frames == ({3} if numbers > 1 else {1})  # arcs at a time, of 4 frames
        results.append((z.detach(), torch.autograd.grad(z.sum(), list(model.transition.parameters()))))
    for whole, portion in zip((results[0][0], *results[0][1]), (results[1][0], *results[1][1]), strict=True):
        torch.testing.assert_close(whole, portion, rtol=1e-4, atol=1e-4)


def test_durations_are_those_of_the_table() -> None:
    """Runs of sampled states are as long as the table says; none is shorter than `shortest` but the last."""
    torch.manual_seed(0)
    transition = SemiMarkovTransition(FULL, shortest=2, longest=4, **NETWORK).eval()
    nn.init.normal_(transition.durations.logits)
    transition.durations.logits.data[:, 0] = -torch.inf
    model = Composition(FULL, InitialTable(FULL), transition, EmissionTable(FULL, V), None)
    with torch.no_grad():
        states = draw_sequences(model, 300, 40, torch.Generator().manual_seed(0)).states_BT
        expected = transition().durations_ND.exp()
    counts = torch.zeros(6, 4)
    for row in states.tolist():
        runs = [(state, len(list(run))) for state, run in itertools.groupby(row)]
        assert max(length for _, length in runs) <= 4
        for state, length in runs[:-1]:
            counts[state, length - 1] += 1
    assert counts[:, 0].sum() == 0
    # 500 to 1500 runs a state: standard errors of .02 at most
    torch.testing.assert_close(counts / counts.sum(-1, keepdim=True), expected, rtol=0, atol=0.06)


def test_the_markov_chain_of_the_same_mean_durations() -> None:
    torch.manual_seed(0)
    durations = SemiMarkovTransition(FULL, longest=5, **NETWORK)()
    matrix = durations.dense()
    torch.testing.assert_close(matrix.exp().sum(-1), torch.ones(6))
    mean = (durations.durations_ND.exp() * torch.arange(1, 6)).sum(-1)
    torch.testing.assert_close(1 / (1 - matrix.diagonal().exp()), mean)
    leaving = matrix.masked_fill(torch.eye(6, dtype=torch.bool), -torch.inf).log_softmax(-1)
    torch.testing.assert_close(leaving, durations.matrix_NN)


def test_a_large_low_rank_chain_is_decoded_by_its_posteriors(monkeypatch: pytest.MonkeyPatch) -> None:
    model = parts("low_rank")
    model.transition.eval()
    batch = Batch(torch.tensor([[0, 1, 1, 2, 0], [2, 1, 0, 0, 0]]), torch.tensor([5, 3]), torch.arange(2))
    monkeypatch.setattr(low_rank, "MOST_STATES", 5)
    chain = compose(model, batch)
    score, states = chain.viterbi()
    assert torch.equal(states[0], chain.marginals()[0].argmax(-1))
    assert states[1].tolist() == [*chain.marginals()[1, :3].argmax(-1).tolist(), -1, -1]
    torch.testing.assert_close(score, chain.score(states))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LowRankTransition(CHAIN), "transition=low_rank: the topology, 2 labels x 3 states, forbids arcs"),
        (lambda: BandedTransition(CHAIN), "transition=banded: the topology"),
        (lambda: SemiMarkovTransition(CHAIN), "transition=semi_markov: the topology"),
        (lambda: ClonedTransition(FULL), "transition=cloned needs topology=cloned"),
        (lambda: LowRankTransition(FULL, rank=0), "transition.rank is 0"),
        (lambda: BandedTransition(FULL, [1, 1]), "transition.offsets is"),
        (lambda: BandedTransition(FULL, [0.5]), "transition.offsets is"),
        (lambda: BandedTransition(FULL, [1, 2]), "state 5 of 6 has nowhere to go"),
        (lambda: SemiMarkovTransition(FULL, 4, 3), "transition.longest is 3"),
        (lambda: SemiMarkovTransition(Topology(1)), "topology.labels must be 2"),
        (lambda: ClonedTransition(CLONES, 1.0), "transition.state_dropout is 1.0"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(make, message: str) -> None:
    with pytest.raises(UserError, match=message) as told:
        make()
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(("name", "other"), [("cloned", "low_rank"), ("semi_markov", "cloned")])
def test_emissions_that_do_not_fit_are_said(name: str, other: str) -> None:
    model, batch = parts(name), every_sequence(2)
    emission = parts(other).emission(batch.units)
    with pytest.raises(UserError, match="emission="):
        model.transition().chain(model.initial(), emission, batch.lengths)
