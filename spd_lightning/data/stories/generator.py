"""Tiny children's stories whose hidden variables are known: who, where, with what, and what came of
it.

A story is a pure function of (seed, index). Its text is drawn from `plots.py` and `words.py`;
beside it come its facts: which characters name a person, which pronoun stands for whom, which word
is a cause and which its effect.

A pronoun for one is written only where it can mean one thing: its referent is the last one named of
that gender (people: female, male; toys, animals and food: neuter). Elsewhere the name itself is
written.
"""

import hashlib
import random
import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple, TypeVar

from spd_lightning.data.stories.templates import BEATS, PLOTS
from spd_lightning.data.stories.vocabulary import ADULTS, BOYS, GIRLS, PLACES, WORDS

T = TypeVar("T")


class Fact(NamedTuple):
    """One hidden variable and the characters of the text that show it.

    Names are: subject, friend, adult, object, animal, food, place, color, size, trait, day, time,
    pronoun, cause, effect, whose value is the text between start and end in lower case (names as
    they are written); and gender (female, male, neuter, plural) and case (subject, object,
    possessive), which say more of a name or a pronoun.
    """

    name: str
    value: str
    start: int
    end: int
    about: str = ""  # whom a pronoun or a gender speaks of; of an effect, its cause


class Story(NamedTuple):
    """A story and what there is to know about it."""

    text: str
    facts: list[Fact]
    plot: str


class PronounPrompt(NamedTuple):
    """The beginning of a story up to a pronoun that stands for a person."""

    text: str  # does not end in a space
    right: str  # the pronoun, a space before it
    wrong: str  # the other gender's
    referent: str  # the person's name, or "mom", "dad", ...


PRONOUNS = {
    "female": {"subject": "she", "object": "her", "possessive": "her"},
    "male": {"subject": "he", "object": "him", "possessive": "his"},
    "neuter": {"subject": "it", "object": "it", "possessive": "its"},
    "plural": {"subject": "they", "object": "them", "possessive": "their"},
}
_CASES = {"he": "subject", "him": "object", "his": "possessive", "it": "object"}
_THEM = {"they": "subject", "them": "object", "their": "possessive"}
_PARTS = re.compile(
    r"\{(?P<slot>[^}]+)\}|\[(?P<mark>cause|effect): (?P<word>[^\]]+)\]|(?P<plain>[^{\[]+)"
)
_PEOPLE = {"A": "subject", "B": "friend", "G": "adult"}
_THINGS = {"toy": "object", "animal": "animal", "food": "food", "treat": "food"}


def story(seed: int, index: int) -> Story:
    """The story of that number: always the same one."""
    key = hashlib.blake2b(f"story {seed} {index}".encode(), digest_size=8).digest()
    teller = _Teller(random.Random(int.from_bytes(key)))
    plot = teller.pick(list(PLOTS))
    for lines in _beats(plot):
        teller.tell(teller.pick(lines))
    return Story(teller.text, teller.facts, plot)


def pronoun_prompts(seed: int, count: int) -> list[PronounPrompt]:
    """Beginnings of stories, one a story, that end right before a pronoun; what comes next, and
    what must not.
    """
    found = list[PronounPrompt]()
    index = 0
    while len(found) < count:
        chosen = list(_before_pronouns(story(seed, index)))
        found += chosen[index % len(chosen) :][:1] if chosen else []
        index += 1
    return found


def _before_pronouns(told: Story) -> Iterator[PronounPrompt]:
    cases = {fact.start: fact.value for fact in told.facts if fact.name == "case"}
    genders = {fact.start: fact.value for fact in told.facts if fact.name == "gender"}
    for fact in told.facts:
        if (
            fact.name != "pronoun"
            or genders[fact.start] not in ("female", "male")
            or told.text[fact.start - 1] != " "
        ):
            continue
        right = told.text[fact.start : fact.end]
        other = "male" if genders[fact.start] == "female" else "female"
        wrong = PRONOUNS[other][cases[fact.start]]
        wrong = wrong.capitalize() if right[0].isupper() else wrong
        yield PronounPrompt(told.text[: fact.start - 1], f" {right}", f" {wrong}", fact.about)


Part = tuple[
    str, str
]  # kind and content: ("plain", "went to the "), ("slot", "A.he"), ("cause", "rain")


@cache
def _beats(plot: str) -> list[list[list[Part]]]:
    """A plot's beats, each with the ways to tell it, each of those in parts."""
    beats = list[list[str]]()
    for line in PLOTS[plot].strip().split("\n"):
        if line.startswith("@"):
            beats.append([way.removeprefix("| ") for way in BEATS[line[1:]].strip().split("\n")])
        elif line.startswith("| "):
            beats[-1].append(line[2:])
        else:
            beats.append([line])
    return [[_parts(line) for line in ways] for ways in beats]


def _parts(line: str) -> list[Part]:
    if line == "-":
        return []
    found = _PARTS.finditer(line)
    return [
        (m["mark"], m["word"]) if m["mark"] else (str(m.lastgroup), m[str(m.lastgroup)])
        for m in found
    ]


class _Teller:
    """Writes a story part by part, and remembers what it has drawn and whom it named last."""

    def __init__(self, source: random.Random) -> None:
        self.text = ""
        self.facts = list[Fact]()
        self._source = source
        self._drawn: dict[str, str] = {}
        self._genders: dict[str, str] = dict.fromkeys(_THINGS, "neuter")
        self._last: dict[str, str] = {}  # gender → who of it was named last
        self._cause = ""

    def pick(self, options: Sequence[T]) -> T:
        """One of them; `random()` alone gives the same numbers in every version of Python."""
        return options[int(self._source.random() * len(options))]

    def tell(self, line: list[Part]) -> None:
        """Writes one beat."""
        if not line:
            return
        self.text += " " if self.text else ""
        self._opens = True
        for kind, content in line:
            if kind == "plain":
                self._write(content)
            elif kind == "slot":
                self._slot(content)
            else:
                self._mark(kind, content)

    def _write(self, words: str) -> tuple[int, int]:
        """Adds words, with a capital at the start of a sentence; returns where they stand."""
        start = len(self.text)
        self.text += words[0].upper() + words[1:] if self._opens else words
        self._opens = self.text.endswith((". ", "! ", "? "))
        return start, len(self.text)

    def _mark(self, kind: str, word: str) -> None:
        about = self._cause if kind == "effect" else ""
        self.facts.append(Fact(kind, word, *self._write(word), about))
        self._cause = word if kind == "cause" else self._cause

    def _slot(self, slot: str) -> None:
        who, _, form = slot.partition(".")
        if slot.startswith(("a ", "A ")):
            self._write(slot[0] + ("n " if self._word(slot[2:])[0] in "aeiou" else " "))
            self._name(slot[2:])
        elif slot == "at":
            self._write(PLACES[self._word("place")])
        elif slot in _THEM:
            self._pronoun("plural", _THEM[slot], f"{self._word('A')} and {self._word('B')}")
        elif form == "child":
            child = self._word(who)
            gender = self._genders[who]
            at = self._write("girl" if gender == "female" else "boy")
            self.facts.append(Fact("gender", gender, *at, child))
        elif form in _CASES:
            self._refer(who, _CASES[form])
        else:
            self._name(who)

    def _refer(self, who: str, case: str) -> None:
        """A pronoun where it is clear, the name elsewhere."""
        if self._last.get(self._genders.get(who, "")) == who:
            self._pronoun(self._genders[who], case, self._word(who))
            return
        if self._genders.get(who) == "neuter":
            self._write("the ")
        self._name(who)
        if case == "possessive":
            self._write("'s")

    def _pronoun(self, gender: str, case: str, about: str) -> None:
        word = PRONOUNS[gender][case]
        at = self._write(word)
        self.facts += [
            Fact(*fact, *at, about)
            for fact in (("pronoun", word), ("gender", gender), ("case", case))
        ]

    def _name(self, slot: str) -> None:
        word = self._word(slot)
        at = self._write(word)
        self.facts.append(Fact(_PEOPLE.get(slot) or _THINGS.get(slot) or slot, word, *at))
        if gender := self._genders.get(slot):
            self._last[gender] = slot
            self.facts.append(Fact("gender", gender, *at, word))

    def _word(self, slot: str) -> str:
        """Return the word for a slot of this story, drawn at its first use."""
        if slot not in self._drawn:
            self._drawn[slot] = self._draw(slot)
        return self._drawn[slot]

    def _draw(self, slot: str) -> str:
        if slot in ("A", "B"):
            self._genders[slot] = self.pick(["female", "male"])
            names = GIRLS if self._genders[slot] == "female" else BOYS
            return self.pick([name for name in names if name not in self._drawn.values()])
        if slot == "G":
            word = self.pick(list(ADULTS))
            self._genders[slot] = ADULTS[word]
            return word
        return self.pick(list(PLACES) if slot == "place" else WORDS[slot])
