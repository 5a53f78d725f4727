"""Semi-Markov chains against the enumeration of all segmentations, and the contract of their kernels."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hmm_speech.hmm import HMM, SemiMarkovHMM, use_backend
from tests.oracle import INF, enumerate_segmentations, segmentation_score

BACKENDS = ("native", "reference")
METHODS = ("log_partition", "marginals", "starts", "transition_counts", "duration_counts")


def semi_markov(
    batch, time, states, longest, seed=0, dtype=torch.float64, scale=1.0, shift=0.0, forbidden=0.0, lengths="ragged",
    final=True, emission_scale=1.0,
):  # fmt: skip
    """Arguments of SemiMarkovHMM as a dict; the seed decides which of them the sequences share."""
    g = torch.Generator().manual_seed(seed)

    def scores(*shape, scale=scale):
        x = torch.randn(shape, generator=g, dtype=torch.float64) * scale + shift
        x[torch.rand(shape, generator=g) < forbidden] = -INF
        return x.to(dtype)

    made = {
        "initial": scores(states) if seed % 2 else scores(batch, states),
        "transition": scores(states, states) if seed % 3 else scores(batch, states, states),
        "emission": scores(batch, time, states, scale=scale * emission_scale),
        "durations": scores(states, longest) if seed % 5 < 3 else scores(batch, states, longest),
        "lengths": torch.randint(0, time + 1, (batch,), generator=g) if lengths == "ragged" else None,
        "final": (scores(batch, states) if seed % 7 < 3 else scores(states)) if final else None,
    }
    return made


@st.composite
def small_problems(draw):
    states = draw(st.integers(1, 4))
    return semi_markov(
        draw(st.integers(1, 3)),
        draw(st.integers(1, 6).filter(lambda t: states * (states + 1) ** (t - 1) <= 1500)),
        states,
        draw(st.integers(1, 7)),
        seed=draw(st.integers(0, 10_000)),
        scale=draw(st.sampled_from([0.1, 1.0, 10.0, 300.0, 3000.0])),
        shift=draw(st.sampled_from([0.0, 1000.0, -1000.0])),
        forbidden=draw(st.sampled_from([0.0, 0.0, 0.3, 0.6])),
        lengths=draw(st.sampled_from(["ragged", "full"])),
        final=draw(st.booleans()),
    )  # fmt: skip


def scores_of(arguments):
    return {k: x for k, x in arguments.items() if x is not None and x.is_floating_point()}


def solve(arguments, grad):
    """log Z and the gradients of sum(grad * log Z) without infeasible sequences."""
    leaves = {k: x.clone().requires_grad_() for k, x in scores_of(arguments).items()}
    z = SemiMarkovHMM(**{**arguments, **leaves}).log_partition()
    (torch.where(z.isfinite(), z, 0) * grad.to(z.dtype)).sum().backward()
    return z.detach(), {k: torch.zeros_like(x) if x.grad is None else x.grad for k, x in leaves.items()}


def doubled(arguments):
    return {k: x.double() if x is not None and x.is_floating_point() else x for k, x in arguments.items()}


def close(found, expected, tolerance=1e-9):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=tolerance, equal_nan=False)


def segments_of(states, starts):
    """((state, duration), ...) of one row up to its first -1, and that the rest is -1 and False."""
    length = int((states >= 0).sum())
    assert (states[:length] >= 0).all() and (states[length:] == -1).all() and not starts[length:].any()
    begins = [*starts[:length].nonzero().flatten().tolist(), length]
    assert not length or begins[0] == 0
    for a, b in itertools.pairwise(begins):
        assert (states[a:b] == states[a]).all()
    return tuple((int(states[a]), b - a) for a, b in itertools.pairwise(begins)), length


@pytest.mark.parametrize("backend", BACKENDS)
def test_inference(backend):
    @settings(max_examples=120, deadline=None)
    @given(arguments=small_problems())
    def check(arguments):
        expected = enumerate_segmentations(**arguments)
        with use_backend(backend):
            model = SemiMarkovHMM(**arguments, check=True)
            close(model.log_partition(), expected.log_partition)
            close(model.marginals(), expected.marginals)
            close(model.starts(), expected.starts)
            close(model.transition_counts(), expected.transitions)
            close(model.duration_counts(), expected.durations)
            best, samples = model.viterbi(), model.sample(3)
            again = model.score(best.states.clamp(min=0), best.starts | ~(best.states >= 0))
        close(best.score, expected.best, 1e-8)
        pieces = {name: x for name, x in arguments.items() if name != "lengths"}
        for b, paths in enumerate(expected.paths):
            path, length = segments_of(best.states[b], best.starts[b])
            drawn = [segments_of(z, s) for z, s in zip(samples.states[:, b], samples.starts[:, b], strict=True)]
            if not paths:
                assert not length and not any(n for _, n in drawn)
                continue
            assert path in paths and all(p in paths for p, _ in drawn)
            score = segmentation_score(path, b, **pieces)
            assert score == pytest.approx(float(expected.best[b]), rel=1e-9, abs=1e-8)
            assert float(again[b]) == pytest.approx(score, rel=1e-12, abs=1e-9)

    check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_the_enumerated_posteriors(backend):
    arguments = semi_markov(3, 5, 3, 3, seed=1)
    arguments["lengths"] = torch.tensor([5, 0, 4])
    expected, weight = enumerate_segmentations(**arguments), torch.tensor([1.5, 1.0, -0.5], dtype=torch.float64)
    with use_backend(backend):
        _, found = solve(arguments, weight)
    close(found["emission"], weight[:, None, None] * expected.marginals)
    close(found["transition"], (weight[:, None, None] * expected.transitions).sum(0))
    close(found["durations"], (weight[:, None, None] * expected.durations).sum(0))
    close(found["initial"], (weight[:, None] * expected.marginals[:, 0]).sum(0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", [1, 4, 6, 9])  # of which each argument is shared in some, of its own in others
def test_first_and_second_derivatives(backend, method, seed):
    arguments = semi_markov(2, 3, 2, 2, seed=seed)
    arguments["lengths"] = torch.tensor([3, 2])
    inputs = {k: x.requires_grad_() for k, x in scores_of(arguments).items()}

    def function(*values):
        return getattr(SemiMarkovHMM(**{**arguments, **dict(zip(inputs, values, strict=True))}), method)()

    with use_backend(backend):
        assert torch.autograd.gradcheck(function, tuple(inputs.values()))
        if seed in (1, 4):
            assert torch.autograd.gradgradcheck(function, tuple(inputs.values()), fast_mode=True)


def test_viterbi_score_and_path_score_are_differentiable():
    arguments = semi_markov(2, 6, 3, 4, seed=1)
    arguments["lengths"] = torch.tensor([6, 3])
    leaves = {k: x.requires_grad_() for k, x in scores_of(arguments).items()}
    model = SemiMarkovHMM(**{**arguments, **leaves})
    best = model.viterbi()
    found = torch.autograd.grad(best.score.sum(), list(leaves.values()))
    given_path = torch.autograd.grad(
        model.score(best.states.clamp(min=0), best.starts | (best.states < 0)).sum(), list(leaves.values())
    )
    torch.testing.assert_close(found, given_path)
    indicator = torch.nn.functional.one_hot(best.states.clamp(min=0), 3) * (best.states >= 0).unsqueeze(-1)
    torch.testing.assert_close(found[2], indicator.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", [1, 6, 9])
def test_operators_are_registered_as_torch_expects(dtype, seed):
    arguments = semi_markov(3, 5, 4, 3, seed=seed, dtype=dtype)
    scores = tuple(arguments[k] for k in ("initial", "transition", "emission", "durations", "lengths", "final"))
    ops = torch.ops.hmm_speech
    for keep in (False, True):
        torch.library.opcheck(ops.semi_markov_forward.default, (*scores, keep))
    messages = ops.semi_markov_forward(*scores, True)
    for wanted in ((True, True, True), (False, False, False)):
        arguments = (torch.ones(3, dtype=dtype), *scores, *messages, *wanted)
        torch.library.opcheck(ops.semi_markov_backward.default, arguments)
    torch.library.opcheck(ops.semi_markov_viterbi.default, scores)
    torch.library.opcheck(ops.semi_markov_sample.default, (*scores, torch.rand(2, 3, 5, 2, dtype=torch.float64)))


def compare(arguments, log_partition=2e-6, posterior=5e-6):
    """float32 native beside the reference, both on the same float32 scores; the reference in float64."""
    grad = torch.linspace(-1, 1.5, arguments["emission"].shape[0], dtype=torch.float64)
    with use_backend("reference"):
        z, expected = solve(doubled(arguments), grad)
    with use_backend("native"):
        found_z, found = solve(arguments, grad)
    feasible = z.isfinite()
    assert torch.equal(feasible, found_z.isfinite())
    torch.testing.assert_close(found_z[feasible].double(), z[feasible], rtol=log_partition, atol=log_partition)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient.double(), expected[name], rtol=posterior, atol=posterior)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 9), time=st.integers(1, 40), states=st.integers(1, 40), longest=st.integers(1, 45),
    seed=st.integers(0, 1000), forbidden=st.sampled_from([0.0, 0.2, 0.5]), scale=st.sampled_from([1.0, 500.0]),
)  # fmt: skip
def test_float32(batch, time, states, longest, seed, forbidden, scale):
    compare(semi_markov(batch, time, states, longest, seed, torch.float32, forbidden=forbidden, emission_scale=scale))


@pytest.mark.parametrize("states", [1, 7, 8, 9, 16, 17, 33, 65, 130])
def test_every_tile_edge(states):
    compare(semi_markov(3, 9, states, 4, states, torch.float32))


@pytest.mark.parametrize("outlier", [-1e4, -1e9, 1e9, -1e30])
def test_one_huge_score_spoils_no_other(outlier):
    """A running sum that took it in would round all that follows away."""
    arguments = semi_markov(2, 60, 3, 5, seed=1, lengths="full")
    with use_backend("reference"):
        plain = solve({**arguments, "emission": arguments["emission"][:, 21:]}, torch.ones(2))
    arguments["emission"][:, 20] = outlier
    for backend in BACKENDS:
        with use_backend(backend):
            _, found = solve(arguments, torch.ones(2))
        close(found["emission"].sum(-1), torch.ones(2, 60, dtype=torch.float64), 1e-8)
        # Where all states have the outlier alike it changes no posterior; those far from it depend on their own frames.
        close(found["emission"][:, -5:], plain[1]["emission"][:, -5:], 1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_durations_farther_apart_than_a_number_is_wide(backend, dtype):
    """What one loses as exp(duration - longest's), the other makes up by its weight: both of two paths count."""
    cases = [  # arc, durations, emission's frames, log Z
        (960.0, [-710.0, -600.0, 0.0], 2, -460.0),
        (0.0, [-502.0, -2.0, -501.0, 250.0], 5, math.log(2) - 252.0),
    ]
    for arc, durations, length, expected in cases:
        hmm = SemiMarkovHMM(
            torch.zeros(1, dtype=dtype), torch.full((1, 1), arc, dtype=dtype), torch.zeros(1, length, 1, dtype=dtype),
            torch.tensor([durations], dtype=dtype),
        )  # fmt: skip
        with use_backend(backend):
            close(hmm.log_partition(), torch.tensor([expected], dtype=dtype), 1e-6)
            assert hmm.viterbi().score <= hmm.log_partition() + 1e-3
            close(hmm.marginals(), torch.ones(1, length, 1, dtype=dtype), 1e-5)
            frames = (hmm.duration_counts() * torch.arange(1, len(durations) + 1)).sum()
            close(frames, torch.tensor(length, dtype=dtype), 1e-4)


@pytest.mark.parametrize(("scale", "forbidden"), [(1.0, 0.0), (500.0, 0.0), (500.0, 0.5)])
def test_a_hundred_thousand_frames(scale, forbidden):
    """float32 scores of 100,000 frames: against float64 natively, and that against a chain of the last frames."""
    arguments = semi_markov(1, 100_000, 5, 30, seed=1, dtype=torch.float32, lengths="full", emission_scale=scale)
    g = torch.Generator().manual_seed(0)
    arguments["transition"][torch.rand(5, 5, generator=g) < forbidden] = -INF
    z, found = solve(arguments, torch.ones(1))
    exact, expected = solve(doubled(arguments), torch.ones(1))
    assert z.isfinite().all()
    torch.testing.assert_close(z.double(), exact, rtol=2e-6, atol=0)
    torch.testing.assert_close(found["emission"].double(), expected["emission"], rtol=0, atol=5e-6)
    torch.testing.assert_close(
        expected["emission"].sum(-1), torch.ones(1, 100_000, dtype=torch.float64), rtol=0, atol=1e-8
    )
    tail = {**arguments, "emission": arguments["emission"][:, -400:]}
    with use_backend("reference"):
        _, near = solve(doubled(tail), torch.ones(1))
    # 300 frames in, a chain has forgotten how it began.
    torch.testing.assert_close(expected["emission"][:, -100:], near["emission"][:, -100:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_durations_of_one_frame_give_the_ordinary_chain(backend):
    arguments = semi_markov(4, 12, 5, 1, seed=1)
    arguments["durations"] = torch.zeros_like(arguments["durations"])
    plain = HMM(**{k: x for k, x in arguments.items() if k != "durations"})
    with use_backend(backend):
        model = SemiMarkovHMM(**arguments)
        close(model.log_partition(), plain.log_partition())
        close(model.marginals(), plain.marginals())
        close(model.starts(), plain.marginals())
        close(model.transition_counts(), plain.transition_counts())
        close(model.viterbi().score, plain.viterbi().score)
        assert torch.equal(model.viterbi().states, plain.viterbi().states)


@pytest.mark.parametrize("backend", BACKENDS)
def test_geometric_durations_give_self_loops(backend):
    """d frames in j as d - 1 loops, with no second segment of the same state: D of at least T loses none."""
    batch, time, states = 3, 9, 4
    arguments = semi_markov(batch, time, states, time + 2, seed=1)
    loops = torch.randn(states, dtype=torch.float64)
    arguments["durations"] = loops.unsqueeze(-1) * torch.arange(time + 2)
    plain = {k: x for k, x in arguments.items() if k != "durations"}
    plain["transition"] = torch.where(torch.eye(states, dtype=torch.bool), loops, arguments["transition"])
    arguments["transition"] = arguments["transition"].masked_fill(torch.eye(states, dtype=torch.bool), -INF)
    with use_backend(backend):
        model, hmm = SemiMarkovHMM(**arguments), HMM(**plain)
        close(model.log_partition(), hmm.log_partition())
        close(model.marginals(), hmm.marginals())
        off = 1 - torch.eye(states, dtype=torch.float64)
        close(model.transition_counts(), hmm.transition_counts() * off)
        assert torch.equal(model.viterbi().states, hmm.viterbi().states)


def test_durations_beyond_the_frames_change_nothing():
    arguments = semi_markov(3, 6, 4, 50, seed=1)
    shorter = {**arguments, "durations": arguments["durations"][:, :6].contiguous()}
    model, other = SemiMarkovHMM(**arguments), SemiMarkovHMM(**shorter)
    assert torch.equal(model.log_partition(), other.log_partition())
    assert torch.equal(model.duration_counts()[..., :6], other.duration_counts())
    assert (model.duration_counts()[..., 6:] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_infeasible_sequences(backend, dtype):
    arguments = semi_markov(4, 7, 3, 3, seed=1, dtype=dtype)
    arguments["lengths"] = torch.tensor([7, 6, 0, 1])
    arguments["durations"][:] = -INF
    arguments["durations"][:, 1] = 0.5  # two frames or nothing: odd lengths cannot be
    with use_backend(backend):
        model = SemiMarkovHMM(**arguments)
        z, best, samples = model.log_partition(), model.viterbi(), model.sample(2)
        assert z.isfinite().tolist() == [False, True, True, False] and z[0] == z[3] == -INF and z[2] == 0
        assert torch.equal(best.score.isfinite(), z.isfinite()) and best.score[2] == 0
        for states, starts in ((best.states, best.starts), (samples.states[0], samples.starts[0])):
            assert (states[0] == -1).all() and not starts[0].any() and (states[1, :6] >= 0).all()
        for method in METHODS[1:]:
            found = getattr(model, method)()
            assert found.isfinite().all() and (found[[0, 2, 3]] == 0).all() and (found[1] > 0).any()
        leaves = {k: x.clone().requires_grad_() for k, x in scores_of(arguments).items()}
        SemiMarkovHMM(**{**arguments, **leaves}).log_partition().sum().backward()
        assert all(x.grad.isfinite().all() for x in leaves.values())
        assert (leaves["emission"].grad[[0, 2, 3]] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_is_never_read(backend):
    arguments = semi_markov(4, 9, 5, 4, seed=1, dtype=torch.float32)
    arguments["lengths"] = torch.tensor([9, 0, 1, 4])
    inside = torch.arange(9) < arguments["lengths"][:, None]
    with use_backend(backend):
        expected = solve(arguments, torch.ones(4))
        arguments["emission"][~inside] = float("nan")
        found = solve(arguments, torch.ones(4))
        SemiMarkovHMM(**arguments, check=True)
    assert torch.equal(found[0], expected[0])
    for name, gradient in found[1].items():
        torch.testing.assert_close(gradient, expected[1][name])
    assert (found[1]["emission"][~inside] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [INF, float("nan")])
@pytest.mark.parametrize("where", ["initial", "transition", "emission", "durations", "final"])
def test_bad_scores_give_nan_or_an_error(backend, bad, where):
    arguments = semi_markov(2, 4, 3, 2, seed=5, dtype=torch.float32, lengths="full")
    arguments[where].view(-1)[1] = bad
    with use_backend(backend):
        model = SemiMarkovHMM(**arguments)
        assert model.log_partition()[0].isnan() and model.viterbi().score[0].isnan()
        assert (model.sample().states[0, 0] == -1).all()
        with pytest.raises(ValueError, match=f"{where}: holds"):
            SemiMarkovHMM(**arguments, check=True)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_any_number_of_threads(threads):
    arguments, saved = semi_markov(11, 20, 10, 6, seed=1, dtype=torch.float32), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        compare(arguments)
        first, again = solve(arguments, torch.ones(11)), solve(arguments, torch.ones(11))
    finally:
        torch.set_num_threads(saved)
    assert torch.equal(first[0], again[0]) and all(torch.equal(x, again[1][k]) for k, x in first[1].items())


@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_follow_the_posterior(backend):
    arguments = semi_markov(2, 5, 2, 3, seed=1)
    arguments["lengths"] = torch.tensor([5, 4])
    expected = enumerate_segmentations(**arguments)
    with use_backend(backend):
        draw = SemiMarkovHMM(**arguments).sample(4000, generator=torch.Generator().manual_seed(0))
    for b, paths in enumerate(expected.paths):
        seen = {}
        for states, starts in zip(draw.states[:, b], draw.starts[:, b], strict=True):
            path, _ = segments_of(states, starts)
            seen[path] = seen.get(path, 0) + 1
        for path, probability in paths.items():  # five standard errors, and one draw
            error = 5 * math.sqrt(probability * (1 - probability) / 4000) + 1 / 4000
            assert seen.get(path, 0) / 4000 == pytest.approx(probability, abs=error)


@pytest.mark.parametrize("frames", [0, 1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_frames_and_no_sequences(backend, frames):
    with use_backend(backend):
        for batch in (0, 2):
            arguments = semi_markov(batch, 1, 3, 2, seed=1)
            arguments["emission"], arguments["lengths"] = arguments["emission"][:, :frames], None
            z, found = solve(arguments, torch.ones(batch))
            model = SemiMarkovHMM(**arguments)
            assert z.shape == (batch,) and found["emission"].shape == (batch, frames, 3)
            assert model.marginals().shape == model.starts().shape == (batch, frames, 3)
            assert model.duration_counts().shape == (batch, 3, 2) and model.transition_counts().shape == (batch, 3, 3)
            assert model.viterbi().states.shape == (batch, frames) and model.sample(2).starts.shape == (
                2,
                batch,
                frames,
            )
            assert model.score(model.viterbi().states, model.viterbi().starts).shape == (batch,)
            assert frames or (z == 0).all()


def test_scores_of_segmentations():
    arguments = semi_markov(1, 4, 3, 2, seed=1, final=False, lengths="full")
    model, pieces = SemiMarkovHMM(**arguments), {k: x for k, x in arguments.items() if k != "lengths"}
    states, starts = torch.tensor([[1, 1, 1, 0]]), torch.tensor([[True, False, True, True]])
    expected = segmentation_score(((1, 2), (1, 1), (0, 1)), 0, **pieces)
    close(model.score(states, starts), torch.tensor([expected], dtype=torch.float64))
    close(model.log_prob(states, starts), model.score(states, starts) - model.log_partition())
    assert model.score(states)[0] == -INF  # a run of three, and D = 2
    for wrong, error, message in (
        ((states + 2, starts), ValueError, r"states: holds 3 at \(0, 0\), expected 0 to 2"),
        ((states, ~starts), ValueError, r"starts: False at \(0, 0\), expected True: the first frame"),
        ((torch.tensor([[1, 1, 0, 0]]), starts & torch.tensor([True, True, False, True])), ValueError, "a new state"),
        ((states.int(), starts), TypeError, "states: got torch.int32"),
        ((states, starts.long()), TypeError, "starts: got torch.int64"),
        ((states[:, :3], starts), ValueError, r"states: shape is \(1, 3\)"),
    ):
        with pytest.raises(error, match=message):
            model.score(*wrong)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"durations": None}, TypeError, "durations: got NoneType"),
        ({"durations": torch.zeros(3)}, ValueError, r"durations: shape is \(3\), expected \(3, D\) or \(2, 3, D\)"),
        ({"durations": torch.zeros(3, 0)}, ValueError, "durations: .* D of at least 1"),
        ({"durations": torch.zeros(4, 2)}, ValueError, "durations: shape"),
        ({"durations": torch.zeros(3, 2).double()}, TypeError, "durations is torch.float64 but initial"),
        ({"transition": torch.zeros(2, 4, 3, 3)}, ValueError, r"transition: .* expected \(N, N\) or \(B, N, N\)"),
        ({"emission": None}, TypeError, "emission: got NoneType"),
        ({"emission": torch.zeros(2, 5, 4)}, ValueError, r"emission: shape is \(2, 5, 4\)"),
        ({"final": torch.zeros(4)}, ValueError, r"final: shape is \(4\)"),
        ({"lengths": torch.tensor([6, 1])}, ValueError, "lengths: holds 6, expected 0 to 5"),
    ],
)
def test_every_bad_argument_is_named(changes, error, message):
    arguments = semi_markov(2, 5, 3, 2, seed=1, dtype=torch.float32, lengths="full")
    with pytest.raises(error, match=message):
        SemiMarkovHMM(**{**arguments, **changes})
    with pytest.raises(ValueError, match="num_samples: got 0"):
        SemiMarkovHMM(**arguments).sample(0)


def test_half_precision_and_strided_scores():
    arguments = semi_markov(3, 8, 4, 3, seed=1, dtype=torch.float32)
    halves = {k: x.bfloat16() if x is not None and x.is_floating_point() else x for k, x in arguments.items()}
    z, found = solve(halves, torch.ones(3))
    expected, _ = solve(doubled(halves), torch.ones(3))
    assert z.dtype == torch.float32 and found["durations"].dtype == torch.bfloat16
    torch.testing.assert_close(z.double(), expected, rtol=2e-6, atol=2e-6)
    twisted = {
        k: x.transpose(-1, -2).contiguous().transpose(-1, -2) if x is not None and x.dim() > 1 else x
        for k, x in arguments.items()
    }
    assert torch.equal(SemiMarkovHMM(**twisted).log_partition(), SemiMarkovHMM(**arguments).log_partition())


def test_compiles_without_a_graph_break():
    arguments = semi_markov(3, 7, 5, 4, seed=1, dtype=torch.float32)
    arguments["emission"].requires_grad_()

    def loss(initial, transition, emission, durations, lengths, final):
        model = SemiMarkovHMM(initial, transition.log_softmax(-1), emission * 2, durations, lengths, final)
        with torch.no_grad():  # double backward is not for torch.compile
            marginals = model.marginals()
        return model.log_partition().sum(), marginals, model.viterbi().states

    eager = loss(**arguments)
    (expected,) = torch.autograd.grad(eager[0], arguments["emission"])
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(**arguments)
    (found,) = torch.autograd.grad(compiled[0], arguments["emission"])
    torch.testing.assert_close((*compiled, found), (*eager, expected))
