"""Substitutes for characters that the encoding of an output stream does not have.

Python raises UnicodeEncodeError when a stream in ASCII or Latin-1 has to print another character.
Instead, lines, arrows and signs are replaced by ASCII, letters lose their accents, and all other
characters are written as escapes. Streams in UTF-8 are not affected.
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
"""Substitutes for characters that Unicode does not decompose, as it does `²` and `é`."""


def fit_streams() -> None:
    """Let standard output and standard error print any text, whatever their encoding is."""
    codecs.register_error("spd_stand_in", _encoded)
    for stream in (sys.stdout, sys.stderr):
        # A notebook's stream has no `reconfigure`, and prints any text.
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="spd_stand_in")


def stand_in(character: str) -> str:
    """Return the substitute for a character in ASCII.

    >>> stand_in("→"), stand_in("é"), stand_in("☃")
    ('->', 'e', '\\\\u2603')
    """
    if character in STAND_INS:
        return STAND_INS[character]
    decomposed = unicodedata.normalize("NFKD", character)
    plain = decomposed.encode("ascii", errors="ignore")
    escape = character.encode("ascii", errors="backslashreplace")
    substitute = plain or escape
    return substitute.decode("ascii")


def _encoded(error: UnicodeError) -> tuple[str, int]:
    """Return the substitutes and the position to continue at: an error handler of `codecs`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    unsupported = error.object[error.start : error.end]
    substitutes = "".join(map(stand_in, unsupported))
    return substitutes, error.end
