"""Prompts from a list or a file, before they become tokens.

All prompts that cannot be used are reported together, in one message.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from spd_lightning.data.corpora import Unusable, jsonl_rows, parquet_rows, text_of
from spd_lightning.encoding import lone_surrogate, read_lines
from spd_lightning.errors import BadInput

_MOST_LISTED = 10  # unusable prompts that a message names


class PromptText(NamedTuple):
    """A prompt before it becomes tokens."""

    source: str  # as in the table `prompts`: "given 0", "file 3"
    place: str  # where its author can find it: "given 0", "line 12"
    text: str | Unusable


def given_texts(prompts: Sequence[str]) -> list[PromptText]:
    """Return the prompts of a list."""
    texts = list[PromptText]()
    for index, prompt in enumerate(prompts):
        text: str | Unusable = prompt
        half = lone_surrogate(prompt)
        if half is not None:
            why = f"{half} is half of a character"
            text = Unusable(why, "write the whole character")
        source = f"given {index}"
        texts.append(PromptText(source, source, text))
    return texts


def texts_in_file(path: Path, column: str) -> tuple[list[PromptText], int]:
    """Return the prompts of a file, and the number of blank lines or rows that were skipped.

    Args:
        path: a .jsonl or .parquet file with prompts in a column, or a text file with one prompt
            per line.
        column: the name of that column.

    Raises:
        BadInput: the file cannot be read, or contains no prompts.
    """
    texts = list[PromptText]()
    blank = 0
    for place, text in _places(path, column):
        if text is None or (isinstance(text, str) and not text.strip()):
            blank += 1
            continue
        source = f"file {len(texts)}"
        full_place = f"{place} of '{path.name}'"
        prompt = PromptText(source, full_place, text)
        texts.append(prompt)
    if not texts:
        raise BadInput(f"prompts_file '{path}' in Text: it contains no prompts; write one per line")
    return texts, blank


def _places(path: Path, column: str) -> Iterator[tuple[str, str | Unusable | None]]:
    """Yield the place and the text of every line or row; the text is None if it is blank."""
    if path.suffix == ".parquet":
        for number, row in parquet_rows(path, column):
            text = text_of(row, column, "prompts_column")
            yield f"row {number}", text
    elif path.suffix == ".jsonl":
        for number, row in jsonl_rows(path, keep_blank=True):
            text = None
            if row is not None:
                text = text_of(row, column, "prompts_column")
            yield f"line {number}", text
    else:
        for number, line in enumerate(read_lines(path), 1):
            yield f"line {number}", line


def rejection(offenses: Mapping[str, Unusable]) -> BadInput:
    """Return the error for prompts that cannot be used.

    Its message names the first ten and says how many more there are.

    Args:
        offenses: the reason for each prompt, by its place.
    """
    number = len(offenses)
    clauses = list[str]()
    for place, offense in islice(offenses.items(), _MOST_LISTED):
        clauses.append(f"{place}: {offense.why}")
    unlisted = number - _MOST_LISTED
    if unlisted > 0:
        clauses.append(f"and {unlisted} more")
    remedies = dict.fromkeys(offense.remedy for offense in offenses.values())
    clauses += islice(remedies, 3)
    reasons = "; ".join(clauses)
    count = "one" if number == 1 else str(number)
    return BadInput(f"prompts in Text: {count} cannot be used: {reasons}")
