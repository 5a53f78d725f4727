"""Vector-quantized autoregressive predictive coding, the baseline of independent codes drawn from the past."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hmm_speech.errors import UserError
from hmm_speech.nn.composition import Composition, score_parts, uses_context
from hmm_speech.nn.contextual import IndependentTransition
from hmm_speech.objective.co_training import check_temperature


class VQAPC(nn.Module):
    """-sum_t log p(x_t | z_t) for one code a frame, z_t drawn from p(z_t | h_t): (B,) nats.

    The code is drawn by Gumbel-softmax, straight through, and its vector alone predicts the frame (Chung, Tang and
    Glass 2020, arXiv:2005.08392, sections 2.1 and 2.2, with a density in place of the L1 distance). On average this is
    E_p[-log p(x | z)], which is never below -log p(x): the frame does not help to find its code, as it does in
    :class:`CoTraining` and in the likelihood.

    Args:
        parts: the model that is trained: independent transitions, a context, an emission that reads the code alone.
        temperature: of the Gumbel-softmax.

    Raises:
        UserError: the model is another.
    """

    def __init__(self, parts: Composition, temperature: float = 1.0) -> None:
        super().__init__()
        if not isinstance(parts.transition, IndependentTransition) or parts.context is None:
            raise UserError(
                "objective=vq_apc draws each code from the past frames alone; it needs transition=independent and a "
                "context"
            )
        if uses_context(parts.emission):
            raise UserError(
                "objective=vq_apc predicts frames from their codes alone; take an emission without a context"
            )
        check_temperature(temperature)
        self.temperature = temperature

    def forward(self, model: Any, batch: Any) -> Tensor:
        """(B,) nats."""
        initial_N, drift, emission_BTN = score_parts(model, batch)
        if not isinstance(emission_BTN, Tensor):
            raise UserError("objective=vq_apc needs an emission over all states; emission=cloned has few a frame")
        log_p_BTN = code_log_probs(initial_N, drift.drift_BTN)
        code_BTN = F.gumbel_softmax(log_p_BTN, self.temperature, hard=True)
        inside_BT = torch.arange(code_BTN.shape[1], device=code_BTN.device) < batch.lengths[:, None]
        return -torch.where(inside_BT, (code_BTN * emission_BTN).sum(-1), 0).sum(-1)


def code_log_probs(initial_N: Tensor, drift_BTN: Tensor) -> Tensor:
    """(B, T, N) log p(z_t | h_t) of independent transitions: their scores, and the initial's at the first frame."""
    first_B1N = initial_N + drift_BTN[:, :1]
    return torch.cat([first_B1N, drift_BTN[:, 1:]], 1).log_softmax(-1)
