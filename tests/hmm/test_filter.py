"""Streaming inference against the offline layer and, through it, against enumeration."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hmm_speech.hmm import HMM, HMMFilter, use_backend
from tests.hmm.problems import INF

BACKENDS = ("native", "reference")


def scores(batch, time, states, per_sequence=False, forbidden=0.0, seed=0, dtype=torch.float64, scale=1.0, whole=False):
    g = torch.Generator().manual_seed(seed)

    def made(*shape):
        x = torch.randn(shape, generator=g, dtype=torch.float64) * scale
        x = x.round() if whole else x
        x[torch.rand(shape, generator=g) < forbidden] = -INF
        return x.to(dtype)

    initial = made(batch, states) if seed % 2 else made(states)
    return initial, made(*(batch,) * per_sequence, states, states), made(batch, time, states)


def left_to_right(states, width=2):
    x = torch.full((states, states), -INF, dtype=torch.float64)
    for k in range(width):
        x.diagonal(k).copy_(torch.linspace(-1, 1, states - k, dtype=torch.float64))
    return x


@st.composite
def streams(draw):
    """Scores of a few streams, and how many frames of each arrive with each update: (updates, B)."""
    batch, states = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    counts = draw(st.lists(st.lists(st.integers(0, 4), min_size=batch, max_size=batch), min_size=1, max_size=5))
    counts = torch.tensor(counts)
    problem = scores(
        batch, int(counts.sum(0).max()), states, draw(st.booleans()), draw(st.sampled_from([0.0, 0.0, 0.3])),
        draw(st.integers(0, 10_000)), scale=draw(st.sampled_from([0.5, 3.0, 300.0])), whole=draw(st.booleans()),
    )  # fmt: skip
    if states > 1 and draw(st.booleans()):
        problem = (problem[0], left_to_right(states), problem[2])
    return *problem, counts


def updates(emission, counts):
    """The emission cut into updates: chunk (B, C, N) with NaN past each stream's lengths, lengths, frames before."""
    before = torch.zeros_like(counts[0])
    for lengths in counts:
        chunk = torch.full(
            (emission.shape[0], int(lengths.max()), emission.shape[2]), float("nan"), dtype=emission.dtype
        )
        for b, (start, n) in enumerate(zip(before.tolist(), lengths.tolist(), strict=True)):
            chunk[b, :n] = emission[b, start : start + n]
        yield chunk, lengths, before
        before = before + lengths


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_said_of_the_frames_so_far(backend):
    @settings(max_examples=30, deadline=None)
    @given(stream=streams(), lag=st.integers(0, 4))
    def check(stream, lag):
        initial, transition, emission, counts = stream
        with use_backend(backend):
            live = HMMFilter(initial, transition, lag)
            for chunk, lengths, before in updates(emission, counts):
                filtered = live.update(chunk, lengths)
                now = before + lengths
                offline = HMM(initial, transition, emission, now)
                torch.testing.assert_close(live.log_partition, offline.log_partition(), rtol=1e-12, atol=1e-9)
                marginals = offline.marginals()
                for b, t in enumerate(now.tolist()):
                    for past in range(lag + 1):
                        expected = marginals[b, t - 1 - past] if t > past else torch.zeros_like(live.posterior()[b])
                        torch.testing.assert_close(live.posterior(past)[b], expected, rtol=1e-9, atol=1e-9)
                for k in range(chunk.shape[1]):
                    cut = HMM(initial, transition, emission, (before + k + 1).clamp(max=emission.shape[1])).marginals()
                    for b in range(len(lengths)):
                        at = int(before[b]) + k
                        expected = cut[b, at] if k < lengths[b] else torch.zeros_like(filtered[b, k])
                        torch.testing.assert_close(filtered[b, k], expected, rtol=1e-9, atol=1e-9)

    check()


def decode(initial, transition, emission, counts, lag):
    """Each stream's states, in the order in which they come out, and how many were out after each update."""
    live = HMMFilter(initial, transition, lag)
    out, progress = [[] for _ in range(emission.shape[0])], []

    def collect(states):
        for row, new in zip(out, states.tolist(), strict=True):
            row.extend(z for z in new if z >= 0)
            assert all(z == -1 for z in new[len([z for z in new if z >= 0]) :])
        progress.append([len(row) for row in out])

    for chunk, lengths, _ in updates(emission, counts):
        live.update(chunk, lengths)
        collect(live.viterbi())
        assert live.viterbi().shape[1] == 0  # each state once
    collect(live.finish())
    return out, torch.tensor(progress)


@settings(max_examples=60, deadline=None)
@given(stream=streams())
def test_without_a_lag_the_path_is_the_offline_one(stream):
    initial, transition, emission, counts = stream
    out, _ = decode(initial, transition, emission, counts, None)
    best = HMM(initial, transition, emission, counts.sum(0)).viterbi()
    for b, states in enumerate(out):
        if best.score[b] > -INF:
            assert states == [z for z in best.states[b].tolist() if z >= 0]


@settings(max_examples=60, deadline=None)
@given(stream=streams(), lag=st.integers(0, 5))
def test_with_a_lag_one_feasible_path_comes_out_in_time(stream, lag):
    """Also: whatever the chunks, the same path; and the offline one where the lag reaches over the whole stream."""
    initial, transition, emission, counts = stream
    out, progress = decode(initial, transition, emission, counts, lag)
    total = counts.sum(0)
    again, _ = decode(initial, transition, emission, torch.stack([total]), lag)
    best = HMM(initial, transition, emission, total).viterbi()
    for b, states in enumerate(out):
        if best.score[b] == -INF:
            continue
        whole = min(len(states), len(again[b]))  # at a dead end, what nobody had asked for is lost
        assert states[:whole] == again[b][:whole]
        arrived = counts[:, b].cumsum(0)
        assert (progress[:-1, b] <= arrived).all()
        if all((x > -INF).all() for x in (initial, transition, emission)):  # else the path may come to a dead end
            assert len(states) == total[b] and (progress[:-1, b] >= arrived - lag).all()
        padded = torch.zeros(emission.shape[:2], dtype=torch.int64)
        padded[b, : len(states)] = torch.tensor(states, dtype=torch.int64)
        lengths = torch.zeros_like(total)
        lengths[b] = len(states)
        assert HMM(initial, transition, emission, lengths).score(padded)[b] > -INF
        if lag >= total[b]:
            assert states == [z for z in best.states[b].tolist() if z >= 0]


def test_states_come_out_as_soon_as_paths_agree():
    """A frame that only state 1 can emit decides itself and what came before it."""
    initial, transition = torch.zeros(2), torch.tensor([[0.0, -1.0], [-1.0, 0.0]])
    live = HMMFilter(initial, transition, None)
    live.update(torch.tensor([[[0.5, 0.0], [0.0, 0.0]]]))
    assert live.viterbi().shape == (1, 0)
    live.update(torch.tensor([[[-INF, 0.0], [0.0, 0.1]]]))
    assert live.viterbi().tolist() == [[1, 1, 1]]
    assert live.finish().tolist() == [[1]]


def test_a_lag_makes_paths_that_disagree_impossible():
    """States 0 and 1 never meet. The lag takes 0, so that what shows 1 to be better comes too late."""
    transition = torch.tensor([[0.0, -INF], [-INF, 0.0]])
    live = HMMFilter(torch.zeros(2), transition, lag=1)
    live.update(torch.tensor([[[1.0, 0.0], [0.0, 0.0], [0.0, 5.0]]]))
    assert live.viterbi().tolist() == [[0, 0, 0]]
    assert live.posterior()[0, 1] > 0.9  # dropped paths are Viterbi's alone


def test_a_dead_end_that_the_lag_did_not_see():
    """State 0 is better at first, but cannot be left nor emit the third frame: the path ends, the filter does not."""
    transition = torch.tensor([[0.0, -INF], [0.0, 0.0]])
    live = HMMFilter(torch.zeros(2), transition, lag=0)
    filtered = live.update(torch.tensor([[[1.0, 0.0], [0.0, 0.0], [-INF, 0.0]]]))
    assert live.viterbi().tolist() == [[0, 0]] and live.finish().shape == (1, 0)
    assert filtered[0, -1].tolist() == [0, 1]


@pytest.mark.parametrize(("chunk", "time"), [(1, 2000), (7, 5000), (1000, 100_000), (100_000, 100_000)])
def test_long_streams_keep_their_precision(chunk, time):
    initial, transition, emission = scores(1, time, 5, dtype=torch.float32, seed=2)
    live = HMMFilter(initial, transition, lag=3, decode=False)
    for part in emission.split(chunk, 1):
        filtered = live.update(part)
    offline = HMM(initial.double(), transition.double(), emission.double())
    expected = offline.log_partition()
    assert ((live.log_partition.double() - expected) / expected).abs() < 2e-6
    assert (filtered[:, -1].double() - offline.marginals()[:, -1]).abs().max() < 5e-6
    assert (live.posterior(3).double() - offline.marginals()[:, -4]).abs().max() < 5e-6


def test_emissions_hundreds_of_nats_apart():
    initial, transition, emission = scores(2, 300, 4, dtype=torch.float32, scale=200.0, forbidden=0.05, seed=6)
    live = HMMFilter(initial, transition, lag=2)
    for part in emission.split(11, 1):
        live.update(part)
    offline = HMM(initial.double(), transition.double(), emission.double())
    torch.testing.assert_close(live.log_partition.double(), offline.log_partition(), rtol=2e-6, atol=0)
    torch.testing.assert_close(live.posterior(2).double(), offline.marginals()[:, -3], rtol=0, atol=1e-4)


def test_infeasible_and_nan_streams():
    initial, transition, emission = scores(3, 6, 3)
    emission[0, 2] = -INF
    emission[1, 2, 1] = float("nan")
    live = HMMFilter(initial, transition, lag=1)
    first, second = live.update(emission[:, :4]), live.update(emission[:, 4:])
    assert (first[0, :2].sum(-1) > 0.99).all() and not first[0, 2:].any() and not second[0].any()
    assert first[1, 2:].isnan().all() and second[1].isnan().all()
    z = live.log_partition
    assert z[0] == -INF and z[1].isnan() and z[2].isfinite()
    assert not live.posterior(1)[0].any()
    live.viterbi()
    assert (live.finish()[:2] == -1).all()


def test_memory_does_not_grow_with_the_stream():
    def numbers(live):
        return sum(
            x.numel() for x in (*vars(live).values(), *vars(live._viterbi).values()) if isinstance(x, torch.Tensor)
        )

    for lag in (0, 4, None):
        live = HMMFilter(torch.zeros(3), torch.randn(3, 3, generator=torch.Generator().manual_seed(0)), lag)
        seen = set()
        for k in range(30):
            live.update(torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(k)) * 3)
            live.viterbi()
            seen.add(numbers(live))
            assert not live._viterbi.decided
            assert len(live._viterbi.pointers) < 30
        assert len(seen) == 1


def test_halves_and_gradients():
    initial, transition, emission = scores(2, 4, 3, dtype=torch.bfloat16)
    live = HMMFilter(initial, transition.requires_grad_())
    found = live.update(emission.requires_grad_())
    assert found.dtype == live.log_partition.dtype == torch.float32
    assert not found.requires_grad and not live.log_partition.requires_grad and not live.posterior().requires_grad


def test_no_frames():
    live = HMMFilter(torch.zeros(2, 3), torch.zeros(3, 3), lag=1)
    assert live.log_partition.tolist() == [0, 0] and live.viterbi().shape == (2, 0)
    assert live.update(torch.zeros(2, 0, 3)).shape == (2, 0, 3)
    assert live.log_partition.tolist() == [0, 0] and not live.posterior(1).any()
    assert live.finish().shape == (2, 0)
    assert HMMFilter(torch.zeros(3), torch.zeros(3, 3)).update(torch.zeros(0, 2, 3)).shape == (0, 2, 3)


def test_errors():
    from hmm_speech.hmm import LowRank

    z = torch.zeros

    def live(*arguments, **more):
        return HMMFilter(z(3), z(3, 3), *arguments, **more)

    def twice(first, second):
        stream = live()
        stream.update(first)
        stream.update(second)

    def after_finish():
        stream = live()
        stream.update(z(1, 1, 3))
        stream.finish()
        stream.update(z(1, 1, 3))

    for call, error, message in [
        (lambda: HMMFilter([0.0], z(1, 1)), TypeError, "initial: got list"),
        (lambda: HMMFilter(z(3), LowRank(z(3, 2), z(2, 3))), TypeError, "transition: got LowRank"),
        (lambda: HMMFilter(z(3), z(2, 4, 3, 3)), ValueError, r"transition: shape is \(2, 4, 3, 3\), expected \(N, N\)"),
        (lambda: HMMFilter(z(3), z(4, 4)), ValueError, r"initial: shape is \(3\), expected \(4,\)"),
        (lambda: HMMFilter(z(2, 3), z(4, 3, 3)), ValueError, r"initial: shape is \(2, 3\)"),
        (lambda: HMMFilter(z(3), z(3, 3).double()), TypeError, "transition is torch.float64"),
        (lambda: live(-1), ValueError, "lag: got -1"),
        (lambda: live(1.5), ValueError, "lag: got 1.5"),
        (lambda: live().update(z(2, 4)), ValueError, r"emission: shape is \(2, 4\)"),
        (lambda: live().update(z(2, 4, 2)), ValueError, r"emission: shape is \(2, 4, 2\)"),
        (lambda: live().update(z(2, 4, 3).double()), TypeError, "emission is torch.float64"),
        (lambda: live().update(z(2, 4, 3), torch.tensor([4, 5])), ValueError, "lengths: holds 5, expected 0 to 4"),
        (lambda: twice(z(2, 1, 3), z(3, 1, 3)), ValueError, "expected B = 2, the number of streams"),
        (lambda: live().posterior(), RuntimeError, "before the first update"),
        (lambda: HMMFilter(z(1, 3), z(3, 3), lag=2).posterior(3), ValueError, "lag: got 3, expected 0 to 2"),
        (lambda: HMMFilter(z(1, 3), z(3, 3), lag=None).posterior(1), ValueError, "lag: got 1, expected 0 to 0"),
        (lambda: HMMFilter(z(1, 3), z(3, 3), decode=False).viterbi(), RuntimeError, "decode=False"),
        (after_finish, RuntimeError, "update: the streams were finished"),
    ]:
        with pytest.raises(error, match=message):
            call()
