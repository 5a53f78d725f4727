import importlib.util
from pathlib import Path

import pytest
import torch

from hmm_speech.data.unitfile import UnitCorpus, read_units, write_units
from hmm_speech.hmm import HMM, use_backend

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def load(name):
    specification = importlib.util.spec_from_file_location(name, RECIPES / "layer" / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


crf_tagger, forced_aligner, forgetting = load("crf_tagger"), load("forced_aligner"), load("forgetting")


def test_the_chain_helps_the_tagger_and_breaks_no_sentence():
    results = crf_tagger.main(["--steps", "60", "--sentences", "100"])
    assert len(results) == 8
    for (labels, network, tags), (right, broken) in results.items():
        if tags == "CRF":
            assert broken == 0
            if (labels, network) != ("all", "BiLSTM"):  # a BiLSTM with all labels needs no chain
                assert right > results[labels, network, "independent"][0] + 0.05
    assert results["all", "word alone", "CRF"][0] > 0.9


def test_the_tagger_is_given_sentences_whose_tags_are_legal():
    words, tags, lengths = crf_tagger.sentences(50, torch.Generator().manual_seed(3))
    assert not crf_tagger.FORBIDDEN[tags[:, :-1], tags[:, 1:]].any()
    assert not crf_tagger.FORBIDDEN[0, tags[:, 0]].any()
    assert set(tags.unique().tolist()) == {0, 1, 2, 3, 4} and words.max() < crf_tagger.WORDS
    assert lengths.min() >= 8 and lengths.max() <= crf_tagger.TIME


def test_the_loss_of_permitted_tags_is_the_log_prob_where_one_tag_is_permitted():
    torch.manual_seed(0)
    words, tags, lengths = crf_tagger.sentences(4, torch.Generator().manual_seed(3))
    known = torch.ones_like(tags, dtype=torch.bool)
    known[:, 20:] = False  # so that the masks are used ...
    tagger = crf_tagger.Tagger(False)
    masked = crf_tagger.loss(tagger, True, words, tags, lengths.clamp(max=20), known)
    exact = -tagger.crf(tagger(words), lengths.clamp(max=20)).log_prob(tags).sum() / lengths.clamp(max=20).sum()
    assert masked.item() == pytest.approx(exact.item(), rel=1e-5)  # ... with all tags known within the lengths
    masked.backward()
    assert all(p.grad.isfinite().all() for p in tagger.parameters())
    assert (tagger.crf.transition.grad[crf_tagger.FORBIDDEN] == 0).all()


@pytest.fixture(scope="module")
def some(tmp_path_factory):
    corpus = read_units(RECIPES / "flite" / "logmel.parquet")
    utterances = corpus.split("train")[:80] + corpus.split("valid")[:2] + corpus.split("test")[:8]
    path = tmp_path_factory.mktemp("units") / "some.parquet"
    write_units(UnitCorpus(utterances, corpus.frame_rate, corpus.vocabulary, corpus.made), path)
    return path


def test_the_aligner_finds_phones_better_than_equal_segments(some, tmp_path, capsys):
    errors_ms = forced_aligner.main(["--units", str(some), "--iterations", "4", "--textgrid", str(tmp_path)])
    assert errors_ms["expected boundary"] < errors_ms["equal segments"] / 3
    assert errors_ms["Viterbi path"] < errors_ms["equal segments"] / 3
    likelihoods = [float(line.split()[3]) for line in capsys.readouterr().out.splitlines() if line.startswith("EM")]
    assert likelihoods == sorted(likelihoods)
    grids = sorted(tmp_path.glob("*.TextGrid"))
    assert len(grids) == 8 and 'name = "aligned"' in grids[0].read_text()


def test_the_aligner_does_the_same_on_the_reference(some):
    labels = sorted({p.label for u in read_units(some).utterances for p in u.phones})
    _, *batch = next(iter(forced_aligner.batches(read_units(some).split("test"), labels)))
    model = torch.randn(len(labels), 100).log_softmax(-1), torch.full((len(labels),), 0.2).log()
    native = forced_aligner.chain(*model, *batch).marginals()
    with use_backend("reference"):
        assert torch.allclose(native, forced_aligner.chain(*model, *batch).marginals(), atol=2e-5)


def test_expected_starts_of_a_certain_path_are_its_starts():
    path = torch.nn.functional.one_hot(torch.tensor([0, 0, 1, 1, 1, 2]), 4).float()
    assert forced_aligner.starts(path, 3) == [2.0, 5.0]
    padded = torch.cat([path, torch.zeros(3, 4)])
    assert forced_aligner.starts(padded, 3) == [2.0, 5.0]


def test_a_chain_forgets_after_as_many_frames_as_its_arcs_say():
    torch.manual_seed(0)
    initial, transition, emission = torch.randn(4).double(), torch.randn(4, 4).double(), torch.randn(30, 4).double()
    arcs, weights = transition.exp(), emission.exp()
    alpha, beta = forgetting.messages(initial.exp(), arcs.expand(29, 4, 4), weights)
    torch.testing.assert_close(alpha * beta, HMM(initial, transition, emission[None]).marginals()[0])
    varying = torch.randn(29, 4, 4).double()
    alpha, beta = forgetting.messages(initial.exp(), varying.exp(), weights)
    torch.testing.assert_close(alpha * beta, HMM(initial, varying[None], emission[None]).marginals()[0])
    # All rows alike: nothing is known of where a message began.
    for messages, posteriors in forgetting.forgets(initial, transition[:1].expand(4, 4), emission, points=5):
        assert messages <= 1 and posteriors <= 1
    two_ways = transition.clone()
    two_ways[:2, 2:] = two_ways[2:, :2] = -torch.inf  # parts that nothing leads between
    assert all(k == (10**9, 10**9) for k in forgetting.forgets(initial, two_ways, emission, points=5))


def test_what_forgets_is_printed(capsys):
    results = forgetting.main(["--points", "2"])
    assert len(results) == 15 and "never" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        forgetting.main(["--units", "x.parquet"])
