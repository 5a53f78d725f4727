"""CUDA graphs of steps (hmm_speech/hmm/cuda_graphs.py), with a stand-in for torch's that repeats calls.

What is launched is executed on the CPU, by tests/cpp/cuda/on_cpu.h; no graph was ever captured on a GPU here."""

import contextlib
import ctypes
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hmm_speech.hmm import cuda, cuda_graphs, library, low_rank_cuda, low_rank_ops
from tests.hmm.problems import INF, problem
from tests.hmm.test_low_rank import low_rank


class NothingElse(TorchDispatchMode):
    """While a graph is captured, torch does nothing that a stand-in would not see."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} within a capture")


class Device:
    """Stands for a GPU: what is captured is not done but kept, with what a launch would have copied, and no more."""

    def __init__(self, handle):
        self.handle, self.bmm, self.default_stream = handle, torch.bmm, True
        self.calls: list | None = None  # of the graph that is being captured
        self.graphs: list = []  # captured, each a weak reference
        self.pool: list = []  # the same, and what keeps the pool
        self.replays = 0

    def __getattr__(self, name):
        function = getattr(self.handle, name)

        def call(first, *rest):
            if self.calls is None:
                return function(first, *rest)
            if name != "hmm_cuda_steps_advance":
                first = ctypes.byref(self.launched(first._obj))
            self.calls.append(lambda: self.check(function(first, *rest)))
            return 0

        return call

    @staticmethod
    def launched(problem):
        """Steps may look at the batch, the number of states and how it is shared, at nothing that has an address."""
        chain = getattr(problem, "chain", problem)
        kept = {name: getattr(chain, name) for name in ("batch", "states", "sharing", "transition_batch_stride")}
        nowhere = dict.fromkeys(("initial", "transition", "emission", "lengths", "final"), 8)
        steps = library.Problem(time=1, **kept, **nowhere)
        return steps if chain is problem else library.CudaLowRankProblem(chain=steps, rank=problem.rank)

    @staticmethod
    def check(status):
        assert status == 0

    def product(self, x, y, out):
        if self.calls is None:
            return self.bmm(x, y, out=out)
        held = [weakref.ref(tensor) for tensor in (x, y, out)]

        def call():
            a, b, c = (tensor() for tensor in held)
            assert a is not None and b is not None and c is not None, "a graph reads what is no longer there"
            self.bmm(a, b, out=c)

        self.calls.append(call)
        return out

    def graph(self):
        return Graph(self)


class Graph:
    def __init__(self, device):
        self.device, self.calls, self.watch = device, [], NothingElse()

    def capture_begin(self, pool=None, capture_error_mode="global"):
        assert pool == "pool" and capture_error_mode == "thread_local" and self.device.calls is None
        assert not self.device.pool or any(graph() for graph in self.device.pool), "torch has given the pool up"
        self.device.calls = self.calls
        self.watch.__enter__()

    def capture_end(self):
        self.watch.__exit__(None, None, None)
        self.device.calls = None
        self.device.pool.append(weakref.ref(self))
        if len(self.calls) > 1:  # not the one that keeps the pool
            self.device.graphs.append(weakref.ref(self))

    def replay(self):
        assert self.device.calls is None and self.calls
        self.device.replays += 1
        for call in self.calls:
            call()


@pytest.fixture
def device(on_cpu, handle, monkeypatch):
    made = Device(handle)
    monkeypatch.setattr(library, "cuda", lambda: made)
    monkeypatch.setattr(torch, "bmm", made.product)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", made.graph)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "current_blas_handle", lambda: None)
    monkeypatch.setattr(cuda_graphs, "_own_stream", lambda device: "stream")
    monkeypatch.setattr(cuda_graphs, "_places", {})
    monkeypatch.setattr(cuda_graphs, "on_default_stream", lambda device: made.default_stream)
    monkeypatch.setattr(cuda_graphs, "_failed", False)
    cuda_graphs.clear()
    yield made
    cuda_graphs.clear()


def dense(time, states=97, dtype=torch.float64, seed=1, batch=3, **options):
    arguments = problem(batch, time, states, "shared", seed, dtype, **options)
    arguments["lengths"] = torch.tensor([time - 3, time, 1, 0])[:batch]
    return arguments


def passes(arguments, grad=None):
    """All that a forward and a backward pass write, but for what no one reads."""
    if grad is None:
        grad = torch.linspace(-1, 1.5, len(arguments["lengths"]), dtype=arguments["emission"].dtype)
    messages = cuda.forward(*arguments.values())
    state, edge = cuda.backward(grad, *arguments.values(), *messages, True)
    inside = torch.arange(state.shape[1]) < arguments["lengths"][:, None]
    return [messages[0], messages[1][inside], messages[3][inside], messages[4], state, edge]


def plain(monkeypatch, arguments):
    with monkeypatch.context() as patch:
        patch.setenv("HMM_SPEECH_CUDA_GRAPHS", "0")
        return passes(arguments)


def same(found, expected):
    return all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("both_ends", [True, False])
def test_replays_give_what_steps_give(device, monkeypatch, both_ends):
    """To the bit, over any number of frames, from tensors elsewhere; also sequences that are done again."""
    if not both_ends:
        monkeypatch.setattr(cuda, "_BOTH_ENDS_TO", 0)
    for k, time in enumerate((19, 38, 20) if both_ends else (9, 21, 12)):
        arguments = dense(time, seed=time, forbidden=0.3, batch=4)
        if k == 2:
            arguments["emission"][0] *= 500
            arguments["emission"][1, 2] = -INF
        expected, before = plain(monkeypatch, arguments), device.replays
        assert same(passes(arguments), expected)
        steps = (time + 1) // 2 if both_ends else time
        assert device.replays - before == (0 if k == 0 else 2 * -(-steps // cuda_graphs.STEPS))
    assert len(device.graphs) == 2  # forward and backward, captured at the second call


@pytest.mark.parametrize("kind", ["shared", "per-sequence"])
def test_products_through_two_factors(device, monkeypatch, kind):
    """Low-rank transitions: two products a step, one after the other."""
    for k, (time, states) in enumerate(((20, 9), (33, 9), (20, 7), (9, 9), (40, 7), (20, 9))):
        arguments = low_rank(4, time, states, 3, kind, time, forbidden=0.3)
        arguments["lengths"] = torch.tensor([time, 0, 1, time - 2])
        arguments["emission"][3] *= 500 if k % 2 else 1
        transition = arguments.pop("transition")
        factors = torch.cat([transition.left.mT, transition.right], -2)
        scores = (arguments["initial"], factors, *(arguments[name] for name in ("emission", "lengths", "final")))
        made = low_rank_ops.Factors(factors, time)

        def found(made=made, scores=scores):
            log_partition, alpha, half, method = low_rank_cuda.forward(made, *scores)
            edge, grad, kept = torch.zeros_like(scores[1]), torch.tensor([1.0, 2.0, 0.0, -1.0]), []
            count = lambda classes, leaving: kept.extend((classes.clone(), leaving.clone()))  # noqa: E731
            state = low_rank_cuda.backward(made, grad, *scores, log_partition, alpha, method, edge, count)
            return [log_partition, alpha, half, method, edge, state, *kept]

        with monkeypatch.context() as patch:
            patch.setenv("HMM_SPEECH_CUDA_GRAPHS", "0")
            expected = found()
        before = device.replays
        assert same(found(), expected)
        assert device.replays - before == (0 if k in (0, 2) else 2 * -(-time // cuda_graphs.STEPS))
    assert len(device.graphs) == 4


def test_shapes_that_alternate_have_graphs_of_their_own(device, monkeypatch):
    shapes = [dense(20), dense(20, batch=2), dense(18, 259, torch.float32, batch=2)]
    expected = [plain(monkeypatch, arguments) for arguments in shapes]
    for _ in range(3):
        assert all(same(passes(x), y) for x, y in zip(shapes, expected, strict=True))
    assert len(device.graphs) == 2 * len(shapes)


def test_graphs_that_are_dropped_are_captured_again(device, monkeypatch):
    """What a graph keeps goes with it."""
    monkeypatch.setattr(cuda_graphs, "MOST_GRAPHS", 2)
    shapes = dense(18, 97, batch=2), dense(18, 98, batch=2)
    expected = [plain(monkeypatch, arguments) for arguments in shapes]
    for k in (0, 0, 1, 1, 0, 0):
        assert same(passes(shapes[k]), expected[k])
    assert len(device.graphs) == 6 and sum(graph() is not None for graph in device.graphs) == 2


def test_other_streams_are_launched_step_by_step(device, monkeypatch):
    """Also where a caller captures, which is on one."""
    arguments = dense(20)
    expected = plain(monkeypatch, arguments)
    passes(arguments), passes(arguments)
    captured = len(device.graphs)
    device.default_stream = False
    before = device.replays
    assert same(passes(arguments), expected) and device.replays == before and len(device.graphs) == captured
    device.default_stream = True
    assert same(passes(arguments), expected) and device.replays > before


def test_what_is_not_worth_a_graph(device, monkeypatch):
    for _ in range(2):
        passes(dense(2 * (cuda_graphs.STEPS // 2), batch=1))  # so many steps, from both ends
        plain(monkeypatch, dense(18, batch=1))
    monkeypatch.setattr(cuda_graphs, "_MOST_BYTES", 2 * 97**2 * 8 - 1)
    for _ in range(2):
        passes(dense(18, batch=1))
    assert not device.graphs and not device.replays


def test_a_capture_that_fails_is_the_last(device, monkeypatch):
    arguments = dense(20)
    expected = plain(monkeypatch, arguments)

    def refuse(self, pool=None, capture_error_mode="global"):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Graph, "capture_begin", refuse)
    assert same(passes(arguments), expected)
    with pytest.warns(UserWarning, match="no CUDA graphs from here on.*not permitted"):
        assert same(passes(arguments), expected)
    assert same(passes(arguments), expected) and not device.graphs


def test_buffers_of_a_graph_are_one_pass_at_a_time(device):
    arguments = dense(20)
    for _ in range(2):
        passes(arguments)
    (found, *_) = cuda_graphs._kept.values()
    call = cuda.Call(*arguments.values())
    call.share(both_ends=True)
    with call.walk("forward") as walk:
        assert walk is found and walk.lock.locked()
    assert not found.lock.locked()


def test_graphs_captured_in_inference_mode_train_later(device, monkeypatch):
    arguments = dense(20, batch=2)
    expected = plain(monkeypatch, arguments)
    for mode in (True, True, False, True):
        with torch.inference_mode(mode):
            assert same(passes({name: x.clone() for name, x in arguments.items()}), expected)
    assert len(device.graphs) == 2 and device.replays


def test_torch_has_what_is_called():
    """Names and arguments of torch.cuda that no test here calls for lack of a GPU."""
    import inspect

    assert {"pool", "capture_error_mode"} <= set(inspect.signature(torch.cuda.CUDAGraph.capture_begin).parameters)
    assert {"capture_end", "replay"} <= set(dir(torch.cuda.CUDAGraph)) and callable(torch.cuda.graph_pool_handle)
    assert {"stream_ptr", "device"} <= set(inspect.signature(torch.cuda.ExternalStream.__new__).parameters)
    assert not cuda_graphs.on_default_stream(torch.device("cpu"))
