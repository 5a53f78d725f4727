"""Transitions that vary over time in chunks of frames, all at once, by the kernels for GPUs (csrc/cuda/transfer.cu)."""

from types import SimpleNamespace

import pytest
import torch

from hmm_speech.hmm import cuda, library
from tests.hmm.problems import INF, problem
from tests.hmm.test_contract import left_to_right
from tests.hmm.test_cuda_kernels import BOTH_ENDS, compare

CHUNKS = 4  # enum hmm_method
NAMES = ("initial", "transition", "emission", "lengths", "final")


@pytest.fixture
def chunks(on_cpu, monkeypatch):
    """Sets the frames of a chunk."""
    return lambda frames: monkeypatch.setattr(cuda, "chunk_frames", lambda *shape: frames)


def varying(time, states, seed, lengths, **options):
    """A problem in float32, and its scores; what pads is NaN."""
    arguments = problem(len(lengths), time, states, "time-varying", seed, torch.float32, **options)
    arguments["lengths"] = torch.tensor(lengths)
    outside = torch.arange(time) >= arguments["lengths"][:, None]
    arguments["emission"][outside] = float("nan")
    arguments["transition"][outside[:, 1:]] = float("nan")
    return arguments, [arguments[k] for k in NAMES]


def clean(arguments):
    """Without NaN where the reference would read it."""
    return {
        k: x.nan_to_num(0, neginf=-INF) if x is not None and x.is_floating_point() else x for k, x in arguments.items()
    }


@pytest.mark.parametrize(
    "time, frames, states",
    [(11, 4, 1), (11, 4, 2), (12, 1, 7), (11, 5, 33), (9, 4, 50), (11, 5, 52), (11, 5, 53), (9, 4, 64)],
)
@pytest.mark.parametrize("forbidden", [0.0, 0.2])
def test_chunks(chunks, monkeypatch, time, frames, states, forbidden):
    """Against the reference, and against both ends, with grad of every sign and size; lengths about a chunk's."""
    lengths = [time, 0, 1, frames - 1, frames, frames + 1, 2 * frames]
    arguments, scores = varying(time, states, states, lengths, forbidden=forbidden if states > 2 else 0.0)
    chunks(frames)
    compare(clean(arguments), torch.linspace(1, -2, 7, dtype=torch.float64))
    found = cuda.forward(*scores)
    expected = [CHUNKS if n > frames and z > -INF else BOTH_ENDS for n, z in zip(lengths, found[0], strict=True)]
    assert found[4].tolist() == expected and CHUNKS in expected
    grad = torch.tensor([1.0, 2.0, -1.0, 0.0, -3.0, 1e-20, 1e4])
    state, edge = cuda.backward(grad, *scores, *found, True)
    assert torch.equal(cuda.backward(grad, *scores, *found, False)[0], state)
    inside = torch.arange(time) < arguments["lengths"][:, None]
    assert (state[~inside] == 0).all() and (edge[~inside[:, 1:]] == 0).all()
    monkeypatch.setenv("HMM_SCHEDULE", "1")
    assert all(torch.equal(x, y) for x, y in zip(found, cuda.forward(*scores), strict=True))
    assert all(
        torch.equal(x, y) for x, y in zip((state, edge), cuda.backward(grad, *scores, *found, True), strict=True)
    )
    chunks(0)
    both = cuda.forward(*scores)
    torch.testing.assert_close(found[0], both[0], rtol=2e-6, atol=2e-6)
    for x, y in zip((state, edge), cuda.backward(grad, *scores, *both, True), strict=True):
        assert ((x - y).abs() <= 1e-5 * grad.abs().view(-1, *(1,) * (x.dim() - 1))).all()


@pytest.mark.parametrize("shift", [1000.0, -1000.0])
@pytest.mark.parametrize("final", [True, False])
def test_chunks_around_a_thousand(chunks, shift, final):
    arguments, scores = varying(31, 10, 3, [31, 30, 12, 4], shift=shift, final=final)
    chunks(6)
    compare(clean(arguments))
    assert cuda.forward(*scores)[4].tolist() == [CHUNKS] * 3 + [BOTH_ENDS]


def test_chunks_of_extreme_emissions(chunks):
    """Hundreds of nats apart. Arcs that mix keep what matters; where they do not, a sequence is done from both ends."""
    for arcs, forbidden, method in ((1.0, 0.0, CHUNKS), (1.0, 0.2, BOTH_ENDS), (8.0, 0.0, BOTH_ENDS)):
        arguments, scores = varying(20, 9, 1, [20, 20, 20])
        arguments["emission"] *= 170
        arguments["transition"] *= arcs
        arguments["transition"][
            torch.rand(arguments["transition"].shape, generator=torch.Generator().manual_seed(0)) < forbidden
        ] = -INF
        chunks(5)
        assert (cuda.forward(*scores)[4] == method).all()
        compare(arguments)


@pytest.mark.parametrize("gap", [1.0, 50.0, 500.0])
def test_chunks_of_left_to_right_chains(chunks, gap):
    """What has no certificate is done as without chunks, to the bit."""
    arguments = left_to_right(9, 40, gap)
    arguments["transition"] = arguments["transition"].expand(4, 39, 9, 9)
    arguments["final"] = torch.full((9,), -INF)
    arguments["final"][-1] = 0
    scores = [arguments[k] for k in NAMES]
    chunks(10)
    found = cuda.forward(*scores)
    posteriors = cuda.backward(torch.ones(4), *scores, *found, True)
    assert (found[4] == torch.tensor([CHUNKS if gap == 1 else BOTH_ENDS] * 2 + [BOTH_ENDS] * 2)).all()
    if gap == 1:
        compare(arguments)
        return
    chunks(0)
    expected = cuda.forward(*scores)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    assert all(
        torch.equal(x, y)
        for x, y in zip(posteriors, cuda.backward(torch.ones(4), *scores, *expected, True), strict=True)
    )


@pytest.mark.parametrize("dear", [(1, 2, 3), (3, 4, 5)])  # the entry is small before a row is rescaled, or then
def test_chunks_in_which_an_entry_is_lost(chunks, dear):
    """The best path stays in state 0, for 68 nats in each of three frames, which no float holds beside 0 nats: those of
    state 1, whose second chunk costs 20 a frame."""
    arguments, scores = varying(28, 2, 1, [28])
    for name in ("initial", "emission", "transition", "final"):
        arguments[name].zero_()
    arguments["transition"][..., 1, 0] = -INF
    arguments["transition"][:, [t - 1 for t in dear], 0, 0] = -68
    arguments["emission"][:, 14:, 1] = -20
    chunks(14)
    found = cuda.forward(*scores)
    assert found[4].tolist() == [BOTH_ENDS] and found[0].item() == pytest.approx(-204)
    compare(arguments)


def test_one_sequence_of_a_batch_without_a_certificate(chunks):
    """And one without a path, one with NaN; edges of their neighbours stay."""
    arguments, scores = varying(13, 6, 2, [13] * 5)
    arguments["emission"][1, 5] *= 1000
    arguments["transition"][1, 3, 0, 0] = -INF
    arguments["transition"][2, 3] = -INF
    arguments["emission"][3, 3, 3] = float("nan")
    chunks(4)
    messages = cuda.forward(*scores)
    assert messages[4].tolist() == [CHUNKS, BOTH_ENDS, BOTH_ENDS, BOTH_ENDS, CHUNKS]
    assert messages[0][2] == -INF and messages[0][3].isnan() and messages[0][[0, 1, 4]].isfinite().all()
    state, edge = cuda.backward(torch.ones(5), *scores, *messages, True)
    assert (state[2] == 0).all() and (edge[2] == 0).all() and state[3].isnan().all() and edge[3].isnan().all()
    kept = [0, 1, 4]
    compare({k: x[kept] if x is not None and x.shape[0] == 5 else x for k, x in arguments.items()})
    for bad in (INF, -INF):
        for name, at in (("initial", 0), ("final", 0), ("transition", 7), ("emission", 12)):
            changed, changed_scores = varying(13, 6, 2, [13])
            changed[name].view(-1)[at] = bad
            if bad == -INF:
                compare(changed)
            else:
                assert cuda.forward(*changed_scores)[0].isnan().all()


def test_many_chunks(chunks):
    """Errors do not add up from chunk to chunk, or over the frames of a long one."""
    arguments, scores = varying(1501, 3, 5, [1501, 1000])
    for frames in (7, 500):
        chunks(frames)
        assert (cuda.forward(*scores)[4] == CHUNKS).all()
        compare(clean(arguments), torch.ones(2, dtype=torch.float64))


def test_where_chunks_are_not_taken(on_cpu, monkeypatch):
    """In float64, for many states, for samples, and where transitions do not vary."""
    asked = []
    monkeypatch.setattr(cuda, "chunk_frames", lambda *shape: asked.append(shape) or 3)
    for kind, states, dtype in (
        ("time-varying", 5, torch.float64),
        ("time-varying", 65, torch.float32),
        ("shared", 5, torch.float32),
    ):
        scores = tuple(problem(2, 9, states, kind, 1, dtype).values())
        assert (cuda.forward(*scores[:3], torch.tensor([9, 8]), scores[4])[4] == BOTH_ENDS).all()
    assert asked == [(2, 9, 65, 1000, 1)]  # which says no: below
    scores = tuple(problem(2, 9, 5, "time-varying", 1, torch.float32).values())
    assert (cuda.sample(*scores[:3], torch.tensor([9, 8]), scores[4], torch.rand(2, 2, 9))[:, :, :8] >= 0).all()


def test_what_chunks_cost():
    def chosen(batch, time, states, multiprocessors, beside=1):
        return cuda.chunk_frames(batch, time, states, multiprocessors, beside)

    assert chosen(8, 3000, 50, 68) == 375 and chosen(8, 3000, 50, 132, 2) == 91  # the seed's table
    assert chosen(1, 3000, 50, 132) == chosen(1, 3000, 50, 132, 2) == 27  # with more, each would wait for the others
    assert chosen(8, 100, 50, 68) == 13 and not chosen(8, 20, 50, 68)
    assert not chosen(8, 3000, 50, 31) and chosen(8, 3000, 50, 32) and not chosen(8, 3000, 65, 1000)
    assert not any(chosen(*shape, 50, 132, 2) for shape in ((0, 100), (1, 0), (1, 1), (1, 2), (1000, 100)))
    assert library.Problem().chunk_frames == 0


def test_chunks_beside_each_other_need_room_that_torch_knows_of(monkeypatch):
    """torch tells of a multiprocessor's shared memory from 2.7 on."""
    for kilobytes, of_50, of_60 in ((164, 2, 2), (100, 2, 1), (64, 1, 1), (None, 1, 1)):
        known = {} if kilobytes is None else {"shared_memory_per_multiprocessor": kilobytes << 10}
        properties = SimpleNamespace(multi_processor_count=108, **known)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, found=properties: found)
        found = [cuda.chunks_beside("cuda:0", states) for states in (50, 52, 53, 60, 65)]
        assert found == [of_50, of_50, of_60, of_60, 1]
