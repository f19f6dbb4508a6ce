"""Read and write the JSON files of runs, targets and harvests: one reader for all of them.

A file on disk may be truncated, changed in one bit, or written by somebody else. `read` returns a
value of the shape that its caller names, or raises one line that gives the file, the place in it,
what was expected there, and what to do:

1. the file's size is bounded, its text is UTF-8 and JSON, and no key stands twice in an object;
2. every value has the type of its place: a `TypedDict`, a dataclass, a list, a literal (`conform`);
3. the seal, a digest of the rest that `dumped` puts into every object, fits (`unsealed`).

A file without a seal is read as well, since people and other tools write JSON too; damage does not
remove a seal unnoticed. A seal detects accidents, not attackers: it is not a signature.
"""

import dataclasses
import hashlib
import json
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

from spd_lightning.errors import BadInput

First = Callable[[Mapping[str, Any]], None]

SEAL = "seal"
MOST_LEVELS = 100
"""Lists and objects in one another that a file may have: far fewer than Python can follow."""
_TOO_DEEP = "not JSON (nested too deeply)"
MOST_BYTES = 1 << 28
LARGEST = (1 << 63) - 1  # of whole numbers, which arrays and tables hold in 64 bits

_OPEN: set[type] = set()
_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "an object",
    list: "a list",
    tuple: "a list",
    type(None): "null",
}


def open_ended(kind: type) -> type:
    """Let a TypedDict have more keys than it names, of any value."""
    _OPEN.add(kind)
    return kind


class Mismatch(ValueError):
    """A value that is not what its place holds."""

    def __init__(self, place: str, wanted: str, found: Any):
        shown = repr(found)
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        super().__init__(f"{place}: expected {wanted}, found {shown}".removeprefix(": "))


# ---- files ---------------------------------------------------------------------------------------


def read(path: Path, kind: Any, remedy: str, what: str = "", first: First | None = None) -> Any:
    """The value of a JSON file, of the type `kind`.

    Args:
        path: the file.
        kind: what it holds: a TypedDict, a dataclass, `dict[str, float]`, …
        remedy: how the error ends: what to do about it.
        what: how the error begins, before the file's name; for example "harvest manifest ".
        first: looks at an object before its seal and its types are checked; for example at its
            version.

    Raises:
        BadInput: the file cannot be read, is damaged, or holds something else.
    """
    try:
        if (size := path.stat().st_size) > MOST_BYTES:
            raise ValueError(
                f"it has {size:,} bytes, and no such file has more than {MOST_BYTES:,}"
            )
        return parsed(path.read_bytes(), kind, first)
    except BadInput:
        raise
    except OSError as error:
        raise BadInput(
            f"{what}'{path}': cannot be read ({error.strerror or error}); check the path"
        ) from error
    except ValueError as error:
        raise BadInput(f"{what}'{path}': {error}; {remedy}") from error


def parsed(content: bytes, kind: Any, first: First | None = None) -> Any:
    """The value that a JSON text holds, of the type `kind`.

    Raises:
        ValueError: it is not JSON, is damaged, or holds something else.
    """
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_once)
    except _Twice:
        raise
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    except ValueError as error:  # of UTF-8, of JSON, or of a number with thousands of digits
        raise ValueError(f"not JSON ({' '.join(str(error).split())[:120]})") from error
    check_levels(value, MOST_LEVELS)
    if isinstance(value, dict):
        if first is not None:
            first(value)
        value = unsealed(value)
    return conform(value, kind)


def check_levels(value: Any, room: int) -> None:
    """Raise ValueError where lists and objects are nested in more than `room` levels."""
    inner = (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    )
    if inner is None:
        return
    if room == 0:
        raise ValueError(_TOO_DEEP)
    for one in inner:
        check_levels(one, room - 1)


def dumped(value: Any, indent: int | None = None) -> str:
    """A value as JSON text; an object gets its seal."""
    if isinstance(value, Mapping):
        plain = json.loads(json.dumps(value))
        value = {**plain, SEAL: _digest(plain)}
    return json.dumps(value, indent=indent) + "\n"


def unsealed(value: dict[str, Any]) -> dict[str, Any]:
    """An object without its seal.

    Raises:
        ValueError: the seal is another object's.
    """
    if SEAL not in value:
        return value
    rest = {key: held for key, held in value.items() if key != SEAL}
    if value[SEAL] != _digest(rest):
        raise ValueError(
            f"its content does not match its {SEAL}: it was changed after it was written"
        )
    return rest


def _digest(value: Any) -> str:
    """Sixteen hex characters that stand for a value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class _Twice(ValueError):
    """A key that stands twice in one object."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _Twice(f"the key '{twice[:60]}' appears twice in one object")
    return found


# ---- types ---------------------------------------------------------------------------------------


def conform(value: Any, kind: Any, place: str = "") -> Any:
    """A JSON value as the type that its place has: lists become tuples, objects dataclasses, where
    those are wanted.

    Raises:
        Mismatch: it is not of that type; the place is named, as `shards[3].tables.nodes`.
    """
    if kind is Any:
        return value
    if is_typeddict(kind):
        return _object(value, kind, place)
    if dataclasses.is_dataclass(kind):
        assert isinstance(kind, type)
        return _dataclass(value, kind, place)
    origin = get_origin(kind)
    inner = get_args(kind)
    if origin is Literal:
        if any(value == one and type(value) is type(one) for one in inner):
            return value
        raise Mismatch(place, " or ".join(map(repr, inner)), value)
    if origin in (Union, types.UnionType):
        return _one_of(value, inner, place)
    if origin in (list, tuple):
        return _sequence(value, origin, inner, place)
    if origin is dict:
        return _mapping(value, inner[1], place)
    return _scalar(value, kind, place)


def _scalar(value: Any, kind: Any, place: str) -> Any:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if kind in (int, float) and whole:
        if abs(value) > LARGEST:
            raise Mismatch(place, f"a number of at most {LARGEST}", value)
        return kind(value)
    if kind is None or kind is type(None):
        kind = type(None)
    if kind is not int and type(value) is kind:
        return value
    raise Mismatch(place, _NAMES.get(kind, str(kind)), value)


def _one_of(value: Any, kinds: tuple[Any, ...], place: str) -> Any:
    problems: list[ValueError] = []
    for kind in kinds:
        try:
            return conform(value, kind, place)
        except ValueError as problem:
            problems.append(problem)
    others = [k for k, kind in enumerate(kinds) if kind is not type(None)]
    if len(others) == 1:
        raise problems[others[0]]
    names = [_NAMES.get(get_origin(kind) or kind, "an object") for kind in kinds]
    raise Mismatch(place, " or ".join(dict.fromkeys(names)), value)


def _sequence(value: Any, origin: type, inner: tuple[Any, ...], place: str) -> Any:
    if not isinstance(value, list):
        raise Mismatch(place, "a list", value)
    fixed = origin is tuple and Ellipsis not in inner
    if fixed and len(value) != len(inner):
        raise Mismatch(place, f"a list of {len(inner)}", value)
    kinds = inner if fixed else [inner[0]] * len(value)
    return origin(
        conform(one, kind, f"{place}[{k}]")
        for k, (one, kind) in enumerate(zip(value, kinds, strict=True))
    )


def _mapping(value: Any, kind: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Mismatch(place, "an object", value)
    return {key: conform(held, kind, _inside(place, key)) for key, held in value.items()}


def _object(value: Any, kind: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Mismatch(place, "an object", value)
    hints = get_type_hints(kind)
    if missing := sorted(kind.__required_keys__ - set(value)):
        raise ValueError(f"no '{_inside(place, missing[0])}' in it")
    for key in value:
        if key not in hints and kind not in _OPEN:
            raise Mismatch(_inside(place, key), f"one of {', '.join(hints)}", key)
    return {
        key: conform(held, hints.get(key, Any), _inside(place, key)) for key, held in value.items()
    }


def _dataclass(value: Any, kind: type, place: str) -> Any:
    if not isinstance(value, dict):
        raise Mismatch(place, "an object", value)
    hints = get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    for key in value:
        if key not in fields:
            raise Mismatch(_inside(place, key), f"one of {', '.join(fields)}", key)
    given = {key: conform(held, hints[key], _inside(place, key)) for key, held in value.items()}
    try:
        return kind(**given)
    except TypeError as error:
        raise Mismatch(place, f"the settings of {kind.__name__}", str(error)) from error


def _inside(place: str, key: str) -> str:
    shown = key if len(key) <= 60 else f"{key[:57]}..."
    return f"{place}.{shown}" if place else shown
