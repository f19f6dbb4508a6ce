"""Interventions as users write them: the options of `intervene`, or the rows of a file."""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from spd_lightning import config as configs
from spd_lightning import json_files
from spd_lightning.decomposition.names import BASES, Base
from spd_lightning.encoding import read_text
from spd_lightning.errors import BadInput, nearest

LARGEST = 3.4028234663852886e38
"""The largest number of single precision."""
MAX_NAMED = 20
"""The largest number of wrong rows that one message names."""


@dataclass(frozen=True)
class Row:
    """One intervention: a prompt, and the edits of its components.

    Attributes:
        text: the prompt, or None.
        input: the prompt as numbers, or None.
        ablate, scale, set, keep: edits by the names of their components. If `keep` is not None,
            all other components are ablated.
        base: the model that is edited.
        name: a label.
        line: its line in the file; None if it was given by options.
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
        """Return the names of all components that are ablated, scaled or set."""
        return [*self.ablate, *self.scale, *self.set]


def each(rows: Sequence[Row], work: Callable[[int], Any]) -> list[Any]:
    """Return the result of a function for each row.

    Args:
        rows: the interventions.
        work: takes the number of a row.

    Raises:
        BadInput: the function raised it for some rows. For a file, the message names all of them.
    """
    results = []
    problems = []
    for number, row in enumerate(rows):
        try:
            results.append(work(number))
        except BadInput as error:
            if row.line is None:
                raise
            problems.append(f"line {row.line}: {error}")
    if problems:
        raise _wrong_rows(problems)
    return results


def _wrong_rows(problems: Sequence[str]) -> BadInput:
    """Return one error for several rows."""
    named = problems[:MAX_NAMED]
    count = len(problems)
    unnamed = count - MAX_NAMED
    reasons = "; ".join(named)
    if unnamed > 0:
        reasons += f"; and {unnamed} more"
    return BadInput(f"--file: {reasons}")


# ---- options -------------------------------------------------------------------------------------


def rows_of(arguments: argparse.Namespace) -> list[Row]:
    """Return the intervention that the options describe, or those of a file."""
    if arguments.text is not None and arguments.input is not None:
        raise BadInput("intervene: --text and --input both give a prompt; use only one of them")
    if arguments.file is not None:
        for name in ("ablate", "scale", "set", "keep"):
            if getattr(arguments, name):
                raise BadInput(
                    f"intervene: --{name} and --file; write the edits into the rows of the file"
                )
        default = Row(text=arguments.text, input=arguments.input, base=arguments.base)
        return _read_file(Path(arguments.file), default)
    if arguments.text is None and arguments.input is None:
        raise BadInput(
            'intervene: the prompt is missing; for example: --text "Mia went", --input 0,1,0, or '
            "--file"
        )
    ablate = []
    for word in arguments.ablate or ():
        ablate += word.split(",")
    row = Row(
        text=arguments.text,
        input=arguments.input,
        ablate=ablate,
        scale=_pairs("--scale", arguments.scale),
        set=_pairs("--set", arguments.set),
        keep=_kept_components(arguments.keep),
        base=arguments.base,
    )
    return [row]


def _pairs(option: str, words: Sequence[str] | None) -> dict[str, float]:
    """Return words such as NAME=NUMBER as a map."""
    numbers = {}
    for word in words or ():
        name, equals, value = word.rpartition("=")
        number = _finite_number(value)
        if not equals or number is None:
            raise BadInput(
                f"{option} '{word}': write a component and a number; for example: {option} "
                "h.0.mlp.c_fc:5=2"
            )
        numbers[name] = number
    return numbers


def _finite_number(word: str) -> float | None:
    """Return the number that a word gives, or None if it is not one of single precision."""
    try:
        number = float(word)
    except ValueError:
        return None
    return number if abs(number) <= LARGEST else None


def _kept_components(words: Sequence[str] | None) -> list[str] | None:
    """Return the names in words and in .json files; None if there are no words."""
    if words is None:
        return None
    names: list[str] = []
    for word in words:
        if word.endswith(".json"):
            names += _names_in_file(Path(word))
        else:
            names += [name for name in word.split(",") if name]
    return names


def _names_in_file(path: Path) -> list[str]:
    """Return the names in a .json file: a list, or an object with a list under `nodes`."""
    try:
        content = json_files.parsed(path.read_bytes(), dict[str, Any] | list[Any])
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not JSON"
        raise BadInput(
            f"--keep '{path}': cannot be read ({reason}); name a file with a list of components"
        ) from error
    names = content.get("nodes") if isinstance(content, dict) else content
    if not _is_list_of_text(names):
        raise BadInput(f"--keep '{path}': not a list of names; write [\"h.0.mlp.c_fc:3:7\", …]")
    return names


# ---- files ---------------------------------------------------------------------------------------

KEYS = ("text", "input", "ablate", "scale", "set", "keep", "base", "name")


def _read_file(path: Path, default: Row) -> list[Row]:
    """Return the interventions of a .jsonl file, or of the list in a .yaml file.

    Args:
        path: the file.
        default: gives the prompt and the base of rows that have none.

    Raises:
        BadInput: the file cannot be read, or some rows are wrong; the message names all of them.
    """
    if path.suffix not in (".jsonl", ".yaml", ".yml"):
        raise BadInput(f"--file '{path}': unknown file type; end it in .jsonl or .yaml")
    text = read_text(path)
    is_json = path.suffix == ".jsonl"
    entries = _filled_lines(text) if is_json else configs.items(path, text)
    rows = []
    problems = []
    for line, entry in entries:
        try:
            content = _parse(entry) if is_json else entry
            rows.append(_row(content, default, line))
        except BadInput as error:
            problems.append(f"line {line}: {error}")
    if problems:
        raise _wrong_rows(problems)
    if not rows:
        raise BadInput(f"--file '{path}': it has no rows; write one intervention in each row")
    return rows


def _filled_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not blank, with their numbers."""
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        yield number, line


def _parse(line: str) -> Any:
    """Return the JSON value of a line."""
    try:
        return json_files.parsed(line.encode("utf-8"), Any)
    except ValueError as error:
        raise BadInput(str(error)) from error


def _row(content: Any, default: Row, line: int) -> Row:
    """Return one row of a file."""
    if not isinstance(content, dict):
        raise BadInput(
            f"expected keys and values, found {type(content).__name__}; for example: "
            '{"text": "Mia"}'
        )
    for key in content:
        if key not in KEYS:
            raise BadInput(f"'{key}': no such key; {nearest(str(key), KEYS)}")
    text, numbers = _prompt(content, default)
    base = content.get("base", default.base)
    if base not in BASES:
        raise BadInput(f"'base': '{base}' is unknown; {nearest(str(base), BASES)}")
    keep = _names("keep", content["keep"]) if "keep" in content else None
    return Row(
        text=text,
        ablate=_names("ablate", content.get("ablate", [])),
        scale=_number_map("scale", content),
        set=_number_map("set", content),
        input=_check_numbers(numbers),
        keep=keep,
        base=base,
        name=str(content.get("name", "")),
        line=line,
    )


def _prompt(content: Mapping[str, Any], default: Row) -> tuple[str | None, Any]:
    """Return the text and the numbers of a row's prompt, one of which is None."""
    if "text" in content and "input" in content:
        raise BadInput("'text' and 'input' both give a prompt; use only one of them")
    text = content.get("text")
    numbers = content.get("input")
    if text is None and numbers is None:
        text = default.text
        numbers = default.input
    if text is None and numbers is None:
        raise BadInput("no prompt; add 'text' or 'input', or give --text or --input for all rows")
    if text is not None and not isinstance(text, str):
        raise BadInput(f"'text': {text!r} is not text; put it in quotes")
    return text, numbers


def _is_list_of_text(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)


def _names(key: str, value: Any) -> list[str]:
    """Return the names of components under a key: a list, or a single name."""
    if isinstance(value, str):
        return [value]
    if not _is_list_of_text(value):
        raise BadInput(f"'{key}': not a list of components; for example: [\"h.0.mlp.c_fc:5\"]")
    return value


def _number_map(key: str, content: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers under a key by the names of their components."""
    value = content.get(key, {})
    is_map = isinstance(value, dict) and all(map(_is_number, value.values()))
    if not is_map:
        raise BadInput(
            f"'{key}': not a map from components to numbers; for example: {{\"h.0.mlp.c_fc:5\": 2}}"
        )
    return {str(name): float(number) for name, number in value.items()}


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= LARGEST


def _check_numbers(value: Any) -> Sequence[float | int] | str | None:
    """Return the numbers of a prompt after checking that they are a list, text or None."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(map(_is_number, value)):
        return value
    raise BadInput("'input': not a list of numbers; for example: [0, 0.75, 0]")
