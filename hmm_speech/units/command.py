"""`hmm-speech units`: from a folder of audio to a unit file."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

if TYPE_CHECKING:
    from hmm_speech.units.extract import Progress, Report

_NAMES_SHOWN = 20  # of files that are no mistake: converted, skipped, without metadata


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:9}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bars, tasks = Progress(*columns, console=Console(stderr=True)), {}
    with contextlib.ExitStack() as running:

        def progress(stage: str, done: int, total: int) -> None:
            if not tasks:  # not before: an empty bar is a blank line above what is told of a mistake
                running.enter_context(bars)
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield progress


def _tell(title: str, names: Sequence[str], most: int | None = None) -> None:
    """A line a name on standard error, with how many were left out."""
    if not names:
        return
    typer.echo(f"{title} ({len(names)}):", err=True)
    for name in names[:most]:
        typer.echo(f"  {name}", err=True)
    if most is not None and len(names) > most:
        typer.echo(f"  and {len(names) - most} more", err=True)


def print_report(report: Report, elapsed: float) -> None:
    """A table of what was written on standard output; the files that failed or were converted on standard error."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=str(report.out), show_header=False)
    speed = report.seconds / max(elapsed, 1e-9)
    rows = [
        ("features", f"{report.extractor.name}, {report.extractor.hop_ms:g} ms a frame"),
        ("units", f"{report.frames} of a vocabulary of {report.vocabulary}"),
        ("quantizer", str(report.quantizer)),
        ("utterances", ", ".join(f"{count} {name}" for name, count in report.splits.items())),
        ("speakers", str(report.speakers or "not known: each utterance normalised alone")),
        (
            "phones",
            "not given" if report.aligned is None else f"for {report.aligned} of {report.utterances} utterances",
        ),
        ("audio", f"{report.seconds / 60:.1f} min in {elapsed:.1f} s, {speed:.0f} times real time"),
        ("failed", f"{len(report.failed)} of {len(report.failed) + report.utterances} files"),
    ]
    if report.extractor.normalisation == "none":
        rows[4] = ("speakers", f"{report.speakers or 'not known'} (frames are not normalised by speaker)")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    _tell("converted", [f"{name}: {what}" for name, what in report.converted], _NAMES_SHOWN)
    _tell("skipped, no audio file by its name", report.skipped, _NAMES_SHOWN)
    _tell("not in the metadata, taken as train with no speaker", report.without_row, _NAMES_SHOWN)
    _tell("in the metadata, but no audio", report.without_audio, _NAMES_SHOWN)
    _tell("failed", [f"{name}: {reason}" for name, reason in report.failed])


def units(
    audio: Annotated[Path, typer.Argument(help="A folder of wav, flac, ogg or mp3, or a TSV that lists files.")],
    out: Annotated[Path, typer.Option(help="The unit file to write, .parquet.")],
    features: Annotated[
        Optional[str],  # noqa: UP045 (typer reads the annotation on Python 3.10 too)
        typer.Option(help="mfcc (the default), logmel, or BUNDLE:LAYER, such as HUBERT_BASE:9 or checkpoint.pt:9."),
    ] = None,
    hop_ms: Annotated[Optional[float], typer.Option(help="Milliseconds a frame; 20 by default.")] = None,  # noqa: UP045
    clusters: Annotated[Optional[int], typer.Option(help="Size of the vocabulary; 100 by default.")] = None,  # noqa: UP045
    quantizer: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="A quantizer that an earlier run saved, instead of fitting one."),
    ] = None,
    metadata: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="TSV with a header: utt (the file's stem), and speaker and split where known."),
    ] = None,
    alignments: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Phone times: a TSV with the header utt start end phone, or a folder of TextGrid or .lab."),
    ] = None,
    keep_frames: Annotated[bool, typer.Option("--keep-frames", help="Keep the features in the unit file too.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the quantizer's fit.")] = 0,
) -> None:
    """Turn audio into a unit file: features, normalised by speaker, quantized by k-means fitted on the train split.

    The quantizer is saved beside the result, as NAME.quantizer.npz. A file that cannot be used is reported by name and
    the rest is written; the exit code is then 1.
    """
    from hmm_speech.units.extract import extract_units

    start = time.monotonic()
    with progress_bar() as progress:
        report = extract_units(
            audio,
            out,
            features=features,
            hop_ms=hop_ms,
            clusters=clusters,
            quantizer=quantizer,
            metadata=metadata,
            alignments=alignments,
            keep_frames=keep_frames,
            seed=seed,
            progress=progress,
        )
    print_report(report, time.monotonic() - start)
    if report.failed:
        raise typer.Exit(1)
