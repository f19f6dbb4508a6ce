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
_OTHER_GENDER = {"female": "male", "male": "female"}
_SEGMENTS = re.compile(
    r"\{(?P<slot>[^}]+)\}|\[(?P<mark>cause|effect): (?P<word>[^\]]+)\]|(?P<plain>[^{\[]+)"
)
_PEOPLE = {"A": "subject", "B": "friend", "G": "adult"}
_THINGS = {"toy": "object", "animal": "animal", "food": "food", "treat": "food"}
_FACT_NAMES = _PEOPLE | _THINGS


def story(seed: int, index: int) -> Story:
    """Return the story of this seed and index, which is always the same."""
    label = f"story {seed} {index}".encode()
    key = hashlib.blake2b(label, digest_size=8).digest()
    number = int.from_bytes(key)
    source = random.Random(number)
    teller = _Teller(source)
    plots = list(PLOTS)
    plot = teller.pick(plots)
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
        text, facts, _ = story(seed, index)
        candidates = list(_before_pronouns(text, facts))
        if candidates:
            nth = index % len(candidates)
            prompts.append(candidates[nth])
        index += 1
    return prompts


def _before_pronouns(text: str, facts: list[Fact]) -> Iterator[PronounPrompt]:
    """Yield the beginnings of a story that end before a pronoun for a single person."""
    cases = {fact.start: fact.value for fact in facts if fact.name == "case"}
    genders = {fact.start: fact.value for fact in facts if fact.name == "gender"}
    for fact in facts:
        if fact.name != "pronoun":
            continue
        gender = genders[fact.start]
        if gender not in _OTHER_GENDER:
            continue
        space = fact.start - 1
        if text[space] != " ":
            continue
        right = text[fact.start : fact.end]
        other = _OTHER_GENDER[gender]
        case = cases[fact.start]
        wrong = PRONOUNS[other][case]
        if right[0].isupper():
            wrong = wrong.capitalize()
        yield PronounPrompt(
            text=text[:space], right=f" {right}", wrong=f" {wrong}", referent=fact.about
        )


Segment = tuple[str, str]
"""Kind and content, for example ("plain", "went to the "), ("slot", "A.he"), ("cause", "rain")."""

Wording = list[Segment]
"""One way to tell a beat."""


@cache
def _beats(plot: str) -> list[list[Wording]]:
    """Return the beats of a plot: for each, all its wordings."""
    beats = list[list[Wording]]()
    for line in _lines(PLOTS[plot]):
        if line.startswith("@"):
            name = line[1:]
            shared = _lines(BEATS[name])
            wordings = [_segments(other.removeprefix("| ")) for other in shared]
            beats.append(wordings)
        elif line.startswith("| "):
            wording = _segments(line[2:])
            beats[-1].append(wording)
        else:
            wording = _segments(line)
            beats.append([wording])
    return beats


def _lines(template: str) -> list[str]:
    stripped = template.strip()
    return stripped.split("\n")


def _segments(line: str) -> Wording:
    """Split a line into plain text, slots and marks; an empty wording has none."""
    if line == "-":
        return []
    segments = list[Segment]()
    for match in _SEGMENTS.finditer(line):
        mark = match["mark"]
        if mark:
            word = match["word"]
            segments.append((mark, word))
        else:
            kind = str(match.lastgroup)
            content = match[kind]
            segments.append((kind, content))
    return segments


class _Teller:
    """Writes a story beat by beat; remembers the drawn words and who was named last."""

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
        fraction = self._source.random()  # from 0 to below 1
        index = int(fraction * len(options))
        return options[index]

    def tell(self, wording: Wording) -> None:
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
            initial = words[0]
            words = initial.upper() + words[1:]
        self.text += words
        end = len(self.text)
        self._opens = self.text.endswith((". ", "! ", "? "))
        return start, end

    def _write_mark(self, kind: str, word: str) -> None:
        """Write a cause or an effect."""
        span = self._write(word)
        if kind == "cause":
            self.facts.append(Fact(kind, word, *span))
            self._cause = word
        else:
            effect = Fact(kind, word, *span, about=self._cause)
            self.facts.append(effect)

    def _write_slot(self, slot: str) -> None:
        who, _, form = slot.partition(".")
        if slot.startswith(("a ", "A ")):
            self._write_with_article(slot[0], slot[2:])
        elif slot == "at":
            place = self._word("place")
            preposition = PLACES[place]
            self._write(preposition)
        elif slot in _PLURAL_CASES:
            first = self._word("A")
            second = self._word("B")
            both = f"{first} and {second}"
            self._write_pronoun("plural", _PLURAL_CASES[slot], both)
        elif form == "child":
            self._write_child(who)
        elif form in _CASES:
            case = _CASES[form]
            self._refer_to(who, case)
        else:
            self._write_name(who)

    def _write_with_article(self, article: str, slot: str) -> None:
        word = self._word(slot)
        if word[0] in "aeiou":
            article += "n"
        self._write(f"{article} ")
        self._write_name(slot)

    def _write_child(self, who: str) -> None:
        """Write "girl" or "boy" for one of the two people."""
        name = self._word(who)
        gender = self._genders[who]
        word = "girl" if gender == "female" else "boy"
        span = self._write(word)
        fact = Fact("gender", gender, *span, about=name)
        self.facts.append(fact)

    def _refer_to(self, who: str, case: str) -> None:
        """Write a pronoun if it is unambiguous, the name otherwise."""
        gender = self._genders.get(who, "")
        last_named = self._last.get(gender)
        if last_named == who:
            name = self._word(who)
            self._write_pronoun(gender, case, name)
            return
        if gender == "neuter":
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
        name = _FACT_NAMES.get(slot, slot)
        fact = Fact(name, word, *span)
        self.facts.append(fact)
        gender = self._genders.get(slot)
        if gender is not None:
            self._last[gender] = slot
            fact = Fact("gender", gender, *span, about=word)
            self.facts.append(fact)

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
            unused = [name for name in names if name not in drawn]
            return self.pick(unused)
        if slot == "G":
            adults = list(ADULTS)
            adult = self.pick(adults)
            self._genders[slot] = ADULTS[adult]
            return adult
        if slot == "place":
            places = list(PLACES)
            return self.pick(places)
        return self.pick(WORDS[slot])
