"""Features from a layer of a self-supervised model: torchaudio's pipelines, or a local checkpoint of such a model."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hmm_speech.errors import UserError
from hmm_speech.units.audio import SAMPLE_RATE

if TYPE_CHECKING:
    import torch

    from hmm_speech.units.features import Extractor

_STRIDES = (5, 2, 2, 2, 2, 2, 2)  # of wav2vec 2.0, HuBERT and WavLM: 320 samples, 20 ms, seen through 400
_HOP, _SEEN = 320, 400


def make_bundle_extractor(features: str, hop_ms: float) -> Extractor:
    """The extractor for `NAME:LAYER`, NAME a pipeline of `torchaudio.pipelines`, or `FILE:LAYER`.

    FILE is what `torch.save` wrote: the state dict of a `torchaudio.models.wav2vec2_model`, or a dictionary with
    `state_dict` and `config`, the arguments of that function. Without `config` the sizes are taken from the tensors'
    shapes, with 64 numbers an attention head. Layers count from 1. A frame comes every 20 ms; a file of n samples has
    n // 320, the centre of frame t at (t + 1/2) 320. Frames are not normalised by speaker.
    """
    name, _, number = features.rpartition(":")
    if not number.isdigit() or int(number) < 1:
        raise UserError(
            f"--features: got {features!r}, expected BUNDLE:LAYER with a layer from 1, such as HUBERT_BASE:9"
        )
    layer = int(number)
    if hop_ms * SAMPLE_RATE / 1000 != _HOP:
        raise UserError(f"--hop-ms: got {hop_ms}, but {features} gives a frame every 20 ms; expected 20")
    path = Path(name)
    if path.is_file():
        label = f"checkpoint {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}:{layer}"
        model, normalise = _load_checkpoint(path)
    else:
        label = features
        model, normalise = _load_pipeline(name)
    layers = _count_layers(model)
    if layers is not None and layer > layers:
        raise UserError(f"--features: got layer {layer}, but {name} has {layers}; expected 1 to {layers}")

    import torch

    from hmm_speech.units.features import Extractor

    device = "cuda" if torch.cuda.is_available() else "cpu"
    compute = functools.partial(_compute, model=model.to(device).eval(), layer=layer, normalise=normalise)
    return Extractor(label, 20.0, "none", compute, parallel=False)


def _compute(samples: torch.Tensor, model: torch.nn.Module, layer: int, normalise: bool) -> torch.Tensor:
    import torch

    if normalise:
        samples = torch.nn.functional.layer_norm(samples, samples.shape)
    # half of what a frame sees beyond its hop on either side centres frame t on (t + 1/2) hops
    margin = (_SEEN - _HOP) // 2
    padded = torch.nn.functional.pad(samples, (margin, margin))[None]
    device = next(model.parameters()).device
    layers, _ = model.extract_features(padded.to(device), num_layers=layer)
    return layers[layer - 1][0].float().cpu()


def _count_layers(model: torch.nn.Module) -> int | None:
    return sum(1 for name in model.state_dict() if name.endswith("attention.k_proj.weight")) or None


def _load_pipeline(name: str) -> tuple[torch.nn.Module, bool]:
    """A pipeline's model, which normalises its input itself."""
    import torchaudio

    bundle = getattr(torchaudio.pipelines, name, None)
    if not isinstance(bundle, torchaudio.pipelines.Wav2Vec2Bundle):
        names = [
            key
            for key, value in vars(torchaudio.pipelines).items()
            if isinstance(value, torchaudio.pipelines.Wav2Vec2Bundle)
        ]
        raise UserError(
            f"--features: {name!r} is neither a file nor a pipeline of torchaudio; expected one of "
            f"{', '.join(sorted(names))}, or a checkpoint"
        )
    try:
        return bundle.get_model(), False
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"--features: the weights of {name} could not be downloaded ({error}); check the network, or save the "
            "model's state dict elsewhere with torch.save and give its file, FILE:LAYER"
        ) from None


def _load_checkpoint(path: Path) -> tuple[torch.nn.Module, bool]:
    import torch
    from torchaudio.models import wav2vec2_model

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path}: cannot be loaded as a checkpoint of tensors ({error})") from None
    try:
        state = content.get("state_dict", content)
        config: dict[str, Any] = content.get("config") or infer_config(state)
        model = wav2vec2_model(**config)
        model.load_state_dict(state)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{path}: does not fit torchaudio.models.wav2vec2_model ({error}); expected its state dict, or a "
            "dictionary with state_dict and config"
        ) from None
    return model, config["extractor_mode"] == "layer_norm"  # those models are trained on normalised samples


def infer_config(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The arguments of `wav2vec2_model` that a state dict fits; KeyError where it is of something else."""
    convolutions = []
    while (key := f"feature_extractor.conv_layers.{len(convolutions)}.conv.weight") in state:
        size, _, kernel = state[key].shape
        convolutions.append((size, kernel, _STRIDES[len(convolutions)]))
    width = state["encoder.feature_projection.projection.weight"].shape[0]
    layers = 0
    while f"encoder.transformer.layers.{layers}.attention.k_proj.weight" in state:
        layers += 1
    position = "encoder.transformer.pos_conv_embed.conv."
    kernel = next(
        state[key] for key in (position + "weight_v", position + "parametrizations.weight.original1") if key in state
    )
    large = "feature_extractor.conv_layers.1.layer_norm.weight" in state
    aux = state.get("aux.weight")
    return {
        "extractor_mode": "layer_norm" if large else "group_norm",
        "extractor_conv_layer_config": convolutions,
        "extractor_conv_bias": "feature_extractor.conv_layers.0.conv.bias" in state,
        "encoder_embed_dim": width,
        "encoder_projection_dropout": 0.0,
        "encoder_pos_conv_kernel": kernel.shape[2],
        "encoder_pos_conv_groups": width // kernel.shape[1],
        "encoder_num_layers": layers,
        "encoder_num_heads": max(1, width // (80 if width == 1280 else 64)),
        "encoder_attention_dropout": 0.0,
        "encoder_ff_interm_features": state[
            "encoder.transformer.layers.0.feed_forward.intermediate_dense.weight"
        ].shape[0],
        "encoder_ff_interm_dropout": 0.0,
        "encoder_dropout": 0.0,
        "encoder_layer_norm_first": large,
        "encoder_layer_drop": 0.0,
        "aux_num_out": None if aux is None else aux.shape[0],
    }
