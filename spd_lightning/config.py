"""Configs: one base and small overrides, found by name from anywhere.

A config is YAML. Its top-level key `base` names another config (or a list of them) that it starts
from: dicts merge key by key, lists and single values replace.
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
from spd_lightning.errors import BadInput, nearest, shown

_HERE = Path(__file__).resolve().parent
SHIPPED = next(
    folder for folder in (_HERE / "configs", _HERE.parent / "configs") if folder.is_dir()
)
"""The shipped configs: inside the installed package, or at the top of a checkout."""


MORE_LINE_ENDS = {"\x85", "\u2028", "\u2029"}
"""Line ends that only Unicode knows: readers of YAML fold them into blanks unless they are written
as escapes.
"""


class KeyTwice(BadInput):
    """A mapping of a YAML text holds the same key twice; YAML's own readers keep the last without a
    word.
    """

    def __init__(self, key: str, lines: tuple[int, int]):
        first, second = lines
        place = f"on line {first}" if first == second else f"on lines {first} and {second}"
        super().__init__(f"key '{key}' is given twice, {place}; keep one of them")


class _OnceOnly(Composer):
    """Rejects a key that a mapping holds twice; one that overrides a merged (`<<`) one is not there
    twice.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: dict[tuple[str, str], yaml.Node] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            name = (key.tag, key.value)
            if name in seen:
                first, second = (one.start_mark.line + 1 for one in (seen[name], key))
                raise KeyTwice(key.value, (first, second))
            seen[name] = key
        return node


class _Loader(_OnceOnly, yaml.SafeLoader):
    """YAML 1.1 with numbers as people write them: 1e-3 is a number, not a word."""


class _Dumper(yaml.SafeDumper):
    """Quotes words that `_Loader` would take for numbers."""


_FLOAT = (
    r"^[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)?$"
    r"|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
)
for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(_FLOAT), list("-+0123456789.")
    )


def places(name: str) -> Iterator[Path]:
    """Every file that a config name may mean, the likeliest first."""
    for folder in (Path(), Path("configs"), SHIPPED):
        yield folder / name
        yield folder / f"{name}.yaml"


def find(name: str) -> Path:
    """The file that a config name means: as given, in ./configs, or among the shipped ones; suffix
    optional.

    Raises:
        BadInput: no such file; the nearest name there is, is suggested.
    """
    with contextlib.suppress(
        OSError, ValueError
    ):  # a name too long for a file, or with a zero byte
        for path in places(name):
            if path.is_file():
                return path
    known = {str(p.relative_to(SHIPPED).with_suffix("")) for p in SHIPPED.rglob("*.yaml")}
    hint = nearest(name.removesuffix(".yaml"), known)
    hint = hint if hint.startswith("did") else "'python -m spd_lightning list' shows those"
    raise BadInput(
        f"config '{shown(name)}': no such file here, in configs/, or among the shipped ones; {hint}"
    )


def load(name: str, as_written: bool = False) -> dict[str, Any]:
    """A config with everything it builds on merged in.

    Of a config that came from a tracker (its folder holds pulled.json), what builds objects beside
    the model and its data is left out: loggers, profilers, callbacks and the like are for the
    user's own settings to name.

    Args:
        name: what `find` finds.
        as_written: keep all of it, to be looked at and not built.

    Raises:
        BadInput: the file is missing, is not a YAML mapping, or builds on itself; or it came from a
            tracker, and its trainer is written in another way than as a run writes it.
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
"""Settings of a trainer that build objects, or say where files go."""


LONGEST = 50
"""How many configs a chain of bases may hold."""


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
        loaded: the results so far, by file and by whether a config that builds on it was pulled.
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
    if (path.resolve(), pulled) in loaded:
        return loaded[path.resolve(), pulled]
    own = read_file(path)
    if not isinstance(own, dict):
        raise BadInput(f"config '{path}': expected 'key: value' lines, found {type(own).__name__}")
    if pulled and not as_written:
        own = _without_foreign(path, own)
    bases = own.pop("base", None) or []
    bases = bases if isinstance(bases, list) else [bases]
    merged: dict[str, Any] = {}
    for base in map(str, bases):
        beside = [path.parent / base, path.parent / f"{base}.yaml"]
        file = next((file for file in beside if file.is_file()), None) or find(base)
        merged = merge(merged, _load(file, (*seen, path.resolve()), as_written, loaded))
    loaded[path.resolve(), pulled] = merge(merged, own)
    return loaded[path.resolve(), pulled]


def _without_foreign(path: Path, pulled: dict[str, Any]) -> dict[str, Any]:
    """Return a pulled config without the settings of its trainer that are for the user to choose.

    jsonargparse also takes a trainer as text, `trainer.logger` as one key, and `callbacks+`. A run
    writes none of these into its config, and they would hide such settings, so they are rejected.
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
    kept = {key: value for key, value in trainer.items() if key not in FOREIGN}
    return {**pulled, "trainer": kept} if "trainer" in pulled else pulled


def items(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """Yield the entries of a YAML list, each with the line on which it begins.

    Raises:
        BadInput: it is not YAML, or not a list.
    """
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if not isinstance(node, yaml.SequenceNode):
            raise BadInput(f"'{path}': expected a list, '- key: value' lines")
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
    """Return what one file holds, without what it builds on.

    Raises:
        BadInput: it is not YAML in UTF-8, or a mapping in it holds a key twice.
    """
    text = read_text(path)
    try:
        content = yaml.load(text, Loader=_Loader) or {}
    except KeyTwice as error:
        raise BadInput(f"config '{path}': {error}") from error
    except _NO_YAML as error:
        raise BadInput(f"config '{path}': not valid YAML: {_reason(error)}") from error
    if fault := next(_faults(content), None):
        raise BadInput(f"config '{path}': {fault}")
    return content


DEEPEST, MOST = 50, 100_000
"""How deeply a config may be nested, and how many values it may hold once its aliases are written
out.
"""


_NO_YAML = (yaml.YAMLError, ValueError, OverflowError, RecursionError)
"""Reading YAML raises these: numbers and dates can be impossible, and lists can be nested too
deeply.
"""


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _faults(content: Any) -> Iterator[str]:
    """Yield what YAML allows and a config cannot hold.

    These are keys that are not text, values that JSON does not have (dates, sets, binary data),
    halves of surrogate pairs, which an escape such as "\\ud83d" makes, and aliases that hold
    themselves or add up to too much.
    """
    pending = [(content, 0)]
    count = 0
    while pending:
        value, depth = pending.pop()
        count += 1
        if depth > DEEPEST:
            yield (
                f"nested more than {DEEPEST} levels deep; write it flatter, without aliases that "
                "hold themselves"
            )
            return
        if count > MOST:
            yield (
                f"it holds more than {MOST:,} values once its aliases are written out; use fewer "
                "aliases"
            )
            return
        if isinstance(value, dict):
            yield from (
                f"the key {key!r} is not text; put it in quotes"
                for key in value
                if not isinstance(key, str)
            )
            pending += [(each, depth + 1) for pair in value.items() for each in pair]
        elif isinstance(value, list):
            pending += [(each, depth + 1) for each in value]
        elif isinstance(value, str):
            if half := lone_surrogate(value):
                yield f"{half} is half of a character; write the character itself"
        elif value is not None and not isinstance(value, bool | int | float):
            yield f"the value {str(value)[:40]!r} is a {type(value).__name__}; put it in quotes"


def check_keys(text: str) -> None:
    """Raise KeyTwice where a mapping in a YAML text holds a key twice; text that is not YAML
    passes.
    """
    with contextlib.suppress(yaml.YAMLError):
        yaml.compose(text, Loader=_Loader)


def one_line(config: Any) -> str:
    """A config as one line of ASCII that every reader of YAML takes, whatever characters are in it.

    JSON writes a character beyond U+FFFF as two halves, which YAML does not join again. Here it is
    one escape.
    """
    written = json.dumps(config, ensure_ascii=False)
    return re.sub(r"[^\x20-\x7e]", lambda found: f"\\U{ord(found[0]):08x}", written)


def merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Two configs as one: dicts merge key by key, everything else in `over` replaces what was under
    it.
    """
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def digest(config: Any) -> str:
    """Twelve hex characters that stand for a config's content, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:12]


def dump(config: Mapping[str, Any]) -> str:
    """A config as YAML that `load` reads back."""
    written = yaml.dump(
        dict(config), Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True
    )
    if MORE_LINE_ENDS & set(written):
        return yaml.dump(dict(config), Dumper=_Dumper, sort_keys=False, width=120)
    return written
