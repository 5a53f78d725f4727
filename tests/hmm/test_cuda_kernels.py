"""The kernels for GPUs, executed on the CPU (tests/cpp/cuda/on_cpu.h), through the wrappers that call them on a GPU.

Numbers are compared with the reference in float64, to the numerical contract."""

import pytest
import torch

from hmm_speech.hmm import HMM, cuda, library, ops, reference, use_backend
from tests.hmm.problems import INF, KINDS, doubled, problem, solve
from tests.hmm.test_contract import left_to_right

REDONE, BOTH_ENDS = library.REDONE, 3  # enum hmm_method


def compare(arguments, grad=None, tolerance=2e-6, marginals=5e-6):
    """log Z relative to its size; gradients, posteriors and counts absolute, beyond 1 relative."""
    batch = arguments["initial"].shape[0] if arguments["emission"] is None else arguments["emission"].shape[0]
    grad = torch.linspace(-1, 1.5, batch, dtype=torch.float64) if grad is None else grad
    with use_backend("reference"):
        z, expected = solve(doubled(arguments), grad)
    found_z, found = solve(arguments, grad)
    feasible = z.isfinite()
    assert torch.equal(found_z[~feasible].double(), z[~feasible])
    torch.testing.assert_close(found_z[feasible].double(), z[feasible], rtol=tolerance, atol=tolerance)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient.double(), expected[name], rtol=marginals, atol=2 * marginals, msg=name)


def compare_best_path(arguments):
    """The best score, and a path that has it; the native CPU kernels take the same of several."""
    found = HMM(**arguments).viterbi()
    with use_backend("reference"):
        hmm = HMM(**doubled(arguments))
        expected = hmm.viterbi()
    feasible = expected.score.isfinite()
    assert torch.equal(found.score[~feasible].double(), expected.score[~feasible])
    torch.testing.assert_close(found.score[feasible].double(), expected.score[feasible], rtol=2e-6, atol=2e-6)
    inside = torch.arange(found.states.shape[1]) < hmm.lengths.unsqueeze(-1)
    assert ((found.states >= 0) == (inside & feasible.unsqueeze(-1))).all()
    score = hmm.score(found.states.clamp(min=0))
    torch.testing.assert_close(score[feasible], expected.score[feasible], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("states", [1, 2, 3, 7, 13, 31, 32, 33, 47, 64])
def test_against_the_reference(on_cpu, kind, states, dtype):
    arguments = problem(5, 9, states, kind, states, dtype, forbidden=0.2 if states % 2 else 0.0)
    arguments["lengths"] = torch.tensor([9, 0, 1, 4, 8])
    compare(arguments)
    compare_best_path(arguments)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("states", [97, 128, 129, 211, 256, 300])
def test_many_states(on_cpu, kind, states):
    batch = 2 if kind == "time-varying" else 3
    for dtype in (torch.float32, torch.float64):
        arguments = problem(batch, 3, states, kind, 1, dtype, lengths="full")
        compare(arguments)
        compare_best_path(arguments)


@pytest.mark.parametrize("dtype, states", [(torch.float32, 257), (torch.float64, 99)])
@pytest.mark.parametrize("forbidden", [0.0, 0.3])
@pytest.mark.parametrize("both_ends", [True, False])
def test_a_matrix_product_a_step(on_cpu, monkeypatch, dtype, states, forbidden, both_ends):
    """Many states of shared transitions: lengths of all kinds, and products that autocast leaves be."""
    if not both_ends:
        monkeypatch.setattr(cuda, "_BOTH_ENDS_TO", 0)
    arguments = problem(5, 7, states, "shared", 2, dtype, forbidden=forbidden)
    arguments["lengths"] = torch.tensor([7, 0, 1, 5, 7])
    products = []
    monkeypatch.setattr(torch, "bmm", lambda *x, bmm=torch.bmm, **out: products.append(x) or bmm(*x, **out))
    compare(arguments)
    assert len(products) == (3 + 4 if both_ends else 6 + 6)  # forward, and backward
    scores = [arguments[k] for k in ("initial", "transition", "emission", "lengths", "final")]
    messages = cuda.forward(*scores)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = cuda.forward(*scores)
    assert all(torch.equal(messages[k], again[k]) for k in (0, 1, 3, 4))


@pytest.mark.parametrize("dtype, most", [(torch.float32, 256), (torch.float64, 96)])
def test_the_most_states_of_a_time_loop_in_one_kernel(on_cpu, dtype, most):
    """With more, a step is a product, where all sequences share the transitions."""
    for states in (most, most + 1):
        for kind in ("shared", "per-sequence"):
            arguments = problem(2, 3, states, kind, 1, dtype) | {"lengths": torch.tensor([3, 2])}
            assert cuda.Call(*arguments.values()).in_steps == (states > most and kind == "shared")


@pytest.mark.parametrize("kind", ["shared", "per-sequence"])
@pytest.mark.parametrize("states", [40, 130])
def test_a_state_that_flushes_among_many(on_cpu, kind, states):
    """Left-to-right chains with emissions 500 nats apart: a product would lose what wins later, and float32 messages
    some thousand nats apart would cost the posterior of an arc 6e-5."""
    chain = left_to_right(states, states + 30, 500.0)
    if kind == "per-sequence":
        chain["transition"] = chain["transition"].repeat(chain["emission"].shape[0], 1, 1)
    compare(chain)
    scores = [chain[k] for k in ("initial", "transition", "emission", "lengths", "final")]
    assert (cuda.forward(*scores)[4] == REDONE).any()


def test_thousands_of_states(on_cpu):
    """Messages that shared memory does not hold twice."""
    states, dtype = 4100, torch.float64
    arguments = problem(1, 2, states, "shared", 2, dtype, lengths="full")
    scores = [arguments[k] for k in ("initial", "transition", "emission", "lengths", "final")]
    scores[3] = torch.tensor([2])
    with use_backend("reference"):
        exact = HMM(**doubled(arguments))
        z, best, marginals = exact.log_partition(), exact.viterbi(), exact.marginals()
    messages = cuda.forward(*scores)
    torch.testing.assert_close(messages[0].double(), z, rtol=2e-6, atol=2e-6)
    state, _ = cuda.backward(torch.ones(1, dtype=dtype), *scores, *messages, False)
    torch.testing.assert_close(state.double(), marginals, rtol=0, atol=5e-6)
    score, path = cuda.viterbi(*scores)
    torch.testing.assert_close(score.double(), best.score, rtol=2e-6, atol=2e-6)
    assert torch.equal(path, best.states)
    uniform = torch.tensor([[[0.5, 0.3]]], dtype=dtype)
    assert torch.equal(cuda.sample(*scores, uniform), reference.sample(*scores, uniform))


def test_too_many_states_are_refused(on_cpu):
    for states, kind in ((library.CUDA_MOST_STATES + 1, "shared"), (library.CUDA_MOST_STATES_VARYING + 1, "varying")):
        transition = torch.zeros(()).expand(1, 1, states, states) if kind == "varying" else torch.zeros(states, states)
        scores = torch.zeros(states), transition, torch.zeros(1, 2, states), torch.tensor([2]), None
        with pytest.raises(RuntimeError, match=f"invalid argument.*N = .*{states}"):
            cuda.viterbi(*scores)


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 7, 8, 9, 17, 33])
def test_every_size_of_batch(on_cpu, batch):
    for kind in KINDS:
        compare(problem(batch, 5, 6, kind, batch, torch.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_orders_of_threads(on_cpu, schedule, kind):
    for states in (5, 40):
        arguments = problem(4, 7, states, kind, 3, torch.float32, forbidden=0.3)
        compare(arguments)
        compare_best_path(arguments)


def test_results_do_not_depend_on_the_order_of_threads(on_cpu, monkeypatch):
    for kind in KINDS:
        arguments = problem(5, 12, 20, kind, 3, torch.float32)
        found = []
        for order in ("0", "1", "2"):
            monkeypatch.setenv("HMM_SCHEDULE", order)
            z, gradients = solve(arguments, torch.ones(5))
            found.append([z, *gradients.values(), HMM(**arguments).viterbi().states])
        assert all(torch.equal(x, y) for others in found[1:] for x, y in zip(found[0], others, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shift", [1000.0, -1000.0])
def test_scores_around_a_thousand(on_cpu, kind, shift):
    compare(problem(5, 30, 9, kind, 3, torch.float32, shift=shift))


@pytest.mark.parametrize("gap", [1.0, 50.0, 500.0])
@pytest.mark.parametrize("end", [None, "last"])
def test_left_to_right_chains(on_cpu, gap, end):
    arguments = left_to_right(12, 40, gap)
    if end:
        arguments["final"] = torch.full((12,), -INF)
        arguments["final"][-1] = 0
    compare(arguments)
    compare_best_path(arguments)
    scores = [arguments[k] for k in ("initial", "transition", "emission", "lengths", "final")]
    method = cuda.forward(*scores)[4]
    assert gap < 500 or (method == REDONE).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["shared", "per-sequence"])
@pytest.mark.parametrize("time", [1, 2, 3, 4, 7, 13, 32])
def test_halves_meet(on_cpu, kind, time, dtype):
    """A sequence of every length, walked from both ends and from one: the same numbers, and samples from the latter."""
    arguments = problem(time + 1, time, 11, kind, time, dtype, forbidden=0.2 if time % 2 else 0.0)
    arguments["lengths"] = torch.arange(time + 1)
    compare(arguments)
    scores = [arguments[k] for k in ("initial", "transition", "emission", "lengths", "final")]
    both, one = cuda.forward(*scores), cuda.forward(*scores, both_ends=False)
    assert set(both[4].tolist()) <= {BOTH_ENDS if time > 1 else 0, REDONE} and set(one[4].tolist()) <= {0, REDONE}
    torch.testing.assert_close(both[0], one[0], rtol=2e-6, atol=2e-6)
    grad = torch.linspace(-1, 1.5, time + 1, dtype=dtype)
    posteriors = [cuda.backward(grad, *scores, *x, True) for x in (both, one)]
    for x, y in zip(*posteriors, strict=True):
        torch.testing.assert_close(x, y, rtol=5e-6, atol=1e-5)


@pytest.mark.parametrize("scale", [5.0, 20.0, 60.0, 200.0])
@pytest.mark.parametrize("forbidden", [0.0, 0.4])
def test_halves_that_meet_far_apart(on_cpu, scale, forbidden):
    """Each half wants other states than the other one: what their product keeps must be enough."""
    for seed in range(3):
        compare(problem(6, 11, 5, "shared", seed, torch.float32, scale=scale, forbidden=forbidden, lengths="full"))


def test_a_flushed_state_that_wins_later(on_cpu):
    """As in test_contract.py: what scaling loses in the first half, and backward in the second, is the answer."""
    emission = torch.zeros(1, 150, 2)
    emission[0, :25, 0], emission[0, 25:125, 1], emission[0, 125:, 0] = 8, 8, 8
    compare({"initial": torch.zeros(2), "transition": torch.full((2, 2), -INF).fill_diagonal_(0), "emission": emission,
             "lengths": None, "final": None})  # fmt: skip


@pytest.mark.parametrize("states", [26, 140, 257])
@pytest.mark.parametrize("time", [13, 40])
def test_a_weight_that_was_lifted_is_not_believed(on_cpu, monkeypatch, states, time):
    """From the start to 16 states, from these to C and to 8 others, which have a weight of e^-500 there and win later:
    lifted to 2^-126, it stands before a product of 16 times what a message may have, and is no small number."""
    monkeypatch.setattr(cuda, "walk_both_ends", lambda *_: False)
    arcs, initial = torch.full((states, states), -INF), torch.full((states,), -INF)
    arcs[0, 1:17], arcs[1:17, 17:26], arcs[17, 17], arcs[18:26, 18:26] = 0, 0, 0, 0
    emission = torch.zeros(1, time, states)
    initial[0], emission[0, 2, 18:], emission[0, 3:, 17] = 0, -500, -10
    compare({"initial": initial, "transition": arcs, "emission": emission, "lengths": None, "final": None})


def test_mixing_chains_stay_scaled(on_cpu):
    arguments = problem(8, 30, 20, "shared", 1, torch.float32)
    arguments["transition"] = arguments["transition"].log_softmax(-1)
    compare(arguments)
    scores = [arguments[k] for k in ("initial", "transition", "emission", "lengths", "final")]
    assert (cuda.forward(*scores)[4] == BOTH_ENDS).all() and (cuda.forward(*scores, both_ends=False)[4] == 0).all()


@pytest.mark.parametrize("kind", ["shared", "per-sequence"])
def test_scaled_and_log_space_in_one_batch(on_cpu, kind):
    """One sequence of each group is lost; gradients of a shared transition sum over both."""
    arguments = problem(6, 40, 12, kind, 1, torch.float32, lengths="full")
    chain = left_to_right(12, 40, 1.0)
    arguments["transition"] = chain["transition"] if kind == "shared" else chain["transition"].repeat(6, 1, 1)
    arguments["emission"][2] *= 500
    arguments["emission"][5] *= 500
    compare(arguments)


@pytest.mark.parametrize("kind, states, time", [("shared", 4, 2500), ("time-varying", 4, 2500), ("shared", 129, 800)])
def test_thousands_of_frames(on_cpu, kind, states, time):
    compare(problem(2, time, states, kind, 7, torch.float32, lengths="full"))


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_never_read(on_cpu, kind):
    arguments = problem(4, 9, 5, kind, 2, torch.float32)
    arguments["lengths"] = torch.tensor([9, 0, 1, 4])
    expected, best = solve(arguments, torch.ones(4)), HMM(**arguments).viterbi()
    inside = torch.arange(9) < arguments["lengths"][:, None]
    arguments["emission"][~inside] = float("nan")
    if kind == "time-varying":
        arguments["transition"][~inside[:, 1:]] = float("nan")
    z, found = solve(arguments, torch.ones(4))
    assert torch.equal(z, expected[0]) and all(torch.equal(x, expected[1][k]) for k, x in found.items())
    assert (found["emission"][~inside] == 0).all()
    assert all(torch.equal(x, y) for x, y in zip(HMM(**arguments).viterbi(), best, strict=True))
    assert (HMM(**arguments).sample(2)[:, ~inside] == -1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_infeasible_sequences(on_cpu, kind):
    arguments = problem(3, 5, 4, kind, 1, torch.float32, lengths="full")
    arguments["emission"][1, 2] = -INF
    compare(arguments)
    hmm = HMM(**arguments)
    assert hmm.log_partition()[1] == -INF and (hmm.marginals()[1] == 0).all() and (hmm.sample(2)[:, 1] == -1).all()
    assert (hmm.transition_counts()[1] == 0).all()
    compare_best_path(arguments)
    leaves = {k: x.clone().requires_grad_() if x is not None else None for k, x in arguments.items()}
    HMM(**leaves).log_partition().sum().backward()
    assert all(not x.grad.isnan().any() for x in leaves.values() if x is not None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [INF, float("nan")])
def test_bad_scores_give_nan(on_cpu, kind, bad):
    for where in ("emission", "transition", "initial"):
        arguments = problem(2, 4, 3, kind, 1, torch.float32, lengths="full", final=False)
        arguments[where].view(-1)[1] = bad
        assert HMM(**arguments).log_partition()[0].isnan()


@pytest.mark.parametrize("kind", KINDS)
def test_edges_and_strides(on_cpu, kind):
    """Posteriors of arcs, of each frame and summed; transitions that are expanded; no emission."""
    arguments = problem(3, 6, 5, kind, 4, torch.float32)
    with use_backend("reference"):
        exact = HMM(**doubled(arguments))
        edges, counts = exact.edge_marginals(), exact.transition_counts()
    hmm = HMM(**arguments)
    torch.testing.assert_close(hmm.edge_marginals().double(), edges, rtol=0, atol=5e-6)
    torch.testing.assert_close(hmm.transition_counts().double(), counts, rtol=0, atol=1e-5)
    if kind == "time-varying":
        arguments["emission"] = None
        compare(arguments | {"initial": arguments["initial"].expand(3, -1)})
    else:
        arguments["transition"] = arguments["transition"].expand(3, 5, 5)[:1].expand(3, 5, 5)
        compare(arguments)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch, time", [(0, 4), (3, 0), (3, 1), (0, 0)])
def test_nothing_to_do(on_cpu, kind, batch, time):
    if kind == "per-sequence" and not batch:
        return
    compare(problem(batch, time, 3, kind, 2, torch.float32, lengths="full"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_those_of_the_same_numbers(on_cpu, kind, dtype):
    """Inverse-CDF walks: the states that the reference draws from the same numbers, but for rounding."""
    for states in (2, 5, 33, 70):
        arguments = problem(4, 8, states, kind, 5, dtype, forbidden=0.3)
        scores = [arguments[k] for k in ("initial", "transition", "emission", "lengths", "final")]
        scores[3] = torch.tensor([8, 0, 1, 5])
        uniform = torch.rand(6, 4, 8, generator=torch.Generator().manual_seed(1), dtype=dtype)
        found = torch.ops.hmm_speech.sample(*scores, uniform)
        wide = [x.double() if x is not None and x.is_floating_point() else x for x in scores]
        expected = reference.sample(*wide, uniform.double())
        assert (found == expected).float().mean() >= 0.99
        assert ((found >= 0) == (expected >= 0)).all()


def test_samples_follow_the_posterior(on_cpu):
    arguments = problem(2, 5, 3, "shared", 3, torch.float32, lengths="full")
    hmm = HMM(**arguments)
    drawn = hmm.sample(3000, torch.Generator().manual_seed(0))
    frequency = torch.nn.functional.one_hot(drawn, 3).float().mean(0)
    assert (frequency - hmm.marginals()).abs().max() < 0.04


def test_second_derivatives_go_through_the_reference(on_cpu, monkeypatch):
    """As on a GPU, where there is no kernel for them."""
    monkeypatch.setattr(ops.library, "use_native", lambda device, operation="": operation in library.CUDA_KERNELS)
    arguments = problem(2, 4, 3, "shared", 1, torch.float64)
    names = [k for k, x in arguments.items() if x is not None and x.is_floating_point()]

    def z(*scores):
        return HMM(**arguments | dict(zip(names, scores, strict=True))).log_partition()

    torch.autograd.gradgradcheck(z, [arguments[k].requires_grad_() for k in names], fast_mode=True)
