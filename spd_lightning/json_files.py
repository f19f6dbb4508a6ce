"""Read and write the JSON files of runs, targets and harvests: one reader for all of them.

A file on disk can be truncated, changed in one bit, or written by somebody else. `read` returns a
value of the type that its caller names. If it cannot, it raises an error of one line with the file,
the place in it, the expected value, and the remedy. It checks that

1. the file is not too large, its text is UTF-8 and JSON, and no object has the same key twice;
2. every value has the expected type: a `TypedDict`, a dataclass, a list, a literal (`conform`);
3. the seal, a digest that `dumped` adds to every object, matches the rest of it (`unsealed`).

Files without a seal are accepted, since people and other tools write JSON, too. A seal detects
accidents, not attackers: it is not a signature.
"""

import dataclasses
import hashlib
import json
import types
from collections.abc import Callable, Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

from spd_lightning.errors import BadInput

First = Callable[[Mapping[str, Any]], None]

SEAL = "seal"
MOST_LEVELS = 100
"""The largest number of levels of lists and objects; Python's recursion limit is far higher."""
_TOO_DEEP = "not JSON (nested too deeply)"
MOST_BYTES = 1 << 28
"""The largest size of a file."""
LARGEST = (1 << 63) - 1
"""The largest whole number; arrays and tables store whole numbers in 64 bits."""

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
    """Allow a TypedDict to have keys that it does not name, with any values."""
    _OPEN.add(kind)
    return kind


class Mismatch(ValueError):
    """A value that does not have the expected type.

    Args:
        place: its place in the file, such as `shards[3].tables.nodes`; empty for the whole file.
        wanted: what was expected, in words.
        found: the value.
    """

    def __init__(self, place: str, wanted: str, found: Any):
        shown = _shortened(repr(found))
        message = f"expected {wanted}, found {shown}"
        if place:
            message = f"{place}: {message}"
        super().__init__(message)


def _shortened(text: str) -> str:
    """Return a text with at most 60 characters."""
    if len(text) <= 60:
        return text
    return f"{text[:57]}..."


# ---- files ---------------------------------------------------------------------------------------


def read(path: Path, kind: Any, remedy: str, what: str = "", first: First | None = None) -> Any:
    """Return the value of a JSON file, of the type `kind`.

    Args:
        path: the file.
        kind: the type of its value: a TypedDict, a dataclass, `dict[str, float]`, …
        remedy: the end of the error message: what to do.
        what: the beginning of the error message, before the file's name; for example
            "harvest manifest ".
        first: checks an object before its seal and its types are checked; for example its version.

    Raises:
        BadInput: the file cannot be read, is damaged, or has a value of another type.
    """
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise ValueError(f"it has {size:,} bytes, and at most {MOST_BYTES:,} are expected")
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
    """Return the value of a JSON text, of the type `kind`.

    Raises:
        ValueError: the text is not JSON, is damaged, or has a value of another type.
    """
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_once)
    except _Twice:
        raise
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    except ValueError as error:  # not UTF-8, not JSON, or a number with thousands of digits
        reason = " ".join(str(error).split())
        raise ValueError(f"not JSON ({reason[:120]})") from error
    check_levels(value, MOST_LEVELS)
    if isinstance(value, dict):
        if first is not None:
            first(value)
        value = unsealed(value)
    return conform(value, kind)


def check_levels(value: Any, room: int) -> None:
    """Raise ValueError if lists and objects are nested in more than `room` levels."""
    if isinstance(value, dict):
        children = list(value.values())
    elif isinstance(value, list):
        children = value
    else:
        return
    if room == 0:
        raise ValueError(_TOO_DEEP)
    for child in children:
        check_levels(child, room - 1)


def dumped(value: Any, indent: int | None = None) -> str:
    """Return a value as JSON text; an object gets a seal."""
    if isinstance(value, Mapping):
        plain = json.loads(json.dumps(value))
        seal = _digest(plain)
        value = {**plain, SEAL: seal}
    text = json.dumps(value, indent=indent)
    return text + "\n"


def unsealed(value: dict[str, Any]) -> dict[str, Any]:
    """Return an object without its seal.

    Raises:
        ValueError: the seal does not match the rest of the object.
    """
    if SEAL not in value:
        return value
    rest = dict(value)
    seal = rest.pop(SEAL)
    if seal != _digest(rest):
        raise ValueError(
            f"its content does not match its {SEAL}: it was changed after it was written"
        )
    return rest


def _digest(value: Any) -> str:
    """Return sixteen hex characters that identify a value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True)
    digits = hashlib.sha256(text.encode()).hexdigest()
    return digits[:16]


class _Twice(ValueError):
    """A key appears twice in one object."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object from its keys and values, or raise _Twice."""
    value = dict(pairs)
    if len(value) == len(pairs):
        return value
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    raise _Twice(f"the key '{twice[:60]}' appears twice in one object")


# ---- types ---------------------------------------------------------------------------------------


def conform(value: Any, kind: Any, place: str = "") -> Any:
    """Return a JSON value as the type `kind`.

    Lists become tuples, and objects become dataclasses, if `kind` says so.

    Raises:
        Mismatch: the value does not have that type. The message names its place, for example
            `shards[3].tables.nodes`.
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
        return _literal(value, inner, place)
    if origin in (Union, types.UnionType):
        return _one_of(value, inner, place)
    if origin in (list, tuple):
        return _sequence(value, origin, inner, place)
    if origin is dict:
        return _mapping(value, inner[1], place)
    return _scalar(value, kind, place)


def _literal(value: Any, choices: tuple[Any, ...], place: str) -> Any:
    for choice in choices:
        if value == choice and type(value) is type(choice):
            return value
    wanted = " or ".join(map(repr, choices))
    raise Mismatch(place, wanted, value)


def _scalar(value: Any, kind: Any, place: str) -> Any:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if kind in (int, float) and whole:
        if abs(value) > LARGEST:
            raise Mismatch(place, f"a number of at most {LARGEST}", value)
        return kind(value)
    if kind is None:
        kind = type(None)
    if kind is not int and type(value) is kind:
        return value
    wanted = _NAMES.get(kind, str(kind))
    raise Mismatch(place, wanted, value)


def _one_of(value: Any, kinds: tuple[Any, ...], place: str) -> Any:
    """Return a value as the first type of a union that it has."""
    problems: list[ValueError] = []
    for kind in kinds:
        try:
            return conform(value, kind, place)
        except ValueError as problem:
            problems.append(problem)
    relevant = []
    names = []
    for kind, problem in zip(kinds, problems, strict=True):
        names.append(_NAMES.get(get_origin(kind) or kind, "an object"))
        if kind is not type(None):
            relevant.append(problem)
    if len(relevant) == 1:  # a type or None: the problem with the type says more
        raise relevant[0]
    distinct = dict.fromkeys(names)
    raise Mismatch(place, " or ".join(distinct), value)


def _sequence(value: Any, origin: type, inner: tuple[Any, ...], place: str) -> Any:
    if not isinstance(value, list):
        raise Mismatch(place, "a list", value)
    if origin is tuple and Ellipsis not in inner:  # a tuple of fixed length
        kinds = list(inner)
    else:
        kinds = [inner[0]] * len(value)
    if len(value) != len(kinds):
        raise Mismatch(place, f"a list of {len(kinds)}", value)
    entries = []
    for number, (entry, kind) in enumerate(zip(value, kinds, strict=True)):
        entries.append(conform(entry, kind, f"{place}[{number}]"))
    return origin(entries)


def _mapping(value: Any, kind: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Mismatch(place, "an object", value)
    entries = {}
    for key, entry in value.items():
        entries[key] = conform(entry, kind, _inside(place, key))
    return entries


def _object(value: Any, kind: Any, place: str) -> dict[str, Any]:
    """Return an object as a TypedDict."""
    if not isinstance(value, dict):
        raise Mismatch(place, "an object", value)
    hints = _hints(kind)
    missing = kind.__required_keys__ - value.keys()
    if missing:
        raise ValueError(f"'{_inside(place, min(missing))}' is missing")
    if kind not in _OPEN:
        _check_keys(value, hints, place)
    entries = {}
    for key, entry in value.items():
        hint = hints.get(key, Any)
        entries[key] = conform(entry, hint, _inside(place, key))
    return entries


@cache
def _hints(kind: type) -> dict[str, Any]:
    """Return the types of the keys of a TypedDict or dataclass."""
    return get_type_hints(kind)


def _dataclass(value: Any, kind: type, place: str) -> Any:
    if not isinstance(value, dict):
        raise Mismatch(place, "an object", value)
    hints = _hints(kind)
    names = [field.name for field in dataclasses.fields(kind) if field.init]
    _check_keys(value, names, place)
    settings = {}
    for key, entry in value.items():
        settings[key] = conform(entry, hints[key], _inside(place, key))
    try:
        return kind(**settings)
    except TypeError as error:
        raise Mismatch(place, f"the settings of {kind.__name__}", str(error)) from error


def _check_keys(value: Mapping[str, Any], known: Collection[str], place: str) -> None:
    """Raise Mismatch if an object has an unknown key."""
    for key in value:
        if key not in known:
            names = ", ".join(known)
            raise Mismatch(_inside(place, key), f"one of {names}", key)


def _inside(place: str, key: str) -> str:
    """Return the place of the value of a key."""
    name = _shortened(key)
    return f"{place}.{name}" if place else name
