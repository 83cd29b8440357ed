"""Made-up towns and ships, passages with facts about them, and questions whose answers are in no model's weights.

What a thing's founder or harbour is called is drawn, so whoever has not read the passage can't know. The things of the
test, and the ways in which its passages say something and its questions ask, are none that models learned from.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dht.memory import Passage

_RELATIONS = (
    ["founder", "river", "mayor", "guardian", "neighbour"],
    ["captain", "harbour", "cargo", "owner", "builder"],
)
_KINDS = ("town", "ship")
_FACTS = 3
_SAYS = (
    "Its {what} is {value}.",
    "The {what} is called {value}.",
    "The name of its {what} is {value}.",
    "As {what} it has {value}.",
    "Its {what} goes by the name of {value}.",
)
_SAYS_TESTED = ("The {what} of the {kind} is {value}.", "As its {what} people name {value}.")
_ASKS = (
    "what is the {what} of {name}?",
    "what is the {what} of {name} called?",
    "which {what} does {name} have?",
    "{name} has which {what}?",
    "who or what is {name}'s {what}?",
    "tell me the name of {name}'s {what}.",
)
_ASKS_TESTED = ("name the {what} of {name}.", "of {name}, what is the {what}?")
_SYLLABLES = [
    first + vowel + last
    for first in [
        "b",
        "d",
        "f",
        "g",
        "k",
        "l",
        "m",
        "n",
        "p",
        "r",
        "s",
        "t",
        "v",
        "z",
        "br",
        "dr",
        "kl",
        "st",
        "tr",
    ]
    for vowel in "aeiou"
    for last in ("", "n", "r", "l", "s")
]


def _name(rng: random.Random) -> str:
    return "".join(rng.choices(_SYLLABLES, k=rng.choice((2, 3)))).capitalize()


VALUES = sorted({_name(random.Random(number)) for number in range(300)})


@dataclass(frozen=True)
class Thing:
    """A name, and what its relations are called."""

    kind: str
    name: str
    facts: Mapping[str, str]
    passage: Passage

    @classmethod
    def drawn(cls, rng: random.Random, *, tested: bool) -> "Thing":
        kind = rng.randrange(2)
        facts = {what: rng.choice(VALUES) for what in rng.sample(_RELATIONS[kind], _FACTS)}
        name = _name(rng)
        return cls(_KINDS[kind], name, facts, _passage(rng, _KINDS[kind], name, facts, tested))

    def changed(self, rng: random.Random) -> "Thing":
        """The same thing, of which a new passage says something else."""
        facts = {what: rng.choice(VALUES) for what in self.facts}
        return replace(self, facts=facts, passage=_passage(rng, self.kind, self.name, facts, True))

    def ask(self, rng: random.Random, *, tested: bool) -> "Asked":
        what = rng.choice(list(self.facts))
        way = rng.choice(_ASKS_TESTED if tested else _ASKS)
        return Asked(way.format(what=what, name=self.name), what, self)


@dataclass(frozen=True)
class Asked:
    """A question, and the thing that it is about."""

    text: str
    what: str
    thing: Thing

    @property
    def answer(self) -> str:
        return self.thing.facts[self.what]


def _passage(rng: random.Random, kind: str, name: str, facts: Mapping[str, str], tested: bool) -> Passage:
    ways = _SAYS_TESTED if tested else _SAYS
    says = [rng.choice(ways).format(what=what, value=value, kind=kind) for what, value in facts.items()]
    return Passage(f"A {kind}. {' '.join(says)}", name, "facts", 0, "CC0-1.0")


def things(rng: random.Random, count: int, taken: set[str], *, tested: bool) -> Sequence[Thing]:
    """`taken`: names that are not given again; takes the new ones."""
    found: list[Thing] = []
    while len(found) < count:
        thing = Thing.drawn(rng, tested=tested)
        if thing.name not in taken:
            taken.add(thing.name)
            found.append(thing)
    return found
