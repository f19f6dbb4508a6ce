"""Print tables in a terminal, or write them to files."""

import json
from pathlib import Path
from typing import Any

import polars as pl

from spd_lightning.errors import BadInput
from spd_lightning.files import whole

WIDEST = 80
"""The largest number of characters of a text in a table."""


def print_frame(frame: pl.DataFrame) -> None:
    """Print all rows of a frame, one line each; numbers are aligned at the right."""
    columns = []
    for name in frame.columns:
        cells = [_cell(value) for value in frame[name].to_list()]
        width = max([len(name), *map(len, cells)])
        is_number = frame.schema[name].is_numeric()
        column = [name, *cells]
        columns.append([cell.rjust(width) if is_number else cell.ljust(width) for cell in column])
    for row in zip(*columns, strict=True):
        print("  ".join(row).rstrip())


def _cell(value: Any) -> str:
    """Return a value as text on one line."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = " ".join(str(value).split()) or repr(value)
    if len(text) > WIDEST:
        return f"{text[: WIDEST - 1]}…"
    return text


def print_json(value: Any) -> None:
    """Print a JSON value, indented."""
    print(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False))


def write(frame: pl.DataFrame, csv: str | None, parquet: str | None) -> bool:
    """Write a frame to the given files, and print a line for each; return whether any was given."""
    for path, kind in ((csv, "csv"), (parquet, "parquet")):
        if path is None:
            continue
        if not path:
            raise BadInput(f"--{kind} '': the name is empty; name a file to write")
        file = Path(path).expanduser()
        if not file.parent.is_dir():
            raise BadInput(f"--{kind} '{path}': the folder does not exist; make it first")
        with whole(file) as temporary:
            if kind == "csv":
                flat = frame.with_columns(pl.col(pl.List(pl.String)).list.join(""))
                flat.write_csv(temporary)
            else:
                frame.write_parquet(temporary)
        print(f"wrote {frame.height} rows to {path}")
    return csv is not None or parquet is not None
