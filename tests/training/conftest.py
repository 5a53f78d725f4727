"""Runs of train.py inside the test process, on synthetic data and small networks."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests import runs


@pytest.fixture
def train() -> Callable[..., None]:
    """Run train.py with overrides in a run folder."""

    def run(folder: Path, *overrides: str, networks: bool = True) -> None:
        runs.train(folder, *runs.SMALL, *(runs.NETWORKS if networks else ()), *overrides)

    return run
