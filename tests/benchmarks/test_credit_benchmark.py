"""The benchmark of signed credit finds what docs/security.md says."""

import pytest

from benchmarks import credit
from benchmarks.credit import TOKENS, filled, node_of


@pytest.mark.parametrize(("claimed", "of_pairs"), [(10**6, 0.0), (10**12, 0.9)])
def test_a_tenth_of_the_tokens_has_a_tenth_of_the_votes_whatever_they_sign(
    claimed: int, of_pairs: float
) -> None:
    counted = filled(200, TOKENS // 10, claimed).count()
    accomplice = counted[node_of(199)]
    assert accomplice.share == pytest.approx(0.1, abs=0.01)
    assert accomplice.work.pairs / sum(each.work.pairs for each in counted.values()) >= of_pairs


def test_the_benchmark_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credit, "NODES", 50)
    monkeypatch.setattr(credit, "ROUNDS", 20)
    credit.main()
    said = capsys.readouterr().out
    assert "a node under 8 trainers: 0.0" in said
    assert said.count("of all votes") == 3
