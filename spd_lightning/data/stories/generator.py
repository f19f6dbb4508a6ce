"""Tiny children's stories with known hidden variables.

A story is a pure function of (seed, index). Its text is drawn from `templates.py` and
`vocabulary.py`. It comes with its facts: which characters name a person, which pronoun refers to
whom, which word is a cause and which one its effect.

A singular pronoun is written only if it is unambiguous: its referent is the last one named of that
gender (people: female, male; toys, animals and food: neuter). Otherwise the name is repeated.
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
    """One hidden variable, and the characters of the text that show it.

    There are two kinds of names:

    - subject, friend, adult, object, animal, food, place, color, size, trait, day, time, pronoun,
      cause, effect: the value is the text between start and end, in lower case (except names).
    - gender (female, male, neuter, plural) and case (subject, object, possessive): properties of
      the name or pronoun between start and end.
    """

    name: str
    value: str
    start: int
    end: int
    about: str = ""  # the person or thing that a pronoun or gender refers to; an effect's cause


class Story(NamedTuple):
    """A story and its facts."""

    text: str
    facts: list[Fact]
    plot: str


class PronounPrompt(NamedTuple):
    """The beginning of a story, up to a pronoun that refers to a person."""

    text: str  # does not end in a space
    right: str  # the pronoun, preceded by a space
    wrong: str  # the pronoun of the other gender
    referent: str  # the person's name, or "mom", "dad", ...


PRONOUNS = {
    "female": {"subject": "she", "object": "her", "possessive": "her"},
    "male": {"subject": "he", "object": "him", "possessive": "his"},
    "neuter": {"subject": "it", "object": "it", "possessive": "its"},
    "plural": {"subject": "they", "object": "them", "possessive": "their"},
}
_CASES = {"he": "subject", "him": "object", "his": "possessive", "it": "object"}
_PLURAL_CASES = {"they": "subject", "them": "object", "their": "possessive"}
_PARTS = re.compile(
    r"\{(?P<slot>[^}]+)\}|\[(?P<mark>cause|effect): (?P<word>[^\]]+)\]|(?P<plain>[^{\[]+)"
)
_PEOPLE = {"A": "subject", "B": "friend", "G": "adult"}
_THINGS = {"toy": "object", "animal": "animal", "food": "food", "treat": "food"}


def story(seed: int, index: int) -> Story:
    """Return the story of this seed and index, which is always the same."""
    label = f"story {seed} {index}".encode()
    key = hashlib.blake2b(label, digest_size=8).digest()
    source = random.Random(int.from_bytes(key))
    teller = _Teller(source)
    plot = teller.pick(list(PLOTS))
    for wordings in _beats(plot):
        wording = teller.pick(wordings)
        teller.tell(wording)
    return Story(teller.text, teller.facts, plot)


def pronoun_prompts(seed: int, count: int) -> list[PronounPrompt]:
    """Return beginnings of stories that end right before a pronoun, one per story.

    Each comes with the right pronoun and the one of the other gender.
    """
    prompts = list[PronounPrompt]()
    index = 0
    while len(prompts) < count:
        candidates = list(_before_pronouns(story(seed, index)))
        if candidates:
            prompts.append(candidates[index % len(candidates)])
        index += 1
    return prompts


def _before_pronouns(told: Story) -> Iterator[PronounPrompt]:
    cases = {fact.start: fact.value for fact in told.facts if fact.name == "case"}
    genders = {fact.start: fact.value for fact in told.facts if fact.name == "gender"}
    for fact in told.facts:
        if fact.name != "pronoun":
            continue
        gender = genders[fact.start]
        before = fact.start - 1
        if gender not in ("female", "male") or told.text[before] != " ":
            continue
        right = told.text[fact.start : fact.end]
        other = "male" if gender == "female" else "female"
        wrong = PRONOUNS[other][cases[fact.start]]
        if right[0].isupper():
            wrong = wrong.capitalize()
        yield PronounPrompt(told.text[:before], f" {right}", f" {wrong}", fact.about)


Part = tuple[str, str]
"""Kind and content, for example ("plain", "went to the "), ("slot", "A.he"), ("cause", "rain")."""


@cache
def _beats(plot: str) -> list[list[list[Part]]]:
    """Return the beats of a plot: for each, all its wordings, split into parts."""
    beats = list[list[str]]()
    for line in PLOTS[plot].strip().split("\n"):
        if line.startswith("@"):
            wordings = BEATS[line[1:]].strip().split("\n")
            beats.append([wording.removeprefix("| ") for wording in wordings])
        elif line.startswith("| "):
            beats[-1].append(line[2:])
        else:
            beats.append([line])
    return [[_parts(wording) for wording in wordings] for wordings in beats]


def _parts(line: str) -> list[Part]:
    if line == "-":
        return []
    parts = list[Part]()
    for match in _PARTS.finditer(line):
        if match["mark"]:
            parts.append((match["mark"], match["word"]))
        else:
            kind = str(match.lastgroup)
            parts.append((kind, match[kind]))
    return parts


class _Teller:
    """Writes a story part by part; remembers the drawn words and who was named last."""

    def __init__(self, source: random.Random) -> None:
        self.text = ""
        self.facts = list[Fact]()
        self._source = source
        self._drawn: dict[str, str] = {}
        self._genders: dict[str, str] = dict.fromkeys(_THINGS, "neuter")
        self._last: dict[str, str] = {}  # gender → the last slot of that gender that was named
        self._cause = ""

    def pick(self, options: Sequence[T]) -> T:
        """Draw one of the options.

        Only `random()` gives the same numbers in every version of Python.
        """
        index = int(self._source.random() * len(options))
        return options[index]

    def tell(self, wording: list[Part]) -> None:
        """Write one beat."""
        if not wording:
            return
        if self.text:
            self.text += " "
        self._opens = True
        for kind, content in wording:
            if kind == "plain":
                self._write(content)
            elif kind == "slot":
                self._write_slot(content)
            else:
                self._write_mark(kind, content)

    def _write(self, words: str) -> tuple[int, int]:
        """Add words, capitalized at the start of a sentence; return their start and end."""
        start = len(self.text)
        if self._opens:
            words = words[0].upper() + words[1:]
        self.text += words
        self._opens = self.text.endswith((". ", "! ", "? "))
        return start, len(self.text)

    def _write_mark(self, kind: str, word: str) -> None:
        """Write a cause or an effect."""
        about = self._cause if kind == "effect" else ""
        span = self._write(word)
        self.facts.append(Fact(kind, word, *span, about))
        if kind == "cause":
            self._cause = word

    def _write_slot(self, slot: str) -> None:
        who, _, form = slot.partition(".")
        if slot.startswith(("a ", "A ")):
            vowel = self._word(slot[2:])[0] in "aeiou"
            self._write(slot[0] + ("n " if vowel else " "))
            self._write_name(slot[2:])
        elif slot == "at":
            self._write(PLACES[self._word("place")])
        elif slot in _PLURAL_CASES:
            both = f"{self._word('A')} and {self._word('B')}"
            self._write_pronoun("plural", _PLURAL_CASES[slot], both)
        elif form == "child":
            child = self._word(who)
            gender = self._genders[who]
            span = self._write("girl" if gender == "female" else "boy")
            self.facts.append(Fact("gender", gender, *span, child))
        elif form in _CASES:
            self._refer_to(who, _CASES[form])
        else:
            self._write_name(who)

    def _refer_to(self, who: str, case: str) -> None:
        """Write a pronoun if it is unambiguous, the name otherwise."""
        if self._last.get(self._genders.get(who, "")) == who:
            self._write_pronoun(self._genders[who], case, self._word(who))
            return
        if self._genders.get(who) == "neuter":
            self._write("the ")
        self._write_name(who)
        if case == "possessive":
            self._write("'s")

    def _write_pronoun(self, gender: str, case: str, about: str) -> None:
        word = PRONOUNS[gender][case]
        span = self._write(word)
        self.facts += [
            Fact("pronoun", word, *span, about),
            Fact("gender", gender, *span, about),
            Fact("case", case, *span, about),
        ]

    def _write_name(self, slot: str) -> None:
        word = self._word(slot)
        span = self._write(word)
        name = _PEOPLE.get(slot) or _THINGS.get(slot) or slot
        self.facts.append(Fact(name, word, *span))
        if gender := self._genders.get(slot):
            self._last[gender] = slot
            self.facts.append(Fact("gender", gender, *span, word))

    def _word(self, slot: str) -> str:
        """Return the word for a slot, which is drawn when it is first used."""
        if slot not in self._drawn:
            self._drawn[slot] = self._draw(slot)
        return self._drawn[slot]

    def _draw(self, slot: str) -> str:
        if slot in ("A", "B"):
            gender = self.pick(["female", "male"])
            self._genders[slot] = gender
            names = GIRLS if gender == "female" else BOYS
            drawn = self._drawn.values()
            return self.pick([name for name in names if name not in drawn])
        if slot == "G":
            word = self.pick(list(ADULTS))
            self._genders[slot] = ADULTS[word]
            return word
        return self.pick(list(PLACES) if slot == "place" else WORDS[slot])
