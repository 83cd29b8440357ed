"""Invented towns and ships, passages with one fact each, and questions whose answers are in no model's weights.

Facts such as a town's founder or a ship's harbour are drawn at random, so a model that has not read the passage cannot
know them. The things of the test, and the wordings of its passages and questions, do not occur in training.
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
    "People say that its {what} is {value}.",
    "{value} is the name of its {what}.",
    "Whoever asks for the {what} hears the name {value}.",
    "For people of this {kind} the {what} is {value}.",
)
_SAYS_TESTED = ("The {what} of the {kind} is {value}.", "As its {what} people name {value}.")
_ASKS = (
    "what is the {what} of {name}?",
    "what is the {what} of {name} called?",
    "which {what} does {name} have?",
    "{name} has which {what}?",
    "who or what is {name}'s {what}?",
    "tell me the name of {name}'s {what}.",
    "can you name {name}'s {what}?",
    "do you know the {what} of {name}?",
    "i look for the {what} of {name}.",
    "about {name}: which {what} is it?",
)
_ASKS_TESTED = ("name the {what} of {name}.", "of {name}, what is the {what}?")
_SYLLABLES = [
    first + vowel + last
    for first in [*"bdfgklmnprstvz", "br", "dr", "kl", "st", "tr"]
    for vowel in "aeiou"
    for last in ("", "n", "r", "l", "s")
]


def _name(rng: random.Random) -> str:
    return "".join(rng.choices(_SYLLABLES, k=rng.choice((2, 3)))).capitalize()


VALUES = sorted({_name(random.Random(number)) for number in range(300)})


@dataclass(frozen=True)
class Thing:
    """A named thing, and its facts: the value of each of its relations."""

    kind: str
    name: str
    facts: Mapping[str, str]
    passages: Mapping[str, Passage]
    """For each relation, the passage that states it."""

    @classmethod
    def drawn(cls, rng: random.Random, *, tested: bool) -> "Thing":
        kind = rng.randrange(2)
        facts = {what: rng.choice(VALUES) for what in rng.sample(_RELATIONS[kind], _FACTS)}
        name = _name(rng)
        return cls(_KINDS[kind], name, facts, _passages(rng, _KINDS[kind], name, facts, tested))

    def changed(self, rng: random.Random) -> "Thing":
        """The same thing with other facts and passages."""
        facts = {what: rng.choice(VALUES) for what in self.facts}
        return replace(self, facts=facts, passages=_passages(rng, self.kind, self.name, facts, True))

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

    @property
    def passage(self) -> Passage:
        """The passage that answers the question."""
        return self.thing.passages[self.what]

    def negative(self, rng: random.Random) -> Passage:
        """A passage that states another fact about the same thing."""
        return self.thing.passages[rng.choice([what for what in self.thing.facts if what != self.what])]


def _passages(
    rng: random.Random, kind: str, name: str, facts: Mapping[str, str], tested: bool
) -> Mapping[str, Passage]:
    ways = _SAYS_TESTED if tested else _SAYS
    said = {what: rng.choice(ways).format(what=what, value=value, kind=kind) for what, value in facts.items()}
    return {what: Passage(f"A {kind}. {text}", name, "facts", 0, "CC0-1.0") for what, text in said.items()}


def things(rng: random.Random, count: int, taken: set[str], *, tested: bool) -> Sequence[Thing]:
    """Draws things with new names. `taken`: names that are in use; the new ones are added."""
    found: list[Thing] = []
    while len(found) < count:
        thing = Thing.drawn(rng, tested=tested)
        if thing.name not in taken:
            taken.add(thing.name)
            found.append(thing)
    return found


def passages_of(some: Sequence[Thing]) -> list[Passage]:
    return [passage for thing in some for passage in thing.passages.values()]
