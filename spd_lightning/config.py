"""Configs: YAML files that are found by name and build on each other.

The top-level key `base` of a config names another config, or a list of them, to start from. Dicts
are merged key by key; lists and single values are replaced.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import Composer

from spd_lightning.encoding import lone_surrogate, read_text
from spd_lightning.errors import BadInput, command, nearest, shown

_HERE = Path(__file__).resolve().parent
SHIPPED = next(
    folder for folder in (_HERE / "configs", _HERE.parent / "configs") if folder.is_dir()
)
"""The shipped configs: inside the installed package, or at the top of a checkout."""


MORE_LINE_ENDS = {"\x85", "\u2028", "\u2029"}
"""Line ends of Unicode, which YAML readers fold into blanks unless they are written as escapes."""


class KeyTwice(BadInput):
    """A mapping in a YAML text has the same key twice; PyYAML would silently keep the last one."""

    def __init__(self, key: str, lines: tuple[int, int]):
        first, second = lines
        place = f"on lines {first} and {second}"
        if first == second:
            place = f"on line {first}"
        super().__init__(f"key '{key}' is given twice, {place}; keep one of them")


class _OnceOnly(Composer):
    """Rejects a key that a mapping has twice; a key can still override a merged (`<<`) one."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            name = (key.tag, key.value)
            line = key.start_mark.line + 1
            if name in lines:
                raise KeyTwice(key.value, (lines[name], line))
            lines[name] = line
        return node


class _Loader(_OnceOnly, yaml.SafeLoader):
    """A reader of YAML 1.1 that takes 1e-3 for a number, not for text."""


class _Dumper(yaml.SafeDumper):
    """A writer of YAML that quotes text that `_Loader` would take for a number."""


_FLOAT = (
    r"^[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)?$"
    r"|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
)
for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(_FLOAT), list("-+0123456789.")
    )


def places(name: str) -> Iterator[Path]:
    """Yield every file that a config name can mean, in order of precedence."""
    for folder in (Path(), Path("configs"), SHIPPED):
        yield folder / name
        yield folder / f"{name}.yaml"


def find(name: str) -> Path:
    """Return the file of a config, in this folder, in ./configs, or among the shipped ones.

    The suffix can be omitted.

    Raises:
        BadInput: there is no such file; the message suggests the nearest name.
    """
    with contextlib.suppress(OSError, ValueError):  # the name is too long, or has a zero byte
        for path in places(name):
            if path.is_file():
                return path
    shipped = [path.relative_to(SHIPPED) for path in SHIPPED.rglob("*.yaml")]
    names = {str(path.with_suffix("")) for path in shipped}
    hint = nearest(name.removesuffix(".yaml"), names)
    if not hint.startswith("did"):
        hint = f"to list those: {command('list')}"
    raise BadInput(
        f"config '{shown(name)}': no such file here, in configs/, or among the shipped ones; {hint}"
    )


def load(name: str, as_written: bool = False) -> dict[str, Any]:
    """Return a config, merged with everything it builds on.

    A config is pulled if it came from a tracker (its folder has a pulled.json). Of a pulled config,
    the parts of the trainer that build further objects are omitted: loggers, profilers, callbacks
    and the like. Only the user's own settings can name those.

    Args:
        name: a name that `find` accepts.
        as_written: keep all of a pulled config, to show it rather than build it.

    Raises:
        BadInput: the file is missing, is not a YAML mapping, or builds on itself; or it is pulled,
            and its trainer is not written the way a run writes it.
    """
    return _load(find(name), (), as_written, {})


FOREIGN = (
    "logger",
    "profiler",
    "callbacks",
    "plugins",
    "strategy",
    "accelerator",
    "default_root_dir",
)
"""Settings of a trainer that build objects or choose a folder."""


LONGEST = 50
"""The largest number of configs in a chain of bases."""


def _load(
    path: Path,
    seen: tuple[Path, ...],
    as_written: bool,
    loaded: dict[tuple[Path, bool], dict[str, Any]],
) -> dict[str, Any]:
    """Load a config with its bases.

    Args:
        path: its file.
        seen: the files that build on it, the outermost first.
        as_written: as for `load`.
        loaded: the results so far, by file and by whether it or a config that builds on it is
            pulled.
    """
    if path.resolve() in seen:
        raise BadInput(
            f"config '{path}': it builds on itself; remove it from its own chain of 'base'"
        )
    if len(seen) > LONGEST:
        raise BadInput(
            f"config '{seen[0].name}': it builds on a chain of more than {LONGEST} configs; merge "
            "some of them"
        )
    pulled = any((file.parent / "pulled.json").exists() for file in (*seen, path))
    key = (path.resolve(), pulled)
    if key in loaded:
        return loaded[key]
    content = read_file(path)
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise BadInput(f"config '{path}': expected 'key: value' lines, found {kind}")
    if pulled and not as_written:
        content = _without_foreign(path, content)
    bases = content.pop("base", None) or []
    if not isinstance(bases, list):
        bases = [bases]
    merged: dict[str, Any] = {}
    for base in map(str, bases):
        file = _find_base(base, path.parent)
        settings = _load(file, (*seen, path.resolve()), as_written, loaded)
        merged = merge(merged, settings)
    loaded[key] = merge(merged, content)
    return loaded[key]


def _find_base(name: str, folder: Path) -> Path:
    """Return the file of a base: next to the config that names it, or wherever `find` finds it."""
    for path in (folder / name, folder / f"{name}.yaml"):
        if path.is_file():
            return path
    return find(name)


def _without_foreign(path: Path, pulled: dict[str, Any]) -> dict[str, Any]:
    """Return a pulled config without the trainer settings that only the user can choose.

    jsonargparse also accepts a trainer as text, `trainer.logger` as one key, and `callbacks+`. A
    run never writes these, and they could hide such settings, so they are rejected.
    """
    trainer = pulled.get("trainer", {})
    if not isinstance(trainer, dict):
        raise BadInput(
            f"config '{path}': trainer: expected 'key: value' lines in a pulled run; pull the run "
            "again"
        )
    for key in (*pulled, *trainer):
        if not str(key).isidentifier():
            raise BadInput(
                f"config '{path}': key '{key}': not the name of a setting; pull the run again"
            )
    if "trainer" not in pulled:
        return pulled
    settings = {key: value for key, value in trainer.items() if key not in FOREIGN}
    return {**pulled, "trainer": settings}


def items(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """Yield the entries of a YAML list, each with the line on which it begins.

    Raises:
        BadInput: the text is not YAML, or not a list.
    """
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if not isinstance(node, yaml.SequenceNode):
            raise BadInput(f"'{path}': expected a list of '- key: value' lines")
        for entry in node.value:
            yield entry.start_mark.line + 1, loader.construct_document(entry)
    except KeyTwice as error:
        raise BadInput(f"'{path}': {error}") from error
    except BadInput:
        raise
    except _NO_YAML as error:
        raise BadInput(f"'{path}': not valid YAML: {_reason(error)}") from error
    finally:
        if loader:
            loader.dispose()


def read_file(path: Path) -> Any:
    """Return the content of one file, without its bases.

    Raises:
        BadInput: it is not YAML in UTF-8, or one of its mappings has a key twice.
    """
    text = read_text(path)
    try:
        content = yaml.load(text, Loader=_Loader) or {}
    except KeyTwice as error:
        raise BadInput(f"config '{path}': {error}") from error
    except _NO_YAML as error:
        raise BadInput(f"config '{path}': not valid YAML: {_reason(error)}") from error
    problem = next(_problems(content), None)
    if problem is not None:
        raise BadInput(f"config '{path}': {problem}")
    return content


MAX_DEPTH = 50
"""The largest number of levels in a config."""
MAX_VALUES = 100_000
"""The largest number of values in a config once its aliases are written out."""


_NO_YAML = (yaml.YAMLError, ValueError, OverflowError, RecursionError)
"""The errors of reading YAML; numbers and dates can be impossible, lists nested too deeply."""


def _reason(error: BaseException) -> str:
    """Return an error's message on one line, or its type if it has no message."""
    words = str(error).split()
    message = " ".join(words)[:300]
    return message or type(error).__name__


def _problems(content: Any) -> Iterator[str]:
    """Yield the problems of a content that YAML allows and a config does not.

    These are keys that are not text, values that JSON does not have (dates, sets, binary data),
    halves of surrogate pairs from an escape such as "\\ud83d", and aliases that contain themselves
    or add up to too many values.
    """
    pending = [(content, 0)]
    count = 0
    while pending:
        value, depth = pending.pop()
        count += 1
        if depth > MAX_DEPTH:
            yield (
                f"nested more than {MAX_DEPTH} levels deep; write it flatter, without aliases that "
                "contain themselves"
            )
            return
        if count > MAX_VALUES:
            yield (
                f"it has more than {MAX_VALUES:,} values once its aliases are written out; use "
                "fewer aliases"
            )
            return
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, str):
                    yield f"the key {key!r} is not text; put it in quotes"
            for pair in value.items():
                pending += [(part, depth + 1) for part in pair]
        elif isinstance(value, list):
            pending += [(entry, depth + 1) for entry in value]
        elif isinstance(value, str):
            if half := lone_surrogate(value):
                yield f"{half} is half of a character; write the character itself"
        elif value is not None and not isinstance(value, bool | int | float):
            shown_value = repr(str(value)[:40])
            kind = type(value).__name__
            yield f"the value {shown_value} has the type {kind}; put it in quotes"


def check_keys(text: str) -> None:
    """Raise KeyTwice if a mapping in a YAML text has a key twice. Text that is not YAML passes."""
    with contextlib.suppress(yaml.YAMLError):
        yaml.compose(text, Loader=_Loader)


def one_line(config: Any) -> str:
    """Return a config as one line of ASCII that every YAML reader understands.

    JSON writes a character beyond U+FFFF as two halves, which YAML does not join again. This
    function writes it as one escape.
    """
    text = json.dumps(config, ensure_ascii=False)
    return re.sub(r"[^\x20-\x7e]", _escape, text)


def _escape(match: re.Match[str]) -> str:
    """Return a character as an escape of YAML."""
    return f"\\U{ord(match[0]):08x}"


def merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return two configs as one: merge dicts key by key, and let all else in `over` win."""
    merged = dict(under)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def digest(config: Any) -> str:
    """Return twelve hex characters that identify a config, whatever the order of its keys."""
    text = json.dumps(config, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def dump(config: Mapping[str, Any]) -> str:
    """Return a config as YAML that `load` reads back."""
    text = yaml.dump(dict(config), Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)
    if MORE_LINE_ENDS & set(text):
        return yaml.dump(dict(config), Dumper=_Dumper, sort_keys=False, width=120)
    return text
