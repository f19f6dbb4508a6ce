"""The words of the command line and its help, both from the table of `verbs`: so the two cannot
differ.

Importing this costs nothing but argparse: help is there at once.
"""

import argparse
import re
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NoReturn

from spd_lightning.commands.verbs import ALLOW, CONFIG, DEBUG, HELP, PROGRAM, VERBS, Option, Verb
from spd_lightning.errors import BadInput, nearest

# ---- reading -------------------------------------------------------------------------------------


class Reader(argparse.ArgumentParser):
    """Reads the words of one verb; whatever is wrong with them is one line."""

    def __init__(self, verb: Verb):
        super().__init__(add_help=False, allow_abbrev=False)
        self.verb = verb
        for option in verb.options:
            if not option.passed:
                self._take(option)

    def _take(self, option: Option) -> None:
        if not option.name.startswith("-"):
            self.add_argument(
                option.dest, metavar=option.name, nargs=None if option.needed else "?"
            )
            return
        if option.value is None:
            self.add_argument(option.name, action="store_true")
            return
        names = [option.name, "-c"] if option is CONFIG else [option.name]
        several: dict[str, Any] = {"action": "extend", "nargs": "+"} if option.many else {}
        if option is CONFIG:
            several = {"action": "append"}
        self.add_argument(*names, default=option.default, type=option.kind, **several)

    def error(self, message: str) -> NoReturn:
        """Raise BadInput with the option, what is wrong with it, and an example."""
        raise BadInput(_complaint(self.verb, message))


def _complaint(verb: Verb, message: str) -> str:
    """Return argparse's message as a line that names the remedy."""
    if found := re.match(r"the following arguments are required: (\w+)", message):
        option = next(option for option in verb.options if option.name == found[1])
        return f"{verb.name}: {option.name} is missing: {option.help}; for example: {verb.example}"
    if found := re.match(r"argument (--\w+)(?:/\S+)?: (.*)", message, re.DOTALL):
        option = next(option for option in verb.options if option.name == found[1])
        example = f"for example: {option.name} {option.example}"
        if found[2].startswith("expected"):
            return f"{verb.name}: '{option.name}' needs a value; {example}"
        if found[2].startswith("ignored explicit argument"):
            return f"{verb.name}: '{option.name}' takes no value"
        return f"{verb.name}: {option.name} {found[2]}; {example}"
    return f"{verb.name}: {message}; see: {PROGRAM} {verb.name} --help"


def read(name: str, words: Sequence[str]) -> argparse.Namespace:
    """Read the words of a verb that takes no settings of configs.

    Raises:
        BadInput: an option is unknown or has a value that it cannot take, an argument is missing or
            one too many.
    """
    verb = VERBS[name]
    found, rest = read_some(name, words)
    for word in rest:
        if word.startswith("-"):
            known = [option.name for option in verb.options if option.name.startswith("-")]
            raise BadInput(
                f"{name}: unknown option '{word}'; {nearest(word.partition('=')[0], known)}"
            )
        raise BadInput(f"{name}: unexpected argument '{word}'; see: {PROGRAM} {name} --help")
    return found


def read_some(name: str, words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Read the words of a verb that the table knows; return the others too, in their order.

    Raises:
        BadInput: an option has a value that it cannot take, or an argument is missing.
    """
    verb = VERBS[name]
    found, rest = Reader(verb).parse_known_args(_with_negative_numbers(verb, words))
    for option in verb.options:
        value = getattr(found, option.dest, None)
        if option.choices and value is not None and value not in option.choices:
            raise BadInput(
                f"{name}: {option.name} '{value}': unknown value; {nearest(value, option.choices)}"
            )
    return found, rest


def _with_negative_numbers(verb: Verb, words: Sequence[str]) -> list[str]:
    """Return the words with `--input -0.5,0` as `--input=-0.5,0`: argparse takes such a value for
    an option.
    """
    valued = {
        option.name for option in verb.options if option.value is not None and not option.passed
    }
    joined = list[str]()
    for word in words:
        if joined and joined[-1] in valued and re.match(r"-[.\d]", word):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


# ---- help ----------------------------------------------------------------------------------------

HELP_WORDS = ("-h", "--help")


def asked_for(words: Sequence[str]) -> str | None:
    """Return the page of help that a command line asks for; None if it asks for none that is known
    without torch.
    """
    if not words or words[0] in (*HELP_WORDS, "help"):
        return page(words[1]) if words[1:] and words[1] in VERBS else overview()
    if words[0] in VERBS and topic(words) is None and any(word in HELP_WORDS for word in words):
        return page(words[0])
    return None


def topic(words: Sequence[str]) -> str | None:
    """Return what settings are asked for: X of `fit --help X`."""
    for word, after in pairwise(words):
        if word in HELP_WORDS and VERBS[words[0]].settings and not after.startswith("-"):
            return after
    return None


def page(name: str) -> str:
    """Return the help of one verb: usage, purpose, options with their defaults, an example."""
    verb = VERBS[name]
    words = [option.name if option.needed else f"[{option.name}]" for option in verb.arguments]
    words += [
        option.shown for option in verb.options if option.needed and option not in verb.arguments
    ]
    usage = " ".join([f"usage: {PROGRAM} {name}", *words, "[options]"])
    lines = [usage, "", verb.purpose]
    if verb.arguments:
        lines += ["", "arguments", *_rows(verb.arguments)]
    others = [option for option in verb.options if option not in verb.arguments]
    lines += ["", "options", *_rows([*others, ALLOW, DEBUG, HELP])]
    if verb.notes:
        lines += ["", *verb.notes]
    return "\n".join([*lines, "", "example", f"  {PROGRAM} {verb.example}", ""])


def _rows(options: Sequence[Option]) -> list[str]:
    width = max(len(option.shown) for option in options)
    rows = []
    for option in options:
        first, *more = textwrap.wrap(_explained(option), 110 - width)
        rows.append(f"  {option.shown:<{width}}  {first}")
        rows += [f"  {'':<{width}}  {line}" for line in more]
    return rows


def _explained(option: Option) -> str:
    facts = []
    if option.choices:
        facts.append(f"one of {', '.join(option.choices)}")
    if option.many and option is not CONFIG:
        facts.append("several are allowed")
    if option.default is not None:
        facts.append(f"default: {option.default}")
    return f"{option.help} ({'; '.join(facts)})" if facts else option.help


def overview() -> str:
    """Return the help of the whole tool: its verbs, a line each."""
    width = max(len(verb.brief) for verb in VERBS.values())
    lines = [f"  {verb.name:<9} {verb.brief:<{width}}  {verb.purpose}" for verb in VERBS.values()]
    return "\n".join([*_HEAD, *lines, *_FOOT, ""])


_HEAD = (
    (
        "Stochastic Parameter Decomposition on PyTorch Lightning: take a neural network apart, see "
        "which parts each input"
    ),
    "needs.",
    "",
    f"usage: {PROGRAM} VERB [options]",
    "",
)
_FOOT = (
    "",
    f"Options and an example of a verb: {PROGRAM} VERB --help",
    f"All settings of configs:          {PROGRAM} fit --help model (or data, trainer, or a class)",
    "",
    (
        "Runs are kept in ./runs, or in $SPD_RUNS. Every config says at its top what it does, how "
        "long it takes, and what"
    ),
    "comes out. After `pip install`, `spd VERB` is the same as `python -m spd_lightning VERB`.",
)
