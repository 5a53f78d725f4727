"""Where training starts: labels from clusters of units, three EM iterations, networks fitted to the tables.

From noise, most of 300 states end up alike. So each label begins as a cluster of units, a chain of substates that
moves from what comes before the cluster's units to what comes after. Only the units of the training split are used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence as padded

from hmm_speech.errors import UserError
from hmm_speech.hmm import HMM
from hmm_speech.nn.blocks import LogTable
from hmm_speech.nn.emission import EmissionTable
from hmm_speech.nn.initial import InitialTable
from hmm_speech.nn.low_rank import LowRankTransition
from hmm_speech.nn.topology import ClonedTopology, Topology, share_out
from hmm_speech.nn.transition import TransitionTable
from hmm_speech.optim import EM

CONTEXT = 0.9
STAY = 0.8  # probability of repeating a state: long stays start from few boundaries, which training then adds to
FLOOR = 0.2  # share of every emission and exit that follows the unigram
PSEUDOCOUNT = 0.1  # frames, in the EM iterations
RARE = 0.01  # share of what a class leads to that follows the unigram
TINY = 1e-30  # what noise made smaller is taken for this: a probability of 0 would never change
BATCH = 32  # utterances, in the EM iterations
MOST_STATES = 1024  # of tables (N, N), whose EM iterations and fit take a minute at that size


def pair_counts(sequences: Sequence[np.ndarray], vocabulary: int) -> np.ndarray:
    """(V, V) float64: how often unit i is followed by unit j."""
    counts = np.zeros((vocabulary, vocabulary))
    for units in sequences:
        np.add.at(counts, (units[:-1], units[1:]), 1)
    return counts


def change_counts(sequences: Sequence[np.ndarray], vocabulary: int) -> np.ndarray:
    """(V, V) float64: how often unit i is followed by another unit j; repetitions do not count."""
    counts = pair_counts(sequences, vocabulary)
    np.fill_diagonal(counts, 0)
    return counts


def cluster_units(sequences: Sequence[np.ndarray], vocabulary: int, labels: int, seed: int = 0) -> np.ndarray:
    """(labels, V) membership: how much of each unit belongs to each label; columns sum to 1.

    As many labels as units: one each. Fewer: Ward clusters of what comes before and after a unit, since units that
    sound alike keep the same company, and of the unit itself by an equal share, since two between which speech wavers
    sound alike too (square roots of distributions, so that distances are Hellinger's). More:
    frequent units are shared by several labels, in proportion to the square root of their counts, in random parts that
    later training tells apart.
    """
    if labels < vocabulary:
        from sklearn.cluster import AgglomerativeClustering

        changes = change_counts(sequences, vocabulary) + 1e-3
        here = np.eye(vocabulary)
        company = np.concatenate([here + _normalise(changes), here + _normalise(changes.T)], 1) / 2
        assignment = AgglomerativeClustering(labels).fit_predict(np.sqrt(company))
        return (np.arange(labels)[:, None] == assignment).astype(np.float64)
    counts = np.bincount(np.concatenate(list(sequences)), minlength=vocabulary)
    copies = share_out(counts, labels)
    owner = np.repeat(np.arange(vocabulary), copies)
    share = np.random.default_rng(seed).uniform(0.5, 1.5, size=labels)
    member = (owner[:, None] == np.arange(vocabulary)) * share[:, None]
    return member / member.sum(0)


def cluster_tables(
    sequences: Sequence[np.ndarray], vocabulary: int, topology: Topology, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability tables (N,), (N, N), (N, V) in which every label is a cluster of units.

    The middle of a chain emits the cluster's units; the first and last substates also what comes before and after
    them. Exits follow how often one cluster comes after another.
    """
    labels, substates = topology.labels, topology.substates
    member = cluster_units(sequences, vocabulary, labels, seed)
    unigram = np.bincount(np.concatenate(list(sequences)), minlength=vocabulary) + 0.5
    changes = change_counts(sequences, vocabulary) + 1e-3
    own = _normalise(member * unigram)
    before, after = _normalise(own @ _normalise(changes.T)), _normalise(own @ _normalise(changes))
    place = np.linspace(0, 1, substates) if substates > 1 else np.full(1, 0.5)
    early, late = np.maximum(1 - 2 * place, 0), np.maximum(2 * place - 1, 0)
    weights = np.stack([1 - CONTEXT * (early + late), CONTEXT * early, CONTEXT * late])
    emission = np.einsum("cs,clv->lsv", weights, np.stack([own, before, after]))
    emission = (1 - FLOOR) * emission + FLOOR * unigram / unigram.sum()

    exits = member @ changes @ member.T
    np.fill_diagonal(exits, 0)
    share = own.sum(1) * (member * unigram).sum(1)
    exits = (1 - FLOOR) * _normalise(exits + 1e-3) + FLOOR * share / share.sum()
    starts, transition = chain_probabilities(share, exits, topology)
    tables = (starts, transition, _normalise(emission.reshape(topology.num_states, vocabulary)))
    return tuple(log_table(table) for table in tables)


def chain_probabilities(share: np.ndarray, exits: np.ndarray, topology: Topology) -> tuple[np.ndarray, np.ndarray]:
    """(N,) and (N, N) probabilities: a label starts by its share, every state stays by STAY, a chain's end leaves by
    exits (labels, labels)."""
    substates = topology.substates
    states = np.arange(topology.num_states)
    last, first = states[substates - 1 :: substates], states[::substates]
    inner = np.setdiff1d(states, last)
    transition = STAY * np.eye(topology.num_states)
    transition[inner, inner + 1] = 1 - STAY
    transition[np.ix_(last, first)] += (1 - STAY) * exits
    starts = np.where(topology.starts().numpy(), np.repeat(share, substates), 0.0)
    return starts / starts.sum(), _normalise(transition)


def log_table(table: np.ndarray) -> Tensor:
    """Logarithms of probabilities, float32; of 0, -inf."""
    with np.errstate(divide="ignore"):
        return torch.from_numpy(np.log(table)).float()


def unit_bigram(sequences: Sequence[np.ndarray], vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """(V,) and (V, V) float64: unigram and bigram of the units; every row sums to 1.

    The bigram is interpolated with the unigram (Witten and Bell 1991: a unit that was followed by many kinds of units
    leaves more to the unigram).
    """
    counts = pair_counts(sequences, vocabulary)
    unigram = np.bincount(np.concatenate(list(sequences)), minlength=vocabulary) + 0.5
    unigram = unigram / unigram.sum()
    kinds = np.maximum((counts > 0).sum(1, keepdims=True), 1)
    return unigram, (counts + kinds * unigram) / (counts.sum(1, keepdims=True) + kinds)


def bigram_tables(sequences: Sequence[np.ndarray], topology: ClonedTopology) -> tuple[np.ndarray, np.ndarray]:
    """(N,) and (N, N) float64: :func:`unit_bigram`, dealt evenly to clones; every row sums to 1."""
    unit = topology.factors()[0].numpy()
    unigram, bigram = unit_bigram(sequences, len(topology.clones))
    clones = np.array(topology.clones)
    return (unigram / clones)[unit], (bigram / clones)[unit][:, unit]


def cloned_tables(
    sequences: Sequence[np.ndarray], vocabulary: int, topology: ClonedTopology, seed: int = 0
) -> tuple[Tensor, Tensor, None]:
    """Log-probabilities (N,) and (N, N) of cloned states: the bigram of units times noise that tells clones apart."""
    initial, transition = bigram_tables(sequences, topology)
    noise = np.random.default_rng(seed).gamma(1.0, size=transition.shape)
    return log_table(initial), log_table(_normalise(transition * noise)), None


def class_tables(
    sequences: Sequence[np.ndarray], vocabulary: int, labels: int, rank: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities (N, R), (R, N) and (N, V) of states that follow one another as units do, through classes.

    States and classes are clusters of units, or copies where they are more; a state leads to classes as its units lead
    to theirs, and a class to the states that share its units. Noise tells copies apart. No (N, N) arises.
    """
    generator = np.random.default_rng(seed)
    unigram, bigram = unit_bigram(sequences, vocabulary)
    of_states, of_classes = (cluster_units(sequences, vocabulary, size, seed) for size in (labels, rank))
    own, shared = _normalise(of_states * unigram), _normalise(of_classes * unigram)
    left, right = own @ bigram @ of_classes.T, shared @ of_states.T
    right = (1 - RARE) * right + RARE * (own * unigram).sum(1) / (own * unigram).sum()
    left, right = (_normalise(x * generator.gamma(1.0, size=x.shape)) for x in (left, right))
    emission = (1 - FLOOR) * own + FLOOR * unigram
    return tuple(log_table(np.maximum(x, TINY)) for x in (left, right, emission))


def _normalise(table: np.ndarray) -> np.ndarray:
    return table / table.sum(-1, keepdims=True)


def em_tables(
    tables: tuple[Tensor, Tensor, Tensor],
    sequences: Sequence[np.ndarray],
    topology: Topology,
    iterations: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Improve tables by EM iterations over the sequences."""
    initial, transition = InitialTable(topology), TransitionTable(topology)
    emission = EmissionTable(topology, tables[2].shape[-1])
    parts: list[LogTable] = [initial, transition, emission.table]
    for part, table in zip(parts, tables, strict=True):
        part.assign(table)
        part.counting = True
    optimizer = EM([part.logits for part in parts], pseudocount=PSEUDOCOUNT)
    for _ in range(iterations):
        optimizer.zero_grad()
        for rows in by_length(sequences):
            lengths = torch.tensor([len(sequences[row]) for row in rows])
            units = padded([torch.as_tensor(sequences[row], dtype=torch.int64) for row in rows], batch_first=True)
            HMM(initial(), transition(), emission(units), lengths).log_partition().sum().neg().backward()
        optimizer.step()
    return tuple(part.logits.detach().clone() for part in parts)


def by_length(sequences: Sequence[Sized]) -> Iterator[list[int]]:
    """The places of BATCH sequences at a time, from long to short."""
    order = sorted(range(len(sequences)), key=lambda index: (-len(sequences[index]), index))
    for start in range(0, len(order), BATCH):
        yield order[start : start + BATCH]


def fit_tables(module: nn.Module, tables: tuple[Tensor, Tensor, Tensor | None], steps: int, lr: float) -> float:
    """Fit a model's initial, transition and emission to tables; see :func:`fit_targets`."""
    parts = (module.initial, module.transition, module.emission)
    targets = [(part, table) for part, table in zip(parts, tables, strict=True) if table is not None]
    return fit_targets(targets, [p for part, _ in targets for p in part.parameters()], steps, lr)


def fit_targets(
    targets: Iterable[tuple[Any, Tensor]], parameters: Sequence[nn.Parameter], steps: int, lr: float
) -> float:
    """Have parts of a model give tables; returns the mean KL divergence left, in nats a row.

    Tables are taken over as they are; of networks, the mean over rows of KL(table || network) is minimised with Adam.
    """
    made: list[tuple[Any, Tensor]] = []
    for part, table in targets:
        if hasattr(part, "assign"):
            part.assign(table)
        else:
            made.append((getattr(part, "logits", part), table.to(parameters[0].device)))
    if not made:
        return 0.0
    optimizer = torch.optim.Adam(parameters, lr=lr)
    loss = torch.zeros(())
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.stack([_divergence(table, network()) for network, table in made]).sum()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def _divergence(table: Tensor, logits: Tensor) -> Tensor:
    allowed = table > -torch.inf
    log_probs = logits.log_softmax(-1)
    return torch.where(allowed, table.exp() * (table - torch.where(allowed, log_probs, 0)), 0).sum(-1).mean()


def set_priors(module: nn.Module, sequences: Sequence[np.ndarray]) -> None:
    """What MAP estimation draws tables between cloned states to: the bigram of their units."""
    prior = getattr(module.transition, "prior", None)
    if prior is not None:
        prior.copy_(torch.from_numpy(bigram_tables(sequences, module.topology)[1]))


def initialise(
    module: nn.Module, sequences: Sequence[np.ndarray], iterations: int, steps: int, lr: float, seed: int = 0
) -> None:
    """Tables, ``iterations`` of EM on them, then ``steps`` of Adam that fit the model to them.

    Tables of chains come from clusters of units, those of cloned states from bigrams, and so do transitions through
    classes, without EM.

    Raises:
        UserError: there are too many states for tables of (N, N), and no classes.
    """
    vocabulary = module.emission.vocabulary
    if isinstance(module.transition, LowRankTransition) and isinstance(module.topology, Topology):
        tables = class_tables(sequences, vocabulary, module.topology.labels, module.transition.rank, seed)
        targets = zip((*module.transition.halves(), module.emission), tables, strict=True)
        fit_targets(targets, [*module.transition.parameters(), *module.emission.parameters()], steps, lr)
        return
    if module.topology.num_states > MOST_STATES:
        raise UserError(
            f"callbacks.initialise makes tables of states x states, too large for {module.topology}; leave it out with "
            "callbacks.initialise=null"
        )
    if isinstance(module.topology, ClonedTopology):
        tables = cloned_tables(sequences, vocabulary, module.topology, seed)
        fit_tables(module, tables, steps, lr)
        return
    tables = cluster_tables(sequences, vocabulary, module.topology, seed)
    tables = em_tables(tables, sequences, module.topology, iterations)
    fit_tables(module, tables, steps, lr)
