"""The `hmm-speech` command. Heavy imports happen inside the commands, so that --help answers at once."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path
from typing import Annotated, Optional

import typer

from hmm_speech import __version__
from hmm_speech.errors import UserError, report_user_errors
from hmm_speech.units.command import units

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Neural hidden Markov models over discrete speech units. Training is `python train.py` in the clone.",
)
app.command()(units)


Checkpoint = Annotated[Path, typer.Argument(help="A run's checkpoints/best.ckpt.")]
UnitFile = Annotated[Path, typer.Argument(help="A unit file, as `hmm-speech units` writes it, or a folder of them.")]


@app.command()
def decode(
    checkpoint: Checkpoint,
    file: UnitFile,
    out: Annotated[Path, typer.Option(help="The folder to write to.")],
    format: Annotated[
        str, typer.Option(help="parquet: one file, decoded.parquet; textgrid: one file an utterance.")
    ] = "parquet",
    split: Annotated[Optional[str], typer.Option(help="train, valid or test; all by default.")] = None,  # noqa: UP045
) -> None:
    """Write the Viterbi states of every utterance: labels, segments in seconds, and log-likelihoods."""
    from hmm_speech import inference
    from hmm_speech.checkpoint import load

    if format not in inference.FORMATS:
        raise UserError(f"--format: got {format!r}, expected one of {', '.join(inference.FORMATS)}")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: {out} is a file, expected a folder")
    module = load(checkpoint)
    corpus = inference.read_corpus(module, file)
    utterances = corpus.utterances if split is None else corpus.split(split)
    if not utterances:
        raise UserError(f"{file}: no utterance in the split {split!r}")
    decoded = list(inference.decode(module, utterances))
    if format == "parquet":
        inference.write_parquet(decoded, corpus, out / "decoded.parquet")
    else:
        inference.write_textgrids(decoded, corpus, out)
    typer.echo(f"{len(decoded)} utterances in {out}", err=True)


@app.command()
def evaluate(
    checkpoint: Checkpoint,
    file: UnitFile,
    json: Annotated[bool, typer.Option("--json", help="Print the metrics.json object and nothing else.")] = False,
    out: Annotated[Optional[Path], typer.Option(help="Write a report with pictures, .html.")] = None,  # noqa: UP045
) -> None:
    """Score a model on the test split, beside n-gram baselines, raw units and equal segments: training's own test."""
    import tempfile

    from hmm_speech import inference
    from hmm_speech.checkpoint import load
    from hmm_speech.evaluate.html import write_html
    from hmm_speech.evaluate.report import print_metrics, to_json
    from hmm_speech.report import draw_figures

    if out is not None and out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out: got {out}, expected the name of a report ending in .html")
    module = load(checkpoint)
    corpus = inference.read_corpus(module, file)
    metrics = inference.evaluate(module, corpus)
    if json:
        typer.echo(to_json(metrics))
    else:
        print_metrics(metrics)
    if out is not None:
        with tempfile.TemporaryDirectory() as folder:
            draw_figures(module, corpus, Path(folder), metrics)
            pictures = sorted((Path(folder) / "figures").glob("*.png"))
            write_html(out, metrics, {x.stem.replace("_", " "): x for x in pictures}, title=f"{checkpoint} on {file}")


@app.command()
def sample(
    checkpoint: Checkpoint,
    num: Annotated[int, typer.Option(help="Utterances.")] = 10,
    frames: Annotated[int, typer.Option(help="Frames of each.")] = 500,
    frame_rate: Annotated[float, typer.Option(help="Frames a second, for the times of the labels.")] = 50.0,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    out: Annotated[Optional[Path], typer.Option(help="Write a unit file; lines `id u1 u2 ...` otherwise.")] = None,  # noqa: UP045
) -> None:
    """Make up utterances of units; in a unit file, the labels that produced them stand where phones do."""
    from hmm_speech import inference
    from hmm_speech.checkpoint import load
    from hmm_speech.data.unitfile import write_units

    corpus = inference.sample(load(checkpoint), num, frames, frame_rate, seed)
    if out is not None:
        write_units(corpus, out)
        return
    for utterance in corpus.utterances:
        typer.echo(" ".join([utterance.id, *map(str, utterance.units)]))


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
    names = ["torchaudio", "lightning", "hydra-core", "torchmetrics", "scikit-learn", "pyarrow", "soundfile", "wandb"]
    installed = {x.metadata["Name"].lower(): x.version for x in importlib.metadata.distributions()}
    for name in names:
        typer.echo(f"{name:<11} {installed.get(name, 'not installed')}")
    now = backend()
    typer.echo(f"backend     {now.name}: {now.detail}")
    for line in _about_cuda():
        typer.echo(f"cuda        {line}")
    if load().handle is None:
        raise typer.Exit(1)


def _about_cuda() -> list[str]:
    """Whether the library has kernels for GPUs; if not, and torch could use them, what builds them."""
    import shutil
    import sysconfig

    import torch

    from hmm_speech.hmm.library import cuda

    if cuda() is not None:
        return ["the library has kernels for GPUs"]
    lines = ["the library has no kernels for GPUs: it was built without nvcc, or with HMM_SPEECH_CUDA=0"]
    version = torch.version.cuda
    if version is None:
        return [*lines, "this torch is for CPUs only"]
    if shutil.which("nvcc"):
        return [*lines, "there is an nvcc now: build again with `pip install -e .` in the clone"]
    if int(version.split(".")[0]) < 13:
        return [*lines, f"install the CUDA toolkit {version} (from 12.0 on), then `pip install -e .` in the clone"]
    names = ("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt", "nvidia-cuda-runtime", "nvidia-cuda-cccl")
    packages = " ".join(f'"{name}=={version}.*"' for name in names)
    toolkit = f"{sysconfig.get_path('purelib')}/nvidia/cu{version.split('.')[0]}"
    again = f"LIBRARY_PATH={toolkit}/lib CUDACXX={toolkit}/bin/nvcc pip install -e ."
    return [*lines, f"to build them: pip install {packages}", f"then, in the clone: {again}"]


@app.command()
def bench(
    threads: Annotated[int, typer.Option(help="Threads of the layer and of torch.")] = 1,
    batch: Annotated[int, typer.Option(help="Sequences, B.")] = 8,
    seconds: Annotated[float, typer.Option(help="Time for each row, after the first five rounds.")] = 4.0,
    quick: Annotated[bool, typer.Option("--quick", help="Two small rows, in seconds.")] = False,
    out: Annotated[Optional[Path], typer.Option(help="Write the rows as JSON, too.")] = None,  # noqa: UP045
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    train: Annotated[bool, typer.Option("--train", help="The layer's share of a training step, by preset.")] = False,
    steps: Annotated[int, typer.Option(help="Training steps that --train measures.")] = 10,
) -> None:
    """Time the layer beside plain-torch loops, in one process, and print the ratios."""
    if train:
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler's own messages; read when torch is imported
        from hmm_speech.benchmark.training import bench_training

        bench_training(threads, steps, out)
        return
    from hmm_speech.benchmark import bench as run

    run(threads, batch, seconds, quick, out, device)


def main() -> None:
    """Run the command; a user's mistake, or a file that cannot be read or written, is told without a traceback."""
    with report_user_errors():
        app()


if __name__ == "__main__":
    main()
