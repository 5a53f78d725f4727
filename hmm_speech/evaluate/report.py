"""``metrics.json``: assembled, written and printed."""

import json
import math
import os
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hmm_speech.data.unitfile import atomic_path
from hmm_speech.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Metrics = dict[str, Any]

BOUNDARY: dict[str, Any] = {"precision": None, "recall": None, "f1": None, "r_value": None}
LABELS: dict[str, Any] = {"pnmi": None, "phone_purity": None, "cluster_purity": None, "boundary": BOUNDARY}
SCHEMA: dict[str, Any] = {
    "bits_per_frame": None,
    "perplexity": None,
    "frames": None,
    "parameters": None,
    "baselines": {"unigram": None, "bigram": None, "trigram": None},
    "states": LABELS,
    "units": LABELS,
    "uniform": {"boundary": BOUNDARY},
}
"""The keys of ``metrics.json``, which are always all there; what does not apply is null."""

COLUMNS = {
    "PNMI": ("pnmi",),
    "phone purity": ("phone_purity",),
    "cluster purity": ("cluster_purity",),
    "precision": ("boundary", "precision"),
    "recall": ("boundary", "recall"),
    "F1": ("boundary", "f1"),
    "R-value": ("boundary", "r_value"),
}


def build_metrics(
    *,
    bits_per_frame: float | None,
    frames: int,
    parameters: int,
    baselines: Mapping[str, float] | None = None,
    states: Mapping[str, Any] | None = None,
    units: Mapping[str, Any] | None = None,
    uniform: Mapping[str, Any] | None = None,
) -> Metrics:
    """The object of ``metrics.json``, of plain numbers.

    Args:
        bits_per_frame: -log2 p(test) / frames of the model, or None for an emission over frames (a density).
        frames: number of test frames, each counted once.
        parameters: number of trained parameters.
        baselines: :func:`~hmm_speech.evaluate.baselines.ngram_baselines`, or None.
        states: :func:`~hmm_speech.evaluate.labels.label_report` of the Viterbi labels, or None without phones.
        units: the same of the input units.
        uniform: :func:`~hmm_speech.evaluate.labels.uniform_report`.

    Returns:
        Every key of :data:`SCHEMA`, with None where something does not apply; ``perplexity`` is 2 ** bits_per_frame.
        A number that JSON cannot hold (a test utterance that the model finds impossible costs infinitely many bits)
        becomes None too, with a warning that names it.

    Raises:
        UserError: a part with keys that ``metrics.json`` does not have.
    """
    return _conform(
        {
            "bits_per_frame": bits_per_frame,
            "perplexity": None if bits_per_frame is None else _power_of_two(float(bits_per_frame)),
            "frames": frames,
            "parameters": parameters,
            "baselines": baselines,
            "states": states,
            "units": units,
            "uniform": uniform,
        },
        SCHEMA,
        "",
    )


def _power_of_two(bits: float) -> float:
    return 2.0**bits if bits < 1024 else math.inf


def _conform(values: Mapping[str, Any] | None, schema: Mapping[str, Any], prefix: str) -> Metrics:
    values = {} if values is None else values
    unknown = set(values) - set(schema)
    if unknown:
        raise UserError(f"{prefix or 'metrics'}: unknown keys {sorted(unknown)}; expected {list(schema)}")
    return {
        key: _conform(values.get(key), default, f"{prefix}{key}.")
        if isinstance(default, dict)
        else _plain(values.get(key), f"{prefix}{key}")
        for key, default in schema.items()
    }


def _plain(value: Any, name: str) -> float | int | None:
    """A Python number of a Python, numpy or torch one."""
    if value is None:
        return None
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, int):
        return value
    value = float(value)
    if not math.isfinite(value):
        warnings.warn(f"{name} is {value}, which JSON cannot hold; written as null", stacklevel=2)
        return None
    return value


def to_json(metrics: Metrics) -> str:
    """The text of ``metrics.json``: strict JSON, indented, with a newline at its end."""
    return json.dumps(metrics, indent=2, allow_nan=False) + "\n"


def write_metrics(path: str | os.PathLike[str], metrics: Metrics) -> None:
    """Write ``metrics.json``; a reader sees the old file or the whole new one."""
    text = to_json(metrics)
    with atomic_path(path) as beside:
        beside.write_text(text, encoding="utf-8")


def likelihood_rows(metrics: Metrics) -> list[list[str]]:
    """The table of likelihoods as text: a header, then a row each for the model and the n-grams."""
    model = metrics["bits_per_frame"]
    rows = [["", "bits per frame", "perplexity", "model saves"]]
    for name, bits in {"this model": model, **metrics["baselines"]}.items():
        both = name != "this model" and bits and model is not None
        saved = f"{100 * (1 - model / bits):+.1f} %" if both else ""
        rows.append([name, _number(bits), _number(None if bits is None else _power_of_two(bits), 2), saved])
    return rows


def phone_rows(metrics: Metrics) -> list[list[str]]:
    """The table of phone scores as text: a header, then states, units and uniform segments."""
    rows = [["", *COLUMNS]]
    for name in ("states", "units", "uniform"):
        row = [name]
        for path in COLUMNS.values():
            value: Any = metrics[name]
            for key in path:
                value = value.get(key) if value else None
            row.append(_number(value))
        rows.append(row)
    return rows


def has_phones(metrics: Metrics) -> bool:
    """Whether any phone score is there to show."""
    return any(cell != "-" for row in phone_rows(metrics)[1:] for cell in row[1:])


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _table(title: str, rows: list[list[str]]) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, heading in enumerate(rows[0]):
        table.add_column(heading, justify="right" if index else "left", no_wrap=index == 0)
    for index, row in enumerate(rows[1:]):
        table.add_row(*row, style="bold cyan" if index == 0 else None)
    return table


def print_metrics(metrics: Metrics, console: "Console | None" = None) -> None:
    """Print the metrics as two tables: the model beside the n-grams, and its states beside units and equal segments.

    Args:
        metrics: what :func:`build_metrics` returned, or ``metrics.json`` read back.
        console: a rich console; by default one on standard output.
    """
    from rich.console import Console

    console = console or Console()
    size = f"{metrics['frames']:,} test frames, {metrics['parameters']:,} parameters"
    console.print(_table(f"Likelihood: {size}", likelihood_rows(metrics)))
    if has_phones(metrics):
        title = "Phones: Viterbi labels, input units, equal segments (20 ms, strict)"
        console.print(_table(title, phone_rows(metrics)))
