"""The inverse of span corruption."""

from collections.abc import Sequence


def restore_spans(inputs: Sequence[int], targets: Sequence[int], sentinels: Sequence[int]) -> list[int]:
    """The original text: the inputs, with each sentinel replaced by what follows it in the targets."""
    known, spans = set(sentinels), dict[int, list[int]]()
    current: list[int] = []
    for token in targets:
        if token in known:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    return [each for token in inputs for each in (spans[token] if token in known else [token])]
