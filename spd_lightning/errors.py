"""Errors for the user: one line with the value, the place and the remedy."""

import difflib
import math
import re
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any, NamedTuple


class BadInput(ValueError):
    """Wrong input that its author can correct.

    The command line prints only the message, and exits with 2.

    Examples:
        >>> from spd_lightning import BadInput, Decoder
        >>> try:
        ...     Decoder(vocab=50, d_model=10, n_layers=1, n_heads=3, context=8)
        ... except BadInput as error:
        ...     print(error)
        n_heads 3 in Decoder: it must divide d_model, which is 10
    """


PROGRAM = "python -m spd_lightning"


def command(words: str) -> str:
    """Return a command of this package as a message shows it: in full, so that it can be copied.

    >>> command("list")
    'python -m spd_lightning list'
    """
    return f"{PROGRAM} {words}"


class Diverged(BadInput):
    """A number that must be finite is infinite or NaN.

    Args:
        reason: which number, and when: "the loss term 'faithfulness' is nan at step 12".
        remedy: what to do about it.
    """

    def __init__(self, reason: str, remedy: str):
        super().__init__(f"diverged: {reason}; {remedy}")
        self.reason = reason


def shown(value: str) -> str:
    """Return a value as error messages show it: on one line, with at most 100 characters.

    >>> shown("a\\nb")
    'a\\\\nb'
    """
    line = "".join(map(_printable, value))
    if len(line) <= 100:
        return line
    return f"{line[:97]}..."


def _printable(character: str) -> str:
    """Return a character, or an escape if it cannot be printed."""
    if character.isprintable():
        return character
    return character.encode("unicode_escape").decode()


Bound = int | float | None


def check_range(
    place: str,
    *,
    least: Bound = None,
    above: Bound = None,
    most: Bound = None,
    below: Bound = None,
    whole: bool = False,
    hint: str = "",
    **settings: object,
) -> None:
    """Reject numbers outside a range, and anything that is not a finite number.

    Args:
        place: the owner of the settings, for the message.
        least: the smallest number that is allowed.
        above: the number that all values must exceed.
        most: the largest number that is allowed.
        below: the number that all values must stay below.
        whole: whether only whole numbers are allowed.
        hint: a further remedy, for the message.
        settings: values by name. Every entry of a list is checked; None is an omitted setting.

    Raises:
        BadInput: one of the settings is out of range.

    >>> check_range("optimizer", least=0, betas=(0.9, -1.0))
    Traceback (most recent call last):
        ...
    spd_lightning.errors.BadInput: betas [0.9, -1.0] in optimizer: each must be at least 0
    """
    bounds = _Bounds(least, above, most, below)
    for name, value in settings.items():
        if value is None:
            continue
        if isinstance(value, list | tuple):
            value = list(value)
            entries = value
            subject = "each"
        else:
            entries = [value]
            subject = "it"
        conditions = [str(bounds)]
        if not all(_is_number(entry, whole) for entry in entries):
            kind = "a whole number" if whole else "a finite number"
            conditions = [kind, *conditions]
        elif all(bounds.contain(entry) for entry in entries):
            continue
        must_be = ", ".join(filter(None, conditions))
        remedy = f"; {hint}" if hint else ""
        raise BadInput(f"{name} {value} in {place}: {subject} must be {must_be}{remedy}")


class _Bounds(NamedTuple):
    """The bounds of a range; None means unbounded."""

    least: Bound
    above: Bound
    most: Bound
    below: Bound

    def __str__(self) -> str:
        words = {
            "at least": self.least,
            "above": self.above,
            "at most": self.most,
            "below": self.below,
        }
        parts = [f"{name} {bound}" for name, bound in words.items() if bound is not None]
        return " and ".join(parts)

    def contain(self, number: Any) -> bool:
        """Return whether a number is in the range."""
        if self.least is not None and not number >= self.least:
            return False
        if self.above is not None and not number > self.above:
            return False
        if self.most is not None and not number <= self.most:
            return False
        return self.below is None or number < self.below


def _is_number(value: object, whole: bool) -> bool:
    """Return whether a value is a finite number, or a whole one; booleans are not numbers."""
    kind = Integral if whole else Real
    if isinstance(value, bool) or not isinstance(value, kind):
        return False
    return whole or math.isfinite(value)


def nearest(name: str, options: Iterable[str]) -> str:
    """Return the end of an error message about an unknown name.

    It is "did you mean 'x'?" or, if no name is close, "choose from: a, b, c" (at most 20).
    """
    known = sorted(options)
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"did you mean '{close[0]}'?"
    names = ", ".join(known[:20]) or "none"
    rest = len(known) - 20
    more = f" and {rest} more" if rest > 0 else ""
    return f"choose from: {names}{more}"


_USER = r"""(?<=//)(?:[^\s/?#'"]*|[^\s/'"]*:(?:(?!['"][:,;)\s]|//).)*)@"""
"""The user and the password of an address, before its `@`.

A password can contain quotes and blanks. A quote that is followed by a colon, a comma, a bracket or
a blank ends the address.
"""
_NAMES = "token|pass|pwd|pw|secret|key|sig|auth|credential"
_VALUE = r"""(?:'[^']*'|"[^"]*"|[^\s&;#'"]+)"""
_SECRET = rf"([?&;#][\w.-]*(?:{_NAMES})[\w.-]*=){_VALUE}"


def without_passwords(text: str) -> str:
    """Return a text with `***` for the user, the password and the secrets in every address.

    >>> without_passwords("tracker 'https://me:hush@host/x?token=hush&a=1': no answer")
    "tracker 'https://***@host/x?token=***&a=1': no answer"
    """
    text = re.sub(_USER, "***@", text)
    return re.sub(_SECRET, r"\1***", text, flags=re.IGNORECASE)
