import numpy as np
import pytest
import torch

from hmm_speech.errors import UserError
from hmm_speech.units.audio import AudioError
from hmm_speech.units.features import FLOOR, SpeakerStatistics, log_mel, make_extractor


def noise(count, seed=0):
    return 0.1 * torch.randn(count, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("features", "width"), [("mfcc", 39), ("logmel", 40)])
@pytest.mark.parametrize("hop_ms", [10, 12.5, 20, 40])
def test_one_frame_a_hop(features, width, hop_ms):
    extractor = make_extractor(features, hop_ms)
    assert extractor.frame_rate == 1000 / hop_ms
    for count in (641, 3200, 16001):
        frames = extractor(noise(count))
        assert frames.shape == (count // extractor.hop, width)
        assert frames.dtype == np.float32
        assert np.isfinite(frames).all()


def test_frame_t_is_centred_on_its_hop():
    samples = torch.zeros(16000)
    samples[320 * 20 + 160] = 1.0  # an impulse in the middle of frame 20
    energy = log_mel(samples, 320).exp().sum(dim=1).tolist()
    assert max(range(50), key=energy.__getitem__) == 20
    assert energy[19] == pytest.approx(energy[21], rel=1e-3)
    assert energy[10] == pytest.approx(40 * FLOOR, rel=1e-3)


def test_log_mel_is_the_log_of_filtered_power():
    samples = noise(16000)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    start = 320 * 7 + 160 - 256
    frame = samples.numpy()[start : start + 512].astype(np.float64)
    power = np.abs(np.fft.rfft(frame * np.pad(hann, 56))) ** 2
    from torchaudio.functional import melscale_fbanks

    bank = melscale_fbanks(257, 0.0, 8000.0, 40, 16000).double().numpy()
    np.testing.assert_allclose(log_mel(samples, 320)[7].numpy(), np.log(power @ bank + FLOOR), rtol=1e-4)


def test_a_long_file_is_the_same_in_pieces(monkeypatch):
    samples = noise(16000 * 3)
    whole = log_mel(samples, 320)
    monkeypatch.setattr("hmm_speech.units.features._CHUNK", 37)
    torch.testing.assert_close(log_mel(samples, 320), whole, rtol=1e-5, atol=1e-5)


def test_digital_silence_is_finite():
    assert np.isfinite(make_extractor("mfcc")(torch.zeros(8000))).all()


@pytest.mark.parametrize(("features", "hop_ms"), [("mfcc", 0), ("mfcc", 20.01), ("mfcc", -20), ("logmel", 5000)])
def test_a_hop_that_cannot_be_is_refused(features, hop_ms):
    with pytest.raises(UserError, match=f"--hop-ms: got {hop_ms}"):
        make_extractor(features, hop_ms)


def test_other_names_are_refused():
    with pytest.raises(UserError, match="'plp', expected mfcc, logmel"):
        make_extractor("plp")


def test_too_short_says_how_short():
    assert len(make_extractor("mfcc")(noise(400))) == 1
    with pytest.raises(AudioError, match=r"too short: 24\.9 ms, expected at least 25 ms"):
        make_extractor("mfcc")(noise(399))


def test_speaker_statistics_are_those_of_all_frames_at_once():
    rng = np.random.default_rng(0)
    pieces = {name: [rng.normal(3, 5, (n, 4)).astype(np.float32) for n in (10, 1, 30)] for name in ("a", "b")}
    statistics = SpeakerStatistics()
    for n in range(3):
        for name, arrays in pieces.items():
            statistics.add(name, arrays[n])
    for name, arrays in pieces.items():
        everything = np.concatenate(arrays).astype(np.float64)
        got = np.concatenate([statistics.normalise(name, array) for array in arrays])
        np.testing.assert_allclose(got, (everything - everything.mean(0)) / everything.std(0), rtol=1e-4, atol=1e-5)


def test_what_does_not_vary_becomes_zero():
    statistics = SpeakerStatistics()
    statistics.add("a", np.full((3, 2), 7.0, np.float32))
    assert (statistics.normalise("a", np.full((3, 2), 7.0, np.float32)) == 0).all()
