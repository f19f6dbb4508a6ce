"""What a user is told when their input cannot work: one line with the value, the place and the remedy."""

import difflib
import re
from collections.abc import Iterable


class BadInput(ValueError):
    """The input is wrong in a way its author can mend; the command line prints the message alone and exits with 2."""


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
"""What stands before the `@` of an address. A password may hold quotes and blanks; a quote that ends the address is
followed by a colon, a comma, a bracket or a blank."""
_NAMES = "token|pass|pwd|pw|secret|key|sig|auth|credential"
_VALUE = r"""(?:'[^']*'|"[^"]*"|[^\s&;#'"]+)"""
_SECRET = rf"([?&;#][\w.-]*(?:{_NAMES})[\w.-]*=){_VALUE}"


def without_passwords(text: str) -> str:
    """Return the text with `***` for the user and password of every address, and for secrets in its query.

    >>> without_passwords("tracker 'https://me:hush@host/x?token=hush&a=1': no answer")
    "tracker 'https://***@host/x?token=***&a=1': no answer"
    """
    return re.sub(_SECRET, r"\1***", re.sub(_USER, "***@", text), flags=re.IGNORECASE)
