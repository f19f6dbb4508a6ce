"""Where text comes from: documents, each a string, in an order that never changes.

    stories        tiny stories whose hidden variables are known, without end (stories.py)
    stdlib         the sources of Python's own standard library, one file a document
    PATH or GLOB   .txt (documents end at <|endoftext|>, or else at blank lines), .jsonl, .parquet
    hf:NAME        a HuggingFace dataset, by its name on the hub or its folder

The first two are on every machine and need no network. Files are in UTF-8; a byte-order mark is not
part of the text.
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
from typing import Any, NamedTuple

from spd_lightning.config import digest
from spd_lightning.data.stories.generator import story
from spd_lightning.encoding import lone_surrogate, read_lines
from spd_lightning.errors import BadInput, nearest
from spd_lightning.targets.huggingface import hub_answers

END = "<|endoftext|>"
_SUFFIXES = (".txt", ".jsonl", ".parquet")
_PEEK = 1 << 20  # characters of a .txt file that are searched for END
_NOT_PROSE = {  # tests, tables, bundled tools and what else is not a library's source
    *(
        "test",
        "tests",
        "idlelib",
        "idle_test",
        "lib2to3",
        "pydoc_data",
        "encodings",
        "turtledemo",
        "ensurepip",
    ),
    *(
        "site-packages",
        "dist-packages",
        "distutils",
        "__pycache__",
        "__phello__",
        "_vendor",
        "lib-dynload",
    ),
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
        inside = (
            sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
        )
        return digest([self.name, self.column, self.split, self.config_name, *map(_facts, inside)])

    def _all(self) -> Iterator[str]:
        if self.endless:
            yield from (story(0, index).text for index in count())
        elif self.name == "stdlib":
            yield from _standard_library(Path(sysconfig.get_path("stdlib")))
        elif self.name.startswith("hf:"):
            yield from texts(
                enumerate(self._dataset(), 1), self.column, f"corpus '{self.name}'", "row"
            )
        else:
            for path in self._files():
                yield from _READERS[path.suffix](path, self.column)

    def _files(self) -> list[Path]:
        paths = matching(Path(self.name).expanduser())
        if not paths:
            given = (
                ""
                if {"/", ".", "*"} & set(self.name)
                else nearest(self.name, ["stories", "stdlib"]) + " or "
            )
            raise BadInput(
                f"corpus '{self.name}': no such file; {given}give stories, stdlib, a path, or "
                "hf:NAME"
            )
        if odd := next(
            (path for path in paths if path.suffix not in _SUFFIXES or not path.is_file()), None
        ):
            raise BadInput(
                f"corpus '{odd}': not a .txt, .jsonl or .parquet file; give such files, as in "
                "'folder/*.txt'"
            )
        return paths

    def _dataset(self) -> Iterable[Any]:
        datasets = library("datasets", f"corpus '{self.name}'")
        name = self.name[3:]
        local = Path(name).exists()
        if local and set("*?[") & set(str(Path(name).resolve())):
            raise BadInput(
                f"corpus '{self.name}': the package datasets takes '*', '?' and '[' in a folder's "
                "name for a pattern; "
                f"name its files instead, for example: {name}/*.parquet"
            )
        reachable = local or hub_answers()
        try:
            with _hub_left_alone(not reachable):
                return datasets.load_dataset(
                    name, self.config_name, split=self.split, streaming=self.streaming
                )
        except (
            Exception
        ) as error:  # of datasets, the hub's client, pyarrow and what they are built on
            why = (
                " ".join(str(error).split())[:200]
                if reachable
                else "not on this machine, and no network to fetch it"
            )
            raise BadInput(
                f"corpus '{self.name}': {why}; the corpora stories and stdlib need no network"
            ) from error


def library(name: str, what: str) -> Any:
    """A package of the extra [lm].

    Raises:
        BadInput: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BadInput(
            f"{what}: needs {name}; pip install 'spd_lightning[lm]' (in a checkout: pip install -e "
            "'.[lm]')"
        ) from error


def matching(path: Path) -> list[Path]:
    """Return the files that a path or a glob means, in order.

    A file or folder that is there is meant as it is written, brackets, stars and question marks
    included.
    """
    literal = path
    while not literal.exists() and literal != literal.parent:
        literal = literal.parent
    rest = path.relative_to(literal)
    pattern = Path(glob.escape(str(literal))) / rest
    return [Path(found) for found in sorted(glob.glob(str(pattern), recursive=True))]


class Unusable(NamedTuple):
    """Why a row of a table of texts has no text, and what to do about it, in the words of an error
    message.
    """

    why: str
    remedy: str


Row = tuple[int, Any]
"""The number of a row, from 1, and its content: an object, or an `Unusable` in place of one."""


def texts(rows: Iterable[Row], column: str, where: str, row_is: str = "line") -> Iterator[str]:
    """Yield one column of rows; nulls are left out.

    Raises:
        BadInput: a row has no text there.
    """
    for number, row in rows:
        text = text_of(row, column)
        if isinstance(text, Unusable):
            raise BadInput(f"{where}: {row_is} {number}: {text.why}; {text.remedy}")
        if text is not None:
            yield text


def text_of(row: Any, column: str, option: str = "column") -> str | Unusable | None:
    """Return what one column of a row holds: a text, None for null, or why it cannot be used.

    Args:
        row: an object, or an `Unusable`.
        column: the column's name.
        option: the setting that names the column.
    """
    if isinstance(row, Unusable):
        return row
    if column not in row:
        return Unusable(
            f"no column '{column}'", f"set {option}; choose from: {', '.join(map(str, row))}"
        )
    value = row[column]
    if value is None:
        return None
    if not isinstance(value, str):
        return Unusable(
            f"column '{column}' holds {type(value).__name__}, not text", f"set {option}"
        )
    if half := lone_surrogate(value):
        return Unusable(f"{half} is half of a character", "write the whole character")
    return value


def jsonl_rows(path: Path, keep_blank: bool = False) -> Iterator[Row]:
    """Yield the objects of a file with a JSON object a line, by line; a blank line is left out, or
    None.
    """
    for number, line in enumerate(read_lines(path), 1):
        if line.strip():
            yield number, _object(line)
        elif keep_blank:
            yield number, None


def _object(line: str) -> dict[str, Any] | Unusable:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Unusable(f"not JSON ({error})", "give one object a line")
    if not isinstance(row, dict):
        return Unusable(f"it holds {type(row).__name__}", "give one object a line")
    return row


def _jsonl(path: Path, column: str) -> Iterator[str]:
    return texts(jsonl_rows(path), column, f"file '{path}'")


def parquet_rows(path: Path, column: str) -> Iterator[Row]:
    """Yield the rows of a Parquet file with this column alone, or with all columns if there is no
    such one.

    Raises:
        BadInput: the file cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            chosen = [column] if column in names else names
            batches = file.iter_batches(1000, columns=chosen) if file.metadata.num_rows else ()
            number = 0
            for batch in batches:
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        why = " ".join(str(error).split())[:160]
        raise BadInput(
            f"file '{path}': cannot be read as Parquet ({why}); give a whole Parquet file"
        ) from error


def _parquet(path: Path, column: str) -> Iterator[str]:
    return texts(parquet_rows(path, column), column, f"file '{path}'", "row")


def _plain(path: Path, _: str) -> Iterator[str]:
    """Documents between END marks or, in a file that has none in its beginning, between blank
    lines.
    """
    document = list[str]()
    marked = False
    seen = 0
    for line in read_lines(path):
        if seen >= _PEEK:
            break
        seen += len(line)
        marked = marked or END in line
    for line in read_lines(path):
        *ended, rest = line.split(END) if marked else [line] if line.strip() else ["", ""]
        for part in ended:
            yield "\n".join([*document, part]).strip("\n")
            document = []
        document.append(rest)
    yield "\n".join(document).strip("\n")


def _standard_library(root: Path) -> Iterator[str]:
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).parts):
        inside = path.relative_to(root).parts
        if _NOT_PROSE.isdisjoint(inside) and not inside[0].startswith(
            ("config-", "_sysconfigdata")
        ):
            with tokenize.open(path) as file:  # in the encoding that the source declares
                yield file.read()


def _facts(path: Path) -> list[Any]:
    facts = path.stat()
    return [str(path.resolve()), facts.st_size, facts.st_mtime_ns]


@contextmanager
def _hub_left_alone(wanted: bool) -> Iterator[None]:
    """Has the hub's client look on this machine only; without a network it would try for most of a
    minute.
    """
    if not wanted:
        yield
        return
    places = [
        library("datasets", "a dataset").config,
        importlib.import_module("huggingface_hub").constants,
    ]
    before = [place.HF_HUB_OFFLINE for place in places]
    try:
        for place in places:
            place.HF_HUB_OFFLINE = True
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


_READERS = {".txt": _plain, ".jsonl": _jsonl, ".parquet": _parquet}
