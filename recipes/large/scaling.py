"""What a training step costs against the number of states: `python recipes/large/scaling.py`. Prints Markdown.

One batch of 16 utterances of recipes/flite/mfcc.parquet, forward, backward and AdamW, on one thread. Each row is a
process of its own, whose peak memory is told by the operating system. Processor time, since other work may share the
machine: the smaller of two steps after a first one, and of two backward passes.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from hmm_speech.data.batching import Batch, collate
from hmm_speech.data.unitfile import read_units
from hmm_speech.nn.composition import build_composition, compose
from hmm_speech.nn.topology import build_topology, resolve_topology

UNITS = Path(__file__).resolve().parents[1] / "flite" / "mfcc.parquet"
UTTERANCES = 16
SIZES = (1024, 4096, 16384, 32768)
MOST_DENSE = 4096
NETWORK = {"dim": 128, "blocks": 2}
LOW_RANK = {"_target_": "hmm_speech.nn.LowRankTransition", "rank": 64, **NETWORK}
CLONED = {"_target_": "hmm_speech.nn.ClonedTransition", "dim": 64, "blocks": 2}
DENSE_EMISSION = {"_target_": "hmm_speech.nn.EmissionNetwork", **NETWORK}
MODELS = {
    "network": ({"_target_": "hmm_speech.nn.TransitionNetwork", **NETWORK}, DENSE_EMISSION),
    "low_rank": (LOW_RANK, DENSE_EMISSION),
    "cloned": ({**CLONED, "state_dropout": 0.0}, {"_target_": "hmm_speech.nn.ClonedEmission"}),
    "cloned, half": ({**CLONED, "state_dropout": 0.5}, {"_target_": "hmm_speech.nn.ClonedEmission"}),
    "cloned, quarter": ({**CLONED, "state_dropout": 0.75}, {"_target_": "hmm_speech.nn.ClonedEmission"}),
}


def measure(name: str, size: int) -> dict[str, float]:
    """Seconds of processor time of a step and of its parts, and gigabytes of memory, at start and at most."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    corpus = read_units(UNITS)
    train = corpus.split("train")
    transition, emission = MODELS[name]
    config = {"states": size} if name.startswith("cloned") else {"labels": size}
    topology = build_topology(resolve_topology(config, [u.units for u in train], corpus.vocabulary))
    parts = {
        "initial": {"_target_": "hmm_speech.nn.InitialTable"},
        "transition": transition,
        "emission": emission,
        "context": None,
    }
    model = build_composition(parts, topology, corpus.vocabulary, None, ["hmm_speech"])
    parameters = [p for part in (model.initial, model.transition, model.emission) for p in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    batch = collate(list(enumerate(sorted(train, key=lambda u: -len(u.units))[::24][:UTTERANCES])))
    start = peak()
    steps = [_step(model, batch, optimizer) for _ in range(3)][1:]
    forward, backward = (min(times) for times in zip(*steps, strict=True))
    return {
        "frames": int(batch.lengths.sum()),
        "parameters": sum(p.numel() for p in parameters),
        "forward": forward,
        "backward": backward,
        "start": start,
        "peak": peak(),
    }


def _step(model, batch: Batch, optimizer: torch.optim.Optimizer) -> tuple[float, float]:
    optimizer.zero_grad()
    begin = time.process_time()
    loss = -compose(model, batch).log_partition().sum()
    middle = time.process_time()
    loss.backward()
    optimizer.step()
    return middle - begin, time.process_time() - middle


def peak() -> float:
    """Gigabytes of memory that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "STATES"), help="measure one row here; prints JSON")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one[0], int(options.one[1]))))
        return
    print(
        "| transition | states | parameters | forward, s | backward and update, s | peak memory, GB (before a step) |"
    )
    print("|---|---|---|---|---|---|")
    for name in options.models:
        for size in options.sizes:
            if name == "network" and size > MOST_DENSE:
                continue
            command = [sys.executable, __file__, "--one", name, str(size)]
            row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print(
                f"| {name} | {size:,} | {row['parameters']:,} | {row['forward']:.2f} | {row['backward']:.2f} | "
                f"{row['peak']:.2f} ({row['start']:.2f}) |",
                flush=True,
            )


if __name__ == "__main__":
    main()
