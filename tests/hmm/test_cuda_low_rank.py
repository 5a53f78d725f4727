"""Chains through two factors by the kernels for GPUs, executed on the CPU (tests/cpp/cuda/on_cpu.h), against dense
twins in float64."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hmm_speech.hmm import HMM, LowRank, library, low_rank_cuda, low_rank_ops, low_rank_sweeps
from tests.hmm.problems import INF
from tests.hmm.test_low_rank import (
    KINDS,
    a_narrow_way_on,
    compare,
    low_rank,
    many_classes_into_a_vanishing_state,
    mapped,
    solve,
    states_that_never_meet,
)

REDONE = library.REDONE


class NoWaiting(TorchDispatchMode):
    """Refuses what would wait for a GPU: numbers that Python, or the shape of a result, would have to know."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function._schema.name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal"), function
        return function(*args, **kwargs or {})


@pytest.fixture(autouse=True)
def on_gpu(on_cpu, monkeypatch):
    """Tensors of a CPU go where those of a GPU would."""

    def elsewhere(*_):
        raise AssertionError("not on a GPU")

    monkeypatch.setattr(low_rank_ops, "_on_gpu", lambda emission: True)
    for name in ("forward", "backward"):
        monkeypatch.setattr(low_rank_sweeps, name, elsewhere)
    monkeypatch.setattr(low_rank_ops.low_rank_redo, "Sequence", elsewhere)


def scores_of(arguments):
    transition = arguments["transition"]
    factors = torch.cat([transition.left.mT, transition.right], -2)
    return arguments["initial"], factors, arguments["emission"], arguments["lengths"], arguments["final"]


def methods(arguments):
    return torch.ops.hmm_speech.low_rank_forward(*scores_of(arguments))[3].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("states, rank", [(1, 1), (2, 2), (7, 3), (31, 1), (32, 32), (53, 17), (67, 40)])
def test_against_dense_chains(kind, states, rank, dtype):
    arguments = low_rank(5, 9, states, rank, kind, states, dtype, forbidden=0.2 if states % 2 else 0.0)
    arguments["lengths"] = torch.tensor([9, 0, 1, 4, 8])
    compare(arguments)


@pytest.mark.parametrize("states, rank", [(127, 127), (211, 5), (300, 64), (293, 293)])
def test_many_states(states, rank):
    compare(low_rank(3, 4, states, rank, "shared" if rank > 5 else "per-sequence", 2))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_waits_for_the_gpu(kind):
    scores = scores_of(far_apart(kind))
    with NoWaiting():
        messages = low_rank_ops._forward(*scores)
        low_rank_ops._backward(torch.ones(5), *scores, *messages, True)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoWaiting():
        assert low_rank_ops.Factors(scores[1], 12).wide


def far_apart(kind, dtype=torch.float32, **options):
    """Sequences 1 and 3 cannot be certified: a way on leads through what scaled probabilities lose."""
    arguments = low_rank(5, 12, 20, 4, kind, 1, dtype, forbidden=0.3, final=True, **options)
    arguments["lengths"] = torch.tensor([12, 11, 0, 12, 2])
    arguments["emission"][1] *= 900 if dtype == torch.float64 else 500
    arguments["emission"][3] *= 900 if dtype == torch.float64 else 500
    return arguments


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_lost_is_done_again_on_the_device(kind, dtype):
    arguments = far_apart(kind, dtype)
    lost = methods(arguments)
    assert lost[1] == lost[3] == REDONE and lost[2] == 0 and lost[0] == 0
    compare(arguments)
    compare(arguments, torch.tensor([0.0, -2.0, 1.0, 0.0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gap", [50.0, 500.0])
def test_emissions_far_apart_where_arcs_mix(kind, gap):
    arguments = low_rank(4, 20, 20, 4, kind, 1, lengths="full", final=False)
    arguments["emission"] = arguments["emission"] * gap
    assert methods(arguments | {"lengths": torch.full((4,), 20)}) == [0] * 4
    compare(arguments)


def test_a_flushed_state_that_wins_later():
    arguments = states_that_never_meet()
    assert methods(arguments) == [REDONE]
    compare(arguments)


@pytest.mark.parametrize("time", [12, 60])
def test_a_weight_that_was_lifted_is_not_believed(time):
    arguments = many_classes_into_a_vanishing_state(time=time)
    assert methods(arguments) == [REDONE]
    compare(arguments)


@pytest.mark.parametrize("bits", [20, 60, 77, 100])
def test_left_factors_of_any_range(bits):
    compare(a_narrow_way_on(bits))


@pytest.mark.parametrize("shift", [1000.0, -1000.0])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_around_a_thousand(kind, shift):
    compare(low_rank(4, 20, 9, 3, kind, 3, shift=shift))


@pytest.mark.parametrize("offset", [10.0, 1000.0])
def test_column_offsets_that_emissions_cancel(offset):
    arguments = low_rank(4, 40, 20, 3, seed=3)
    columns = (torch.rand(20, generator=torch.Generator().manual_seed(1)) * 2 - 1) * offset
    arguments["transition"] = LowRank(arguments["transition"].left, arguments["transition"].right + columns)
    arguments["emission"] = arguments["emission"] - columns
    # log Z is the sum of 40 frames whose scores carry a rounding of 6e-8 * offset each, whatever computes it.
    compare(arguments, log_partition=2e-6 * max(1, offset / 100))


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_never_read(kind):
    arguments = far_apart(kind)
    expected = solve(arguments, torch.ones(5))
    inside = torch.arange(12) < arguments["lengths"][:, None]
    arguments["emission"][~inside] = float("nan")
    z, state, found = solve(arguments, torch.ones(5))
    assert torch.equal(z, expected[0]) and torch.equal(state, expected[1])
    assert all(torch.equal(x, expected[2][name]) for name, x in found.items())
    assert z[2] == 0 and (found["emission"][~inside] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [INF, float("nan")])
@pytest.mark.parametrize("where", ["emission", "left", "right", "initial"])
def test_bad_scores_give_nan_and_forbidden_ones_nothing(kind, bad, where):
    arguments = low_rank(3, 5, 4, 2, kind, 1, lengths="full", final=False)
    tensor = arguments[where] if where in arguments else getattr(arguments["transition"], where)
    tensor.view(-1)[1] = bad
    arguments["emission"][1, 2] = -INF
    arguments["lengths"] = torch.tensor([5, 5, 5])
    z, _, found = solve(arguments, torch.ones(3))
    assert z[0].isnan()
    messages = torch.ops.hmm_speech.low_rank_forward(*scores_of(arguments))
    state, edge = torch.ops.hmm_speech.low_rank_backward(torch.ones(3), *scores_of(arguments), *messages, True)
    assert state[0].isnan().all() and (edge if kind == "shared" else edge[0]).isnan().all()
    if where == "emission":
        assert z[1] == -INF and z[2].isfinite() and (found["emission"][1] == 0).all()
        assert (state[1] == 0).all() and state[2].isfinite().all()
        assert kind == "shared" or ((edge[1] == 0).all() and edge[2].isfinite().all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0), (2, 1)])
def test_little_or_nothing_to_do(kind, shape):
    _, _, found = solve(low_rank(*shape, 5, 2, kind, 1, lengths="full"), torch.ones(shape[0]))
    assert (found["left"] == 0).all() and (found["right"] == 0).all()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_upstream_gradients_of_any_size(scale):
    arguments = low_rank(3, 10, 6, 2, seed=2, lengths="full")
    expected = solve(arguments, torch.ones(3))[2]
    for name, gradient in solve(arguments, torch.full((3,), scale))[2].items():
        torch.testing.assert_close(gradient.double() / scale, expected[name].double(), rtol=1e-5, atol=1e-5)


def test_many_frames():
    arguments = low_rank(1, 400, 4, 2, seed=7, lengths="full")
    arguments["transition"] = arguments["transition"].map(lambda x: x.log_softmax(-1))
    compare(arguments, torch.ones(1, dtype=torch.float64), marginals=5e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_results_do_not_depend_on_the_order_of_threads(monkeypatch, kind):
    arguments = far_apart(kind)
    found = []
    for order in ("0", "1", "2"):
        monkeypatch.setenv("HMM_SCHEDULE", order)
        z, state, gradients = solve(arguments, torch.ones(5))
        found.append([z, state, *gradients.values()])
    assert all(torch.equal(x, y) for others in found[1:] for x, y in zip(found[0], others, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_messages_are_those_of_the_sweeps(monkeypatch, kind):
    """Up to a power of two a frame, and 0 past the end and where a sequence is lost."""
    arguments = far_apart(kind, torch.float64)
    scores = scores_of(arguments)
    _, alpha, half, method = torch.ops.hmm_speech.low_rank_forward(*scores)
    monkeypatch.undo()
    _, expected, _, expected_method = low_rank_sweeps.forward(
        low_rank_ops.Factors(scores[1], 12), scores[0], *scores[2:]
    )
    assert torch.equal(method, expected_method.to(torch.int32))
    mass, theirs = alpha.sum(-1, keepdim=True), expected.sum(-1, keepdim=True)
    torch.testing.assert_close(alpha / mass.clamp(min=1), expected / theirs.clamp(min=1))
    assert ((mass == 0) == (theirs == 0)).all() and (half[:, 0] == 0).all()
    assert ((mass == 0) | ((mass >= 2**18) & (mass < 2**31))).all()


def test_autocast_leaves_products_be():
    arguments = low_rank(3, 8, 20, 5, seed=2)
    expected = solve(arguments, torch.ones(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, state, found = solve(arguments, torch.ones(3))
    assert torch.equal(z, expected[0]) and torch.equal(state, expected[1])
    assert all(torch.equal(x, expected[2][name]) for name, x in found.items())


def test_second_derivatives_go_through_the_reference():
    arguments = mapped(low_rank(2, 3, 3, 2, seed=1, dtype=torch.float64, lengths="full"), lambda x: x.requires_grad_())
    transition = arguments["transition"]

    def z(left, right, emission):
        return HMM(**arguments | {"transition": LowRank(left, right), "emission": emission}).log_partition()

    torch.autograd.gradgradcheck(z, [transition.left, transition.right, arguments["emission"]], fast_mode=True)


def test_errors_name_the_shape():
    scores = list(scores_of(low_rank(2, 3, 4, 2, seed=1)))
    made = low_rank_ops.Factors(scores[1], 3)
    made.rank = 0
    with pytest.raises(RuntimeError, match=r"low_rank_begin: invalid argument.*; B, T, N = \(2, 3, 4\)"):
        low_rank_cuda.forward(made, *scores)
