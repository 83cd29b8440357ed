"""Text from tokens as they arrive: only whole characters, up to a stop sequence."""

import codecs
from collections.abc import Sequence


class TextStream:
    """The text of one answer.

    Bytes that are not UTF-8 become U+FFFD. What may be the start of a character or of a stop sequence is held back. The
    text does not depend on the boundaries of tokens. It ends before the first complete stop sequence; if several end at
    the same character, before the longest of them.
    """

    def __init__(self, token_bytes: Sequence[bytes], stops: Sequence[str] = ()) -> None:
        assert all(stops), "an empty stop sequence would stop everything"
        self._token_bytes = token_bytes
        self._stops = tuple(stops)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.length = 0
        """How many characters were returned."""
        self.has_stopped = False

    @property
    def decoded(self) -> int:
        """How many characters were decoded: returned or held back."""
        return self.length + len(self._held)

    def feed(self, token: int) -> str:
        """Returns the text that is certain now. Don't feed anything after it has stopped."""
        assert not self.has_stopped
        return self._take(self._decoder.decode(self._token_bytes[token]))

    def finish(self) -> str:
        """The rest of the text, if no token follows."""
        rest = self._take(self._decoder.decode(b"", final=True))
        return rest if self.has_stopped else rest + self._give(len(self._held))

    def _take(self, text: str) -> str:
        self._held += text
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.has_stopped = True
            certain = self._give(min(found)[1])
            self._held = ""
            return certain
        return self._give(
            len(self._held) - max((_overlap(self._held, stop) for stop in self._stops), default=0)
        )

    def _give(self, length: int) -> str:
        certain, self._held = self._held[:length], self._held[length:]
        self.length += length
        return certain


def _overlap(text: str, stop: str) -> int:
    """The largest number of characters at the end of the text that the stop sequence begins with."""
    return next((n for n in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:n])), 0)
