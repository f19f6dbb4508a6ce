"""What a user is told when their input cannot work: one line with the value, the place and the remedy."""

import difflib
from collections.abc import Iterable


class BadInput(ValueError):
    """The input is wrong in a way its author can mend; the command line prints the message alone and exits with 2."""


def nearest(name: str, options: Iterable[str]) -> str:
    """The closest known names to a misspelt one, as the end of an error message.

    Returns "did you mean 'x'?" or, where nothing is close, "there are: a, b, c" (at most 20).
    """
    known = sorted(options)
    if close := difflib.get_close_matches(name, known, n=1):
        return f"did you mean '{close[0]}'?"
    more = f" and {len(known) - 20} more" if len(known) > 20 else ""
    return f"there are: {', '.join(known[:20]) or 'none'}{more}"
