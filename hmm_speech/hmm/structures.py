"""Transitions and emissions with structure: what they mean, and what they cost where nothing better is known.

Each class says what dense tensor it stands for, ``dense()``, and looks single arcs up, ``gather()``. How chains with
such scores are inferred without forming that tensor is told in ``low_rank.py``, ``banded.py``, ``chunked.py`` and
``active.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import checks
from .products import log_matmul_exp
from .reference import INF, logsumexp


class LowRank:
    r"""Transition scores that are the log of a product, :math:`\phi(i, j) = \log \sum_r \exp(l(i, r) + r(r, j))`.

    A chain that passes through one of R hidden classes between any two states (Chiu et al. 2021, arXiv:2201.02715; with
    softmaxes over r and over j, both factors are conditional distributions). Forward-backward costs 2 N R a frame, not
    N^2.

    Args:
        left: :math:`l`, (N, R), (B, N, R) or (B, T-1, N, R), in nats; -inf forbids.
        right: :math:`r`, (R, N), with the same leading axes.

    >>> import torch
    >>> from hmm_speech.hmm import HMM, LowRank
    >>> left, right = torch.randn(1000, 8).log_softmax(-1), torch.randn(8, 1000).log_softmax(-1)
    >>> z = HMM(torch.zeros(1000), LowRank(left, right), torch.randn(2, 30, 1000)).log_partition()
    """

    def __init__(self, left: Tensor, right: Tensor):
        for name, x in (("left", left), ("right", right)):
            checks.require_tensor(f"LowRank: {name}", x)
        if (
            left.dim() not in (2, 3, 4)
            or left.shape[:-2] != right.shape[:-2]
            or left.shape[-2:] != right.shape[:-3:-1]
            or 0 in left.shape[-2:]
        ):
            raise ValueError(
                f"LowRank: left is {checks.shape_of(left)}, right is {checks.shape_of(right)}, expected "
                "(..., N, R) and (..., R, N) with leading axes none, (B,) or (B, T-1)"
            )
        self.left, self.right = left, right
        self.num_states, self.rank, self.leading = left.shape[-2], left.shape[-1], tuple(left.shape[:-2])

    def tensors(self) -> dict[str, Tensor]:
        return {"transition.left": self.left, "transition.right": self.right}

    def map(self, function: Callable[[Tensor], Tensor]) -> LowRank:
        return LowRank(function(self.left), function(self.right))

    def within(self, lengths: Tensor) -> LowRank:
        """This with 0 past sequences' ends, whatever factors hold there: NaN times the zero gradient of what is not
        used would be NaN."""
        if len(self.leading) < 2:
            return self
        steps = torch.arange(1, self.leading[1] + 1, device=lengths.device)
        inside = (steps < lengths.unsqueeze(-1))[..., None, None]
        return self.map(lambda x: torch.where(inside, x, 0))

    def dense(self) -> Tensor:
        """(..., N, N)."""
        return log_product(self.left, self.right)

    def gather(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Scores of arcs from states (B, T-1, I) to states (B, T-1, J): (B, T-1, I, J)."""
        return log_product(_rows(self.left, rows), _rows(self.right.transpose(-1, -2), columns).transpose(-1, -2))


class Banded:
    r"""Transition scores on some diagonals alone: ``diagonals[..., d, i]`` scores i -> i + ``offsets[d]``.

    All other arcs are forbidden. Entries whose target would lie outside 0..N-1 are ignored, whatever they hold.
    Forward-backward costs N len(offsets) a frame: left-to-right chains (offsets 0, 1), with skips (0, 1, 2), and
    near-diagonal alignments.

    Args:
        diagonals: (D, N), (B, D, N) or (B, T-1, D, N), in nats; -inf forbids. Indexed by the state that an arc leaves.
        offsets: D different integers, of any sign.

    >>> import torch
    >>> from hmm_speech.hmm import Banded
    >>> Banded(torch.tensor([[0.1, 0.2, 0.3], [1.0, 2.0, 3.0]]), (0, 1)).dense()
    tensor([[0.1000, 1.0000,   -inf],
            [  -inf, 0.2000, 2.0000],
            [  -inf,   -inf, 0.3000]])
    """

    def __init__(self, diagonals: Tensor, offsets: Sequence[int]):
        checks.require_tensor("Banded: diagonals", diagonals)
        offsets = offsets.tolist() if isinstance(offsets, Tensor) else list(offsets)
        if not offsets or any(isinstance(k, bool) or not isinstance(k, int) for k in offsets):
            raise ValueError(f"Banded: offsets is {offsets!r}, expected one integer for each diagonal")
        if len(set(offsets)) < len(offsets):
            raise ValueError(f"Banded: offsets is {offsets!r}, expected each diagonal once")
        if diagonals.dim() not in (2, 3, 4) or diagonals.shape[-2] != len(offsets) or diagonals.shape[-1] < 1:
            raise ValueError(
                f"Banded: diagonals is {checks.shape_of(diagonals)}, expected (..., {len(offsets)}, N), a row for each "
                "of the offsets, with leading axes none, (B,) or (B, T-1)"
            )
        self.diagonals, self.offsets = diagonals, tuple(offsets)
        self.num_states, self.leading = diagonals.shape[-1], tuple(diagonals.shape[:-2])

    def tensors(self) -> dict[str, Tensor]:
        return {"transition.diagonals": self.diagonals}

    def map(self, function: Callable[[Tensor], Tensor]) -> Banded:
        return Banded(function(self.diagonals), self.offsets)

    def inside(self) -> Tensor:
        """(D, N): whether an entry's target is a state."""
        target = torch.arange(self.num_states) + torch.tensor(self.offsets).unsqueeze(-1)
        return ((target >= 0) & (target < self.num_states)).to(self.diagonals.device)

    def dense(self, elsewhere: float = -INF) -> Tensor:
        """(..., N, N), `elsewhere` off the diagonals."""
        rows = torch.arange(self.num_states, device=self.diagonals.device)
        found = torch.full((), elsewhere, dtype=self.diagonals.dtype, device=self.diagonals.device)
        for d, offset in enumerate(self.offsets):
            found = torch.where(rows - rows.unsqueeze(-1) == offset, self.diagonals[..., d, :].unsqueeze(-1), found)
        return found.expand(*self.leading, self.num_states, self.num_states)

    def gather(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Scores of arcs from states (B, T-1, I) to states (B, T-1, J): (B, T-1, I, J)."""
        rows, columns = rows.unsqueeze(-1), columns.unsqueeze(-2)
        found = torch.full((), -INF, dtype=self.diagonals.dtype, device=self.diagonals.device)
        for d, offset in enumerate(self.offsets):
            picked = _rows(self.diagonals[..., d, :].unsqueeze(-1), rows.squeeze(-1))
            found = torch.where(columns - rows == offset, picked, found)
        return found


class Chunked:
    r"""Transition scores that vary over time and are made by a function, some frames at a time, whenever needed.

    ``function(start, stop)`` returns (B, stop - start, N, N): what ``transition[:, start:stop]`` would hold, for
    0 <= start < stop <= T-1. It is called again in the backward pass, so that no (B, T, N, N) ever exists; it must
    return the same scores every time (dropout is repeated in the backward pass, but ``viterbi``, ``sample``,
    ``marginals`` and ``transition_counts`` take arcs more than once and want none). Gradients reach the tensors that it
    closes over, by ``backward()`` and by ``torch.autograd.grad``.

    Forward-backward then holds B (stop - start) N^2 scores, their gradients and what the function saves for them, and B
    N numbers a chunk. So do ``marginals``, ``transition_counts`` (their gradients too), ``viterbi`` and ``sample``;
    ``edge_marginals`` has the size of its result. ``topk``, the entropies and divergences, and the backward pass of a
    backward pass with ``create_graph=True`` form all (B, T, N, N) scores.

    Args:
        function: as above; its result has the scores' device and any floating-point type that may stand beside theirs.
        chunk: the number of frames asked for at a time, at least 1. Memory grows with it, overhead falls. On a CPU keep
            its scores below 32 MB: of what is larger, glibc gives the memory back at once and Linux clears it anew
            (B = 8, N = 256, float32: 20 frames at a time took 2.5 times as long as 15).

    >>> import torch
    >>> from hmm_speech.hmm import HMM, Chunked
    >>> context, weight = torch.randn(2, 99, 8), torch.randn(8, 16, requires_grad=True)
    >>> arcs = Chunked(lambda start, stop: (context[:, start:stop] @ weight).unflatten(-1, (4, 4)), chunk=10)
    >>> HMM(torch.zeros(4), arcs, torch.randn(2, 100, 4)).log_partition().sum().backward()
    >>> weight.grad.shape
    torch.Size([8, 16])
    """

    def __init__(self, function: Callable[[int, int], Tensor], chunk: int):
        if not callable(function):
            raise TypeError(f"Chunked: function is {type(function).__name__}, expected function(start, stop)")
        if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
            raise ValueError(f"Chunked: chunk is {chunk!r}, expected an integer of at least 1")
        self.function, self.chunk, self.leading = function, chunk, ()

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def map(self, function: Callable[[Tensor], Tensor]) -> Chunked:
        inner = self.function
        return Chunked(lambda start, stop: function(inner(start, stop)), self.chunk)

    def checked(
        self, batch: int, num_states: int, dtype: torch.dtype, device: torch.device, lengths: Tensor | None
    ) -> Chunked:
        """This, with each result seen to have its shape and device and brought to `dtype`; and, given lengths, looked
        through for +inf and NaN within them."""
        name, inner = "Chunked: function(start, stop)", self.function

        def function(start: int, stop: int) -> Tensor:
            arcs = inner(start, stop)
            checks.require_tensor(name, arcs)
            expected = (batch, stop - start, num_states, num_states)
            if tuple(arcs.shape) != expected:
                raise ValueError(
                    f"{name}: shape is {checks.shape_of(arcs)} for ({start}, {stop}), expected (B, stop - start, N, N) "
                    f"= ({', '.join(map(str, expected))})"
                )
            if arcs.device != device:
                raise ValueError(f"{name}: on {arcs.device}, expected {device}, where initial is")
            if (arcs.dtype == torch.float64) != (dtype == torch.float64):
                raise TypeError(
                    f"{name}: dtype is {arcs.dtype}, expected {dtype} as the other scores: convert with .double() or "
                    ".float()"
                )
            if lengths is not None:
                checks.check_values(f"{name} at ({start}, {stop})", arcs, lengths - start, shift=1)
            return arcs.to(dtype)

        return Chunked(function, self.chunk)

    def spans(self, time: int) -> list[tuple[int, int]]:
        """(start, stop) of each call for T frames."""
        return [(start, min(start + self.chunk, time - 1)) for start in range(0, time - 1, self.chunk)]


class Active:
    r"""Emission scores of a chain of which only some states can emit a frame: blocked and cloned HMMs (Chiu and Rush
    2020, arXiv:2011.04640; Dedieu et al. 2019).

    Forward-backward costs K^2 a frame, not N^2, plus 2 N^2 a call where the frames have more arcs between them than the
    transition has: with N = 1000, K = 10 and 83,000 frames in 450 sequences, 16 ms on one AVX-512 core, the gradient of
    a shared transition included. Fastest where the states of a frame are consecutive and padded at the end: blocks of
    the transition are then read in place. Transitions that vary over time, or have a structure, go through plain blocks
    (B, T-1, K, K); so do edge marginals, ``topk`` and second derivatives.

    Gradients are posteriors here too: that of ``scores`` is (B, T, K), 0 where ``states`` pads; that of ``transition``
    is (N, N), 0 for arcs between states that no two neighbouring frames have. ``marginals()`` and
    ``transition_counts()`` are (B, T, N) and (B, N, N), as for any chain. Ties of Viterbi go to the smallest state.

    Args:
        states: (B, T, K) int64: the states, 0..N-1, that can emit each frame, each at most once; -1 pads.
        scores: (B, T, K), in nats: their emission scores; where ``states`` is -1, ignored.

    >>> import torch
    >>> from hmm_speech.hmm import HMM, Active
    >>> states = torch.tensor([[[0, 1], [2, 3], [0, 1]]])
    >>> hmm = HMM(torch.zeros(4), torch.eye(4), Active(states, torch.tensor([[[0.0, 1.0], [0.0, 2.0], [3.0, 0.0]]])))
    >>> hmm.viterbi().states
    tensor([[1, 3, 0]])
    """

    def __init__(self, states: Tensor, scores: Tensor):
        checks.require_tensor("Active: scores", scores)
        if not isinstance(states, Tensor) or states.dtype != torch.int64:
            raise TypeError(
                f"Active: states is {getattr(states, 'dtype', type(states).__name__)}, expected an int64 tensor"
            )
        if scores.dim() != 3 or states.shape != scores.shape or scores.shape[2] < 1:
            raise ValueError(
                f"Active: states is {checks.shape_of(states)}, scores is {checks.shape_of(scores)}, expected (B, T, K) "
                "both, with K of at least 1"
            )
        if states.device != scores.device:
            raise ValueError(f"Active: states on {states.device}, expected {scores.device}, where scores is")
        self.states, self.scores = states, scores
        self.shape = tuple(scores.shape)

    def tensors(self) -> dict[str, Tensor]:
        return {"emission.scores": self.scores}

    def map(self, function: Callable[[Tensor], Tensor]) -> Active:
        return Active(self.states, function(self.scores))

    def slots(self) -> Tensor:
        """``scores`` with -inf where ``states`` pads."""
        return torch.where(self.states >= 0, self.scores, -INF)

    def dense(self, num_states: int) -> Tensor:
        """(B, T, N), -inf where a state cannot emit a frame."""
        batch, time, _ = self.shape
        emission = self.scores.new_full((batch, time, num_states + 1), -INF)  # one more, for what pads
        place = torch.where(self.states >= 0, self.states, num_states)
        return emission.scatter(2, place, self.slots())[..., :num_states]

    def look_up(self, path: Tensor) -> Tensor:
        """The score of each frame under the states of paths (B, T), -inf where it cannot be emitted."""
        same = self.states == path.unsqueeze(-1)
        return torch.where(same.any(-1), torch.where(same, self.scores, 0).sum(-1), -INF)


TRANSITIONS = (LowRank, Banded, Chunked)
Transition = Tensor | LowRank | Banded | Chunked


def gather(transition: Tensor | LowRank | Banded, rows: Tensor, columns: Tensor) -> Tensor:
    """Scores of arcs from states (B, T-1, I) to states (B, T-1, J): (B, T-1, I, J)."""
    if not isinstance(transition, Tensor):
        return transition.gather(rows, columns)
    rows, columns = rows.unsqueeze(-1), columns.unsqueeze(-2)
    batch = torch.arange(rows.shape[0], device=rows.device)[:, None, None, None]
    if transition.dim() == 2:
        return transition[rows, columns]
    if transition.dim() == 3:
        return transition[batch, rows, columns]
    return transition[batch, torch.arange(rows.shape[1], device=rows.device)[:, None, None], rows, columns]


def log_product(left: Tensor, right: Tensor) -> Tensor:
    """log(exp(left) @ exp(right)) for (..., I, R) and (..., R, J), -inf where nothing is allowed."""
    if torch.compiler.is_compiling():  # whether a product underflowed cannot be asked while tracing
        return logsumexp(left.unsqueeze(-1) + right.unsqueeze(-3), -2)
    return log_matmul_exp(left, right.mT)


def _rows(matrix: Tensor, index: Tensor) -> Tensor:
    """Rows (B, T-1, I) of a matrix (N, R), (B, N, R) or (B, T-1, N, R): (B, T-1, I, R)."""
    if matrix.dim() == 2:
        return matrix[index]
    batch = torch.arange(index.shape[0], device=index.device)[:, None, None]
    if matrix.dim() == 3:
        return matrix[batch, index]
    return matrix[batch, torch.arange(index.shape[1], device=index.device)[:, None], index]
