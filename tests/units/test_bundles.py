import numpy as np
import pytest
import torch
import torchaudio

from hmm_speech.errors import UserError
from hmm_speech.units.bundles import infer_config
from hmm_speech.units.features import make_extractor


def noise(count):
    return 0.1 * torch.randn(count, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("mode", ["group_norm", "layer_norm"])
@pytest.mark.parametrize("form", ["state dict", "with config"])
def test_a_local_checkpoint_gives_that_layer(tmp_path, small_model, mode, form):
    config, model = small_model(mode)
    state = model.state_dict()
    torch.save(state if form == "state dict" else {"state_dict": state, "config": config}, tmp_path / "m.pt")
    extractor = make_extractor(f"{tmp_path / 'm.pt'}:2")
    samples = noise(16001)
    frames = extractor(samples)
    assert frames.shape == (50, 64)
    if mode == "layer_norm":
        samples = torch.nn.functional.layer_norm(samples, samples.shape)
    with torch.inference_mode():
        layers, _ = model.extract_features(torch.nn.functional.pad(samples, (40, 40))[None])
    np.testing.assert_allclose(frames, layers[1][0].numpy(), atol=1e-5)
    assert str(tmp_path) not in extractor.name
    assert extractor.name.startswith("checkpoint ")
    assert extractor.normalisation == "none"


@pytest.mark.parametrize("count", [400, 640, 3199, 3200])
def test_one_frame_a_hop(tmp_path, small_model, count):
    torch.save(small_model()[1].state_dict(), tmp_path / "m.pt")
    assert len(make_extractor(f"{tmp_path / 'm.pt'}:1")(noise(count))) == count // 320


@pytest.mark.parametrize(
    "name", ["hubert_base", "hubert_large", "hubert_xlarge", "wav2vec2_base", "wav2vec2_large_lv60k"]
)
def test_the_sizes_of_the_published_models_are_found(name):
    with torch.device("meta"):
        model = getattr(torchaudio.models, name)()
    config = infer_config(model.state_dict())
    with torch.device("meta"):
        again = torchaudio.models.wav2vec2_model(**config)
    again.load_state_dict(model.state_dict())
    heads = model.encoder.transformer.layers[0].attention.num_heads
    assert config["encoder_num_heads"] == heads
    assert config["encoder_layer_norm_first"] == model.encoder.transformer.layers[0].layer_norm_first


@pytest.mark.parametrize(
    ("features", "words"),
    [
        ("HUBERT_BASE:zero", "layer from 1"),
        ("HUBERT_BASE:0", "layer from 1"),
        ("HUBERT_TINY:3", "neither a file nor a pipeline.*HUBERT_BASE"),
        ("TACOTRON2_WAVERNN_CHAR_LJSPEECH:3", "neither a file nor a pipeline"),
    ],
)
def test_names_that_cannot_be_are_refused(features, words):
    with pytest.raises(UserError, match=words):
        make_extractor(features)


def test_another_hop_and_a_layer_too_many_are_refused(tmp_path, small_model):
    torch.save(small_model()[1].state_dict(), tmp_path / "m.pt")
    with pytest.raises(UserError, match="--hop-ms: got 10"):
        make_extractor(f"{tmp_path / 'm.pt'}:1", 10)
    with pytest.raises(UserError, match=r"layer 4, but .* has 3"):
        make_extractor(f"{tmp_path / 'm.pt'}:4")


@pytest.mark.parametrize("content", ["text", "other tensors", "list", "object"])
def test_checkpoints_of_something_else_are_refused(tmp_path, content):
    path = tmp_path / "m.pt"
    if content == "text":
        path.write_text("hello")
    else:
        torch.save({"other tensors": {"w": torch.zeros(2)}, "list": [1], "object": object()}[content], path)
    with pytest.raises(UserError, match=r"m\.pt"):
        make_extractor(f"{path}:1")


def test_a_download_that_fails_says_what_to_do(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    monkeypatch.setattr(torchaudio._internal, "load_state_dict_from_url", fail)
    monkeypatch.setattr(type(torchaudio.pipelines.HUBERT_BASE), "get_model", fail)
    with pytest.raises(UserError, match=r"HUBERT_BASE could not be downloaded \(no route to host\).*FILE:LAYER"):
        make_extractor("HUBERT_BASE:9")
