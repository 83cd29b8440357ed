"""Retrievers that are trained, and models that answer from what they find.

    python -m benchmarks.rag [--quick] [--only PART...] [--json FILE]

recall      questions that find a passage which answers them among the first twenty: by DPR, BM25, word vectors, fused
answers     questions that are answered exactly: closed-book, by DPR and a reader, by RAG-Token and RAG-Sequence

For `recall`, the passages are those of two dictionaries and of Python's documentation, as far as they are installed,
and the questions are WordNet's definitions and the documentation's headings. For `answers`, both are about invented
towns and ships.
`--quick` takes a 64th of each work, and trains too briefly for models to learn anything.
"""

import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from rich.console import Console

from benchmarks.apart import end_in_order_when_stopped
from benchmarks.command import command_parser, write_figures
from benchmarks.memory import corpora
from benchmarks.rag import answers, recall
from benchmarks.rag.questions import ask
from benchmarks.verdicts import Verdict, table_of
from talkoot.memory.dual_training import K

PARTS = ("recall", "answers")
_FULL, _QUICK = (1, 1500), (64, 300)
"""One title or page in this many is used, and this many questions of each kind."""
_WAYS = {
    "closed_book": "closed-book",
    "dpr_reader": "DPR and a reader of the first passage",
    "rag_token": "RAG-Token",
    "rag_sequence": "RAG-Sequence",
    "gold": "RAG-Sequence, given the right passage alone",
}
_EXACT, _OF_GOLD, _CLOSED_BOOK, _FOLLOW = 0.5, 0.8, 0.05, 0.9
_WITHIN = 0.01
"""Where fusing rankings does not help, its result must be this close to that of the best single ranking."""
_NAMES = {
    "dpr": "DPR",
    "bm25": "BM25",
    "word_vectors": "word vectors",
    "fused": "DPR and BM25 fused, weight tuned on validation",
    "as_searched": "as a swarm is searched: DPR, its 60 best ranked by words, too",
}


def verdicts(results: Mapping[str, Any]) -> Iterator[Verdict]:
    if found := results.get("recall"):
        yield from _recall_verdicts(found)
    if found := results.get("answers"):
        yield from _answer_verdicts(found)
    if found := results.get("encoder_decoder"):
        for verdict in _answer_verdicts(found):
            yield replace(verdict, what=f"{verdict.what} (encoder-decoder)")


def _answer_verdicts(found: Mapping[str, Any]) -> Iterator[Verdict]:
    exact = found["exact"]
    about = f"exact answers to {found['questions']} questions about {found['passages']:,} passages"
    best = max(exact["rag_token"], exact["rag_sequence"])
    for name, words in _WAYS.items():
        yield Verdict(f"{about}: {words}", "", f"{exact[name]:.2f}")
    yield Verdict("the better RAG", f">= {_EXACT}", f"{best:.2f}", best >= _EXACT)
    least = _OF_GOLD * exact["gold"]
    yield Verdict("the same, against the right passage", f">= {least:.2f}", f"{best:.2f}", best >= least)
    closed = exact["closed_book"]
    yield Verdict("closed-book", f"<= {_CLOSED_BOOK}", f"{closed:.2f}", closed <= _CLOSED_BOOK)
    changed = found["changed"]
    yield Verdict(
        f"of {changed['right_before']} right answers, those that follow when the passages change",
        f">= {_FOLLOW}",
        f"{changed['followed']:.2f}",
        changed["followed"] >= _FOLLOW,
    )
    same = found["same_with_a_host_killed"]
    yield Verdict("the same answers with one of four hosts killed half-way", "1.00", f"{same:.2f}", same == 1)
    first = found["found_first"]
    yield Verdict(
        "questions whose passage is found first, before and after the query encoder has learned",
        "",
        f"{first['before']:.2f}, {first['after']:.2f}",
    )


def _recall_verdicts(found: Mapping[str, Any]) -> Iterator[Verdict]:
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
    parser = command_parser(__doc__, "a 64th of the text, under 90 s")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--encoder-decoder", action="store_true", help="answer with one, too: twice the time")
    options = parser.parse_args()
    end_in_order_when_stopped()
    console = Console(width=150)
    needed = [] if options.only == ["answers"] else corpora.remedies()
    missing = needed + ([] if find_spec("bm25s") else ["pip install '.[retrieval]'"])
    if missing:
        console.print(f"This benchmark needs: {'; '.join(missing)}")
        raise SystemExit(1)
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    parts = options.only or PARTS
    with console.status("") as status:
        if "recall" in parts:
            status.update("recall")
            share, tested = _QUICK if options.quick else _FULL
            results["recall"] = recall.measure(ask(random.Random(0), share, tested))
        if "answers" in parts:
            size = answers.QUICK if options.quick else answers.Size()
            results["answers"] = answers.measure(size, lambda what: status.update(f"answers: {what}"))
            if options.encoder_decoder:
                size = replace(size, encoder_layers=size.layers)
                results["encoder_decoder"] = answers.measure(
                    size, lambda what: status.update(f"answers of an encoder-decoder: {what}")
                )
    write_figures(options.json, results)
    console.print(table_of("retrieval", verdicts(results)))


if __name__ == "__main__":
    main()
