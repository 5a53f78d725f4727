import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "peers"
sys.path.insert(0, str(FOLDER))
import cases  # noqa: E402
import compare  # noqa: E402
import contenders  # noqa: E402
import timing  # noqa: E402

from hmm_speech.hmm import HMM  # noqa: E402

PROBLEMS = {problem.name: problem for problem in cases.cases(quick=True)}
SMALL = [p for p in PROBLEMS.values() if p.emission.shape[2] ** p.emission.shape[1] <= 50_000]


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_layer_is_right_in_every_case_and_every_peer_that_is_here_answers(name):
    true = cases.truth(PROBLEMS[name])
    found = {c.name: compare.compared(PROBLEMS[name], true, c) for c in contenders.present()}
    assert found["hmm_speech"].verdict == "ok"
    assert all(row.verdict for row in found.values())


def test_the_truth_of_the_small_cases_was_enumerated():
    assert len(SMALL) == 6
    infeasible = PROBLEMS["one infeasible sequence in the batch"]
    expected = cases.enumerate_paths(infeasible)
    assert expected.log_partition[1] == -math.inf
    assert not expected.marginals[1].any()
    assert torch.allclose(expected.marginals[[0, 2]].sum(-1), torch.ones(2, 6).double())


def test_the_truth_refuses_a_reference_that_enumeration_contradicts(monkeypatch):
    problem = SMALL[0]
    wrong = cases.enumerate_paths(problem)
    wrong.log_partition += 1e-6
    monkeypatch.setattr(cases, "enumerate_paths", lambda _: wrong)
    with pytest.raises(AssertionError):
        cases.truth(problem)


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_what_is_folded_into_probabilities_for_peers_scores_the_same(problem):
    def one(start, arcs, emission):
        start, arcs, emission = (torch.from_numpy(x) for x in (start, arcs, emission))
        assert torch.allclose(arcs.sum(-1), torch.ones_like(arcs.sum(-1)))
        hmm = HMM(start.log(), arcs.log() if arcs.dim() == 2 else arcs.log()[None], emission[None])
        gradient = hmm.marginals()[0].numpy()
        return hmm.log_partition(), gradient, gradient

    found, true = contenders.per_sequence(problem, one), cases.truth(problem)
    assert float(compare.log_partition_errors(found.log_partition, true.log_partition).max()) < 1e-12
    assert torch.allclose(found.marginals, true.marginals, atol=1e-9)
    assert torch.allclose(found.gradient, true.gradient, atol=1e-9)


@pytest.mark.parametrize(
    ("wrong", "verdict"),
    [
        (lambda a: a, "ok"),
        (lambda a: a.log_partition.copy_(torch.tensor([1.0, -1e9, 1.0])), "log Z not -inf"),
        (lambda a: a.log_partition[0].mul_(1.01), "log Z off by 0.01"),
        (lambda a: a.log_partition[0].fill_(math.nan), "log Z NaN"),
        (lambda a: a.gradient[0, 0].fill_(math.nan), "gradient NaN"),
        (lambda a: a.gradient[0, 0, 0].add_(0.02), "gradient off by 0.02"),
        (lambda a: a.marginals[0, 0, 0].add_(0.02), "marginals off by 0.02"),
        (lambda a: math.log(0), "raises ValueError"),
    ],
)
def test_every_kind_of_mistake_is_told(wrong, verdict):
    problem = PROBLEMS["one infeasible sequence in the batch"]

    class Wrong(contenders.Contender):
        name = "wrong"

        def answer(self, problem):
            answer = cases.truth(problem)
            wrong(answer)
            return answer

    assert compare.compared(problem, cases.truth(problem), Wrong()).verdict == verdict


def test_absent_peers_are_left_out_and_named_and_the_readme_changes_between_its_markers(monkeypatch, tmp_path, capsys):
    for kind in (contenders.TorchStruct, contenders.Dynamax, contenders.HmmLearn):
        monkeypatch.setattr(kind, "distribution", "no-such-distribution")
    assert [c.name for c in contenders.present()] == ["hmm_speech", "loop in torch"]
    readme = tmp_path / "README.md"
    first, second = (f"<!-- {part} by compare.py -->" for part in ("cases", "times"))
    readme.write_text(f"before\n{first}\nold\n{compare.END}\nbetween\n{second}{compare.END}\nafter\n")
    monkeypatch.setattr(compare, "README", readme)
    monkeypatch.setattr(compare, "time_table", lambda *_: "how long")
    compare.main(["--quick", "--write"])
    assert "Absent: no-such-distribution." in capsys.readouterr().out
    text = readme.read_text()
    assert text.startswith(f"before\n{first}\n\ntorch ")
    assert text.endswith(f"how long\n\n{compare.END}\nafter\n")
    assert text.count("\nbetween\n") == 1 and "old" not in text and "| left-to-right, shared | ok |" in text


def test_times_and_memory_come_from_the_same_scores():
    forward, both = timing.prepared(contenders.Layer, "varying", 4, 6)
    assert forward().shape == (timing.BATCH,)
    assert [tuple(g.shape) for g in both()] == [(4,), (8, 5, 4, 4), (8, 6, 4)]
    assert torch.allclose(forward(), timing.prepared(contenders.TorchLoop, "varying", 4, 6)[0]())
    # In a process of its own, as there: what this one took before would hide it.
    command = [sys.executable, timing.__file__, "hmm_speech", "varying", "50", "200"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert float(shown) > 8 * 199 * 50 * 50 * 4 / 2**20 / 2  # the gradient at least
