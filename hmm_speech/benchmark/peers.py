"""Other libraries' forward-backward, for `hmm-speech bench`: those that are installed, called by their public
interface.

Nothing here is needed for anything else, and nothing is installed. Each contender takes the row's scores and returns a
call that runs the forward and the backward pass once, with seconds and log Z.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import time
from collections.abc import Callable

import torch
from torch import Tensor

Run = Callable[[], tuple[float, Tensor]]

NAMES = {"dynamax": "dynamax", "torch-struct": "torch_struct"}
# torch-struct keeps the transfer matrices of a binary tree over time: 4 GB for B=8, T=500, N=50.
TORCH_STRUCT_NUMBERS = 8 * 100 * 50 * 50


def present() -> dict[str, str]:
    """Installed peers and their versions."""
    return {
        name: importlib.metadata.version(name)
        for name, module in NAMES.items()
        if importlib.util.find_spec(module) is not None
    }


def contender(name: str, kind: str, scores: list[Tensor]) -> Run | None:
    """A peer's run of a row of `hmm_speech.benchmark`; None for a row that it is not made for."""
    if kind not in ("dense", "shared"):
        return None
    if name == "dynamax":
        return dynamax(kind, scores)
    if kind == "dense" and scores[1].numel() <= TORCH_STRUCT_NUMBERS:
        return torch_struct(scores)
    return None


def dynamax(kind: str, scores: list[Tensor]) -> Run:
    """`hmm_filter`, vmapped over the batch, under jax.jit, with jax.value_and_grad around it; float32.

    It takes probabilities of the initial state and of transitions, and log-likelihoods. Transitions that vary over time
    go in as their exponentials, which it does not ask to be normalised.
    """
    if torch.get_num_threads() == 1:  # read when jax is imported
        os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
    import jax
    import jax.numpy as jnp
    from dynamax.hidden_markov_model import hmm_filter

    arrays = [jnp.asarray(x.numpy()) for x in scores]

    def one(initial, transition, emission):
        return hmm_filter(jnp.exp(initial), jnp.exp(transition), emission).marginal_loglik

    def shared(initial, transition, emission):
        return jax.vmap(one, (None, None, 0))(initial, transition, emission)

    def dense(initial, transition):
        nothing = jnp.zeros((transition.shape[1] + 1, transition.shape[-1]), jnp.float32)
        return jax.vmap(one, (0, 0, None))(initial, transition, nothing)

    batch = shared if kind == "shared" else dense

    def total(*x):
        z = batch(*x)
        return z.sum(), z

    step = jax.jit(jax.value_and_grad(total, argnums=tuple(range(len(arrays))), has_aux=True))

    def run() -> tuple[float, Tensor]:
        start = time.perf_counter()
        (_, z), gradients = step(*arrays)
        jax.block_until_ready(gradients)
        return time.perf_counter() - start, torch.tensor(z.tolist())

    run()  # compiles
    return run


def torch_struct(scores: list[Tensor]) -> Run:
    """`LinearChainCRF(...).partition`, whose edge scores are [t, to, from] and hold the start in the first step."""
    from torch_struct import LinearChainCRF

    initial, transition = scores
    edges = transition.clone()
    edges[:, 0] += initial.unsqueeze(-1)
    leaf = edges.transpose(-1, -2).contiguous().requires_grad_()

    def run() -> tuple[float, Tensor]:
        leaf.grad = None
        start = time.perf_counter()
        z = LinearChainCRF(leaf).partition
        z.sum().backward()
        return time.perf_counter() - start, z.detach()

    return run
