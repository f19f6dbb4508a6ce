"""Sources of text: each yields documents, which are strings, in an order that never changes.

    stories        an endless series of tiny stories with known hidden variables (`stories/`)
    stdlib         the source files of Python's standard library, one file per document
    PATH or GLOB   .txt (documents end at <|endoftext|>, or else at blank lines), .jsonl, .parquet;
                   package:NAME/FILE is a file of an installed package (`paths`)
    hf:NAME        a HuggingFace dataset, by its name on the hub or its folder

The first two are available on every machine and need no network. Files are in UTF-8; a byte-order
mark is not part of the text.
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
from difflib import get_close_matches
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

from spd_lightning.config import digest
from spd_lightning.data.stories.generator import story
from spd_lightning.encoding import lone_surrogate, read_lines
from spd_lightning.errors import BadInput
from spd_lightning.paths import expanded
from spd_lightning.targets.huggingface import hub_answers

END = "<|endoftext|>"
_SUFFIXES = (".txt", ".jsonl", ".parquet")
_PEEK = 1 << 20  # number of characters at the start of a .txt file that are searched for END
_SKIPPED_FOLDERS = {  # tests, tables, bundled tools and other files that are not library source
    "test",
    "tests",
    "idlelib",
    "idle_test",
    "lib2to3",
    "pydoc_data",
    "encodings",
    "turtledemo",
    "ensurepip",
    "site-packages",
    "dist-packages",
    "distutils",
    "__pycache__",
    "__phello__",
    "_vendor",
    "lib-dynload",
}


@dataclass(frozen=True)
class Corpus:
    """A source of text, by its name.

    Args:
        name: `stories`, `stdlib`, a path, a glob, or `hf:NAME`.
        column: the text column of .jsonl files, .parquet files and datasets.
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
        """Return whether the corpus never ends."""
        return self.name == "stories"

    def documents(self) -> Iterator[str]:
        """Yield all documents that are not blank, in order.

        Raises:
            BadInput: the corpus or its column does not exist, or an entry is not text.
        """
        for text in self._all():
            if text.strip():
                yield text

    def fingerprint(self) -> str:
        """Return twelve characters that identify everything the documents depend on."""
        if self.endless:
            first = list(islice(self.documents(), 100))
            return digest(["stories", first])
        if self.name == "stdlib":
            version = platform.python_version()
            return digest(["stdlib", version])
        if not self.name.startswith("hf:"):
            states = [_file_state(path) for path in self._files()]
            return digest([self.column, *states])
        folder = Path(self.name.removeprefix("hf:"))
        states = []
        if folder.is_dir():
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            states = [_file_state(path) for path in files]
        return digest([self.name, self.column, self.split, self.config_name, *states])

    def _all(self) -> Iterator[str]:
        if self.endless:
            for index in count():
                yield story(0, index).text
        elif self.name == "stdlib":
            root = Path(sysconfig.get_path("stdlib"))
            yield from _standard_library(root)
        elif self.name.startswith("hf:"):
            rows = enumerate(self._dataset(), 1)
            where = f"corpus '{self.name}'"
            yield from texts(rows, self.column, where, "row")
        else:
            for path in self._files():
                read = _READERS[path.suffix]
                yield from read(path, self.column)

    def _files(self) -> list[Path]:
        paths = matching(expanded(self.name))
        if not paths:
            remedy = "give stories, stdlib, a path, or hf:NAME"
            is_word = {"/", ".", "*"}.isdisjoint(self.name)
            close = get_close_matches(self.name, ["stories", "stdlib"], n=1)
            if is_word and close:
                remedy = f"did you mean '{close[0]}'?"
            raise BadInput(f"corpus '{self.name}': no such file; {remedy}")
        for path in paths:
            if path.suffix not in _SUFFIXES or not path.is_file():
                raise BadInput(
                    f"corpus '{path}': not a .txt, .jsonl or .parquet file; give such files, for "
                    "example 'folder/*.txt'"
                )
        return paths

    def _dataset(self) -> Iterable[Any]:
        datasets = library("datasets", f"corpus '{self.name}'")
        name = self.name[3:]
        local = Path(name).exists()
        if local and set("*?[") & set(str(Path(name).resolve())):
            raise BadInput(
                f"corpus '{self.name}': the package datasets reads '*', '?' and '[' in a folder's "
                f"name as a pattern; name its files instead, for example: {name}/*.parquet"
            )
        reachable = local or hub_answers()
        try:
            with _offline_hub(not reachable):
                return datasets.load_dataset(
                    name, self.config_name, split=self.split, streaming=self.streaming
                )
        # datasets, the hub's client, pyarrow and their dependencies raise errors of many types
        except Exception as error:
            why = "not on this machine, and no network to fetch it"
            if reachable:
                why = " ".join(str(error).split())[:200]
            raise BadInput(
                f"corpus '{self.name}': {why}; the corpora stories and stdlib need no network"
            ) from error


def library(name: str, what: str) -> Any:
    """Import and return a package of the extra [lm].

    Args:
        name: the package.
        what: the value that needs it, for the message.

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
    """Return the files that match a path or a glob, in order.

    The longest leading part of the path that exists is taken literally, including any brackets,
    stars and question marks in it.
    """
    literal = path
    while not literal.exists() and literal != literal.parent:
        literal = literal.parent
    rest = path.relative_to(literal)
    pattern = Path(glob.escape(str(literal))) / rest
    names = glob.glob(str(pattern), recursive=True)
    return [Path(name) for name in sorted(names)]


class Unusable(NamedTuple):
    """The reason why a row has no usable text, and the remedy, as phrases of an error message."""

    why: str
    remedy: str


Row = tuple[int, Any]
"""The number of a row, counted from 1, and its content: an object, or an `Unusable`."""


def texts(rows: Iterable[Row], column: str, where: str, row_is: str = "line") -> Iterator[str]:
    """Yield the texts in one column of some rows; nulls are skipped.

    Raises:
        BadInput: a row has no usable text in that column.
    """
    for number, row in rows:
        text = text_of(row, column)
        if isinstance(text, Unusable):
            place = f"{where}: {row_is} {number}"
            raise BadInput(f"{place}: {text.why}; {text.remedy}")
        if text is None:
            continue
        yield text


def text_of(row: Any, column: str, option: str = "column") -> str | Unusable | None:
    """Return the text in one column of a row: None for null, an `Unusable` if it is not a text.

    Args:
        row: an object, or an `Unusable`.
        column: the column's name.
        option: the setting that names the column.
    """
    if isinstance(row, Unusable):
        return row
    if column not in row:
        columns = ", ".join(map(str, row))
        return Unusable(f"no column '{column}'", f"set {option}; choose from: {columns}")
    value = row[column]
    if value is None:
        return None
    if not isinstance(value, str):
        why = f"column '{column}' holds {type(value).__name__}, not text"
        return Unusable(why, f"set {option}")
    if half := lone_surrogate(value):
        return Unusable(f"{half} is half of a character", "write the whole character")
    return value


def jsonl_rows(path: Path, keep_blank: bool = False) -> Iterator[Row]:
    """Yield the objects of a file with one JSON object per line, each with its line number.

    Blank lines are skipped; with `keep_blank` they yield None.
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
        return Unusable(f"not JSON ({error})", "give one object per line")
    if not isinstance(row, dict):
        return Unusable(f"it holds {type(row).__name__}", "give one object per line")
    return row


def _jsonl(path: Path, column: str) -> Iterator[str]:
    rows = jsonl_rows(path)
    where = f"file '{path}'"
    return texts(rows, column, where)


def parquet_rows(path: Path, column: str) -> Iterator[Row]:
    """Yield the rows of a Parquet file: only this column of them, or all columns if it is missing.

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
    rows = parquet_rows(path, column)
    where = f"file '{path}'"
    return texts(rows, column, where, "row")


def _plain(path: Path, _: str) -> Iterator[str]:
    """Yield the documents of a text file.

    They end at END marks or, if the beginning of the file contains none, at blank lines.
    """
    marked = _has_end_marks(path)
    document = list[str]()  # lines of the document that has not ended yet
    for line in read_lines(path):
        if marked:
            *ended, rest = line.split(END)
        elif line.strip():
            ended, rest = [], line
        else:  # a blank line ends a document and starts the next one
            ended, rest = [""], ""
        for part in ended:
            yield "\n".join([*document, part]).strip("\n")
            document = []
        document.append(rest)
    yield "\n".join(document).strip("\n")


def _has_end_marks(path: Path) -> bool:
    """Return whether the first `_PEEK` characters, up to the end of their line, contain END."""
    marked = False
    seen = 0
    for line in read_lines(path):
        if seen >= _PEEK:
            break
        seen += len(line)
        marked = marked or END in line
    return marked


def _standard_library(root: Path) -> Iterator[str]:
    paths = root.rglob("*.py")
    for path in sorted(paths, key=lambda path: path.relative_to(root).parts):
        parts = path.relative_to(root).parts
        generated = parts[0].startswith(("config-", "_sysconfigdata"))
        skipped = not _SKIPPED_FOLDERS.isdisjoint(parts)
        if generated or skipped:
            continue
        with tokenize.open(path) as file:  # in the encoding that the source declares
            yield file.read()


def _file_state(path: Path) -> list[Any]:
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


@contextmanager
def _offline_hub(offline: bool) -> Iterator[None]:
    """Let the hub's client search this machine only, if `offline`.

    Without a network the client would otherwise retry for most of a minute.
    """
    if not offline:
        yield
        return
    modules = [
        library("datasets", "a dataset").config,
        importlib.import_module("huggingface_hub").constants,
    ]
    before = [module.HF_HUB_OFFLINE for module in modules]
    try:
        for module in modules:
            module.HF_HUB_OFFLINE = True
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


_READERS = {".txt": _plain, ".jsonl": _jsonl, ".parquet": _parquet}
