"""Retrievers that learn: which passages a question finds.

    python -m benchmarks.rag [--quick] [--only PART...] [--json FILE]

recall      questions that find a passage which answers them among the first twenty: by DPR, BM25, word vectors, fused

The passages are those of two dictionaries and of Python's documentation, as far as they are installed. The questions
are WordNet's definitions and the documentation's headings. `--quick` takes an eighth of each work.
"""

import argparse
import json
import random
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.apart import end_in_order_when_stopped
from benchmarks.memory import corpora
from benchmarks.rag import recall
from benchmarks.rag.questions import ask
from benchmarks.verdicts import Verdict, table_of
from talkoot.memory.dual_training import K

PARTS = ("recall",)
_FULL, _QUICK = (1, 1500), (8, 300)
"""One title of so many, and questions of each kind."""
_WITHIN = 0.01
"""Of the best ranking, where fusing does no harm."""
_NAMES = {
    "dpr": "DPR",
    "bm25": "BM25",
    "word_vectors": "word vectors",
    "fused": "DPR and BM25 fused, weight tuned on validation",
    "as_searched": "as a swarm is searched: DPR, its 60 best ranked by words, too",
}


def verdicts(results: Mapping[str, Any]) -> Iterator[Verdict]:
    if not (found := results.get("recall")):
        return
    figures = found["recall"]
    best = max(figures[name]["all"][str(K)] for name in ("dpr", "bm25", "word_vectors"))
    for name, words in _NAMES.items():
        by_kind = {kind: cuts[str(K)] for kind, cuts in figures[name].items()}
        is_judged = name == "fused"
        yield Verdict(
            f"recall@{K} of {found['questions']['all']:,} questions in {found['passages']:,} passages: {words}",
            f"{best - _WITHIN:.3f}" if is_judged else "",
            ", ".join(f"{kind} {value:.3f}" for kind, value in by_kind.items()),
            by_kind["all"] >= best - _WITHIN if is_judged else None,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="an eighth of the text, under 90 s")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    options = parser.parse_args()
    end_in_order_when_stopped()
    console = Console(width=150)
    missing = corpora.remedies() + ([] if find_spec("bm25s") else ["pip install 'talkoot[retrieval]'"])
    if missing:
        console.print(f"This benchmark needs: {'; '.join(missing)}")
        raise SystemExit(1)
    results: dict[str, Any] = {}
    with console.status("recall"):
        share, tested = _QUICK if options.quick else _FULL
        results["recall"] = recall.measure(ask(random.Random(0), share, tested))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    console.print(table_of("retrieval", verdicts(results)))


if __name__ == "__main__":
    main()
