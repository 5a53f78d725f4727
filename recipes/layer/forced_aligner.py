"""Forced alignment: when was each phone said, knowing only which phones, in which order.

The chain of an utterance has its phones as states, from left to right: it starts in the first, stays or goes on to the
next, ends in the last. p(unit | phone) and each phone's chance to go on are learned by EM from equal segments; the
times in the unit file only score the result.
"""

import argparse
from pathlib import Path

import torch
from torch.nn.functional import one_hot
from torch.nn.utils.rnn import pad_sequence

from hmm_speech.data.textgrid import write_textgrid
from hmm_speech.data.unitfile import Phone, read_units
from hmm_speech.errors import report_user_errors
from hmm_speech.hmm import HMM, Banded


def batches(utterances, labels, size=32):
    """The utterances, units (B, T), lengths (B,), phones (B, S) and numbers of phones (B,), of similar length each."""
    for part in torch.tensor([len(u.units) for u in utterances]).argsort().split(size):
        some = [utterances[i] for i in part]
        units = [torch.from_numpy(u.units).long() for u in some]
        phones = [torch.tensor([labels.index(p.label) for p in u.phones]) for u in some]
        sizes = [torch.tensor([len(x) for x in padded]) for padded in (units, phones)]
        yield some, pad_sequence(units, True), sizes[0], pad_sequence(phones, True), sizes[1]


def chain(log_emission, log_leave, units, lengths, phones, num_phones):
    """From log p(unit | phone), (P, V), and log p(go on | phone), (P,)."""
    slot, leave = torch.arange(phones.shape[1]), log_leave[phones]
    arcs = Banded(torch.stack([(-leave.exp()).log1p(), leave], 1), offsets=(0, 1))
    first = torch.where(slot == 0, 0.0, -torch.inf)
    last = torch.where(slot == num_phones[:, None] - 1, 0.0, -torch.inf)
    return HMM(first, arcs, log_emission[phones[:, None], units[:, :, None]], lengths, last)


def equal_segments(units, lengths, phones, num_phones):
    """Posteriors (B, T, S) of someone who knows nothing: all phones of an utterance are equally long."""
    t = torch.arange(units.shape[1])
    slot = (t * num_phones[:, None] // lengths[:, None]).clamp(max=phones.shape[1] - 1)
    return (one_hot(slot, phones.shape[1]) * (t < lengths[:, None])[..., None]).float()


def train(data, num_labels, vocabulary, iterations):
    """EM, with 0.1 added to each count."""
    model = None
    for iteration in range(iterations + 1):
        counts, times_said, total = torch.full((num_labels, vocabulary), 0.1), torch.zeros(num_labels), 0.0
        for _, *batch in data:
            units, _, phones, num_phones = batch
            hmm = chain(*model, *batch) if model else None
            posterior = hmm.marginals() if hmm else equal_segments(*batch)
            total += hmm.log_partition().sum().item() if hmm else 0.0
            cells = (phones[:, None] * vocabulary + units[..., None]).flatten()
            counts.view(-1).index_add_(0, cells, posterior.flatten())
            times_said += phones[torch.arange(phones.shape[1]) < num_phones[:, None]].bincount(minlength=num_labels)
        leave = (times_said / counts.sum(1)).clamp(1e-4, 0.999)  # a phone is left once each time that it is said
        model = (counts / counts.sum(1, keepdim=True)).log(), leave.log()
        if iteration in (1, 2, 4, iterations):
            print(f"EM iteration {iteration}: {total / sum(b[2].sum().item() for b in data):.3f} nats a frame")
    return model


def starts(posterior, num_phones):
    """Frames where phones 1, 2, ... start: the chain only moves right, so E[start of s] = sum_t p(z_t < s)."""
    return posterior.cumsum(-1).sum(0)[: num_phones - 1].tolist()


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", default=Path(__file__).parents[1] / "flite" / "logmel.parquet")
    parser.add_argument("--iterations", type=int, default=8)
    parser.add_argument("--textgrid", type=Path, metavar="FOLDER", help="write the test split's alignments")
    options = parser.parse_args(arguments)
    corpus = read_units(options.units)
    labels = sorted({p.label for u in corpus.utterances for p in u.phones})
    data = list(batches(corpus.split("train"), labels))
    model = train(data, len(labels), corpus.vocabulary, options.iterations)
    errors_ms = {"equal segments": [], "Viterbi path": [], "expected boundary": []}
    for utterances, *batch in batches(corpus.split("test"), labels):
        hmm, slots = chain(*model, *batch), torch.arange(batch[2].shape[1])
        path = (hmm.viterbi().states[..., None] == slots).float()
        for b, utterance in enumerate(utterances):
            known = torch.tensor([p.start for p in utterance.phones[1:]])
            for name, posterior in zip(errors_ms, (equal_segments(*batch), path, hmm.marginals()), strict=True):
                found = [t / corpus.frame_rate for t in starts(posterior[b], len(utterance.phones))]
                errors_ms[name].append((torch.tensor(found) - known).abs() * 1000)
            if options.textgrid:
                end = utterance.phones[-1].end
                edges = [0.0, *found, end]
                aligned = [Phone(p.label, *edges[k : k + 2]) for k, p in enumerate(utterance.phones)]
                tiers = {"aligned": aligned, "known": utterance.phones}
                write_textgrid(options.textgrid / f"{utterance.id}.TextGrid", tiers, end)
    print(f"\n{'error, ms':18}  mean  median  within 20 ms  within 50 ms")
    errors = {name: torch.cat(parts) for name, parts in errors_ms.items()}
    for name, x in errors.items():
        within = [f"{(x <= limit).float().mean():12.1%}" for limit in (20, 50)]
        print(f"{name:18} {x.mean():5.1f} {x.median():7.1f}", *within, sep="  ")
    return {name: x.mean().item() for name, x in errors.items()}


if __name__ == "__main__":
    with report_user_errors():
        main()
