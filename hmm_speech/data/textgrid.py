"""Praat TextGrids, the long text form that every reader opens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from hmm_speech.data.unitfile import Phone, atomic_path


def _filled(phones: Sequence[Phone], end: float) -> list[Phone]:
    """Intervals from 0 to `end` without gaps, as Praat wants them: what is not labelled gets the empty label."""
    filled: list[Phone] = []
    at = 0.0
    for phone in phones:
        if phone.end <= phone.start:
            continue
        if phone.start > at:
            filled.append(Phone("", at, phone.start))
        filled.append(phone)
        at = phone.end
    if at < end or not filled:
        filled.append(Phone("", at, end))
    return filled


def write_textgrid(path: Path, tiers: Mapping[str, Sequence[Phone]], end: float) -> None:
    """Write interval tiers, each a list of labels with their times in ascending order, from 0 to `end` seconds."""
    lines = ['File type = "ooTextFile"', 'Object class = "TextGrid"', "", "xmin = 0", f"xmax = {end:.7g}"]
    lines += ["tiers? <exists>", f"size = {len(tiers)}", "item []:"]
    for k, (name, phones) in enumerate(tiers.items(), start=1):
        intervals = _filled(phones, end)
        lines += [f"    item [{k}]:", '        class = "IntervalTier"', f'        name = "{name}"']
        lines += ["        xmin = 0", f"        xmax = {end:.7g}", f"        intervals: size = {len(intervals)}"]
        for n, (label, start, stop) in enumerate(intervals, start=1):
            text = label.replace('"', '""')
            lines += [f"        intervals [{n}]:", f"            xmin = {start:.7g}", f"            xmax = {stop:.7g}"]
            lines += [f'            text = "{text}"']
    with atomic_path(path) as beside:
        beside.write_text("\n".join(lines) + "\n", encoding="utf-8")
