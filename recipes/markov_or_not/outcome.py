"""The table, the figure and the answer of a comparison, from one row of measures for each model, hop and seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hmm_speech.data.unitfile import atomic_path

FRAMES = "frames, k-means"


class Measure(NamedTuple):
    """A column."""

    title: str
    digits: int
    better: int
    """1: more is better; -1: less; 0: neither."""


MEASURES = {
    "parameters": Measure("parameters", 0, 0),
    "nats": Measure("nats / frame", 2, -1),
    "probe_context": Measure("probe h", 3, 1),
    "probe_posterior": Measure("probe posterior", 3, 1),
    "f1": Measure("F1", 3, 1),
    "r_value": Measure("R-value", 3, 1),
    "purity": Measure("purity", 3, 1),
    "pnmi": Measure("PNMI", 3, 1),
    "nmi": Measure("NMI", 3, 1),
    "codes": Measure("codes used", 0, 0),
}
CLAIM = ("probe_context", "probe_posterior", "f1", "r_value", "purity", "nmi")
"""What the paper says that Markov states improve: access to phones, segmentation, purity (and NMI)."""


class Row(NamedTuple):
    """Measures of one run."""

    model: str
    hop: int | None
    """None where there is no context."""
    seed: int
    measures: Mapping[str, float | None]


def line(measures: Mapping[str, float | None]) -> str:
    """All measures of a row in a line."""
    return ", ".join(f"{MEASURES[key].title} {cell([measures[key]], key)}" for key in MEASURES if key in measures)


def values(rows: Sequence[Row], model: str, hop: int | None, key: str) -> list[float]:
    """One measure over seeds."""
    found = [row.measures.get(key) for row in rows if (row.model, row.hop) == (model, hop)]
    return [value for value in found if value is not None]


def cell(numbers: Sequence[float | None], key: str) -> str:
    """Mean, and half the range over seeds where there are several."""
    known = [x for x in numbers if x is not None]
    if not known:
        return "-"
    digits = MEASURES[key].digits
    text = f"{np.mean(known):,.{digits}f}"
    if len(known) == 1 or MEASURES[key].better == 0:
        return text
    return f"{text} ± {(max(known) - min(known)) / 2:.{digits}f}"


def groups(rows: Sequence[Row]) -> list[tuple[str, int | None]]:
    """(model, hop) in the order of hops, then as they came; what has no hop first."""
    found = dict.fromkeys((row.model, row.hop) for row in rows)
    return sorted(found, key=lambda group: -1 if group[1] is None else group[1])


def table(rows: Sequence[Row]) -> str:
    """Markdown: a row for each model and hop, mean ± half the range over seeds."""
    titles = ["hop", "model", "seeds", *(measure.title for measure in MEASURES.values())]
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for model, hop in groups(rows):
        seeds = len({row.seed for row in rows if (row.model, row.hop) == (model, hop)})
        cells = [cell(values(rows, model, hop, key), key) for key in MEASURES]
        lines.append(f"| {'-' if hop is None else hop} | {model} | {seeds} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def verdict(rows: Sequence[Row]) -> str:
    """In words, for each measure of the claim: where Markov states are ahead of the others, and whether hops help.

    A difference counts where the two ranges over seeds do not meet; with one seed, any difference does.
    """
    hops = sorted({row.hop for row in rows if row.hop is not None})
    lines = []
    for key in CLAIM:
        parts = [*(_against(rows, other, hops, key) for other in ("independent", "vq_apc")), _trend(rows, hops, key)]
        lines.append(f"- {MEASURES[key].title}: {'; '.join(filter(None, parts)) or 'nothing to compare'}.")
    return "\n".join(lines) + "\n"


def _against(rows: Sequence[Row], other: str, hops: Sequence[int], key: str) -> str:
    where: dict[str, list[str]] = {"ahead": [], "behind": [], "level": []}
    for hop in hops:
        ours, theirs = (values(rows, model, hop, key) for model in ("markov", other))
        if ours and theirs:
            where[_place(ours, theirs, MEASURES[key].better)].append(str(hop))
    told = [f"{place} at hop {', '.join(found)}" for place, found in where.items() if found]
    return f"Markov against {other}: {'; '.join(told)}" if told else ""


def _place(ours: Sequence[float], theirs: Sequence[float], better: int) -> str:
    a, b = (sorted(better * x for x in numbers) for numbers in (ours, theirs))
    return "ahead" if a[0] > b[-1] else "behind" if a[-1] < b[0] else "level"


def _trend(rows: Sequence[Row], hops: Sequence[int], key: str) -> str:
    better = MEASURES[key].better
    means = [(better * float(np.mean(x)), hop) for hop in hops if (x := values(rows, "markov", hop, key))]
    return f"best hop of Markov: {max(means)[1]} of {', '.join(str(hop) for _, hop in means)}" if len(means) > 1 else ""


def figure(rows: Sequence[Row], path: Path) -> None:
    """A panel a measure, hops across, a line a model with the range over seeds; frames by a dotted line."""
    from matplotlib.figure import Figure

    keys = [key for key, measure in MEASURES.items() if measure.better]
    models = list(dict.fromkeys(row.model for row in rows if row.hop is not None))
    hops = sorted({row.hop for row in rows if row.hop is not None})
    drawing = Figure(figsize=(12, 5.6), layout="constrained")
    panels = drawing.subplots(2, math.ceil(len(keys) / 2)).ravel()
    for key, axes in zip(keys, panels, strict=True):
        for model in models:
            points = [(hop, x) for hop in hops if (x := values(rows, model, hop, key))]
            if not points:
                continue
            means = np.array([np.mean(x) for _, x in points])
            low, high = (np.array([end(x) for _, x in points]) for end in (min, max))
            axes.errorbar(
                [hop for hop, _ in points], means, yerr=[means - low, high - means], marker="o", capsize=3, label=model
            )
        if frames := values(rows, FRAMES, None, key):
            axes.axhline(np.mean(frames), color="grey", linestyle=":", label=FRAMES)
        axes.set(title=MEASURES[key].title, xlabel="hop", xticks=hops)
    handles = {label: x for axes in panels for x, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    drawing.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5)
    with atomic_path(path) as beside:
        drawing.savefig(beside, dpi=120, format="png")
