"""Checkpoints: opened without running any code of theirs, and compared with what is to go on from them."""

from __future__ import annotations

import inspect
import logging
import pickle
from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch

from hmm_speech.configuration import ALLOWED_TARGETS
from hmm_speech.errors import UserError

if TYPE_CHECKING:
    from hmm_speech.module import SpeechHMM


def load(checkpoint: str | PathLike[str], allowed: Sequence[str] = ALLOWED_TARGETS) -> SpeechHMM:
    """The model of a checkpoint, on the CPU and in evaluation mode.

    Opening a file runs no code of its own: it is read with ``weights_only=True``, and its modules may only be classes
    of the ``allowed`` packages.

    Raises:
        UserError: there is no such file, it is no checkpoint of this package, or a class in it is not allowed.
    """
    content = read_checkpoint(checkpoint)
    from hmm_speech.module import SpeechHMM  # with Lightning, which takes seconds: not before there is what to load

    values = {k: v for k, v in content["hyper_parameters"].items() if k in inspect.signature(SpeechHMM).parameters}
    try:
        module = SpeechHMM(**values, allowed=allowed)
        module.load_state_dict(content["state_dict"])
    except (TypeError, RuntimeError) as error:
        raise UserError(f"{checkpoint}: does not fit this version of hmm_speech: {error}") from error
    return module.eval()


def read_checkpoint(checkpoint: str | PathLike[str]) -> dict[str, Any]:
    """The plain content of a checkpoint file, on the CPU; see :func:`load`."""
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{checkpoint}: no such file; expected a run's checkpoints/best.ckpt or last.ckpt") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        # Not with torch's own text, which advises to switch the safe mode off.
        raise UserError(
            f"{checkpoint}: is no checkpoint that can be opened safely; expected a run's checkpoints/best.ckpt or "
            "last.ckpt (hmm-speech takes the checkpoint first, then the unit file)"
        ) from error
    if not isinstance(content, dict) or not {"state_dict", "hyper_parameters"} <= content.keys():
        raise UserError(f"{checkpoint}: is no checkpoint of hmm_speech: it holds no state_dict and hyper_parameters")
    return content


def check_resume(checkpoint: str | PathLike[str], module: SpeechHMM, max_epochs: int | None = None) -> None:
    """Raise a UserError where a model cannot go on from a checkpoint: other sizes, other units, or too few epochs."""
    content = read_checkpoint(checkpoint)
    before, now = content["hyper_parameters"], module.hparams
    shapes = {name: tuple(x.shape) for name, x in content["state_dict"].items()}
    fits = shapes == {name: tuple(x.shape) for name, x in module.state_dict().items()}
    parts = (
        ["vocabulary", "dimension", "topology", "initial", "transition", "emission", "context", "objective"]
        if not fits
        else []
    )
    made = before.get("quantizer"), now.get("quantizer")
    if None not in made and made[0] != made[1]:
        parts.append("quantizer")
    differ = [
        f"{name} {before.get(name)}, this run has {now.get(name)}"
        for name in parts
        if before.get(name) != now.get(name)
    ]
    if differ or not fits:
        raise UserError(
            f"{checkpoint}: cannot be resumed, it was trained with {'; '.join(differ) or 'other modules'}. Give the "
            "overrides of that run (.hydra/overrides.yaml in its run folder) again, or start anew without ckpt_path"
        )
    done = content.get("epoch", -1) + 1
    if max_epochs is not None and done > max_epochs:
        raise UserError(f"{checkpoint}: was trained for {done} epochs, trainer.max_epochs is {max_epochs}; give more")
    if done == max_epochs:
        message = "%s: was trained for %d of %d epochs: it is only tested; trainer.max_epochs= goes on"
        logging.getLogger("train").warning(message, checkpoint, done, max_epochs)
