"""Autograd around kernels for transitions with structure, given as one tensor ``arcs`` in place of (..., N, N).

``kernels`` says what to call: ``forward(initial, arcs, emission, lengths, final)`` returns log Z and whatever else
``backward(grad, *the same, *messages, edges)`` needs, which returns grad times p(z_t | x), (B, T, N), and the gradient
of ``arcs``, of its shape (or empty, without `edges`); ``step`` is how the reference goes along such arcs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

from . import ops


class LogPartition(Function):
    """log Z with an explicit backward pass: its gradients are the posteriors times the upstream gradient."""

    @staticmethod
    def forward(ctx, initial, arcs, emission, lengths, final, kernels):
        messages = kernels.forward(initial, arcs, emission, lengths, final)
        # What is returned may be changed in place; what is saved may not.
        ctx.save_for_backward(initial, arcs, emission, lengths, final, messages[0].clone(), *messages[1:])
        ctx.kernels = kernels
        return messages[0]

    @staticmethod
    def backward(ctx, grad):
        *scores, log_partition = ctx.saved_tensors[:6]
        initial, _, _, lengths, final = scores
        messages, needs = (log_partition, *ctx.saved_tensors[6:]), ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph=True
            state, edge = Posterior.apply(grad, *scores, ctx.kernels, needs[1], *messages)
        else:
            state, edge = ctx.kernels.backward(grad, *scores, *messages, needs[1])
        return (
            ops.first_frame(state, initial) if needs[0] else None,
            edge if needs[1] else None,
            state if needs[2] else None,
            None,
            ops.last_frame(state, lengths, final) if needs[4] else None,
            None,
        )


class Posterior(Function):
    """What ``kernels.backward`` returns; differentiable by the reference."""

    @staticmethod
    def forward(ctx, grad, initial, arcs, emission, lengths, final, kernels, edges, *messages):
        ctx.save_for_backward(grad, initial, arcs, emission, lengths, final)
        ctx.kernels, ctx.edges = kernels, edges
        return kernels.backward(grad, initial, arcs, emission, lengths, final, *messages, edges)

    @staticmethod
    def backward(ctx, grad_state, grad_edge):
        def twin(*saved):
            return ops.posterior(*saved, ctx.edges, ctx.kernels.step)

        return ops.through_reference(ctx, twin, (grad_state, grad_edge))


def posterior(scores: tuple, kernels, edges: bool) -> tuple[Tensor, Tensor]:
    """p(z_t | x), (B, T, N), and the gradient of log Z with respect to ``arcs``; differentiable."""
    with torch.no_grad():
        messages = kernels.forward(*scores)
    return Posterior.apply(torch.ones_like(messages[0]), *scores, kernels, edges, *messages)


def reference_posterior(scores: tuple, step, edges: bool) -> tuple[Tensor, Tensor]:
    """The same through the reference."""
    initial, _, emission, _, _ = scores
    ones = torch.ones(emission.shape[0], dtype=initial.dtype, device=initial.device)
    state, edge = ops.posterior(ones, *scores, edges, step)
    return (state, edge) if ops.tracked(scores) else (state.detach(), edge.detach())
