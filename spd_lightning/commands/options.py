"""Read the words of the command line, and print its help, both from the table of `verbs`.

Importing this module loads nothing but argparse, so that help is printed at once.
"""

import argparse
import re
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NoReturn

from spd_lightning.commands.option import Option, Verb
from spd_lightning.commands.verbs import ALLOW, CONFIG, DEBUG, HELP, VERBS
from spd_lightning.errors import PROGRAM, BadInput, command, nearest

# ---- reading -------------------------------------------------------------------------------------


class Reader(argparse.ArgumentParser):
    """The argument parser of one verb; its errors are one line."""

    def __init__(self, verb: Verb):
        super().__init__(add_help=False, allow_abbrev=False)
        self.verb = verb
        for option in verb.options:
            if not option.passed:
                self._add(option)

    def _add(self, option: Option) -> None:
        if not option.name.startswith("-"):
            count = None if option.needed else "?"
            self.add_argument(option.dest, metavar=option.name, nargs=count)
            return
        if option.value is None:
            self.add_argument(option.name, action="store_true")
            return
        names = [option.name]
        settings: dict[str, Any] = {"default": option.default, "type": option.kind}
        if option is CONFIG:
            names.append("-c")
            settings["action"] = "append"
        elif option.many:
            settings["action"] = "extend"
            settings["nargs"] = "+"
        self.add_argument(*names, **settings)

    def error(self, message: str) -> NoReturn:
        """Raise BadInput with the option, the problem, and an example."""
        line = _error_line(self.verb, message)
        raise BadInput(line)


def _error_line(verb: Verb, message: str) -> str:
    """Return argparse's message as a line that names the remedy."""
    missing = re.match(r"the following arguments are required: (\w+)", message)
    if missing:
        option = _option_named(verb, missing[1])
        return f"{verb.name}: {option.name} is missing: {option.help}; for example: {verb.example}"
    wrong = re.match(r"argument (--\w+)(?:/\S+)?: (.*)", message, re.DOTALL)
    if wrong is None:
        return f"{verb.name}: {message}; see: {command(f'{verb.name} --help')}"
    option = _option_named(verb, wrong[1])
    problem = wrong[2]
    example = f"for example: {option.name} {option.example}"
    if problem.startswith("expected"):
        return f"{verb.name}: '{option.name}' needs a value; {example}"
    if problem.startswith("ignored explicit argument"):
        return f"{verb.name}: '{option.name}' takes no value"
    return f"{verb.name}: {option.name} {problem}; {example}"


def _option_named(verb: Verb, name: str) -> Option:
    return next(option for option in verb.options if option.name == name)


def read(name: str, words: Sequence[str]) -> argparse.Namespace:
    """Read the words of a verb that takes no settings of configs.

    Raises:
        BadInput: an option is unknown, a value is invalid, or an argument is missing or unexpected.
    """
    arguments, rest = read_some(name, words)
    if not rest:
        return arguments
    word = rest[0]
    if word.startswith("-"):
        names = [option.name for option in VERBS[name].options]
        options = [option for option in names if option.startswith("-")]
        unknown, _, _ = word.partition("=")
        hint = nearest(unknown, options)
        raise BadInput(f"{name}: unknown option '{word}'; {hint}")
    raise BadInput(f"{name}: unexpected argument '{word}'; see: {command(f'{name} --help')}")


def read_some(name: str, words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Read the words of a verb that are in the table, and return the other words, too.

    Raises:
        BadInput: a value is invalid, or an argument is missing.
    """
    verb = VERBS[name]
    words = _join_negative_numbers(verb, words)
    arguments, rest = Reader(verb).parse_known_args(words)
    for option in verb.options:
        value = getattr(arguments, option.dest, None)
        if not option.choices or value is None:
            continue
        if value not in option.choices:
            hint = nearest(value, option.choices)
            place = f"{name}: {option.name} '{value}'"
            raise BadInput(f"{place}: unknown value; {hint}")
    return arguments, rest


def _join_negative_numbers(verb: Verb, words: Sequence[str]) -> list[str]:
    """Join `--input -0.5,0` into `--input=-0.5,0`; argparse would take the value for an option."""
    with_value = set[str]()
    for option in verb.options:
        if option.value is not None and not option.passed:
            with_value.add(option.name)
    joined = list[str]()
    for word in words:
        is_number = re.match(r"-[.\d]", word)
        if is_number and joined and joined[-1] in with_value:
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


# ---- help ----------------------------------------------------------------------------------------

HELP_WORDS = ("-h", "--help")


def asked_for(words: Sequence[str]) -> str | None:
    """Return the help page that a command line requests.

    It is None if the command line requests no help, or help that needs torch.
    """
    if not words:
        return overview()
    first, *rest = words
    if first in (*HELP_WORDS, "help"):
        if rest and rest[0] in VERBS:
            return page(rest[0])
        return overview()
    if first not in VERBS or topic(words) is not None:
        return None
    if any(word in HELP_WORDS for word in words):
        return page(first)
    return None


def topic(words: Sequence[str]) -> str | None:
    """Return the X of `fit --help X`, the settings to describe; None without it."""
    if not VERBS[words[0]].settings:
        return None
    for word, following in pairwise(words):
        if word in HELP_WORDS and not following.startswith("-"):
            return following
    return None


def page(name: str) -> str:
    """Return the help of one verb: usage, purpose, options with their defaults, an example."""
    verb = VERBS[name]
    others = [option for option in verb.options if option not in verb.arguments]
    lines = [_usage(verb), "", verb.purpose]
    if verb.arguments:
        lines += ["", "arguments", *_rows(verb.arguments)]
    lines += ["", "options", *_rows([*others, ALLOW, DEBUG, HELP])]
    if verb.notes:
        lines += ["", *verb.notes]
    lines += ["", "example", f"  {PROGRAM} {verb.example}", ""]
    return "\n".join(lines)


def _usage(verb: Verb) -> str:
    """Return the first line of a verb's help."""
    words = ["usage:", PROGRAM, verb.name]
    for option in verb.options:
        if option in verb.arguments:
            words.append(option.name if option.needed else f"[{option.name}]")
        elif option.needed:
            words.append(option.shown)
    words.append("[options]")
    return " ".join(words)


HELP_WIDTH = 100
"""The largest width of a line of options."""


def _rows(options: Sequence[Option]) -> list[str]:
    """Return the lines of a list of options, with their explanations in a column."""
    width = max(len(option.shown) for option in options)
    text_width = HELP_WIDTH - width - 4
    rows = []
    for option in options:
        explanation = _explanation(option)
        first, *more = textwrap.wrap(explanation, text_width)
        rows.append(f"  {option.shown:<{width}}  {first}")
        indent = " " * width
        rows += [f"  {indent}  {line}" for line in more]
    return rows


def _explanation(option: Option) -> str:
    """Return the help of an option with its choices and default."""
    facts = []
    if option.choices:
        choices = ", ".join(option.choices)
        facts.append(f"one of {choices}")
    if option.many and option is not CONFIG:
        facts.append("one or more")
    if option.default is not None:
        facts.append(f"default: {option.default}")
    elif option.default_text:
        facts.append(f"default: {option.default_text}")
    if not facts:
        return option.help
    remark = "; ".join(facts)
    return f"{option.help} ({remark})"


def overview() -> str:
    """Return the help of the whole program, one line for each verb."""
    name_width = max(map(len, VERBS))
    width = max(len(verb.brief) for verb in VERBS.values())
    lines = []
    for verb in VERBS.values():
        words = f"{verb.name:<{name_width}} {verb.brief:<{width}}"
        lines.append(f"  {words}  {verb.purpose}")
    lines = [*_HEAD, *lines, *_FOOT, ""]
    return "\n".join(lines)


_HEAD = (
    "Stochastic Parameter Decomposition on PyTorch Lightning: split the weights of a neural",
    "network into components, and find out which of them each input needs.",
    "",
    f"usage: {PROGRAM} VERB [options]",
    "",
)
_FOOT = (
    "",
    f"Options and an example of a verb:  {PROGRAM} VERB --help",
    f"All settings with their defaults:  {PROGRAM} fit --help model",
    "                                   (or: data, trainer, reconstruction, a class)",
    "",
    "Runs are written to ./runs, or to $SPD_RUNS. The first lines of every config describe what it",
    "does, how long it takes, and the results. After `pip install`, `spd VERB` is short for",
    f"`{PROGRAM} VERB`.",
)
