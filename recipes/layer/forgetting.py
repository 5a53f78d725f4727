"""How soon does a chain forget? Frames until a message no longer tells where it began.

From some frames on, the forward message is walked from ones beside the one that came from the first frame, until both
are the same to 2^-20 in every state; and the posteriors back from a frame taken for the last one, until they differ
by 2^-20 in total from those of the whole sequence. Chunks that begin so much early (csrc/cuda/scaled_chunks.h,
early_chunks.h) are exact.
"""

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

SAME = 2.0**-20


def messages(initial: Tensor, arcs_TNN: Tensor, weights_TN: Tensor) -> tuple[Tensor, Tensor]:
    """a_t = (a_t-1 A_t) w_t, of sum 1, and b_t-1 = A_t (w_t b_t), with sum_i a_t(i) b_t(i) = 1: both (T, N).

    `arcs_TNN` are those into frames 1 to T-1."""
    forward, backward = [initial * weights_TN[0]], [torch.ones_like(initial)]
    for arcs, weight in zip(arcs_TNN.unbind(), weights_TN[1:], strict=True):
        message = (forward[-1] / forward[-1].sum()) @ arcs * weight
        forward.append(message)
    forward = [message / message.sum() for message in forward]
    for arcs, weight, message in zip(arcs_TNN.unbind()[::-1], weights_TN.flip(0), forward[-2::-1], strict=False):
        behind = arcs @ (weight * backward[-1])
        backward.append(behind / (message * behind).sum())
    return torch.stack(forward), torch.stack(backward[::-1])


def frames_until(same: Callable[[int], bool], most: int) -> int:
    """The first of 0, 1, ... where something is the same; more than any where it is not within `most`."""
    return next((k for k in range(most) if same(k)), 10**9)


def forgets(initial: Tensor, transition: Tensor, emission_TN: Tensor, points: int = 40) -> Iterator[tuple[int, int]]:
    """Frames until messages, and posteriors, are the same, from `points` of the first and last two thirds of frames.

    `transition` is (N, N), or (T-1, N, N) where it varies over time."""
    weights = (emission_TN - emission_TN.amax(1, keepdim=True)).double().exp()
    time, ones = len(weights), torch.ones_like(weights[0])
    arcs = (transition - transition.amax()).double().exp().expand(time - 1, -1, -1)
    alpha, beta = messages((initial - initial.amax()).double().exp(), arcs, weights)
    for first in torch.linspace(1, time * 2 // 3, points).long().tolist():
        ahead, _ = messages(ones, arcs[first:], weights[first:])
        _, back = messages(alpha[0], arcs[: time - first - 1], weights[: time - first])

        def met(k, first=first, ahead=ahead):
            return bool(((ahead[k] - alpha[first + k]).abs() <= SAME * alpha[first + k]).all())

        def met_back(k, last=time - 1 - first, back=back):
            return bool((alpha[last - k] * (back[last - k] - beta[last - k])).abs().sum() <= SAME)

        yield frames_until(met, time - first), frames_until(met_back, time - first)


def random_chains() -> Iterator[tuple[str, tuple[Tensor, Tensor, Tensor]]]:
    """What they are, and their scores: arcs of random scores, or that stay; emissions of random ones."""
    random = torch.Generator().manual_seed(0)
    time = 900

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    for scale in (1, 3):
        for states in (10, 50, 128):
            name = f"{states} states, scores of scale {scale}"
            yield name, (normal(states), scale * normal(states, states), scale * normal(time, states))
    for stay in (0.5, 0.9, 0.95):
        arcs = torch.full((50, 50), (1 - stay) / 49, dtype=torch.float64).fill_diagonal_(stay).log()
        for scale in (1, 3):
            yield (
                f"50 states, stays with {stay}, emissions of scale {scale}",
                (normal(50), arcs, scale * normal(time, 50)),
            )
    for scale in (1, 3):
        varying = (normal(50), scale * normal(time - 1, 50, 50), scale * normal(time, 50))
        yield f"50 states, other arcs each frame, of scale {scale}", varying
    arcs = torch.full((50, 50), -torch.inf, dtype=torch.float64).fill_diagonal_(-0.1)
    arcs.diagonal(1).fill_(-2.4)
    yield "50 states from left to right", (torch.zeros(50).double(), arcs, normal(time, 50))


def trained_chain(checkpoint: str, units: str) -> Iterator[tuple[str, tuple[Tensor, Tensor, Tensor]]]:
    """The longest utterance of a model's test split."""
    from hmm_speech import checkpoint as checkpoints
    from hmm_speech.data.batching import collate
    from hmm_speech.inference import read_corpus

    module = checkpoints.load(checkpoint)
    utterance = max(read_corpus(module, units).split("test"), key=lambda x: len(x.units))
    with torch.no_grad():
        hmm = module(collate([(0, utterance)]))
    scores = hmm.initial, hmm.transition, hmm.emission
    if not all(isinstance(x, Tensor) for x in scores) or hmm.transition.dim() != 2:
        raise SystemExit(f"{checkpoint}: transitions are not one matrix, or emissions not those of all states")
    yield f"{hmm.num_states} states of {utterance.id}", (hmm.initial.reshape(-1), hmm.transition, hmm.emission[0])


def main(arguments: list[str] | None = None) -> dict[str, list[tuple[int, int]]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="a trained model, instead of random chains")
    parser.add_argument("--units", help="its unit file")
    parser.add_argument("--points", type=int, default=40, help="frames that walks begin in (%(default)s)")
    options = parser.parse_args(arguments)
    if bool(options.checkpoint) != bool(options.units):
        parser.error("--checkpoint and --units come together")
    chains = trained_chain(options.checkpoint, options.units) if options.checkpoint else random_chains()
    print(f"{'frames: median, of 90 %':<48} {'messages':>14} {'posteriors':>14}")
    results = {}
    for name, scores in chains:
        results[name] = list(forgets(*scores, points=options.points))
        ranks = len(results[name]) // 2, len(results[name]) * 9 // 10
        columns = [[sorted(x)[rank] for rank in ranks] for x in zip(*results[name], strict=True)]
        cells = [", ".join("never" if k == 10**9 else str(k) for k in column) for column in columns]
        print(f"{name:<48} {cells[0]:>14} {cells[1]:>14}", flush=True)
    return results


if __name__ == "__main__":
    main()
