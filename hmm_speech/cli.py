"""The `hmm-speech` command. Heavy imports happen inside the commands, so that --help answers at once."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from hmm_speech import __version__
from hmm_speech.errors import UserError
from hmm_speech.units.command import units

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Neural hidden Markov models over discrete speech units. Training is `python train.py` in the clone.",
)
app.command()(units)


@app.command()
def info() -> None:
    """Versions, the backend in use and, where the kernels did not load, why and how to rebuild them."""
    import platform

    import torch

    from hmm_speech.hmm import backend
    from hmm_speech.hmm.library import load

    typer.echo(f"hmm_speech  {__version__}, {Path(__file__).parent}")
    typer.echo(f"python      {platform.python_version()}, {platform.platform()}")
    cuda = f"CUDA {torch.version.cuda}, {torch.cuda.device_count()} GPU(s)" if torch.cuda.is_available() else "no GPU"
    typer.echo(f"torch       {torch.__version__}, {torch.get_num_threads()} thread(s), {cuda}")
    for package in ("torchaudio", "lightning", "hydra-core", "torchmetrics", "scikit-learn", "pyarrow", "soundfile", "wandb"):
        try:
            typer.echo(f"{package:<11} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            typer.echo(f"{package:<11} not installed")
    now = backend()
    typer.echo(f"backend     {now.name}: {now.detail}")
    if load().handle is None:
        raise typer.Exit(1)


@app.command()
def bench(
    threads: Annotated[int, typer.Option(help="Threads of the layer and of torch.")] = 1,
    batch: Annotated[int, typer.Option(help="Sequences, B.")] = 8,
    seconds: Annotated[float, typer.Option(help="Time for each row, after the first five rounds.")] = 4.0,
    quick: Annotated[bool, typer.Option("--quick", help="Two small rows, in seconds.")] = False,
    out: Annotated[Optional[Path], typer.Option(help="Write the rows as JSON, too.")] = None,  # noqa: UP045
) -> None:
    """Time the layer beside plain-torch loops, in one process, and print the ratios."""
    from hmm_speech.benchmark import bench as run

    run(threads, batch, seconds, quick, out)


def main() -> None:
    """Run the command; a user's mistake is one line on standard error and exit code 1 (HYDRA_FULL_ERROR=1 shows more)."""
    try:
        app()
    except UserError as error:
        if os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0"):
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
