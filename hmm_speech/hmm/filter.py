"""Inference while a sequence is still arriving."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, reference
from .chunked import centred
from .dense import DenseChain
from .library import use_native
from .online import OnlineViterbi
from .reference import INF


class HMMFilter:
    r"""A batch of hidden Markov chains whose frames arrive a few at a time: what :class:`HMM` says of those so far.

    .. math:: \alpha_t(j) = e_t(j) + \log \sum_i \exp(\alpha_{t-1}(i) + \phi(i, j)), \quad
        p(z_t = j \mid x_{0..t}) \propto \exp \alpha_t(j)

    (Rabiner 1989, eqs. 19-20). Messages are re-centred at each frame and what that takes out is summed in float64, so
    that streams may be long. An update costs N^2 a frame, whatever came before it, and the memory is that of lag + 1
    frames.

    Nothing here is differentiable: to train, give the frames to :class:`HMM`, its transitions as a :class:`Chunked`
    where memory is short.

    Args:
        initial: :math:`\pi`, (N,) or (B, N): the score of starting in each state, in nats; -inf forbids.
        transition: :math:`\phi`, (N, N) or (B, N, N): ``[..., i, j]`` scores i -> j.
        lag: the largest lag of :meth:`posterior`, and the number of frames after which :meth:`viterbi` decides. None:
            it waits until all paths agree, which may be forever, and keeps 8 N bytes a frame until then; posteriors
            have lag 0 alone.
        decode: False spares the cost of :meth:`viterbi`, which is then not to be had.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    >>> import torch
    >>> from hmm_speech.hmm import HMMFilter
    >>> stream = HMMFilter(torch.zeros(2), torch.tensor([[0.0, -1.0], [-1.0, 0.0]]), lag=1)
    >>> stream.update(torch.tensor([[[2.0, 0.0], [2.0, 0.0]]]))[0, :, 0].round(decimals=3)
    tensor([0.8810, 0.9390])
    >>> stream.update(torch.tensor([[[0.0, 2.0]]]))[0, :, 0].round(decimals=3)
    tensor([0.2430])
    >>> stream.posterior(lag=1)[0].round(decimals=3)
    tensor([0.8810, 0.1190])
    >>> stream.log_partition
    tensor([5.4888])
    >>> stream.viterbi(), stream.finish()
    (tensor([[0, 0]]), tensor([[1]]))
    """

    def __init__(self, initial: Tensor, transition: Tensor, lag: int | None = 0, decode: bool = True):
        for name, x in (("initial", initial), ("transition", transition)):
            checks.require_tensor(name, x)
        if transition.dim() not in (2, 3):
            raise ValueError(f"transition: shape is {checks.shape_of(transition)}, expected (N, N) or (B, N, N)")
        if lag is not None and (isinstance(lag, bool) or not isinstance(lag, int) or lag < 0):
            raise ValueError(f"lag: got {lag!r}, expected a number of frames of at least 0, or None for no limit")
        scores = {"initial": initial, "transition": transition}
        dtype, device = checks.common_dtype(scores), checks.common_device(scores)
        batch = transition.shape[0] if transition.dim() == 3 else initial.shape[0] if initial.dim() == 2 else None
        nothing = torch.zeros(1 if batch is None else batch, 0, transition.shape[-1], dtype=dtype, device=device)
        checks.check_shapes(initial, transition, nothing, None)
        self.initial, self.transition = initial.detach().to(dtype), transition.detach().to(dtype)
        self.lag, self.decode = lag, decode
        self._rows = 1 + (lag or 0)
        self._batch: int | None = None
        self._finished = False
        if batch is not None:
            self._begin(batch)

    @torch.no_grad()
    def update(self, emission: Tensor, lengths: Tensor | None = None) -> Tensor:
        r"""Takes the next frames of each stream; returns the filtering distributions :math:`p(z_t = j \mid x_{0..t})`.

        Args:
            emission: (B, C, N), C >= 0: the score of each frame under each state.
            lengths: (B,) int64, 0..C: how many of them are frames of that stream, None: all C. Those past a length are
                ignored whatever they hold: a stream that has none does not move.

        Returns:
            (B, C, N), 0 past a stream's new frames, and from where no path is feasible any more.
        """
        emission, lengths = self._checked(emission, lengths)
        batch, time, _ = emission.shape
        if self._batch is None:
            self._begin(batch)
        if time == 0:
            return torch.zeros_like(emission)
        if self.decode:
            self._viterbi.update(emission, lengths)
        messages = self._messages(emission, lengths)
        inside = (torch.arange(time, device=lengths.device) < lengths.unsqueeze(-1)).unsqueeze(-1)
        self._count = self._count + lengths
        rows = torch.cat([self._history, torch.cat([messages, torch.where(inside, emission, 0)], -1)], 1)
        newest = (lengths.unsqueeze(-1) + torch.arange(self._rows, device=lengths.device)).unsqueeze(-1)
        self._history = rows.gather(1, newest.expand(-1, -1, rows.shape[2]))
        return torch.where(inside, _probabilities(messages), 0)

    @property
    def log_partition(self) -> Tensor:
        r""":math:`\log Z` of all frames so far, (B,), in nats; 0 for a stream that has had none."""
        self._require_batch("log_partition")
        z = self._offset + reference.logsumexp(self._history[:, -1, : self._states].double(), -1)
        return torch.where(self._count > 0, z, 0).to(self.initial.dtype)

    @torch.no_grad()
    def posterior(self, lag: int = 0) -> Tensor:
        r"""Fixed-lag smoothing, :math:`p(z_{t - \mathrm{lag}} \mid x_{0..t})` with t the last frame so far, (B, N).

        0 where a stream has had fewer than lag + 1 frames, or has no feasible path. Costs N^2 for each frame of lag.

        Raises:
            ValueError: for more than the lag that the filter was made with.
        """
        self._require_batch("posterior")
        if isinstance(lag, bool) or not isinstance(lag, int) or not 0 <= lag < self._rows:
            raise ValueError(
                f"lag: got {lag!r}, expected 0 to {self._rows - 1}: HMMFilter(initial, transition, lag=...) sets the "
                "largest, and keeps as many frames"
            )
        rows = self._history[:, self._rows - 1 - lag :]
        emission = rows[..., self._states :].clone()
        emission[:, 0] = 0  # part of the first message
        lengths = torch.where(self._count > lag, lag + 1, 0)
        chain = DenseChain(rows[:, 0, : self._states], self.transition, emission, lengths, None, lag + 1)
        return chain.marginals()[:, 0]

    @torch.no_grad()
    def viterbi(self) -> Tensor:
        """The best path, as far as it was decided since the last call: (B, K) int64, -1 past each stream's new states.

        Each state comes out once: when all surviving paths agree on it, or at the latest when ``lag`` more frames have
        come; then the path that is best so far decides, and paths that disagree are dropped. What comes out is thus one
        connected, feasible path, though with a lag not always the best one; with ``lag=None`` it equals
        ``HMM.viterbi().states``. Where no survivor can go on, no further states come out: no path of the stream is
        feasible, or, where scores forbid arcs, the lag was too short to see that the path ends (Bloit and Rodet 2008;
        Šrámek et al. 2007). States wait for this call, 8 bytes each.
        """
        return self._decided(finish=False)

    @torch.no_grad()
    def finish(self) -> Tensor:
        """As :meth:`viterbi`, all states that are left, along the best path; the streams then take no more frames."""
        states = self._decided(finish=True)
        self._finished = True
        return states

    def _begin(self, batch: int) -> None:
        self._batch, self._states = batch, self.transition.shape[-1]
        like = {"dtype": self.initial.dtype, "device": self.initial.device}
        # Each stream's last frames, the newest last: its message, with maximum 0, and its emission scores beside it.
        self._history = torch.zeros(batch, self._rows, 2 * self._states, **like)
        self._offset = torch.zeros(batch, dtype=torch.float64, device=self.initial.device)
        self._count = torch.zeros(batch, dtype=torch.int64, device=self.initial.device)
        if self.decode:
            self._viterbi = OnlineViterbi(batch, self.initial, self.transition, self.lag)

    def _checked(self, emission: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        if self._finished:
            raise RuntimeError("update: the streams were finished; make a new HMMFilter")
        checks.require_tensor("emission", emission)
        scores = {"initial": self.initial, "transition": self.transition, "emission": emission}
        dtype, device = checks.common_dtype(scores), checks.common_device(scores)
        batch, time, _ = checks.check_shapes(self.initial, self.transition, emission, None)
        if self._batch not in (None, batch):
            raise ValueError(
                f"emission: shape is {checks.shape_of(emission)}, expected B = {self._batch}, the number of streams"
            )
        return emission.detach().to(dtype), checks.check_lengths(lengths, batch, time, device, False)

    def _messages(self, emission: Tensor, lengths: Tensor) -> Tensor:
        """Messages (B, C, N) of new frames; adds to the offset."""
        batch, time, num_states = emission.shape
        started = self._count > 0
        starts = ~started & (lengths > 0)
        scores = torch.where(starts.unsqueeze(-1), emission[:, 0], 0)
        first, taken = centred(self.initial.expand(batch, -1), scores)
        message = torch.where(starts.unsqueeze(-1), first, self._history[:, -1, :num_states])
        self._offset = self._offset + torch.where(starts, taken, 0)
        # A stream's very first frame is the message that its others follow.
        later = torch.where(started[:, None, None], emission, emission.roll(-1, 1))
        local = (lengths + started).clamp(min=1)
        arcs = self.transition if self.transition.dim() == 2 else self.transition.unsqueeze(1)
        arcs = arcs.expand(batch, time, num_states, num_states)  # in log space: messages between chunks must be exact
        if use_native(emission.device.type):
            end, taken, rows, *_ = torch.ops.hmm_speech.advance(message, arcs, later, local)
        else:
            messages, taken = reference.advance(message, arcs, later, local)
            end, rows = messages[-1], torch.stack(messages, 1)
        self._offset = self._offset + taken
        # The kernel stops where nothing is feasible: from there on, rows are what the last message is.
        lost = (rows.amax(-1, keepdim=True) > -INF).logical_not().cummax(1).values
        rows = torch.where(lost, end.unsqueeze(1), rows)
        return torch.where(started[:, None, None], rows[:, 1:], rows[:, :-1])

    def _decided(self, finish: bool) -> Tensor:
        if not self.decode:
            raise RuntimeError("viterbi: the filter was made with decode=False, expected decode=True")
        self._require_batch("viterbi")
        return self._viterbi.take(finish)

    def _require_batch(self, name: str) -> None:
        if self._batch is None:
            raise RuntimeError(f"{name}: the number of streams is not known before the first update")


def _probabilities(messages: Tensor) -> Tensor:
    """exp(messages) normalised over the last axis; 0 where all are -inf, NaN where one is."""
    none = messages.amax(-1, keepdim=True) == -INF
    return torch.where(none, 0, torch.where(none, 0, messages).softmax(-1))
