"""k-means over frames: fitted in a stream, saved as plain arrays."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hmm_speech.data.unitfile import atomic_path
from hmm_speech.errors import UserError

SAMPLE = 100_000  # frames that Lloyd's iterations run on: half an hour of speech
_BATCH = 10_000  # frames a mini-batch, and a block of distances


@dataclass
class Quantizer:
    """Centroids, and the features that they were fitted on."""

    centroids: np.ndarray
    """(K, D) float32."""
    settings: dict[str, str] = field(default_factory=dict)
    """features, hop_ms, normalisation, seed."""

    def __post_init__(self) -> None:
        self._half_norms = 0.5 * (self.centroids.astype(np.float64) ** 2).sum(axis=1).astype(np.float32)

    @property
    def fingerprint(self) -> str:
        """16 hex digits that two quantizers share only where they give the same units."""
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode())
        digest.update(np.ascontiguousarray(self.centroids).tobytes())
        return digest.hexdigest()[:16]

    def assign(self, frames: np.ndarray) -> np.ndarray:
        """The nearest centroid of each frame: (T, D) -> (T,) int32. The first of equally near ones."""
        units = [
            np.argmax(frames[start : start + _BATCH] @ self.centroids.T - self._half_norms, axis=1)
            for start in range(0, len(frames), _BATCH)
        ]
        return np.concatenate(units).astype(np.int32) if units else np.zeros(0, np.int32)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an npz of plain arrays; the same quantizer gives the same bytes."""
        settings = np.array(json.dumps(self.settings, sort_keys=True))
        with atomic_path(path) as beside, open(beside, "wb") as out:
            np.savez(out, centroids=self.centroids, settings=settings)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Quantizer:
        """Read what `save` wrote; UserError where the file is missing or is something else."""
        try:
            with np.load(Path(path), allow_pickle=False) as arrays:
                centroids = np.asarray(arrays["centroids"], dtype=np.float32)
                settings = json.loads(str(arrays["settings"]))
            if centroids.ndim != 2 or not np.isfinite(centroids).all() or not {"features", "hop_ms"} <= set(settings):
                raise ValueError("its arrays are not a quantizer's")
        except (OSError, KeyError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(
                f"{path}: cannot be read as a quantizer ({error}); expected an .npz that `hmm-speech units` wrote"
            ) from None
        return cls(centroids, settings)


def fit_centroids(
    sample: np.ndarray,
    batches: Callable[[], Iterable[np.ndarray]],
    clusters: int,
    seed: int,
    progress: Callable[[int], None] = lambda frames: None,
) -> np.ndarray:
    """k-means centroids (K, D) float32 of frames too many to hold.

    Lloyd's algorithm from a k-means++ start converges on `sample` (S, D), a uniform sample of the frames. Its result
    starts a mini-batch k-means (Sculley 2010), whose counts begin at the sample's, and which sees every frame of
    `batches()` once. `progress` is told how many frames it has seen. One thread throughout: sums in one order make the
    result the same on every run.

    Raises UserError where there are fewer frames than clusters.
    """
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    if len(sample) < clusters:
        raise UserError(
            f"--clusters: got {clusters}, but the train split has {len(sample)} frames; give fewer clusters or "
            "more audio"
        )
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct frames than clusters: some stay unused
        start = KMeans(clusters, init="k-means++", n_init=1, max_iter=50, random_state=seed).fit(sample)
        model = MiniBatchKMeans(
            clusters, init=start.cluster_centers_, n_init=1, reassignment_ratio=0, random_state=seed
        )
        model.partial_fit(sample)
        seen = 0
        pending: list[np.ndarray] = []
        for frames in batches():
            pending.append(frames)
            if sum(map(len, pending)) >= _BATCH:
                model.partial_fit(np.concatenate(pending))
                pending = []
            seen += len(frames)
            progress(seen)
        if pending:
            model.partial_fit(np.concatenate(pending))
    return np.ascontiguousarray(model.cluster_centers_, dtype=np.float32)
