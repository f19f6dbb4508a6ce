"""Where text comes from: documents, each a string, in an order that never changes.

    stories        tiny stories whose hidden variables are known, without end (stories.py)
    stdlib         the sources of Python's own standard library, one file a document
    PATH or GLOB   .txt (a document ends at <|endoftext|>, or at a blank line where there is none), .jsonl, .parquet
    hf:NAME        a HuggingFace dataset, by its name on the hub or its folder

The first two are on every machine and need no network.
"""

import glob
import importlib
import json
import platform
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

from spd_lightning.config import digest
from spd_lightning.errors import BadInput, nearest
from spd_lightning.targets.huggingface import hub_answers
from spd_lightning.targets.stories import story

END = "<|endoftext|>"
_SUFFIXES = (".txt", ".jsonl", ".parquet")
_PEEK = 1 << 20  # characters of a .txt file that are searched for END
_NOT_PROSE = {  # tests, tables, bundled tools and what else is not a library's source
    *("test", "tests", "idlelib", "idle_test", "lib2to3", "pydoc_data", "encodings", "turtledemo", "ensurepip"),
    *("site-packages", "dist-packages", "distutils", "__pycache__", "__phello__", "_vendor", "lib-dynload"),
}


@dataclass(frozen=True)
class Corpus:
    """Text by name: one of those above.

    Args:
        name: `stories`, `stdlib`, a path, a glob, or `hf:NAME`.
        column: the column that holds the text, of .jsonl, .parquet and datasets.
        split: the split of a dataset.
        config_name: the configuration of a dataset that has several.
        streaming: read a dataset as it arrives rather than download it first.
    """

    name: str
    column: str = "text"
    split: str = "train"
    config_name: str | None = None
    streaming: bool = False

    @property
    def endless(self) -> bool:
        """Whether there are always more documents."""
        return self.name == "stories"

    def documents(self) -> Iterator[str]:
        """All documents with anything in them, in order.

        Raises:
            BadInput: there is no such corpus or column, or something in it is not text.
        """
        return (text for text in self._all() if text.strip())

    def fingerprint(self) -> str:
        """Twelve characters that stand for all that the documents depend on."""
        if self.endless:
            return digest(["stories", list(islice(self.documents(), 100))])
        if self.name == "stdlib":
            return digest(["stdlib", platform.python_version()])
        if not self.name.startswith("hf:"):
            return digest([self.column, *map(_facts, self._files())])
        folder = Path(self.name[3:])
        inside = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
        return digest([self.name, self.column, self.split, self.config_name, *map(_facts, inside)])

    def _all(self) -> Iterator[str]:
        if self.endless:
            yield from (story(0, index).text for index in count())
        elif self.name == "stdlib":
            yield from _standard_library(Path(sysconfig.get_path("stdlib")))
        elif self.name.startswith("hf:"):
            yield from _column(self._dataset(), self.column, f"corpus '{self.name}'")
        else:
            for path in self._files():
                yield from _READERS[path.suffix](path, self.column)

    def _files(self) -> list[Path]:
        paths = [Path(found) for found in sorted(glob.glob(str(Path(self.name).expanduser()), recursive=True))]
        if not paths:
            given = "" if {"/", ".", "*"} & set(self.name) else nearest(self.name, ["stories", "stdlib"]) + " or "
            raise BadInput(f"corpus '{self.name}': no such file; {given}give stories, stdlib, a path, or hf:NAME")
        if odd := next((path for path in paths if path.suffix not in _SUFFIXES or not path.is_file()), None):
            raise BadInput(
                f"corpus '{odd}': not a .txt, .jsonl or .parquet file; give such files, as in 'folder/*.txt'"
            )
        return paths

    def _dataset(self) -> Iterable[Any]:
        datasets, name = library("datasets", f"corpus '{self.name}'"), self.name[3:]
        reachable = Path(name).exists() or hub_answers()
        try:
            with _hub_left_alone(not reachable):
                return datasets.load_dataset(name, self.config_name, split=self.split, streaming=self.streaming)
        except Exception as error:  # of datasets, the hub's client, pyarrow and what they are built on
            why = " ".join(str(error).split())[:200] if reachable else "not on this machine, and no network to fetch it"
            raise BadInput(f"corpus '{self.name}': {why}; the corpora stories and stdlib need no network") from error


def library(name: str, what: str) -> Any:
    """A package of the extra [lm].

    Raises:
        BadInput: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BadInput(f"{what}: needs {name}; pip install 'spd_lightning[lm]'") from error


def lines(path: Path) -> Iterator[str]:
    """The lines of a text file, without their ends.

    Raises:
        BadInput: it is not there, or not UTF-8.
    """
    try:
        with open(path, encoding="utf-8") as file:
            yield from (line.rstrip("\n") for line in file)
    except UnicodeDecodeError as error:
        raise BadInput(f"file '{path}': not UTF-8 text ({error.reason}); convert it") from error
    except OSError as error:
        raise BadInput(f"file '{path}': cannot be read ({error.strerror}); give a text file") from error


def jsonl(path: Path, column: str) -> Iterator[str]:
    """The texts in one column of a file with a JSON object a line."""
    return _column(_objects(path), column, f"file '{path}'")


def _objects(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise BadInput(f"file '{path}': line {number} is not JSON ({error}); give one object a line") from error
        if not isinstance(row, dict):
            raise BadInput(f"file '{path}': line {number} holds {type(row).__name__}; give one object a line")
        yield row


def _column(rows: Iterable[Any], column: str, where: str) -> Iterator[str]:
    """One column of rows; nulls are left out."""
    for row in rows:
        if column not in row:
            raise BadInput(f"{where}: no column '{column}'; set column; there are: {', '.join(map(str, row))}")
        value = row[column]
        if isinstance(value, str):
            yield value
        elif value is not None:
            raise BadInput(f"{where}: column '{column}' holds {type(value).__name__}, not text; name another column")


def _parquet(path: Path, column: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            chosen = [column] if column in names else names
            for rows in file.iter_batches(1000, columns=chosen) if file.metadata.num_rows else ():
                yield from _column(rows.to_pylist(), column, f"file '{path}'")
    except (pa.ArrowException, OSError) as error:
        why = " ".join(str(error).split())[:160]
        raise BadInput(f"file '{path}': cannot be read as Parquet ({why}); give a whole Parquet file") from error


def _plain(path: Path, _: str) -> Iterator[str]:
    """Documents between END marks or, in a file that has none in its beginning, between blank lines."""
    document, marked, seen = list[str](), False, 0
    for line in lines(path):
        if seen >= _PEEK:
            break
        seen += len(line)
        marked = marked or END in line
    for line in lines(path):
        *ended, rest = line.split(END) if marked else [line] if line.strip() else ["", ""]
        for part in ended:
            yield "\n".join([*document, part]).strip("\n")
            document = []
        document.append(rest)
    yield "\n".join(document).strip("\n")


def _standard_library(root: Path) -> Iterator[str]:
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).parts):
        inside = path.relative_to(root).parts
        if _NOT_PROSE.isdisjoint(inside) and not inside[0].startswith(("config-", "_sysconfigdata")):
            with tokenize.open(path) as file:  # in the encoding that the source declares
                yield file.read()


def _facts(path: Path) -> list[Any]:
    facts = path.stat()
    return [str(path.resolve()), facts.st_size, facts.st_mtime_ns]


@contextmanager
def _hub_left_alone(wanted: bool) -> Iterator[None]:
    """Has the hub's client look on this machine only; without a network it would try for most of a minute."""
    if not wanted:
        yield
        return
    places = [library("datasets", "a dataset").config, importlib.import_module("huggingface_hub").constants]
    before = [place.HF_HUB_OFFLINE for place in places]
    try:
        for place in places:
            place.HF_HUB_OFFLINE = True
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


_READERS = {".txt": _plain, ".jsonl": jsonl, ".parquet": _parquet}
