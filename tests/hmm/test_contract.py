"""The numerical contract: float32 against the reference in float64, on benign scores and on hard ones."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hmm_speech.hmm import HMM, HMMForward, backend, log_partition, use_backend
from tests.hmm.problems import INF, KINDS, doubled, problem, solve


def compare(arguments, grad=None, log_partition=2e-6, marginals=5e-6):
    """float32 native beside float64 reference: log Z relative to its size, marginals and gradients absolute."""
    batch = arguments["emission"].shape[0]
    grad = torch.linspace(-1, 1.5, batch, dtype=torch.float64) if grad is None else grad
    with use_backend("reference"):
        z, expected = solve(doubled(arguments), grad)
    with use_backend("native"):
        found_z, found = solve(arguments, grad)
        state = HMM(**arguments).marginals()
    with use_backend("reference"):
        expected_state = HMM(**doubled(arguments)).marginals()
    assert (found_z.isfinite() == z.isfinite()).all() and (found_z[~z.isfinite()] == z[~z.isfinite()].float()).all()
    feasible = z.isfinite()
    torch.testing.assert_close(found_z[feasible].double(), z[feasible], rtol=log_partition, atol=log_partition)
    torch.testing.assert_close(state.double(), expected_state, rtol=0, atol=marginals)
    for name, gradient in found.items():
        # A gradient that sums over frames and sequences carries their rounding: relative to its size beyond 1.
        torch.testing.assert_close(gradient.double(), expected[name], rtol=marginals, atol=2 * marginals)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 19),
    time=st.integers(1, 40),
    states=st.integers(1, 70),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 1000),
    forbidden=st.sampled_from([0.0, 0.2, 0.5]),
)
def test_benign_scores(batch, time, states, kind, seed, forbidden):
    if kind == "time-varying" and batch * time * states**2 > 400_000:
        time = max(1, 400_000 // (batch * states**2))
    compare(problem(batch, time, states, kind, seed, torch.float32, forbidden=forbidden))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shift", [1000.0, -1000.0])
def test_scores_around_a_thousand(kind, shift):
    compare(problem(5, 30, 9, kind, 3, torch.float32, shift=shift))


@pytest.mark.parametrize("states", [1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 130, 300])
@pytest.mark.parametrize("batch", [1, 2, 3, 5, 8, 13])
def test_every_tile_edge(batch, states):
    compare(problem(batch, 6, states, "shared", batch, torch.float32))


def left_to_right(states, time, gap, seed=0):
    """A chain that only stays or moves on, with emissions `gap` nats apart."""
    g = torch.Generator().manual_seed(seed)
    transition = torch.full((states, states), -INF)
    for i in range(states):
        transition[i, i] = -0.5
        if i + 1 < states:
            transition[i, i + 1] = -1.0
    initial = torch.full((states,), -INF)
    initial[0] = 0
    return {"initial": initial, "transition": transition, "emission": torch.randn(4, time, states, generator=g) * gap,
            "lengths": torch.tensor([time, time - 1, states, 1]), "final": None}  # fmt: skip


@pytest.mark.parametrize("gap", [1.0, 50.0, 500.0])
@pytest.mark.parametrize("end", [None, "last"])
def test_left_to_right_chains(gap, end):
    arguments = left_to_right(12, 60, gap)
    if end:
        arguments["final"] = torch.full((12,), -INF)
        arguments["final"][-1] = 0
    compare(arguments)


def test_a_flushed_state_that_wins_later():
    """Two chains that never meet: what scaling loses in the first half, and backward in the second, is the answer."""
    transition = torch.full((2, 2), -INF).fill_diagonal_(0)
    emission = torch.zeros(1, 150, 2)
    emission[0, :25, 0], emission[0, 25:125, 1], emission[0, 125:, 0] = 8, 8, 8
    arguments = {
        "initial": torch.zeros(2),
        "transition": transition,
        "emission": emission,
        "lengths": None,
        "final": None,
    }
    before = backend().redone
    compare(arguments)
    assert backend().redone > before


def test_mixing_chains_keep_the_fast_path_with_emissions_far_apart():
    arguments = problem(8, 50, 20, "shared", 1, torch.float32)
    arguments["transition"] = arguments["transition"].log_softmax(-1)
    arguments["emission"] = arguments["emission"] * 300
    before = backend().redone
    compare(arguments)
    assert backend().redone == before


@pytest.mark.parametrize("growth", [3.0, 0.3, -0.3, -3.0])  # from sums that grow to sums that fall
@pytest.mark.parametrize("states", [3, 50, 1100])
def test_sums_of_messages_stay_in_their_range(growth, states):
    """By powers of two where they grow and where they fall, at each frame or once in some (csrc/cpu/scaled_arcs.h)."""
    g, time = torch.Generator().manual_seed(1), 60 if states < 1000 else 8
    forbidden = torch.rand(states, states, generator=g) < 0.05
    forbidden.fill_diagonal_(False)
    scores = torch.randn(states, states, generator=g).log_softmax(-1).masked_fill(forbidden, -INF)
    emission = torch.randn(3, time, states, generator=g)
    emission[:, :, 0] = 4 - growth * torch.log(torch.tensor(float(states)))  # below the others, or above
    arguments = {"initial": torch.zeros(states), "transition": scores, "emission": emission,
                 "lengths": torch.tensor([time, time - 1, 1]), "final": None}  # fmt: skip
    compare(arguments)
    _, alpha, _, _, method = torch.ops.hmm_speech.forward(*arguments.values())
    assert (method == 0).all()
    total = torch.cat([alpha[b, :length].double().sum(-1) for b, length in enumerate(arguments["lengths"])])
    assert (total >= 2**18).all() and (total < 2**31).all()


@pytest.mark.parametrize("states", [30, 1000, 1100])
@pytest.mark.parametrize("low", [30.0, 70.0])
def test_an_unlikely_state_that_the_end_asks_for(low, states):
    """While sums grow by N a frame, state 0 is `low` nats below the others; it alone leads to state 1, which the frames
    after want. Its backward score is as far above theirs, times what rescaling took out of the messages."""
    transition = torch.zeros(states, states)
    transition[2:, 1] = transition[0] = transition[1] = -INF
    transition[0, 1] = transition[1, 1] = 0
    initial = torch.zeros(states)
    initial[1] = -INF
    fall, growing = 20.0, 6
    emission = torch.zeros(1, growing + int(low / fall) + 2, states)
    emission[:, :, 0] = -low
    emission[:, growing:, 2:] = -fall
    emission[:, growing:, 0] = -INF
    arguments = {"initial": initial, "transition": transition, "emission": emission, "lengths": None, "final": None}
    before = backend().redone
    compare(arguments)
    assert backend().redone == before


def test_only_sequences_that_cannot_be_certified_are_redone():
    arguments = left_to_right(12, 60, 1.0)
    arguments["lengths"] = None
    arguments["emission"][2] *= 500
    before = backend().redone
    with use_backend("native"):
        log_partition(**arguments)
    assert backend().redone == before + 1
    compare(arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_never_read(kind):
    arguments = problem(4, 9, 5, kind, 2, torch.float32)
    arguments["lengths"] = torch.tensor([9, 0, 1, 4])
    expected = solve(arguments, torch.ones(4))
    inside = torch.arange(9) < arguments["lengths"][:, None]
    arguments["emission"][~inside] = float("nan")
    if kind == "time-varying":
        arguments["transition"][~inside[:, 1:]] = float("nan")
    for name in ("native", "reference"):
        with use_backend(name):
            z, found = solve(arguments, torch.ones(4))
        torch.testing.assert_close(z, expected[0])
        assert z[1] == 0
        for key, gradient in found.items():
            torch.testing.assert_close(gradient, expected[1][key], atol=1e-6, rtol=1e-5)
        assert (found["emission"][~inside] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["native", "reference"])
def test_infeasible_sequences(kind, name):
    arguments = problem(3, 5, 4, kind, 1, torch.float32, lengths="full")
    arguments["emission"][1, 2] = -INF
    with use_backend(name):
        hmm = HMM(**arguments)
        assert hmm.log_partition()[1] == -INF and hmm.log_partition()[[0, 2]].isfinite().all()
        assert (hmm.marginals()[1] == 0).all() and (hmm.transition_counts()[1] == 0).all()
        assert hmm.viterbi().score[1] == -INF and (hmm.viterbi().states[1] == -1).all()
        assert (hmm.sample(2)[:, 1] == -1).all()
        leaves = {k: x.clone().requires_grad_() if x is not None else None for k, x in arguments.items()}
        HMM(**leaves).log_partition().sum().backward()
    assert (leaves["emission"].grad[1] == 0).all() and not leaves["transition"].grad.isnan().any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [INF, float("nan")])
@pytest.mark.parametrize("name", ["native", "reference"])
def test_bad_scores_give_nan_or_an_error(kind, bad, name):
    for where in ("emission", "transition", "initial"):
        arguments = problem(2, 4, 3, kind, 1, torch.float32, lengths="full", final=False)
        arguments[where].view(-1)[1] = bad
        with use_backend(name):
            assert HMM(**arguments).log_partition()[0].isnan()
            with pytest.raises(ValueError, match=f"{where}: holds"):
                HMM(**arguments, check=True)


@pytest.mark.parametrize("kind", ["shared", "time-varying"])
def test_a_hundred_thousand_frames(kind):
    """Errors do not grow with T: float32 within 2e-6 and 5e-6 of float64, both native (the reference takes minutes)."""
    arguments = problem(1, 100_000, 4, kind, 7, torch.float32, lengths="full")
    z, found = solve(arguments, torch.ones(1))
    exact, expected = solve(doubled(arguments), torch.ones(1))
    torch.testing.assert_close(z.double(), exact, rtol=2e-6, atol=0)
    torch.testing.assert_close(found["emission"].double(), expected["emission"], rtol=0, atol=5e-6)
    short = {
        k: x[:, :200] if k == "emission" or (k == "transition" and x.dim() == 4) else x for k, x in arguments.items()
    }
    if kind == "time-varying":
        short["transition"] = short["transition"][:, :199]
    compare(short)


@pytest.mark.parametrize("kind", KINDS)
def test_results_are_deterministic(kind):
    arguments = problem(9, 40, 30, kind, 5, torch.float32)
    first, again = solve(arguments, torch.ones(9)), solve(arguments, torch.ones(9))
    assert torch.equal(first[0], again[0]) and all(torch.equal(x, again[1][k]) for k, x in first[1].items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_any_number_of_threads(kind, threads):
    saved = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        compare(problem(11, 20, 10, kind, threads, torch.float32))
    finally:
        torch.set_num_threads(saved)


def test_half_precision_is_computed_in_float32():
    arguments = problem(3, 20, 6, "shared", 1, torch.float32)
    halves = {k: x.bfloat16() if x is not None and x.is_floating_point() else x for k, x in arguments.items()}
    z, found = solve(halves, torch.ones(3))
    exact, _ = solve(doubled(halves), torch.ones(3))
    assert z.dtype == torch.float32 and found["emission"].dtype == torch.bfloat16
    torch.testing.assert_close(z.double(), exact, rtol=2e-6, atol=2e-6)


def test_the_seed_example():
    """The README example of hmm-backprop, with only the import and the device changed."""
    torch.manual_seed(0)
    device = torch.device("cpu")
    batch, time, num_states = 2, 5, 10
    lengths = torch.tensor([3, 5], device=device, dtype=torch.int64)
    mask_pad = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]], device=device) * -1e23
    emission = -1 * torch.randn(batch, time, num_states, num_states, device=device, requires_grad=True).pow(2)
    transition = torch.randn(batch, time, num_states, num_states, device=device).log_softmax(-1)
    potential = emission + transition
    mask_pad = mask_pad.view(batch, time, 1, 1)
    saved = potential.detach().clone()
    partition = HMMForward.apply(potential, lengths, mask_pad)
    loss = -partition.sum()
    potential.retain_grad()
    loss.backward()
    assert partition.shape == (2, 1) and torch.equal(potential, saved)
    expected = log_partition(saved[:, 0, 0].double(), saved[:, 1:].double(), None, lengths)
    torch.testing.assert_close(partition.squeeze(1).double(), expected)
    # Marginals of the edges sum to one a frame within the length, and to nothing past it.
    mass = -potential.grad.sum((2, 3))
    torch.testing.assert_close(mass, (torch.arange(5) < lengths[:, None]).float())


def gaussian_chain(labels, substates, batch, time, gap):
    """Frames drawn from a chain of left-to-right labels with Gaussian emissions: benign, yet beyond float32's range."""
    g = torch.Generator().manual_seed(0)
    states = labels * substates
    k = torch.arange(states)
    last, first = k % substates == substates - 1, k % substates == 0
    arcs = (
        torch.eye(states, dtype=torch.bool) | (~last[:, None] & (k[None] == k[:, None] + 1)) | (last[:, None] & first)
    )
    transition = torch.randn(states, states, generator=g).masked_fill(~arcs, -INF).log_softmax(-1)
    initial = torch.zeros(states).masked_fill(~first, -INF).log_softmax(-1)
    means = torch.randn(states, 13, generator=g) * gap
    path = torch.randint(0, states, (batch, time), generator=g)
    frames = means[path] + torch.randn(batch, time, 13, generator=g)
    emission = -0.5 * ((frames[:, :, None] - means) ** 2).sum(-1)
    lengths = torch.randint(1, time + 1, (batch,), generator=g)
    return {"initial": initial, "transition": transition, "emission": emission, "lengths": lengths, "final": None}


@pytest.mark.parametrize("gap", [1.0, 3.0, 10.0])
@pytest.mark.parametrize("kind", ["shared", "per-sequence"])
def test_gaussian_chains(gap, kind):
    """What float32 cannot certify is redone in float64, scaled where 666 nats are enough and in log space beyond."""
    arguments = gaussian_chain(6, 3, 5, 40, gap)
    if kind == "per-sequence":
        arguments["transition"] = arguments["transition"].expand(5, -1, -1).clone()
    before = backend().redone
    compare(arguments)
    assert (backend().redone > before) == (gap > 1)


@pytest.mark.parametrize("gap", [3.0, 10.0])
def test_samples_of_redone_sequences_are_feasible_and_follow_the_marginals(gap):
    arguments = gaussian_chain(3, 2, 4, 20, gap)
    hmm = HMM(**arguments)
    samples = hmm.sample(2000, generator=torch.Generator().manual_seed(0))
    share = torch.nn.functional.one_hot(samples.clamp(min=0), 6).float() * (samples >= 0).unsqueeze(-1)
    # 2,000 draws: five standard errors of a share are at most 5 * 0.5 / sqrt(2000).
    torch.testing.assert_close(share.mean(0), hmm.marginals(), atol=0.056, rtol=0)
    assert hmm.score(samples[0]).isfinite().all()
