"""Honest numbers: n-gram baselines, phone metrics of discrete labels, reports and figures.

Nothing is imported until it is asked for, so that a command's ``--help`` does not wait for torchmetrics.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "NGram": "baselines",
    "ngram_baselines": "baselines",
    "BoundaryScores": "segmentation",
    "PhoneClustering": "clustering",
    "phone_inventory": "clustering",
    "LabelReport": "labels",
    "UniformReport": "labels",
    "joint_counts": "labels",
    "label_report": "labels",
    "uniform_report": "labels",
    "build_metrics": "report",
    "print_metrics": "report",
    "write_metrics": "report",
    "write_html": "html",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
