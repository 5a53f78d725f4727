"""`hmm-speech bench`: the layer beside the strongest plain-torch loops, and beside the peers that are installed.

Each row is timed in rounds, one call of every contender a round, so that a machine whose speed drifts slows all of
them alike, in an order drawn anew, so that none always finds caches and memory as the same other one left them; what is
printed are medians over rounds, of times and of the ratios within a round. The results are compared first: a row whose
numbers differ is an error, not a time.
"""

from __future__ import annotations

import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from hmm_speech.benchmark import cases, peers
from hmm_speech.benchmark.cases import Case
from hmm_speech.benchmark.table import growing, three_digits
from hmm_speech.data.unitfile import atomic_path
from hmm_speech.errors import UserError
from hmm_speech.hmm import backend
from hmm_speech.hmm.library import cuda

# (kind, N, T, B); B: None takes --batch. "dense": transitions that vary over time, (B, T-1, N, N); "shared": one (N, N)
# for all frames; the others are shared too, with structure.
ROWS = (
    ("dense", 50, 100, None),
    ("dense", 50, 1000, None),
    ("dense", 50, 3000, None),
    ("shared", 50, 1000, None),
    ("shared", 50, 3000, None),
    ("shared", 128, 1000, None),
    ("shared", 512, 1000, None),
    ("shared", 1024, 300, None),
    ("shared", 2048, 300, None),
    ("shared", 50, 3000, 1),
    ("shared", 512, 1000, 1),
    ("banded", 200, 3000, None),
    ("low-rank", 1024, 300, None),
    ("semi-Markov", 50, 1000, None),
    ("active", 1000, 184, 450),
)
# On a GPU: the table of hmm-backprop's README, and the other rows that csrc/cuda/README.md has estimates of.
CUDA_ROWS = (
    *((kind, 50, frames, None) for kind in ("dense", "shared") for frames in (100, 500, 1000, 2000, 3000)),
    ("shared", 256, 1000, 32),
    ("shared", 1024, 1000, 32),
)
QUICK = (("dense", 50, 300, None), ("shared", 50, 1000, None))


@dataclass
class Row:
    """Milliseconds (medians) and ratios of one case; ratios are above 1 where the layer is faster."""

    kind: str
    batch: int
    states: int
    frames: int
    forward_ms: float
    backward_ms: float
    viterbi_ms: float
    loop_forward_ms: float
    loop_backward_ms: float
    ratio: float
    largest_difference: float
    peers: dict[str, float]  # time of a peer's forward and backward pass, by the layer's


def _timed(function: Callable[..., Tensor], scores: list[Tensor]) -> Callable[[], tuple[float, float, Tensor]]:
    """A call that returns seconds of the forward pass, of the backward pass, and the result; a GPU is waited for."""
    leaves = [x.clone().requires_grad_() for x in scores]

    def run() -> tuple[float, float, Tensor]:
        for x in leaves:
            x.grad = None
        start = _now(leaves[0])
        z = function(*leaves)
        middle = _now(leaves[0])
        z.sum().backward()
        return middle - start, _now(leaves[0]) - middle, z.detach()

    return run


def _now(x: Tensor) -> float:
    """Seconds, when the device of `x` has done all that it was given."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter()


def _difference(case: Case) -> float:
    """The layer's float32 log partition beside the loop's in float64, relative."""
    scores, layer = (case.part.scores, case.part.layer) if case.part else (case.scores, case.layer)
    with torch.no_grad():
        exact = case.loop(*(x.double() for x in scores))
        return float(((layer(*scores).log_partition() - exact) / exact).abs().max())


def measure(case: Case, seconds: float) -> Row:
    """One row: at least five rounds, and more until `seconds` have passed.

    Raises:
        RuntimeError: the layer and the loop disagree by more than 3e-6 of the log partition.
    """
    name, difference = f"{case.kind} N={case.states} T={case.frames}", _difference(case)
    if not difference < 3e-6:
        raise RuntimeError(f"{name}: the layer and the loop differ by {difference:.1e} of log Z")
    layer = _timed(lambda *x: case.layer(*x).log_partition(), case.scores)
    loop = _timed(case.loop, case.part.scores if case.part else case.scores)
    on_cpu = case.scores[0].device.type == "cpu"
    others = {p: peers.contender(p, case.kind, case.scores) for p in (peers.present() if on_cpu else ())}
    others = {p: run for p, run in others.items() if run is not None}
    scale = case.part.scale if case.part else 1.0
    z = layer()[2]
    loop()
    for p, run in others.items():
        found = run()[1]
        if not torch.allclose(found, z, rtol=1e-5):
            raise RuntimeError(f"{name}: {p} has log Z {found.tolist()}, the layer {z.tolist()}")

    def viterbi() -> tuple[float]:
        with torch.no_grad():
            start = _now(case.scores[0])
            case.layer(*case.scores).viterbi()
            return (_now(case.scores[0]) - start,)

    contenders = {"layer": layer, "viterbi": viterbi, "loop": loop, **others}
    rounds: list[dict[str, tuple]] = []
    end = time.perf_counter() + seconds
    draw = random.Random(0)
    while len(rounds) < 5 or (time.perf_counter() < end and len(rounds) < 50):
        order = draw.sample(list(contenders), len(contenders))
        rounds.append({contender: contenders[contender]() for contender in order})

    def milliseconds(contender: str, part: int = 0, scale: float = 1.0) -> float:
        return statistics.median(scale * x[contender][part] for x in rounds) * 1e3

    def slower(seconds: Callable[[dict[str, tuple]], float]) -> float:
        return statistics.median(seconds(x) / sum(x["layer"][:2]) for x in rounds)

    return Row(
        case.kind, case.batch, case.states, case.frames,
        milliseconds("layer"), milliseconds("layer", 1), milliseconds("viterbi"),
        milliseconds("loop", 0, scale), milliseconds("loop", 1, scale),
        ratio=slower(lambda x: scale * sum(x["loop"][:2])),
        largest_difference=difference,
        peers={p: slower(lambda x, p=p: x[p][0]) for p in others},
    )  # fmt: skip


def hardware(device: str = "cpu") -> dict[str, str | int]:
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
        "device": "cpu" if device == "cpu" else f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}",
        **peers.present(),
    }


def rows(quick: bool, batch: int, seconds: float, device: str = "cpu") -> Iterator[Row]:
    """All rows, as they are measured."""
    for kind, states, frames, own_batch in QUICK if quick else ROWS if device == "cpu" else CUDA_ROWS:
        case = cases.make(kind, states, frames, own_batch or batch)
        case.scores = [x.to(device) for x in case.scores]
        yield measure(case, seconds)


def _check_device(device: str) -> None:
    if device not in ("cpu", "cuda"):
        raise UserError(f"--device: got {device!r}, expected cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        built = f"this torch is for CUDA {torch.version.cuda}" if torch.version.cuda else "this torch is for CPUs only"
        raise UserError(f"--device cuda: no CUDA device: {built}, and torch.cuda.is_available() is False")
    if device == "cuda" and cuda() is None:
        raise UserError("--device cuda: the library has no kernels for GPUs; `hmm-speech info` says how to build them")


def bench(threads: int, batch: int, seconds: float, quick: bool, out: Path | None, device: str = "cpu") -> None:
    """Measure, print a table as rows come in, and write them as JSON where `out` says."""
    for name, value in (("--threads", threads), ("--batch", batch)):
        if value < 1:
            raise UserError(f"{name}: got {value}, expected at least 1")
    _check_device(device)
    torch.set_num_threads(threads)
    machine, others = hardware(device), peers.present() if device == "cpu" else {}
    place = "{threads} thread(s), {cpu}, {instructions} ({backend})" if device == "cpu" else "{device}"
    title = f"float32, {place}, torch {{torch}}".format(**machine)
    caption = "milliseconds, medians of paired rounds; ratio, and each peer: its time / the layer's, forward + backward"
    if not quick and device == "cpu":
        caption += (
            f"; active: {cases.SLOTS} states a frame, T in the mean, its loop the layer with -inf in a dense emission"
        )
    columns = ["arcs", "B", "N", "T", "fwd", "bwd", "Viterbi", "loop fwd", "loop bwd", "ratio"]
    found = []
    with growing(title, caption, [*columns, *(f"{name} {version}" for name, version in others.items())]) as table:
        for row in rows(quick, batch, seconds, device):
            found.append(row)
            times = (row.forward_ms, row.backward_ms, row.viterbi_ms, row.loop_forward_ms, row.loop_backward_ms)
            table.add_row(
                row.kind, str(row.batch), str(row.states), str(row.frames), *map(three_digits, times),
                f"{row.ratio:.1f}", *(f"{row.peers[p]:.1f}" if p in row.peers else "-" for p in others),
            )  # fmt: skip
    if out is not None:
        with atomic_path(out) as beside:
            beside.write_text(
                json.dumps({"machine": machine, "batch": batch, "rows": [asdict(x) for x in found]}, indent=2)
            )
