"""A linear-chain CRF over a small network, beside the same network with independent tags; then with few labels.

The sentences are made here. Names have one to four words: the first tells whether the name is of type A or B, the
others occur in both types and outside names too, so that a tag depends on the tags before. Tags are BIO: I-A follows
B-A or I-A and nothing else, and arcs that are forbidden score -inf.
"""

import argparse

import torch
from torch import nn
from torch.nn.functional import cross_entropy, one_hot

from hmm_speech.hmm import HMMLayer

TAGS = ["O", "B-A", "I-A", "B-B", "I-B"]
FORBIDDEN = torch.tensor([[tag[0] == "I" and last[1:] != tag[1:] for tag in TAGS] for last in TAGS])
WORDS, TIME = 30, 24  # words 0-9 occur outside names only, 10-14 begin names of type A, 15-19 of type B, 20-29 are free


def sentences(count, generator):
    """Words (B, T), tags (B, T), lengths (B,)."""
    words, tags = torch.zeros(2, count, TIME, dtype=torch.int64)
    for b in range(count):
        t = 0
        while t < TIME:
            kind, size, free, word = (int(torch.randint(n, (), generator=generator)) for n in (3, 4, 3, 10))
            if kind == 2:
                words[b, t], size = word + 20 * (free == 0), 0
            else:
                words[b, t], tags[b, t] = 10 + 5 * kind + word % 5, 1 + 2 * kind
                words[b, t + 1 : t + 1 + size] = torch.randint(20, WORDS, (size,), generator=generator)[: TIME - t - 1]
                tags[b, t + 1 : t + 1 + size] = 2 + 2 * kind
            t += 1 + size
    return words, tags, torch.randint(8, TIME + 1, (count,), generator=generator)


class Tagger(nn.Module):
    """Scores of tags, (B, T, 5), from each word alone or from a BiLSTM over the sentence; ``crf`` is the chain."""

    def __init__(self, lstm):
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(WORDS, 16), nn.LSTM(16, 8, bidirectional=True) if lstm else None
        self.score, self.crf = nn.Linear(16, len(TAGS)), HMMLayer(len(TAGS), normalised=False)
        with torch.no_grad():
            self.crf.transition.masked_fill_(FORBIDDEN, -torch.inf)
            self.crf.initial.masked_fill_(FORBIDDEN[0], -torch.inf)  # a sentence begins as if after O

    def forward(self, words):
        x = self.embedding(words)
        return self.score(self.lstm(x.transpose(0, 1))[0].transpose(0, 1) if self.lstm else x)


def loss(tagger, chained, words, tags, lengths, known):
    """Negative log-likelihood of the tags that are known, (B, T) bool, in nats a word."""
    emission, inside = tagger(words), torch.arange(TIME) < lengths[:, None]
    if not chained:
        return cross_entropy(emission[inside & known], tags[inside & known])
    if known.all():
        return -tagger.crf(emission, lengths).log_prob(tags).sum() / lengths.sum()
    permitted = one_hot(tags, len(TAGS)).bool() | ~known[..., None]  # a word without a label may have any tag
    constrained = tagger.crf(emission.masked_fill(~permitted, -torch.inf), lengths)
    return (tagger.crf(emission, lengths).log_partition() - constrained.log_partition()).sum() / lengths.sum()


def train_and_test(lstm, chained, train, test, known, steps):
    """Share of tags that are right, and of sentences with a forbidden arc, after Adam on all sentences at once."""
    torch.manual_seed(1)
    tagger = Tagger(lstm)
    optimizer = torch.optim.Adam(tagger.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(tagger, chained, *train, known).backward()
        optimizer.step()
    words, tags, lengths = test
    with torch.no_grad():
        emission, inside = tagger(words), torch.arange(TIME) < lengths[:, None]
        found = tagger.crf(emission, lengths).viterbi().states.clamp(min=0) if chained else emission.argmax(-1)
    broken = (FORBIDDEN[found[:, :-1], found[:, 1:]] & inside[:, 1:]).any(1)
    return (found == tags)[inside].float().mean().item(), broken.float().mean().item()


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--sentences", type=int, default=200, help="for training; five times as many to test")
    options = parser.parse_args(arguments)
    generator = torch.Generator().manual_seed(0)
    train, test = (sentences(n * options.sentences, generator) for n in (1, 5))
    some = torch.rand(train[0].shape, generator=generator) < 0.05
    results = {}
    print(f"{'network':11}{'labels':12}{'tags':12}{'right':>7}{'broken sentences':>18}")
    for labels, known in (("all", torch.ones_like(some)), ("one in 20", some)):
        for network in ("word alone", "BiLSTM"):
            for tags in ("independent", "CRF"):
                right, broken = train_and_test(network == "BiLSTM", tags == "CRF", train, test, known, options.steps)
                results[labels, network, tags] = right, broken
                print(f"{network:11}{labels:12}{tags:12}{right:7.1%}{broken:18.1%}")
    return results


if __name__ == "__main__":
    main()
