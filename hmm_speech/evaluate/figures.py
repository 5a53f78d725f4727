"""Figures of a trained model, as PNG files.

Drawn with matplotlib's Figure objects, never with pyplot: no window, no global state, and no backend to choose.
"""

import csv
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hmm_speech.data.unitfile import atomic_path
from hmm_speech.errors import UserError
from hmm_speech.evaluate.phoneset import phone_class, sort_phones
from hmm_speech.evaluate.sequences import PhoneSegments, as_labels, check_frame_rate, phone_times_us

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PathLike = str | os.PathLike[str]
UNUSED = "unused"  # stands for the phone of a label that no frame has
CLASS_COLOURS = {
    "silence": "#d9d9d9",
    "vowel": "#fdc086",
    "approximant": "#ffe79a",
    "nasal": "#cbb8dd",
    "fricative": "#a9cfe8",
    "affricate": "#8fd3c7",
    "stop": "#a8d99c",
    "other": "#eeeeee",
}
FLOOR = 1e-4  # probabilities below this look alike


def label_phones(joint_LP: np.ndarray, phones: Sequence[str]) -> list[str]:
    """Each label's most frequent phone by the counts of frames, (L, P); ``"unused"`` for a label without frames."""
    joint_LP = np.asarray(joint_LP)
    return [phones[int(row.argmax())] if row.sum() else UNUSED for row in joint_LP]


def label_transitions(log_transition: Any, labels: Sequence[int]) -> np.ndarray:
    """Log transition probabilities between labels, of a chain whose states share labels; float64 (L, L).

    With pi the stationary distribution of the states, and I(a) the states of label a:

        p(b | a) = sum_{i in I(a)} pi_i sum_{j in I(b)} p(j | i) / sum_{i in I(a)} pi_i.

    Args:
        log_transition: natural-log probabilities, (N, N).
        labels: the label of each state, (N,).
    """
    p_NN = np.exp(_matrix(log_transition, "log_transition"))
    label_N = as_labels(labels, "labels")
    if len(label_N) != len(p_NN):
        raise UserError(f"labels: {len(label_N)} labels for {len(p_NN)} states; expected one for each state")
    stationary_N = np.full(len(p_NN), 1 / len(p_NN))
    for _ in range(1000):  # lazy steps, x (P + I) / 2, converge for periodic chains too
        step_N = 0.5 * (stationary_N @ p_NN + stationary_N)
        step_N /= step_N.sum()
        done = np.abs(step_N - stationary_N).sum() < 1e-9
        stationary_N = step_N
        if done:
            break
    member_NL = np.eye(label_N.max() + 1)[label_N]
    flow_LL = member_NL.T @ (stationary_N[:, None] * p_NN) @ member_NL
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(np.nan_to_num(flow_LL / flow_LL.sum(axis=1, keepdims=True)))


def transition_matrix(
    log_transition: Any, path: PathLike, *, names: Sequence[str] | None = None, title: str = "Transitions"
) -> None:
    """Draw transition probabilities between states, or between labels (:func:`label_transitions`).

    Args:
        log_transition: natural-log probabilities, (N, N), -inf where forbidden; a numpy array or a torch tensor.
        path: the PNG file.
        names: each state's phone (:func:`label_phones`); rows and columns are then sorted by phone, phones by class.
        title: heading of the figure.
    """
    from matplotlib.colors import LogNorm

    p_NN = np.exp(_matrix(log_transition, "log_transition"))
    figure = _figure(8.4, 7.2)
    axes = figure.add_subplot()
    what = "state"
    if names is not None:
        if len(names) != len(p_NN):
            raise UserError(f"names: {len(names)} names for {len(p_NN)} states; expected one for each state")
        rank = {phone: index for index, phone in enumerate(sort_phones(set(names)))}
        order = sorted(range(len(names)), key=lambda state: (rank[names[state]], state))
        p_NN = p_NN[np.ix_(order, order)]
        _group_ticks(axes, [names[state] for state in order])
        what = "state, by its phone"
    image = axes.imshow(np.maximum(p_NN, FLOOR), norm=LogNorm(FLOOR, 1), cmap="magma_r", interpolation="nearest")
    axes.set(xlabel=f"to {what}", ylabel=f"from {what}", title=f"{title} ({len(p_NN)} x {len(p_NN)})")
    bar = figure.colorbar(image, ax=axes, extend="min", shrink=0.9, label="probability a frame")
    bar.outline.set_linewidth(0.5)
    _save(figure, path)


def states_against_phones(
    joint_LP: Any, phones: Sequence[str], path: PathLike, *, title: str = "States against phones"
) -> None:
    """Draw p(phone | label): labels sorted by their most frequent phone, phones by class, so that it shows a diagonal.

    Args:
        joint_LP: counts of frames by label and phone, (L, P), as :func:`~hmm_speech.evaluate.labels.joint_counts`.
        phones: the P phones.
        path: the PNG file.
        title: heading of the figure.

    Raises:
        UserError: no counts at all.
    """
    joint_LP = _matrix(joint_LP, "joint_LP", square=False)
    if joint_LP.shape[1] != len(phones):
        raise UserError(f"phones: {len(phones)} phones, but joint_LP has {joint_LP.shape[1]} columns")
    rows = sort_phones(phones)
    counts_LP = joint_LP[:, [list(phones).index(phone) for phone in rows]]
    used = np.flatnonzero(counts_LP.sum(axis=1))
    if not len(used):
        raise UserError(
            "joint_LP: all counts are 0, so there is nothing to draw; only call this where phones are known"
        )
    p_LP = counts_LP[used] / counts_LP[used].sum(axis=1, keepdims=True)
    order = np.lexsort((-p_LP.max(axis=1), p_LP.argmax(axis=1)))
    figure = _figure(float(np.clip(3 + 0.07 * len(used), 7, 16)), max(3.5, 1.4 + 0.15 * len(rows)))
    axes = figure.add_subplot()
    image = axes.imshow(p_LP[order].T, aspect="auto", vmin=0, vmax=1, cmap="magma_r", interpolation="nearest")
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    for index, (above, below) in enumerate(pairwise(rows)):
        if phone_class(above) != phone_class(below):
            axes.axhline(index + 0.5, color="0.45", linewidth=0.6)
    unused = len(joint_LP) - len(used)
    note = f" ({unused} of {len(joint_LP)} never used)" if unused else ""
    axes.set(xlabel=f"label, sorted by its most frequent phone{note}", ylabel="phone", title=title)
    axes.set_xticks([])
    figure.colorbar(image, ax=axes, label="p(phone | label)", pad=0.015).outline.set_linewidth(0.5)
    _save(figure, path)


def utterance(
    states: Any,
    units: Any,
    phones: PhoneSegments | None,
    frame_rate: float,
    path: PathLike,
    *,
    names: Sequence[str] | None = None,
    max_seconds: float = 4.0,
    title: str = "One utterance",
) -> None:
    """Draw an utterance's states and units over its phones, whose boundaries run through all rows.

    Args:
        states, units: a label for each frame, (T,); ``None`` leaves the row out (units of an emission over frames).
        phones: (label, start, end) in seconds, or None where unknown.
        frame_rate: in Hz.
        path: the PNG file.
        names: each state's phone (:func:`label_phones`): states are then coloured by its class, and named by it.
        max_seconds: how much of a long utterance to show.
        title: heading of the figure, such as the utterance's id.
    """
    tracks = [(name, as_labels(row, name)) for name, row in (("states", states), ("units", units)) if row is not None]
    period = 1 / check_frame_rate(frame_rate)
    length = max([len(row) * period for _, row in tracks] + [end for _, _, end in phones or ()], default=0.0)
    shown = min(length, max_seconds) or period
    rows = len(tracks) + bool(phones)
    figure = _figure(float(np.clip(4.4 * shown, 7, 18)), 0.9 + 0.75 * max(rows, 1))
    all_axes = figure.subplots(max(rows, 1), 1, sharex=True, squeeze=False, gridspec_kw={"hspace": 0.08})[:, 0]
    for axes, (name, row) in zip(all_axes, tracks, strict=False):
        for start, stop in _segments(row):
            label = int(row[start])
            phone = names[label] if names is not None and name == "states" and label < len(names) else None
            colour = CLASS_COLOURS[phone_class(phone)] if phone else _pastel(label)
            text = f"{label}\n{phone}" if phone else str(label)
            _bar(axes, start * period, min(stop * period, shown), text, colour, shown)
        axes.set_ylabel(name, rotation=0, ha="right", va="center")
    if phones:
        starts_us, ends_us = phone_times_us(phones)
        for (label, _, _), start, end in zip(phones, starts_us / 1e6, ends_us / 1e6, strict=True):
            _bar(all_axes[-1], start, min(end, shown), label, CLASS_COLOURS[phone_class(label)], shown)
        for axes in all_axes[:-1]:
            for start in starts_us[1:] / 1e6:
                axes.axvline(start, color="#c00000", linewidth=0.8, alpha=0.8)
        all_axes[-1].set_ylabel("phones", rotation=0, ha="right", va="center")
    for axes in all_axes:
        axes.set(xlim=(0, shown), ylim=(0, 1), yticks=[])
        axes.tick_params(bottom=axes is all_axes[-1])
        axes.spines[:].set_visible(False)
    all_axes[-1].set_xlabel("time (s)")
    cut = f" (first {shown:g} of {length:.1f} s)" if length > shown else ""
    all_axes[0].set_title(title + cut)
    _save(figure, path)


def learning_curve(
    history: PathLike | Iterable[Mapping[str, Any]],
    path: PathLike,
    *,
    baselines: Mapping[str, float | None] | None = None,
    train: str = "train/bits_per_frame",
    valid: str = "valid/bits_per_frame",
    title: str = "Learning curve",
) -> None:
    """Draw bits per frame on train and valid by epoch, with the n-gram baselines as lines.

    Args:
        history: a CSV file such as Lightning's CSVLogger writes, or rows as mappings: ``epoch`` and the two below,
            where empty, missing and NaN cells are passed over. Several rows of an epoch are averaged.
        path: the PNG file.
        baselines: bits per frame by name; these are of the test split, the curves are not.
        train, valid: names of the columns; a column that is absent is left out.
        title: heading of the figure.

    Raises:
        UserError: neither column holds a number, or a row with a number lacks its epoch.
    """
    rows = _read_csv(history) if isinstance(history, str | os.PathLike) else list(history)
    curves = {name: _curve(rows, column) for name, column in (("train", train), ("valid", valid))}
    if not any(curves.values()):
        held = sorted({key for row in rows for key in row if key})
        raise UserError(f"history: no numbers under {train!r} or {valid!r}; it holds the columns {held}")
    from matplotlib.ticker import MaxNLocator

    figure = _figure(7.2, 4.4)
    axes = figure.add_subplot()
    for (name, curve), colour in zip(curves.items(), ("#7f7f7f", "#0b5fa5"), strict=True):
        if curve:
            axes.plot(list(curve), list(curve.values()), marker="o", markersize=3, color=colour, label=name)
    values = [value for curve in curves.values() for value in curve.values()]
    lines = {name: bits for name, bits in (baselines or {}).items() if bits is not None}
    inside = [bits for bits in lines.values() if bits <= max(values)]
    low, high = min([*values, *inside]), max(values)
    axes.set_ylim(low - 0.06 * (high - low or 1), high + 0.06 * (high - low or 1))
    for name, bits in lines.items():
        if axes.get_ylim()[0] <= bits <= axes.get_ylim()[1]:
            axes.axhline(bits, color="#c00000", linewidth=0.9, linestyle="--")
            label = f" {name}, test {bits:.3f}"
            axes.annotate(
                label, (1, bits), xycoords=axes.get_yaxis_transform(), va="center", color="#c00000", fontsize=9
            )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="epoch", ylabel="bits per frame", title=title)
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    _save(figure, path)


def _read_csv(path: PathLike) -> list[dict[str, str]]:
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except OSError as error:
        raise UserError(
            f"history: {path} cannot be read ({error.strerror}); train with logger=csv to have it"
        ) from error


def _curve(rows: list[Any], column: str) -> dict[float, float]:
    """Epoch -> mean value of the column, in order of epochs."""
    values: dict[float, list[float]] = {}
    for row in rows:
        cell = row.get(column)
        if cell in (None, "") or not np.isfinite(float(cell)):
            continue
        if row.get("epoch") in (None, ""):
            raise UserError(f"history: a row has {column} = {cell}, but no epoch; log both")
        values.setdefault(float(row["epoch"]), []).append(float(cell))
    return {epoch: float(np.mean(values[epoch])) for epoch in sorted(values)}


def _matrix(values: Any, name: str, square: bool = True) -> np.ndarray:
    values = values.detach().cpu().double().numpy() if hasattr(values, "detach") else np.asarray(values, np.float64)
    if values.ndim != 2 or (square and values.shape[0] != values.shape[1]):
        raise UserError(f"{name}: expected a {'square ' if square else ''}matrix, but its shape is {values.shape}")
    return values


def _segments(row: np.ndarray) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(row)) + 1
    return list(zip([0, *edges.tolist()], [*edges.tolist(), len(row)], strict=True)) if len(row) else []


def _pastel(label: int) -> tuple[float, float, float]:
    """A light colour; neighbouring numbers get hues far apart (steps of the golden ratio)."""
    from colorsys import hls_to_rgb

    return hls_to_rgb(label * 0.6180339887 % 1, 0.82, 0.55)


def _bar(axes: "Axes", start: float, end: float, text: str, colour: Any, shown: float) -> None:
    if start >= end:
        return
    axes.add_patch(_rectangle(start, end - start, colour))
    inches = axes.figure.get_size_inches()[0] * 0.9 / shown * (end - start)
    across = 0.03 + 0.07 * max(map(len, text.split("\n")))
    along = 0.13 * len(text.split("\n"))
    if inches < min(across, along):  # no room for the text, upright or turned
        return
    axes.text(
        (start + end) / 2,
        0.5,
        text,
        ha="center",
        va="center" if inches < across or "\n" in text else "center_baseline",
        rotation=90 if inches < across else 0,
        fontsize=7.5,
        linespacing=1.2,
    )


def _rectangle(start: float, width: float, colour: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((start, 0), width, 1, facecolor=colour, edgecolor="white", linewidth=0.7)


def _group_ticks(axes: "Axes", names: list[str]) -> None:
    """One tick for each run of equal names, at its middle, and thin lines between classes of phones."""
    runs = _segments(np.unique(names, return_inverse=True)[1])
    middles = [(start + stop - 1) / 2 for start, stop in runs]
    texts = [names[start] for start, _ in runs]
    axes.set_xticks(middles, texts, rotation=90, fontsize=7)
    axes.set_yticks(middles, texts, fontsize=7)
    axes.tick_params(length=2)
    for start, _ in runs[1:]:
        if phone_class(names[start - 1]) != phone_class(names[start]):
            for line in (axes.axhline, axes.axvline):
                line(start - 0.5, color="0.6", linewidth=0.5)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=130, layout="constrained")


def _save(figure: "Figure", path: PathLike) -> None:
    with atomic_path(path) as beside:
        figure.savefig(beside, format="png", facecolor="white")
