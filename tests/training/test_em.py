import json
import math
from itertools import pairwise

import pytest
import torch

from hmm_speech.errors import UserError
from hmm_speech.hmm import HMM
from hmm_speech.nn import EmissionTable, InitialTable, Topology, TransitionNetwork, TransitionTable
from hmm_speech.optim import EM

V = 5


def tables(topology: Topology, seed: int = 0) -> tuple:
    torch.manual_seed(seed)
    parts = InitialTable(topology), TransitionTable(topology), EmissionTable(topology, V)
    for part in (parts[0], parts[1], parts[2].table):
        part.counting = True
        with torch.no_grad():
            part.logits.copy_((part.logits + torch.randn_like(part.logits)).log_softmax(-1))
    return parts


def parameters(parts: tuple) -> list[torch.nn.Parameter]:
    return [parameter for part in parts for parameter in part.parameters()]


def log_likelihood(parts: tuple, units: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    initial, transition, emission = parts
    return HMM(initial(), transition(), emission(units), lengths).log_partition().sum()


def baum_welch(initial, transition, emission, sequences):
    """One textbook iteration in float64: forward and backward probabilities, then ratios of expected counts."""
    starts, arcs, emitted = torch.zeros_like(initial), torch.zeros_like(transition), torch.zeros_like(emission)
    for units in sequences:
        score = emission[:, units].T  # (T, N)
        alpha, beta = [initial * score[0]], [torch.ones_like(initial)]
        for frame in score[1:]:
            alpha.append((alpha[-1] @ transition) * frame)
        for frame in score[1:].flip(0):
            beta.insert(0, transition @ (frame * beta[0]))
        total = alpha[-1].sum()
        for t, unit in enumerate(units):
            posterior = alpha[t] * beta[t] / total
            emitted[:, unit] += posterior
            if t == 0:
                starts += posterior
            else:
                arcs += alpha[t - 1][:, None] * transition * (score[t] * beta[t])[None] / total
    return [counts / counts.sum(-1, keepdim=True) for counts in (starts, arcs, emitted)]


@pytest.mark.parametrize("topology", [Topology(3), Topology(2, 3)])
def test_a_step_is_baum_welch(topology: Topology) -> None:
    parts = tables(topology)
    for part in parts:
        part.double()
    units, lengths = torch.randint(V, (4, 12)), torch.tensor([12, 7, 9, 1])
    sequences = [row[:length] for row, length in zip(units, lengths, strict=True)]
    start = [part().detach().exp() for part in parts[:2]] + [parts[2].logits().detach().exp()]
    expected = baum_welch(*start, sequences)
    optimizer = EM(parameters(parts))
    (-log_likelihood(parts, units, lengths) / 7).backward()  # a constant divisor does not matter
    optimizer.step()
    for parameter, wanted in zip(parameters(parts), expected, strict=True):
        torch.testing.assert_close(parameter.detach().exp(), wanted)


def test_the_likelihood_never_falls_and_forbidden_entries_stay() -> None:
    topology = Topology(3, 2)
    parts = tables(topology)
    optimizer = EM(parameters(parts))
    units, lengths = torch.randint(V, (8, 20)), torch.randint(1, 21, (8,))
    found = []
    for _ in range(25):
        optimizer.zero_grad()
        likelihood = log_likelihood(parts, units, lengths)
        (-likelihood).backward()
        optimizer.step()
        found.append(likelihood.item())
    assert all(later >= earlier - 1e-3 for earlier, later in pairwise(found))
    assert found[-1] > found[0] + 5
    assert not (parts[1]().detach()[~topology.arcs()] > -torch.inf).any()


def test_a_pseudocount_is_worth_frames() -> None:
    table = torch.nn.Parameter(torch.tensor([0.5, 0.5, 0.0]).log())
    table.grad = -torch.tensor([6.0, 2.0, 0.0]) / 4
    EM([table], pseudocount=1.0, scale=4.0).step()
    torch.testing.assert_close(table.detach().exp(), torch.tensor([0.7, 0.3, 0.0]))


def test_a_step_size_moves_part_of_the_way_and_unused_rows_stay() -> None:
    table = torch.nn.Parameter(torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log())
    table.grad = -torch.tensor([[4.0, 0.0], [0.0, 0.0]])
    EM([table], lr=0.5).step()
    torch.testing.assert_close(table.detach().exp(), torch.tensor([[0.75, 0.25], [0.9, 0.1]]))


def test_a_closure_is_the_e_step() -> None:
    parts = tables(Topology(3))
    optimizer = EM(parameters(parts))
    units, lengths = torch.randint(V, (2, 9)), torch.tensor([9, 4])

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = -log_likelihood(parts, units, lengths)
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first


def test_networks_are_refused() -> None:
    network = TransitionNetwork(Topology(3), dim=4, blocks=1)
    with pytest.raises(UserError, match="last dimension does not sum to 1"):
        EM(network.parameters())


def test_gradients_that_are_no_counts_are_refused() -> None:
    part = TransitionTable(Topology(3))  # counting is off, so the gradient goes through log_softmax
    optimizer = EM(part.parameters())
    (-(part() * torch.tensor([[3.0, 1, 1]])).sum()).backward()
    with pytest.raises(UserError, match="both signs"):
        optimizer.step()


@pytest.mark.parametrize(
    "values", [{"stepwise": 0.5}, {"pseudocount": -1.0}, {"pseudocount": math.nan}, {"lr": 0.0}, {"lr": 2.0}]
)
def test_wrong_settings_are_refused(values: dict) -> None:
    with pytest.raises(UserError, match="EM: "):
        EM([torch.nn.Parameter(torch.zeros(1))], **values)


def test_a_prior_is_worth_so_many_frames_in_each_row() -> None:
    table = torch.nn.Parameter(torch.tensor([[0.5, 0.5, 0.0]]).log())
    table.grad = -torch.tensor([[6.0, 2.0, 0.0]]) / 4
    EM([{"params": [table], "prior": torch.tensor([[0.1, 0.9, 0.0]])}], pseudocount=10.0, scale=4.0).step()
    torch.testing.assert_close(table.detach().exp(), torch.tensor([[7.0, 11.0, 0.0]]) / 18)


def test_stepwise_counts_are_a_running_average() -> None:
    table = torch.nn.Parameter(torch.tensor([0.5, 0.5]).log())
    optimizer = EM([table], stepwise=0.6)
    counts = [torch.tensor(x) for x in ([8.0, 2.0], [1.0, 9.0], [5.0, 5.0])]
    average = counts[0]
    for step, found in enumerate(counts):
        table.grad = -found
        optimizer.step()
        if step:
            weight = (step + 2) ** -0.6
            average = (1 - weight) * average + weight * found
        torch.testing.assert_close(table.detach().exp(), average / average.sum())


def test_cloned_states_are_drawn_to_the_bigram(tmp_path, train) -> None:
    """With a pseudocount that outweighs the data, the model is the bigram."""
    cloned = ("topology=cloned", "topology.states=60", "emission=cloned")
    run = ("transition=table", "initial=table", "optimizer=em", "trainer.max_epochs=2")
    found = []
    for pseudocount in (0.01, 1e9):
        folder = tmp_path / str(pseudocount)
        train(folder, *cloned, *run, f"optimizer.pseudocount={pseudocount}", networks=False)
        found.append(json.loads((folder / "metrics.json").read_text()))
    assert found[1]["bits_per_frame"] == pytest.approx(found[1]["baselines"]["bigram"], abs=0.1)
    assert abs(found[0]["bits_per_frame"] - found[1]["bits_per_frame"]) > 0.05


def test_a_pseudocount_is_chosen_on_the_valid_split(tmp_path, train) -> None:
    """Sixty states from forty utterances: the largest of three is best, and resuming keeps it."""
    cloned = ("topology=cloned", "topology.states=60", "emission=cloned", "transition=table", "initial=table")
    choose = "hmm_speech.callbacks.ChoosePseudocount"
    run = ("optimizer=em", f"+callbacks.pseudocount={{_target_:{choose},candidates:[0.001,30,1]}}")
    train(tmp_path, *cloned, *run, "trainer.max_epochs=1", networks=False)
    last = tmp_path / "checkpoints" / "last.ckpt"
    groups = torch.load(last, weights_only=True)["optimizer_states"][0]["param_groups"]
    assert {group["pseudocount"] for group in groups} == {30}
    train(tmp_path, *cloned, *run, "trainer.max_epochs=2", f"ckpt_path={last}", networks=False)
    groups = torch.load(last, weights_only=True)["optimizer_states"][0]["param_groups"]
    assert {group["pseudocount"] for group in groups} == {30}
    with pytest.raises(UserError, match="optimizer=em adds"):
        train(tmp_path / "adam", *cloned, run[1], networks=False)
