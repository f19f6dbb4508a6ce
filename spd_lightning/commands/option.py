"""The types of the table of verbs: options, verbs, and readers of option values."""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from spd_lightning.errors import command

# ---- kinds of values -----------------------------------------------------------------------------


LARGEST = 2**31 - 1
"""The largest whole number that an option takes."""


def whole(least: int) -> Callable[[str], int]:
    """Return a reader of whole numbers from `least` to `LARGEST`."""

    def read_whole(word: str) -> int:
        shown = word if len(word) <= 20 else f"{word[:17]}..."
        is_whole = word.isascii() and word.isdecimal()
        too_large = f"'{shown}': too large"
        too_small = f"'{shown}': not a whole number of at least {least}"
        if is_whole and len(word) > len(str(LARGEST)):
            raise argparse.ArgumentTypeError(too_large)
        if not is_whole or int(word) < least:
            raise argparse.ArgumentTypeError(too_small)
        if int(word) > LARGEST:
            raise argparse.ArgumentTypeError(too_large)
        return int(word)

    return read_whole


def share(word: str) -> float:
    """Read a number from 0 to 1."""
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"'{word}': not a number from 0 to 1")
    return value


# ---- the table -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """One argument or option of a verb.

    Attributes:
        name: `--option`, or the name of an argument in capitals.
        help: its explanation: a phrase without a period.
        value: the placeholder of its value; None for a switch.
        default: its value if omitted.
        default_text: describes the default if `default` is None.
        kind: parses the value.
        choices: all values that are allowed, or empty.
        many: whether it takes several values, and can be given more than once.
        needed: whether it is required.
        example: a value that works.
        passed: whether it is only shown here, and parsed elsewhere.
    """

    name: str
    help: str
    value: str | None = None
    default: Any = None
    default_text: str = ""
    kind: Callable[[str], Any] = str
    choices: tuple[str, ...] = ()
    many: bool = False
    needed: bool = False
    example: str = ""
    passed: bool = False

    @property
    def dest(self) -> str:
        """Return the attribute that holds its value after parsing."""
        return self.name.lstrip("-").lower()

    @property
    def shown(self) -> str:
        """Return its name with the placeholder of its value, as help shows it."""
        if self.value is None:
            return self.name
        return f"{self.name} {self.value}"


@dataclass(frozen=True)
class Verb:
    """One verb.

    Attributes:
        name: its name on the command line.
        brief: its most common arguments, for the list of all verbs.
        purpose: one sentence.
        example: the words of a command that works.
        options: its arguments in order, and its options.
        settings: whether any setting of a config can be given as `--KEY VALUE`.
        notes: further lines of its help.
        module: the module of `commands` whose `main` it calls, or module:function; empty if the
            module has the name of the verb.
    """

    name: str
    brief: str
    purpose: str
    example: str
    options: tuple[Option, ...] = ()
    settings: bool = False
    notes: tuple[str, ...] = ()
    module: str = ""

    @property
    def arguments(self) -> list[Option]:
        """Return the positional arguments."""
        return [option for option in self.options if not option.name.startswith("-")]


RUN = Option(
    "RUN",
    "a run's name or folder, or a tracker reference (see pull); to list the names: "
    f"{command('runs')}",
    needed=True,
)
