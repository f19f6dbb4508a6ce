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


def nearest(name: str, options: Iterable[str]) -> str:
    """The closest known names to a misspelt one, as the end of an error message.

    Returns "did you mean 'x'?" or, where nothing is close, "choose from: a, b, c" (at most 20).
    """
    known = sorted(options)
    if close := difflib.get_close_matches(name, known, n=1):
        return f"did you mean '{close[0]}'?"
    more = f" and {len(known) - 20} more" if len(known) > 20 else ""
    return f"choose from: {', '.join(known[:20]) or 'none'}{more}"


_USER = r"(?<=://)(?:[^\s/?#'\"]*|[^\s/'\"]*:[^\s'\"]*)@"
_SECRET = r"([?&;][\w.-]*(?:token|passw|pwd|secret|key|signature|auth|credential)[\w.-]*=)[^\s&;#'\"]+"


def without_passwords(text: str) -> str:
    """Return the text with `***` for the user and password of every address, and for secrets in its query.

    >>> without_passwords("tracker 'https://me:hush@host/x?token=hush&a=1': no answer")
    "tracker 'https://***@host/x?token=***&a=1': no answer"
    """
    return re.sub(_SECRET, r"\1***", re.sub(_USER, "***@", text), flags=re.IGNORECASE)
