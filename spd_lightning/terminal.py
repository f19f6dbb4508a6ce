"""Substitutes for characters that the terminal, or the reader of our output, cannot show.

Python raises UnicodeEncodeError when a stream in ASCII or Latin-1 is given a character that it
cannot hold. Nothing that this program prints is worth a traceback: lines, arrows and signs get
stand-ins in ASCII, letters lose their accents, and other characters are written as escapes. Streams
in UTF-8 are not changed.
"""

import codecs
import sys
import unicodedata

STAND_INS = {
    **dict.fromkeys("─━═‐‑–—−", "-"),
    **dict.fromkeys("│┃║", "|"),
    **dict.fromkeys("┌┐└┘├┤┬┴┼", "+"),
    **dict.fromkeys("“”", '"'),
    **dict.fromkeys("‘’", "'"),
    "·": ".",
    "…": "...",
    "→": "->",
    "←": "<-",
    "±": "+-",
    "×": "x",
    "≤": "<=",
    "≥": ">=",
    "‖": "||",
    "√": "sqrt",
    "Σ": "sum",
    "Δ": "delta",
    "ε": "epsilon",
    "λ": "lambda",
    "µ": "u",
}
"""What is written instead of a character, where Unicode itself does not say it, as it does for `²`
and `é`.
"""


def fit_streams() -> None:
    """Let standard output and standard error take any text, whatever their encoding is."""
    codecs.register_error("spd_stand_in", _encoded)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(
            stream, "reconfigure", None
        )  # a notebook's stream has none, and takes any text
        if reconfigure is not None:
            reconfigure(errors="spd_stand_in")


def stand_in(character: str) -> str:
    """Return how a character is written in ASCII.

    >>> stand_in("→"), stand_in("é"), stand_in("☃")
    ('->', 'e', '\\\\u2603')
    """
    if character in STAND_INS:
        return STAND_INS[character]
    decomposed = unicodedata.normalize("NFKD", character)
    plain = decomposed.encode("ascii", errors="ignore").decode("ascii")
    return plain or character.encode("ascii", errors="backslashreplace").decode("ascii")


def _encoded(error: UnicodeError) -> tuple[str, int]:
    """An error handler of `codecs`: what to write instead, and where to go on."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    refused = error.object[error.start : error.end]
    return "".join(map(stand_in, refused)), error.end
