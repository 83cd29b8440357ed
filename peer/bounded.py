"""A dictionary with a bound: strangers must not be able to make a peer remember more and more."""

from collections import OrderedDict
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")


class BoundedDict(OrderedDict[K, V]):
    """Holds at most `most` entries and evicts those that were set longest ago. `move_to_end` makes an entry the
    newest.
    """

    def __init__(self, most: int) -> None:
        assert most > 0, "nothing could be remembered"
        super().__init__()
        self.most = most

    def __setitem__(self, key: K, value: V) -> None:
        self.put(key, value)

    def put(self, key: K, value: V) -> list[V]:
        """Sets the entry as the newest. Returns the evicted values, for owners that must close them."""
        super().__setitem__(key, value)
        self.move_to_end(key)
        return [self.popitem(last=False)[1] for _ in range(len(self) - self.most)]
