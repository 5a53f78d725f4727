import numpy as np
import pytest
import soundfile
import torch
import torchaudio

CONVOLUTIONS = [(16, 10, 5)] + [(16, 3, 2)] * 4 + [(16, 2, 2)] * 2


def small_config(mode="group_norm"):
    return {
        "extractor_mode": mode,
        "extractor_conv_layer_config": CONVOLUTIONS,
        "extractor_conv_bias": mode == "layer_norm",
        "encoder_embed_dim": 64,
        "encoder_projection_dropout": 0.0,
        "encoder_pos_conv_kernel": 16,
        "encoder_pos_conv_groups": 4,
        "encoder_num_layers": 3,
        "encoder_num_heads": 1,
        "encoder_attention_dropout": 0.0,
        "encoder_ff_interm_features": 32,
        "encoder_ff_interm_dropout": 0.0,
        "encoder_dropout": 0.0,
        "encoder_layer_norm_first": mode == "layer_norm",
        "encoder_layer_drop": 0.0,
        "aux_num_out": None,
    }


@pytest.fixture
def small_model():
    """The arguments of, and, a wav2vec 2.0 with three narrow layers and random weights."""

    def make(mode="group_norm"):
        torch.manual_seed(0)
        config = small_config(mode)
        return config, torchaudio.models.wav2vec2_model(**config).eval()

    return make


def tone(seconds, seed=0, rate=16000):
    """A sequence of noisy tones, a new one every 0.1 s, so that there is something to cluster."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * rate)) / rate
    pitch = rng.choice([200, 400, 800, 1600, 3000], size=int(seconds * 10) + 1)[(time * 10).astype(int)]
    return (0.3 * np.sin(2 * np.pi * np.cumsum(pitch) / rate) + 0.01 * rng.standard_normal(len(time))).astype(
        np.float32
    )


@pytest.fixture
def write_tone():
    def write(path, seconds=1.0, seed=0, rate=16000, channels=1):
        path.parent.mkdir(parents=True, exist_ok=True)
        samples = tone(seconds, seed, rate)
        soundfile.write(path, np.stack([samples] * channels, axis=1) if channels > 1 else samples, rate)
        return path

    return write


@pytest.fixture
def corpus(tmp_path, write_tone):
    """Twelve seconds of two speakers: audio/, meta.tsv and align.tsv."""
    meta, align = ["utt\tspeaker\tsplit"], ["utt\tstart\tend\tphone"]
    for n in range(12):
        write_tone(tmp_path / "audio" / f"s{n % 2}" / f"utt{n:02d}.wav", seed=n)
        meta.append(f"utt{n:02d}\ts{n % 2}\t{'test' if n >= 10 else 'train'}")
        align += [f"utt{n:02d}\t0.0\t0.5\tah", f"utt{n:02d}\t0.5\t1.0\tsh"]
    (tmp_path / "meta.tsv").write_text("\n".join(meta) + "\n")
    (tmp_path / "align.tsv").write_text("\n".join(align) + "\n")
    return tmp_path
