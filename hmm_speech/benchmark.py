"""`hmm-speech bench`: the layer beside the strongest plain-torch loops, paired in one process.

Each row is timed in rounds, one call of every contender a round, so that a machine whose speed drifts slows all of
them alike; what is printed are medians over rounds, of times and of the ratios within a round. The results are compared
first: a row whose numbers differ is an error, not a time.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from hmm_speech.data.unitfile import atomic_path
from hmm_speech.errors import UserError
from hmm_speech.hmm import HMM, Active, SemiMarkovHMM, backend, log_partition

# (kind, N, T). "dense": transitions that vary over time, (B, T-1, N, N); "shared": one (N, N) for all frames;
# "semi-Markov": segments of 1 to LONGEST frames; "active": shared, with SLOTS of the states for each frame of UTTERANCES
# sequences, T frames in the mean.
LONGEST = 30
ROWS = (
    ("dense", 50, 1000),
    ("dense", 50, 3000),
    ("shared", 50, 1000),
    ("shared", 50, 3000),
    ("shared", 128, 1000),
    ("shared", 512, 1000),
    ("shared", 1024, 300),
    ("semi-Markov", 50, 1000),
    ("active", 1000, 184),
)
QUICK = (("dense", 50, 300), ("shared", 50, 1000))

UTTERANCES, SLOTS = 450, 10


@dataclass
class Row:
    """Milliseconds (medians) and ratios of one case; ratios are above 1 where the layer is faster."""

    kind: str
    states: int
    frames: int
    forward_ms: float
    backward_ms: float
    viterbi_ms: float
    loop_forward_ms: float
    loop_backward_ms: float
    ratio: float
    largest_difference: float


def dense_loop(initial: Tensor, transition: Tensor) -> Tensor:
    """Forward algorithm in log space, one torch.logsumexp a frame. `unbind`: indexing makes backward quadratic."""
    alpha = initial
    for arcs in transition.unbind(1):
        alpha = torch.logsumexp(alpha.unsqueeze(-1) + arcs, 1)
    return torch.logsumexp(alpha, -1)


def shared_loop(initial: Tensor, transition: Tensor, emission: Tensor) -> Tensor:
    """Forward algorithm with scaled probabilities, one matrix product a frame (Rabiner 1989, section V.A)."""
    top = emission.detach().amax(-1, keepdim=True)
    weights = (emission - top).exp().unbind(1)
    arcs = transition.exp()
    alpha = initial.exp() * weights[0]
    scale = alpha.sum(-1, keepdim=True)
    alpha, scales = alpha / scale, [scale]
    for weight in weights[1:]:
        alpha = torch.mm(alpha, arcs) * weight
        scale = alpha.sum(-1, keepdim=True)
        alpha = alpha / scale
        scales.append(scale)
    return torch.cat(scales, 1).log().sum(1) + top.sum((1, 2))


def semi_markov_loop(initial: Tensor, transition: Tensor, emission: Tensor, durations: Tensor) -> Tensor:
    """Forward algorithm over segments: one matrix product and one torch.logsumexp over durations a frame."""
    by_duration, arcs, start = durations.T, transition.exp(), initial.expand(emission.shape[0], -1)
    windows, total, end = start.new_full((len(start), *by_duration.shape), -torch.inf), 0, start
    for t, scores in enumerate(emission.unbind(1)):
        if t > 0:
            top = end.detach().amax(-1, keepdim=True)
            start, total, windows = torch.mm((end - top).exp(), arcs).log(), total + top, windows - top.unsqueeze(1)
        windows = torch.cat([start.unsqueeze(1), windows[:, :-1]], 1) + scores.unsqueeze(1)
        end = torch.logsumexp(windows + by_duration, 1)
    return (total + torch.logsumexp(end, -1, keepdim=True)).squeeze(-1)


def _problem(kind: str, batch: int, states: int, frames: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(7)
    initial = torch.randn(states, generator=g).log_softmax(-1)
    transition = torch.randn(states, states, generator=g).log_softmax(-1)
    if kind != "dense":
        scores = [initial, transition, -torch.randn(batch, frames, states, generator=g).pow_(2)]
        durations = [torch.randn(states, LONGEST, generator=g).log_softmax(-1)] if kind == "semi-Markov" else []
        return scores + durations
    arcs = -torch.randn(batch, frames - 1, states, states, generator=g).pow_(2)
    return [initial.expand(batch, -1).contiguous(), arcs.add_(transition)]


def _timed(function: Callable[..., Tensor], scores: list[Tensor]) -> Callable[[], tuple[float, float, Tensor]]:
    """A call that returns seconds of the forward pass, of the backward pass, and the result."""
    leaves = [x.clone().requires_grad_() for x in scores]

    def run() -> tuple[float, float, Tensor]:
        for x in leaves:
            x.grad = None
        start = time.perf_counter()
        z = function(*leaves)
        middle = time.perf_counter()
        z.sum().backward()
        return middle - start, time.perf_counter() - middle, z.detach()

    return run


def measure(kind: str, states: int, frames: int, batch: int, seconds: float) -> Row:
    """One row: at least five rounds, and more until `seconds` have passed.

    Raises:
        RuntimeError: the layer and the loop disagree by more than 3e-6 of the log partition.
    """
    scores = _problem(kind, batch, states, frames)
    plain = {"dense": dense_loop, "shared": shared_loop, "semi-Markov": semi_markov_loop}[kind]
    model = SemiMarkovHMM if kind == "semi-Markov" else HMM
    layer, loop = _timed(lambda *x: model(*x).log_partition(), scores), _timed(plain, scores)
    ours, theirs = layer()[2].double(), loop()[2].double()
    difference = float(((ours - theirs) / theirs).abs().max())
    if not difference < 3e-6:
        raise RuntimeError(f"{kind} N={states} T={frames}: the layer and the loop differ by {difference:.1e} of log Z")
    times: list[tuple[float, float, float, float]] = []
    viterbi: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or (time.perf_counter() < end and len(times) < 50):
        times.append((*layer()[:2], *loop()[:2]))
        with torch.no_grad():
            start = time.perf_counter()
            model(*scores).viterbi()
            viterbi.append(time.perf_counter() - start)
    forward, backward, loop_forward, loop_backward = (statistics.median(x) * 1e3 for x in zip(*times, strict=True))
    ratio = statistics.median((c + d) / (a + b) for a, b, c, d in times)
    return Row(kind, states, frames, forward, backward, statistics.median(viterbi) * 1e3, loop_forward, loop_backward,
               ratio, difference)  # fmt: skip


def _active_problem(states: int, frames: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """Scores (initial, transition, those of the slots), the states of the slots in blocks, and ragged lengths."""
    g = torch.Generator().manual_seed(7)
    share = torch.rand(UTTERANCES, generator=g) + 0.35
    lengths = (share * (UTTERANCES * frames / share.sum())).long()
    time = int(lengths.max())
    blocks = torch.randint(0, states // SLOTS, (UTTERANCES, time, 1), generator=g)
    scores = [
        torch.randn(states, generator=g).log_softmax(-1),
        torch.randn(states, states, generator=g).log_softmax(-1),
    ]
    return [*scores, torch.randn(UTTERANCES, time, SLOTS, generator=g)], blocks * SLOTS + torch.arange(SLOTS), lengths


def measure_active(states: int, frames: int, seconds: float) -> Row:
    """Blocked emissions beside the layer's own dense chain with -inf for all other states.

    The dense chain has the first 100 frames of 8 sequences; its times are scaled to as many frames as the others are.

    Raises:
        RuntimeError: the two disagree on these by more than 3e-6 of the log partition.
    """
    scores, slots, lengths = _active_problem(states, frames)
    few, short = slots[:8, :100].contiguous(), lengths[:8].clamp(max=100)
    dense = [*scores[:2], Active(few, scores[2][:8, :100].contiguous()).dense(states)]
    layer = _timed(lambda pi, phi, e: log_partition(pi, phi, Active(slots, e), lengths), scores)
    plain = _timed(lambda pi, phi, e: log_partition(pi, phi, e, short), dense)
    ours = log_partition(*scores[:2], Active(few, scores[2][:8, :100]), short).double()
    difference = float(((ours - plain()[2]) / ours).abs().max())
    if not difference < 3e-6:
        raise RuntimeError(f"active N={states}: the active and the dense chain differ by {difference:.1e} of log Z")
    scale = float(lengths.sum() / short.sum())
    times: list[tuple[float, ...]] = []
    layer()
    end = time.perf_counter() + seconds
    while len(times) < 5 or (time.perf_counter() < end and len(times) < 50):
        found = (*layer()[:2], *(scale * x for x in plain()[:2]))
        start = time.perf_counter()
        with torch.no_grad():
            HMM(*scores[:2], Active(slots, scores[2]), lengths).viterbi()
        times.append((*found, time.perf_counter() - start))
    forward, backward, loop_forward, loop_backward, viterbi = (
        statistics.median(x) * 1e3 for x in zip(*times, strict=True)
    )
    ratio = statistics.median((c + d) / (a + b) for a, b, c, d, _ in times)
    return Row("active", states, frames, forward, backward, viterbi, loop_forward, loop_backward, ratio, difference)


def hardware() -> dict[str, str | int]:
    """What the numbers were taken on."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "backend": backend().name,
        "instructions": backend().detail.split()[0],
    }


def rows(quick: bool, batch: int, seconds: float) -> Iterator[Row]:
    """All rows, as they are measured."""
    for kind, states, frames in QUICK if quick else ROWS:
        if kind == "active":
            yield measure_active(states, frames, seconds)
        else:
            yield measure(kind, states, frames, batch, seconds)


def bench(threads: int, batch: int, seconds: float, quick: bool, out: Path | None) -> None:
    """Measure, print a table as rows come in, and write them as JSON where `out` says."""
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

    for name, value in (("--threads", threads), ("--batch", batch)):
        if value < 1:
            raise UserError(f"{name}: got {value}, expected at least 1")
    torch.set_num_threads(threads)
    machine = hardware()
    title = "B={}, float32, {threads} thread(s), {cpu}, {instructions} ({backend}), torch {torch}".format(
        batch, **machine
    )
    caption = "milliseconds, medians of paired rounds; ratio: loop / layer, forward + backward"
    if not quick:
        caption += (
            f"; active: {UTTERANCES} sequences of T frames in the mean, {SLOTS} states a frame; its loop is the layer "
            "with a dense emission, scaled from 8 x 100 frames"
        )
    table = Table(title=title, caption=caption)
    for column in ("arcs", "N", "T", "fwd", "bwd", "Viterbi", "loop fwd", "loop bwd", "ratio"):
        table.add_column(column, justify="left" if column == "arcs" else "right")
    found = []
    with Live(table, console=Console(), refresh_per_second=2):
        for row in rows(quick, batch, seconds):
            found.append(row)
            times = (row.forward_ms, row.backward_ms, row.viterbi_ms, row.loop_forward_ms, row.loop_backward_ms)
            table.add_row(row.kind, str(row.states), str(row.frames), *(f"{x:.2f}" for x in times), f"{row.ratio:.1f}")
    if out is not None:
        with atomic_path(out) as beside:
            beside.write_text(
                json.dumps({"machine": machine, "batch": batch, "rows": [asdict(x) for x in found]}, indent=2)
            )
