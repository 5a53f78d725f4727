"""MFCC and log-mel features, one frame a hop, frame t centred on (t + 1/2) hops; self-supervised ones in `bundles`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hmm_speech.errors import UserError
from hmm_speech.units.audio import SAMPLE_RATE, AudioError

if TYPE_CHECKING:
    import torch

NUM_MELS = 40
NUM_CEPSTRA = 13
DELTA_WINDOW = 5  # frames
WINDOW_MS = 25
FLOOR = 1e-6  # added to mel energies (samples in -1 .. 1): above 16-bit rounding noise, below speech
_CHUNK = 8192  # frames a transform: bounds the memory that an hour-long file takes


@dataclass(frozen=True)
class Extractor:
    """Turns samples at 16 kHz into frames."""

    name: str
    """As the unit file and the quantizer keep it: free of paths."""
    hop_ms: float
    normalisation: str
    """`speaker`: mean and variance of each speaker; `none`."""
    compute: Callable[[torch.Tensor], torch.Tensor]
    """(n,) samples -> (n // hop, D) float32."""
    parallel: bool = True
    """Whether files are best computed in several threads at once."""

    @property
    def hop(self) -> int:
        """Samples a frame."""
        return round(self.hop_ms * SAMPLE_RATE / 1000)

    @property
    def frame_rate(self) -> float:
        """Frames a second."""
        return SAMPLE_RATE / self.hop

    def __call__(self, samples: torch.Tensor) -> np.ndarray:
        """Frames (T, D) float32 of one file; AudioError where it is shorter than one window."""
        import torch

        shortest = max(self.hop, WINDOW_MS * SAMPLE_RATE // 1000)
        if len(samples) < shortest:
            raise AudioError(
                f"too short: {1000 * len(samples) / SAMPLE_RATE:.1f} ms, expected at least "
                f"{1000 * shortest / SAMPLE_RATE:g} ms"
            )
        with torch.inference_mode():
            return self.compute(samples).numpy()


def check_hop(hop_ms: float) -> int:
    """The hop in samples at 16 kHz; UserError where it is not a whole number from 1 ms to 1 s."""
    hop = hop_ms * SAMPLE_RATE / 1000
    if not (16 <= hop <= SAMPLE_RATE) or abs(hop - round(hop)) > 1e-6:
        raise UserError(
            f"--hop-ms: got {hop_ms}, expected 1 to 1000 ms in steps of 0.0625 ms (one sample at 16 kHz), such as 20"
        )
    return round(hop)


@functools.cache
def _mel_transform(hop: int) -> tuple[int, torch.nn.Module]:
    from torchaudio.transforms import MelSpectrogram

    window = max(WINDOW_MS * SAMPLE_RATE // 1000, hop)  # a longer hop leaves no gaps
    size = 1 << (window - 1).bit_length()
    return size, MelSpectrogram(
        SAMPLE_RATE, n_fft=size, win_length=window, hop_length=hop, n_mels=NUM_MELS, center=False, power=2.0
    )


def log_mel(samples: torch.Tensor, hop: int) -> torch.Tensor:
    """Log mel energies (T, 40) of samples (n,), T = n // hop: Hann windows of 25 ms centred on (t + 1/2) hop."""
    import torch

    size, transform = _mel_transform(hop)
    count = len(samples) // hop
    # the transform's windows start at 0, hop, ...: this much silence in front centres the first on hop / 2
    padded = torch.nn.functional.pad(samples, (size // 2 - hop // 2, size))
    pieces = []
    for start in range(0, count, _CHUNK):
        stop = min(start + _CHUNK, count)
        mel = transform(padded[start * hop : (stop - 1) * hop + size])
        pieces.append(torch.log(mel + FLOOR).T)
    return torch.cat(pieces)


def mfcc(samples: torch.Tensor, hop: int) -> torch.Tensor:
    """Cepstra 0 .. 12 of the log mel energies with first and second differences, (T, 39)."""
    import torch
    from torchaudio.functional import compute_deltas, create_dct

    cepstra = (log_mel(samples, hop) @ create_dct(NUM_CEPSTRA, NUM_MELS, "ortho")).T
    first = compute_deltas(cepstra, DELTA_WINDOW)
    return torch.cat([cepstra, first, compute_deltas(first, DELTA_WINDOW)]).T.contiguous()


def make_extractor(features: str, hop_ms: float = 20.0) -> Extractor:
    """The extractor for `mfcc`, `logmel` or `BUNDLE:LAYER`; UserError for another name or a hop that cannot be."""
    hop = check_hop(hop_ms)
    if features in ("mfcc", "logmel"):
        function = mfcc if features == "mfcc" else log_mel
        return Extractor(features, float(hop_ms), "speaker", functools.partial(function, hop=hop))
    if ":" in features:
        from hmm_speech.units.bundles import make_bundle_extractor

        return make_bundle_extractor(features, hop_ms)
    raise UserError(
        f"--features: got {features!r}, expected mfcc, logmel, or BUNDLE:LAYER such as HUBERT_BASE:9 or checkpoint.pt:9"
    )


class SpeakerStatistics:
    """Mean and standard deviation of each speaker's frames, from sums in float64, a file at a time."""

    def __init__(self) -> None:
        self._sums: dict[str, list[np.ndarray | int]] = {}

    def add(self, speaker: str, frames: np.ndarray) -> None:
        """Count frames (T, D) in."""
        values = frames.astype(np.float64)
        entry = self._sums.setdefault(speaker, [0, np.zeros(values.shape[1]), np.zeros(values.shape[1])])
        entry[0] += len(values)
        entry[1] += values.sum(axis=0)
        entry[2] += (values**2).sum(axis=0)

    def normalise(self, speaker: str, frames: np.ndarray) -> np.ndarray:
        """Frames with the speaker's mean 0 and variance 1; a dimension that does not vary becomes 0."""
        count, total, squares = self._sums[speaker]
        mean = total / count
        deviation = np.sqrt(np.maximum(squares / count - mean**2, 0.0))
        scale = np.divide(1.0, deviation, out=np.zeros_like(deviation), where=deviation > 1e-5)
        return ((frames - mean) * scale).astype(np.float32)
