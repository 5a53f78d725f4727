import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmm_speech.errors import UserError
from hmm_speech.units.quantize import Quantizer, fit_centroids

SETTINGS = {"features": "mfcc", "hop_ms": "20", "normalisation": "speaker", "seed": "0"}


def blobs(count, seed=0):
    rng = np.random.default_rng(seed)
    centres = np.array([[0, 0], [10, 0], [0, 10], [10, 10]], np.float32)
    return centres, (centres[rng.integers(0, 4, count)] + rng.normal(0, 0.5, (count, 2))).astype(np.float32)


@given(st.integers(0, 1000), st.integers(1, 30), st.integers(1, 5), st.integers(2, 9))
def test_assigns_the_nearest(seed, count, width, clusters):
    rng = np.random.default_rng(seed)
    frames = rng.normal(size=(count, width)).astype(np.float32)
    centroids = rng.normal(size=(clusters, width)).astype(np.float32)
    units = Quantizer(centroids, SETTINGS).assign(frames)
    distances = ((frames[:, None].astype(np.float64) - centroids[None]) ** 2).sum(-1)
    assert units.dtype == np.int32
    np.testing.assert_allclose(distances[np.arange(count), units], distances.min(1), atol=1e-5)


def test_no_frames_no_units_and_many_frames_in_blocks(monkeypatch):
    quantizer = Quantizer(blobs(1)[0], SETTINGS)
    assert quantizer.assign(np.zeros((0, 2), np.float32)).shape == (0,)
    frames = blobs(100)[1]
    whole = quantizer.assign(frames)
    monkeypatch.setattr("hmm_speech.units.quantize._BATCH", 7)
    np.testing.assert_array_equal(quantizer.assign(frames), whole)


def in_order(centroids):
    return centroids[np.lexsort(centroids.round().T)]


def test_finds_the_blobs_and_sees_the_stream():
    centres, frames = blobs(20000)
    seen = []
    got = fit_centroids(frames[:400], lambda: np.array_split(frames, 50), 4, 0, seen.append)
    np.testing.assert_allclose(in_order(got), centres, atol=0.03)
    assert seen[-1] == len(frames)
    # the sample alone would put them some .05 away
    alone = fit_centroids(frames[:400], lambda: [], 4, 0)
    distance = [np.abs(in_order(centroids) - centres).mean() for centroids in (got, alone)]
    assert distance[0] < distance[1]


def test_same_seed_same_bits_and_another_seed_another_result():
    _, frames = blobs(3000)

    def fit(seed):
        return fit_centroids(frames, lambda: np.array_split(frames, 9), 12, seed)

    np.testing.assert_array_equal(fit(0), fit(0))
    assert not np.array_equal(fit(0), fit(1))


def test_fewer_frames_than_clusters_are_refused():
    with pytest.raises(UserError, match="--clusters: got 5, but the train split has 4 frames"):
        fit_centroids(np.zeros((4, 2), np.float32), lambda: [], 5, 0)


def test_frames_that_are_all_the_same_do_not_fail():
    frames = np.ones((50, 2), np.float32)
    centroids = fit_centroids(frames, lambda: [frames], 3, 0)
    assert np.isfinite(centroids).all()


def test_saved_and_loaded_is_the_same_and_the_bytes_too(tmp_path):
    quantizer = Quantizer(blobs(1)[0], SETTINGS)
    for name in ("a.npz", "b.npz"):
        quantizer.save(tmp_path / name)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    loaded = Quantizer.load(tmp_path / "a.npz")
    np.testing.assert_array_equal(loaded.centroids, quantizer.centroids)
    assert loaded.settings == SETTINGS
    assert loaded.fingerprint == quantizer.fingerprint
    assert Quantizer(quantizer.centroids + 1, SETTINGS).fingerprint != quantizer.fingerprint
    assert Quantizer(quantizer.centroids, SETTINGS | {"hop_ms": "10"}).fingerprint != quantizer.fingerprint


@pytest.mark.parametrize("content", ["text", "arrays", "pickle", "nothing", "nan", "cut"])
def test_what_is_no_quantizer_is_refused(tmp_path, content):
    path = tmp_path / "q.npz"
    if content == "text":
        path.write_text("hello")
    elif content == "arrays":
        np.savez(path, x=np.zeros(3))
    elif content == "pickle":
        np.savez(path, centroids=np.array([{}], dtype=object), settings=np.array("{}"))
    elif content == "nan":
        Quantizer(np.full((2, 2), np.nan, np.float32), SETTINGS).save(path)
    elif content == "cut":
        Quantizer(np.zeros((2, 2), np.float32), SETTINGS).save(path)
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r"q\.npz.*quantizer"):
        Quantizer.load(path)
