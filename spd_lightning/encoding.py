"""Read text files in UTF-8, with or without a byte-order mark, and reject all other encodings.

Universal newlines apply. Other encodings are not guessed, since a wrong guess would silently read
different text.
"""

import codecs
from collections.abc import Iterator
from pathlib import Path

from spd_lightning.errors import BadInput

_PIECE = 1 << 20
"""The number of bytes that are read at once."""
_START = 1 << 10
"""The number of bytes that are searched for the zeros of UTF-16."""
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_text(path: Path) -> str:
    """Return a text file's content, without a byte-order mark.

    Raises:
        BadInput: it cannot be read, or is not UTF-8.
    """
    lines = _lines_with_ends(path)
    return "".join(lines)


def read_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text file without their ends, and without a byte-order mark.

    Raises:
        BadInput: it cannot be read, or is not UTF-8.
    """
    for line in _lines_with_ends(path):
        yield line.removesuffix("\n")


def _lines_with_ends(path: Path) -> Iterator[str]:
    """Yield the lines of a text file with their ends, but without a byte-order mark."""
    try:
        with open(path, "rb") as file:
            start = file.read(_START)
        if looks_like_utf_16(start):
            raise _rejected(path, 0, "UTF-16")
        with open(path, encoding="utf-8-sig") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise _rejected(path, _first_bad_byte(path), "WINDOWS-1252") from error
    except OSError as error:
        raise BadInput(
            f"file '{path}': cannot be read ({error.strerror}); give a text file"
        ) from error


def looks_like_utf_16(start: bytes) -> bool:
    """Return whether a file is in UTF-16, judged by the mark or the zeros in its first bytes."""
    if start.startswith(_UTF_16):
        return True
    zeros = start.count(0)
    return zeros * 3 > len(start)


def lone_surrogate(text: str) -> str | None:
    """Return the first unpaired surrogate of a text, as JSON writes it; None without one.

    >>> lone_surrogate("ab \\ud83d cd")
    '\\\\ud83d'
    """
    for character in text:
        if "\ud800" <= character <= "\udfff":
            return f"\\u{ord(character):04x}"
    return None


def _first_bad_byte(path: Path) -> int:
    """Return the offset of the first byte of a file that is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            pending, _ = decoder.getstate()  # the start of a character, in the previous piece
            try:
                decoder.decode(piece)
            except UnicodeDecodeError as error:
                return offset - len(pending) + error.start
            offset += len(piece)
    pending, _ = decoder.getstate()  # the file ends within a character
    return offset - len(pending)


def _rejected(path: Path, offset: int, encoding: str) -> BadInput:
    """Return the error about a file that is not in UTF-8."""
    guess = "it may be Latin-1 or Windows-1252"
    if encoding == "UTF-16":
        guess = "it looks like UTF-16"
    command = f"iconv -f {encoding} -t UTF-8 '{path}' > new{path.suffix}"
    return BadInput(f"file '{path}': not UTF-8 at byte {offset} ({guess}); convert it: {command}")
