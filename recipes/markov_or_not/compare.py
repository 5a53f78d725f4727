"""Independent states, Markov states and VQ-APC at equal parameters: train, evaluate, and write table and figure.

    python recipes/markov_or_not/compare.py --hops 1 2 4 8 --seeds 0 1

Runs that are finished are used again, one that was interrupted goes on. Under --out: a run folder for each model, hop
and seed, scores.json, table.md and figure.png. What stands behind `--` are overrides for every training.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import outcome

from hmm_speech.configuration import CLONE, instantiate
from hmm_speech.data.unitfile import atomic_path
from hmm_speech.errors import UserError

MODELS = ("independent", "markov", "vq_apc")
SIZES = {"laptop": "", "original": "_original"}
Train = Callable[[Path, Sequence[str]], None]


def run_training(folder: Path, overrides: Sequence[str]) -> None:
    """`python train.py` in a process of its own; what it prints goes to train.log in the run folder."""
    folder.mkdir(parents=True, exist_ok=True)
    quiet = ("figures=false", "callbacks.progress=null", "trainer.enable_progress_bar=false")
    command = [sys.executable, str(CLONE / "train.py"), *quiet, *overrides, f"hydra.run.dir={folder}"]
    with open(folder / "train.log", "a", encoding="utf-8") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, cwd=CLONE, check=False).returncode
    if code:
        raise UserError(f"{' '.join(command)} ended with code {code}; see {folder / 'train.log'}")


def finished_run(folder: Path, overrides: Sequence[str], train: Train) -> float:
    """Train in a folder unless that was done; returns the seconds of training that this call took.

    Raises:
        UserError: the folder holds a run with other settings.
    """
    record, last = folder / "overrides.json", folder / "checkpoints" / "last.ckpt"
    if record.exists():
        before = json.loads(record.read_text(encoding="utf-8"))
        if before != list(overrides):
            raise UserError(f"{folder}: was trained with {before}, not {list(overrides)}; give another --out")
    else:
        write_json(record, list(overrides))
    if (folder / "metrics.json").exists():
        return 0.0
    start = time.monotonic()
    train(folder, [*overrides, f"ckpt_path={last}"] if last.exists() else overrides)
    return time.monotonic() - start


def scores_of(folder: Path) -> dict[str, Any]:
    """The measures of a finished run, computed once: scores.json in its folder."""
    path = folder / "scores.json"
    if not path.exists():
        from measures import evaluate
        from omegaconf import OmegaConf

        from hmm_speech.checkpoint import load

        data = instantiate(OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))["data"])
        write_json(path, evaluate(load(folder / "checkpoints" / "best.ckpt"), data.corpus))
    return json.loads(path.read_text(encoding="utf-8"))


def baseline_of(out: Path, run: Path, seed: int) -> dict[str, float]:
    """What needs no training, on the corpus of a run and with as many codes as it has labels."""
    path = out / f"frames_seed{seed}.json"
    if not path.exists():
        from measures import baseline
        from omegaconf import OmegaConf

        config = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
        write_json(path, baseline(instantiate(config["data"]).corpus, config["topology"]["labels"], seed))
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as beside:
        beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def compare(
    out: Path,
    models: Sequence[str],
    hops: Sequence[int],
    seeds: Sequence[int],
    overrides: Sequence[str] = (),
    size: str = "laptop",
    train: Train = run_training,
) -> list[outcome.Row]:
    """Train and evaluate every model with every hop and seed; writes table.md, figure.png and times as it goes."""
    rows: list[outcome.Row] = []
    for seed, hop, model in cells(models, hops, seeds):
        folder = out / f"{model}{SIZES[size]}_hop{hop}_seed{seed}"
        wanted = [f"recipes=markov_or_not/{model}{SIZES[size]}", f"context.hop={hop}", f"seed={seed}", *overrides]
        seconds = finished_run(folder, wanted, train)
        scores = scores_of(folder)
        rows.append(outcome.Row(model, hop, seed, scores["model"]))
        if "past codes" in scores:
            rows.append(outcome.Row(f"{model}, codes from h", hop, seed, scores["past codes"]))
        if not any(row.model == outcome.FRAMES and row.seed == seed for row in rows):
            rows.append(outcome.Row(outcome.FRAMES, None, seed, baseline_of(out, folder, seed)))
        print(f"{folder.name}: {seconds:.0f} s, {outcome.line(scores['model'])}", flush=True)
        with atomic_path(out / "table.md") as beside:
            beside.write_text(outcome.table(rows) + "\n" + outcome.verdict(rows) + "\n", encoding="utf-8")
        outcome.figure(rows, out / "figure.png")
    return rows


def cells(models: Sequence[str], hops: Sequence[int], seeds: Sequence[int]) -> Iterator[tuple[int, int, str]]:
    """(seed, hop, model), so that an early table has all models side by side."""
    for seed in seeds:
        for hop in hops:
            for model in models:
                yield seed, hop, model


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    cut = given.index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--hops", nargs="+", type=int, default=[1, 2, 3, 4, 5, 6, 7, 8])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--size", choices=list(SIZES), default="laptop")
    parser.add_argument("--out", type=Path, default=CLONE / "outputs" / "markov_or_not", help="default: %(default)s")
    options = parser.parse_args(given[:cut])
    out = options.out.resolve()
    try:
        compare(out, options.models, options.hops, options.seeds, given[cut + 1 :], options.size)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print((out / "table.md").read_text(encoding="utf-8"))
    print(f"{os.path.relpath(out / 'table.md')} and figure.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
