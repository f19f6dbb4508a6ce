"""Errors for the user: one line with the value, the place and the remedy."""

import difflib
import math
import re
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any


class BadInput(ValueError):
    """The input is wrong in a way its author can mend; the command line prints the message alone
    and exits with 2.
    """


class Diverged(BadInput):
    """Numbers that must be finite are not.

    Args:
        reason: which number, and when: "the loss term 'faithfulness' is nan at step 12".
        remedy: what to do about it.
    """

    def __init__(self, reason: str, remedy: str):
        super().__init__(f"diverged: {reason}; {remedy}")
        self.reason = reason


def shown(value: str) -> str:
    """Return a value as an error message shows it: on one line, and of at most 100 characters.

    >>> shown("a\\nb")
    'a\\\\nb'
    """
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in value)
    return line if len(line) <= 100 else f"{line[:97]}..."


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
        place: what the settings belong to, for the message.
        least: the smallest number that is allowed.
        above: a number that is just too small.
        most: the largest number that is allowed.
        below: a number that is just too large.
        whole: whether only whole numbers are allowed.
        hint: what else could be done, for the message.
        settings: values by name. Every entry of a list counts; None is a setting left out.

    Raises:
        BadInput: one of the settings is out of range.

    >>> check_range("optimizer", least=0, below=1, betas=(0.9, 2.0)) Traceback (most recent call
    last): spd_lightning.errors.BadInput: betas [0.9, 2.0] in optimizer: each must be at least 0 and
    below 1
    """
    bounds = {"at least": least, "above": above, "at most": most, "below": below}
    wanted = " and ".join(
        f"{words} {bound}" for words, bound in bounds.items() if bound is not None
    )
    for name, value in settings.items():
        several = isinstance(value, list | tuple)
        entries = [] if value is None else value if several else [value]
        numeric = all(_is_number(entry, whole) for entry in entries)
        if numeric and all(_within(entry, least, above, most, below) for entry in entries):
            continue
        kind = "" if numeric else "a whole number" if whole else "a finite number"
        given, subject = (list(value), "each") if several else (value, "it")
        remedy = f"; {hint}" if hint else ""
        must_be = ", ".join(filter(None, (kind, wanted)))
        raise BadInput(f"{name} {given} in {place}: {subject} must be {must_be}{remedy}")


def _is_number(value: object, whole: bool) -> bool:
    """Whether a value is a finite number, and a whole one if that is asked; true and false are not
    numbers.
    """
    if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
        return False
    return whole or math.isfinite(value)


def _within(number: Any, least: Bound, above: Bound, most: Bound, below: Bound) -> bool:
    high_enough = (least is None or number >= least) and (above is None or number > above)
    return high_enough and (most is None or number <= most) and (below is None or number < below)


def nearest(name: str, options: Iterable[str]) -> str:
    """The closest known names to a misspelt one, as the end of an error message.

    Returns "did you mean 'x'?" or, where nothing is close, "choose from: a, b, c" (at most 20).
    """
    known = sorted(options)
    if close := difflib.get_close_matches(name, known, n=1):
        return f"did you mean '{close[0]}'?"
    more = f" and {len(known) - 20} more" if len(known) > 20 else ""
    return f"choose from: {', '.join(known[:20]) or 'none'}{more}"


_USER = r"""(?<=//)(?:[^\s/?#'"]*|[^\s/'"]*:(?:(?!['"][:,;)\s]|//).)*)@"""
"""The user and the password of an address, before its `@`. A password may hold quotes and blanks. A
quote that is followed by a colon, a comma, a bracket or a blank ends the address.
"""
_NAMES = "token|pass|pwd|pw|secret|key|sig|auth|credential"
_VALUE = r"""(?:'[^']*'|"[^"]*"|[^\s&;#'"]+)"""
_SECRET = rf"([?&;#][\w.-]*(?:{_NAMES})[\w.-]*=){_VALUE}"


def without_passwords(text: str) -> str:
    """Return the text with `***` for the user and password of every address, and for secrets in its
    query.

    >>> without_passwords("tracker 'https://me:hush@host/x?token=hush&a=1': no answer")
    "tracker 'https://***@host/x?token=***&a=1': no answer"
    """
    return re.sub(_SECRET, r"\1***", re.sub(_USER, "***@", text), flags=re.IGNORECASE)
