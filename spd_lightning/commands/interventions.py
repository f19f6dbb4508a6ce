"""Interventions as users write them: the words of `intervene`, or the rows of a .jsonl or .yaml
file.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spd_lightning import config as configs
from spd_lightning import json_files
from spd_lightning.decomposition.names import BASES, Base
from spd_lightning.encoding import read_text
from spd_lightning.errors import BadInput, nearest

LARGEST = 3.4028234663852886e38
"""The largest number of single precision."""
MOST_TOLD = 20
"""How many rows of a file are named in one message at most."""


@dataclass(frozen=True)
class Row:
    """One intervention: a prompt, and what is done to components.

    Attributes:
        text: the prompt, or None.
        input: the prompt as numbers, or None.
        ablate, scale, set, keep: edits by the names of their components; keep is None if nothing
            else is ablated.
        base: the model that is edited.
        name: a label.
        line: where it stands in its file; None for the command's own.
    """

    text: str | None = None
    input: Sequence[float | int] | str | None = None
    ablate: Sequence[str] = ()
    scale: Mapping[str, float] = field(default_factory=dict)
    set: Mapping[str, float] = field(default_factory=dict)
    keep: Sequence[str] | None = None
    base: Base = "unmasked"
    name: str = ""
    line: int | None = None

    @property
    def components(self) -> list[str]:
        """Return the names of all components that are edited."""
        return [*self.ablate, *self.scale, *self.set]


def each(rows: Sequence[Row], work: Callable[[int], Any]) -> list[Any]:
    """Return what some work gives for each row, by its number.

    Raises:
        BadInput: it rejects some; all that are of a file are named by their lines.
    """
    results = []
    wrong = []
    for number, row in enumerate(rows):
        try:
            results.append(work(number))
        except BadInput as error:
            if row.line is None:
                raise
            wrong.append(f"line {row.line}: {error}")
    if wrong:
        raise _offenders(wrong)
    return results


def _offenders(wrong: Sequence[str]) -> BadInput:
    """Return one error for several rows."""
    more = f"; and {len(wrong) - MOST_TOLD} more" if len(wrong) > MOST_TOLD else ""
    return BadInput(f"--file: {'; '.join(wrong[:MOST_TOLD])}{more}")


# ---- what is asked -------------------------------------------------------------------------------


def rows_of(asked: argparse.Namespace) -> list[Row]:
    """Return the command's own intervention, or those of its file."""
    given = [name for name in ("text", "input") if getattr(asked, name) is not None]
    if len(given) > 1:
        raise BadInput(
            "intervene: --text and --input are two ways to give a prompt; leave one of them out"
        )
    edits = [f"--{name}" for name in ("ablate", "scale", "set", "keep") if getattr(asked, name)]
    if asked.file is not None:
        if edits:
            raise BadInput(
                f"intervene: {edits[0]} and --file; write the edits into the rows of the file"
            )
        return _file(Path(asked.file), Row(text=asked.text, input=asked.input, base=asked.base))
    if not given:
        raise BadInput(
            'intervene: the prompt is missing; for example: --text "Mia went", --input 0,1,0, or '
            "--file"
        )
    row = Row(
        asked.text,
        asked.input,
        [name for word in asked.ablate or () for name in word.split(",")],
        _pairs("--scale", asked.scale),
        _pairs("--set", asked.set),
        _kept(asked.keep),
        asked.base,
    )
    return [row]


def _pairs(option: str, words: Sequence[str] | None) -> dict[str, float]:
    """NAME=NUMBER as a map."""
    found = {}
    for word in words or ():
        name, equals, number = word.rpartition("=")
        try:
            found[name] = float(number)
        except ValueError:
            equals = ""
        if not equals or not abs(found[name]) <= LARGEST:
            raise BadInput(
                f"{option} '{word}': write a component and a number; for example: {option} "
                "h.0.mlp.c_fc:5=2"
            )
    return found


def _kept(words: Sequence[str] | None) -> list[str] | None:
    """The names in words and in .json files: a list of names, or an object that has one under
    `nodes`.
    """
    if words is None:
        return None
    found: list[str] = []
    for word in words:
        found += (
            _listed(Path(word))
            if word.endswith(".json")
            else [name for name in word.split(",") if name]
        )
    return found


def _listed(path: Path) -> list[str]:
    try:
        held = json_files.parsed(path.read_bytes(), dict[str, Any] | list[Any])
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "not JSON"
        raise BadInput(
            f"--keep '{path}': cannot be read ({why}); name a file with a list of components"
        ) from error
    names = held.get("nodes") if isinstance(held, dict) else held
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BadInput(
            f"--keep '{path}': it holds no list of names; write [\"h.0.mlp.c_fc:3:7\", …]"
        )
    return names


# ---- files of interventions ----------------------------------------------------------------------

KEYS = ("text", "input", "ablate", "scale", "set", "keep", "base", "name")


def _file(path: Path, default: Row) -> list[Row]:
    """Return the interventions of a .jsonl file, or of the list in a .yaml file.

    Raises:
        BadInput: the file cannot be read, or rows are wrong; all of them are named.
    """
    if path.suffix not in (".jsonl", ".yaml", ".yml"):
        raise BadInput(
            f"--file '{path}': not a kind of file that is read; end it in .jsonl or .yaml"
        )
    text = read_text(path)
    found = []
    wrong = []
    is_json = path.suffix == ".jsonl"
    for line, entry in _filled_lines(text) if is_json else configs.items(path, text):
        try:
            found.append(_row(_parsed(entry) if is_json else entry, default, line))
        except BadInput as error:
            wrong.append(f"line {line}: {error}")
    if wrong:
        raise _offenders(wrong)
    if not found:
        raise BadInput(f"--file '{path}': no row in it; write one intervention a row")
    return found


def _filled_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not blank, with their numbers."""
    for line, words in enumerate(text.split("\n"), 1):
        if words.strip():
            yield line, words


def _parsed(words: str) -> Any:
    try:
        return json_files.parsed(words.encode("utf-8"), Any)
    except ValueError as error:
        raise BadInput(str(error)) from error


def _row(held: Any, default: Row, line: int) -> Row:
    """Return one row of a file."""
    if not isinstance(held, dict):
        raise BadInput(
            f'expected keys and values, found {type(held).__name__}; for example: {{"text": "Mia"}}'
        )
    for key in held:
        if key not in KEYS:
            raise BadInput(f"'{key}': no such key; {nearest(str(key), KEYS)}")
    if "text" in held and "input" in held:
        raise BadInput("'text' and 'input' are two ways to give a prompt; leave one of them out")
    text = held.get("text")
    numbers = held.get("input")
    if text is None and numbers is None:
        text, numbers = default.text, default.input
    if text is None and numbers is None:
        raise BadInput("no prompt; add 'text' or 'input', or give --text or --input for all rows")
    if text is not None and not isinstance(text, str):
        raise BadInput(f"'text': {text!r} is not text; put it in quotes")
    base = held.get("base", default.base)
    if base not in BASES:
        raise BadInput(f"'base': '{base}' is unknown; {nearest(str(base), BASES)}")
    keep = _names("keep", held["keep"]) if "keep" in held else None
    edits = (
        _names("ablate", held.get("ablate", [])),
        _numbers_of("scale", held),
        _numbers_of("set", held),
    )
    return Row(text, _numbers_in(numbers), *edits, keep, base, str(held.get("name", "")), line)


def _names(key: str, value: Any) -> list[str]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BadInput(f"'{key}': not a list of components; for example: [\"h.0.mlp.c_fc:5\"]")
    return names


def _numbers_of(key: str, held: Mapping[str, Any]) -> dict[str, float]:
    value = held.get(key, {})
    if not isinstance(value, dict) or not all(map(_number, value.values())):
        raise BadInput(
            f"'{key}': not a map from components to numbers; for example: {{\"h.0.mlp.c_fc:5\": 2}}"
        )
    return {str(name): float(number) for name, number in value.items()}


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def _numbers_in(value: Any) -> Sequence[float | int] | str | None:
    if (
        value is None
        or isinstance(value, str)
        or (isinstance(value, list) and all(map(_number, value)))
    ):
        return value
    raise BadInput("'input': not a list of numbers; for example: [0, 0.75, 0]")
