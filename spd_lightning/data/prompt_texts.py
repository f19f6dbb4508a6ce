"""Prompts as people give them, in a list or in a file, and everything that is wrong with them in
one message.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from spd_lightning.data.corpora import Unusable, jsonl_rows, parquet_rows, text_of
from spd_lightning.encoding import lone_surrogate, read_lines
from spd_lightning.errors import BadInput

_MOST_LISTED = 10  # offending prompts that a message names


class PromptText(NamedTuple):
    """A prompt before it becomes tokens."""

    source: str  # as in the table `prompts`: "given 0", "file 3"
    place: str  # where its author finds it: "given 0", "line 12"
    text: str | Unusable


def given_texts(prompts: Sequence[str]) -> list[PromptText]:
    """Return the prompts of a list."""
    found = []
    for index, text in enumerate(prompts):
        half = lone_surrogate(text)
        usable = (
            Unusable(f"{half} is half of a character", "write the whole character")
            if half
            else text
        )
        found.append(PromptText(f"given {index}", f"given {index}", usable))
    return found


def texts_in_file(path: Path, column: str) -> tuple[list[PromptText], int]:
    """Return the prompts of a file, and how many blank lines or rows were skipped.

    Args:
        path: a .jsonl or .parquet file with prompts in a column, or a text file with one prompt a
            line.
        column: that column.

    Raises:
        BadInput: the file cannot be read, or holds no prompt.
    """
    found = list[PromptText]()
    blank = 0
    for place, text in _places(path, column):
        if text is None or (isinstance(text, str) and not text.strip()):
            blank += 1
        else:
            found.append(PromptText(f"file {len(found)}", f"{place} of '{path.name}'", text))
    if not found:
        raise BadInput(f"prompts_file '{path}' in Text: there is no prompt in it; write one a line")
    return found, blank


def _places(path: Path, column: str) -> Iterator[tuple[str, str | Unusable | None]]:
    """Every line or row with its text; None where it has none."""
    if path.suffix == ".parquet":
        for number, row in parquet_rows(path, column):
            yield f"row {number}", text_of(row, column, "prompts_column")
    elif path.suffix == ".jsonl":
        for number, row in jsonl_rows(path, keep_blank=True):
            yield f"line {number}", None if row is None else text_of(row, column, "prompts_column")
    else:
        for number, line in enumerate(read_lines(path), 1):
            yield f"line {number}", line


def rejection(offenses: Mapping[str, Unusable]) -> BadInput:
    """Return the error that names every prompt that cannot be used, or the first ten and how many
    more there are.

    Args:
        offenses: what is wrong with each, by its place.
    """
    places = list(offenses)
    listed = [f"{place}: {offenses[place].why}" for place in places[:_MOST_LISTED]]
    if len(places) > _MOST_LISTED:
        listed.append(f"and {len(places) - _MOST_LISTED} more")
    count = "one" if len(places) == 1 else str(len(places))
    remedies = dict.fromkeys(each.remedy for each in offenses.values())
    return BadInput(
        f"prompts in Text: {count} cannot be used: {'; '.join([*listed, *list(remedies)[:3]])}"
    )
