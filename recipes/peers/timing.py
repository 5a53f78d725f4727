"""Time and memory at some sizes: every library on the same scores, in turn, on one core."""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from contenders import CONTENDERS, HmmLearn, Layer, TorchLoop, TorchStruct

from hmm_speech.hmm import log_partition

BATCH = 8
SIZES = (("shared", 50, 1000), ("shared", 512, 300), ("varying", 50, 100), ("varying", 50, 300))
TIMED = [
    c for c in CONTENDERS if c.name in ("hmm_speech", "loop in torch", "torch-struct", "dynamax", "hmmlearn, scaling")
]


def scores(kind: str, states: int, frames: int) -> list[torch.Tensor]:
    """Log-probabilities (N,), of arcs (N, N) or (B, T-1, N, N), and emission scores (B, T, N), float32."""
    g = torch.Generator().manual_seed(7)
    shape = (states, states) if kind == "shared" else (BATCH, frames - 1, states, states)
    initial, transition = (torch.randn(s, generator=g).log_softmax(-1) for s in ((states,), shape))
    return [initial, transition, torch.randn(BATCH, frames, states, generator=g)]


def prepared(contender: type, kind: str, states: int, frames: int):
    """(forward, forward and backward) as calls, warmed up; None where it has no such thing or needs minutes."""
    x = scores(kind, states, frames)
    if (states > 100 and contender in (TorchStruct, TorchLoop)) or (frames > 300 and contender is TorchStruct):
        return None
    if issubclass(contender, HmmLearn) and kind != "shared":
        return None
    calls = {"dynamax": _dynamax, "hmmlearn, scaling": _hmmlearn}.get(contender.name, _torch)(contender, x)
    for call in calls:
        call()
    return calls


def _torch(contender, x):
    lengths = torch.full((BATCH,), x[2].shape[1])
    leaves = [y.clone().requires_grad_() for y in x]

    def z(initial, transition, emission):
        if contender is Layer:
            return log_partition(initial, transition, emission)
        if contender is TorchLoop:
            return TorchLoop.log_partition(initial, transition, emission, lengths, None)
        from torch_struct import LinearChainCRF

        return LinearChainCRF(TorchStruct.edges(initial, transition, emission, lengths, None)).partition

    def forward():
        with torch.no_grad():
            return z(*x)

    return forward, lambda: torch.autograd.grad(z(*leaves).sum(), leaves)


def _dynamax(contender, x):
    import jax
    from dynamax.hidden_markov_model import hmm_filter

    def total(start, arcs, emission):  # probabilities, as dynamax takes them
        one = jax.vmap(lambda a, e: hmm_filter(start, a, e).marginal_loglik, (None if arcs.ndim == 2 else 0, 0))
        return one(arcs, emission).sum()

    y = [jax.numpy.asarray(v.numpy()) for v in (x[0].exp(), x[1].exp(), x[2])]
    forward, both = jax.jit(total), jax.jit(jax.grad(total, (0, 1, 2)))
    return (lambda: forward(*y).block_until_ready()), (lambda: jax.block_until_ready(both(*y)))


def _hmmlearn(contender, x):
    start, arcs, emission = (v.double().numpy() for v in (x[0].softmax(-1), x[1].softmax(-1), x[2]))
    model = contender().model(start, arcs, emission.reshape(-1, emission.shape[-1]))
    frames, lengths = np.arange(emission.shape[0] * emission.shape[1])[:, None], [emission.shape[1]] * BATCH
    return (lambda: model.score(frames, lengths)), (lambda: model.score_samples(frames, lengths))


def resident() -> int:
    """The largest resident size so far, kB. Not getrusage: what that tells begins with the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def peak(name: str, kind: str, states: int, frames: int) -> float:
    """MB that forward and backward add to the largest resident size of this process, after a small problem."""
    contender = next(c for c in CONTENDERS if c.name == name)
    prepared(contender, kind, 4, 8)
    x = scores(kind, states, frames)
    calls = {"dynamax": _dynamax, "hmmlearn, scaling": _hmmlearn}.get(name, _torch)(contender, x)
    before = resident()
    calls[1]()
    return (resident() - before) / 1024


def measure(quick: bool, rounds: int = 5):
    """Yield (kind, N, T, name, forward ms, both ms, MB): processor time, medians of rounds in which all take turns."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # before jax and torch make threads: one core for each
    torch.set_num_threads(1)
    for kind, states, frames in (("shared", 5, 20),) if quick else SIZES:
        present = [c for c in TIMED if c.version() is not None]
        calls = {c.name: prepared(c, kind, states, frames) for c in present}
        calls = {name: pair for name, pair in calls.items() if pair}
        taken = {name: ([], []) for name in calls}
        for _ in range(rounds):
            for name, pair in calls.items():
                for call, times in zip(pair, taken[name], strict=True):
                    gc.collect()
                    start = time.process_time()
                    call()
                    times.append(1e3 * (time.process_time() - start))
        for name, times in taken.items():
            command = [sys.executable, str(Path(__file__)), name, kind, str(states), str(frames)]
            shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            yield kind, states, frames, name, *map(statistics.median, times), json.loads(shown.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(peak(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
