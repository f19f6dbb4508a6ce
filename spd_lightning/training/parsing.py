"""LightningCLI's parser, whose complaints are one line.

jsonargparse wraps what is wrong in layers: the key of every level, each type that was tried and why
it did not fit, the whole value. The layers are chained as causes: going down them gives the place
key by key, and at the bottom the cause.
"""

import importlib
import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import yaml
from jsonargparse import get_loader, set_dumper, set_loader
from lightning.pytorch.cli import LightningArgumentParser

import spd_lightning
from spd_lightning import classes
from spd_lightning.config import MORE_LINE_ENDS, check_keys
from spd_lightning.errors import BadInput, nearest, shown


class Complaint(BadInput):
    """An error in a setting, and its place."""

    def __init__(self, place: str, why: str):
        super().__init__(f"config: {place}: {why}" if place else f"config: {why}")
        self.place, self.why = place, why


_yaml_of_jsonargparse = get_loader("yaml")


def _load_once_only(text: str) -> Any:
    """jsonargparse's own reader of YAML, for files and values on the command line, which rejects a
    key given twice.
    """
    check_keys(text)
    return _yaml_of_jsonargparse(text)


def _dump_all_characters(settings: Any) -> str:
    """Settings as YAML; jsonargparse's own writer loses the line ends that only Unicode knows."""
    readable = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    return yaml.safe_dump(settings, sort_keys=False) if MORE_LINE_ENDS & set(readable) else readable


set_dumper("yaml", _dump_all_characters)
set_loader("yaml", _load_once_only, exceptions=(yaml.YAMLError,))


class Parser(LightningArgumentParser):
    """Says what is wrong with a config in one line; takes no abbreviated options."""

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs["allow_abbrev"] = False
        super().__init__(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        key = re.match(r'Parser key "([^"]+)":', str(message))
        place = key[1] if key and key[1] != "config" else ""
        found = told(ex)
        inner, why = (
            (found.place, found.why) if isinstance(found, Complaint) else ("", str(found or ""))
        )
        if not found:
            inner, why = self._cause([str(layer) for layer in causes(ex)] or [str(message)])
        raise Complaint(".".join(filter(None, (place, inner))), why) from ex

    def _cause(self, layers: list[str]) -> tuple[str, str]:
        """The setting within this parser, and what is wrong with it, from the layers of a
        complaint.
        """
        union = layers[-2] if len(layers) > 1 else ""
        leaf = layers[-1]
        if m := re.search(r"Importing '(.+?)' is not allowed", "\n".join(layers)):
            return "", _not_allowed(m[1])
        if m := re.search(
            r"^Problem with given class_path '(.+?)':(.*)",
            "\n".join(layers),
            re.DOTALL | re.MULTILINE,
        ):
            return "", _no_class(m[1], m[2].strip().partition("\n")[0])
        if m := re.match(r"Expected a dot import path string: (.+)", leaf):
            return "", _no_class(m[1], "names no package")
        if m := re.match(r"Not a valid subclass of (\S+)\. Got value: (.*)", leaf):
            return "", f"'{m[2]}' is not a {m[1]}; give its class_path, and init_args"
        if m := re.match(r"Import path (\S+) does not correspond to a subclass of (\S+)", leaf):
            return "", f"class_path '{m[1]}' is not a {m[2]}"
        if m := re.match(r"(?:Group '(.+)' does not accept option|Option) '(.+?)'", leaf):
            return self._unknown(".".join(filter(None, m.groups())))
        if m := re.match(r"unrecognized arguments: --([^\s=]+)", leaf):
            return self._unknown(m[1])
        if m := re.match(r"unrecognized arguments: (\S+)", leaf):
            return "", f"unexpected argument '{m[1]}'; write options as --key value"
        if m := re.match(r"the following arguments are required: (.+)", leaf):
            return m[1], "missing; it has no default"
        if m := re.match(r"argument --(\S+): expected one argument", leaf):
            return m[1], f"no value; for example: --{m[1]}=1"
        if m := re.match(r"Expected an? (.+)\. Got value: (.*)", leaf, re.DOTALL):
            types = re.findall(r"- Expected an? (.+)", union) or [m[1]]
            value = " ".join(m[2].split())[:80]
            wanted = " or ".join(map(_readable, types))
            near = nearest(value, re.findall(r"'(\w+)'", wanted))
            return "", f"'{value}' is not {wanted}" + (
                f"; {near}" if near.startswith("did") else ""
            )
        return "", " ".join(leaf.split())[:300]

    def _unknown(self, name: str) -> tuple[str, str]:
        """The first part of a dotted name that this parser does not have, and the nearest one
        beside it.
        """
        known = {action.dest for action in self._actions}
        parts = name.split(".")
        for depth in range(len(parts)):
            parent = "".join(f"{part}." for part in parts[:depth])
            beside = {
                k.removeprefix(parent).split(".")[0] for k in known if k.startswith(parent)
            } - _NO_SETTINGS
            if parts[depth] not in beside:
                hint = nearest(parts[depth], beside) if beside else "is a class_path missing?"
                return parent + parts[depth], f"no such setting; {hint}"
        return name, "no such setting"


_NO_SETTINGS = {"help", "config", "print_config", "print_shtab"}
_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
_KINDS |= {"dict": "'key: value' pairs", "list": "a list", "NoneType": "null"}


def _readable(kind: str) -> str:
    """A type as a newcomer would say it."""
    if m := re.match(r"typing\.Literal\[(.*)\]", kind):
        return f"one of {m[1]}"
    name = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", kind)
    return _KINDS.get(name, name)


_BASES = ("lightning.LightningModule", "lightning.LightningDataModule")
"""What jsonargparse takes for the class of a setting without a class_path."""


def _not_allowed(path: str) -> str:
    if path in _BASES:
        return "no class_path; name the class, for example class_path: spd_lightning.Decomposition"
    near = nearest(path, [f"spd_lightning.{name}" for name in spd_lightning.__all__])
    near = f"{near} " if near.startswith("did") else ""
    remedy = (
        f"{near}A package of your own is named on the command line: --allow_classes "
        f"{path.partition('.')[0]}"
    )
    return f"class_path '{path}': not one that a config may name; {remedy}"


def _no_class(path: str, why: str) -> str:
    near = nearest(path, [f"spd_lightning.{name}" for name in spd_lightning.__all__])
    return (
        f"class_path '{path}': {why}; {near if near.startswith('did') else 'write package.Class'}"
    )


def refuse_unknown(
    given: Mapping[str, Any], parsed: Mapping[str, Any], place: tuple[str, ...] = ()
) -> None:
    """jsonargparse passes over empty mappings, whatever their names: those that no setting has are
    refused here.

    Raises:
        BadInput: there is one.
    """
    for key, value in given.items():
        if not isinstance(value, Mapping):
            continue
        if key not in parsed:
            where = ".".join(part for part in (*place, key) if part != "init_args")
            raise Complaint(where, f"no such setting; {nearest(key, set(parsed) - _NO_SETTINGS)}")
        if isinstance(inner := parsed[key], Mapping):
            refuse_unknown(value, inner, (*place, key))


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and what it goes back to; a config given as text is first tried as a path, which
    is not a cause.
    """
    while error is not None and not str(error).startswith("File does not exist"):
        yield error
        error = error.__cause__ or error.__context__


def told(error: BaseException | None) -> BadInput | None:
    """The outermost cause that was written for the user."""
    return next((cause for cause in causes(error) if isinstance(cause, BadInput)), None)


def complaint(error: Exception) -> BadInput:
    """Turn an error raised while building from a config into one line for the user."""
    inner = told(error)
    return (
        BadInput(str(inner))
        if inner
        else Complaint("", " ".join(str(list(causes(error))[-1]).split())[:300])
    )


# ---- what settings there are ---------------------------------------------------------------------

TOPICS = {
    "model": ("spd_lightning.Decomposition", "model"),
    "data": ("spd_lightning.Text", "data"),
    "trainer": ("lightning.pytorch.Trainer", "trainer"),
    "reconstruction": (
        "spd_lightning.decomposition.reconstruction.Reconstruction",
        "model.losses.reconstruction.NAME",
    ),
}
"""The classes that whole parts of a config set up, and what options call them."""


def settings_of(topic: str) -> str:
    """Return the settings of a part of configs or of a public class, each with its type, its
    default, its docstring.

    Args:
        topic: `model`, `data`, `trainer`, `reconstruction`, or the name of a class, with or without
            `spd_lightning.`.

    Raises:
        BadInput: there is no such part or class.
    """
    path, prefix = TOPICS.get(topic, (topic, ""))
    if "." not in path:
        path = f"spd_lightning.{path}"
    module, _, name = path.rpartition(".")
    public = spd_lightning.__all__
    if module == "spd_lightning" and name not in public:
        raise BadInput(f"--help {topic}: no such settings; {nearest(topic, [*TOPICS, *public])}")
    if not (topic in TOPICS or classes.allowed(path)):
        raise BadInput(
            f"--help {shown(topic)}: not a class with settings; "
            f"{nearest(topic, [*TOPICS, *public])}"
        )
    try:
        kind = getattr(importlib.import_module(module), name)
        parser = LightningArgumentParser(prog="", usage="", add_help=False)
        parser.add_class_arguments(kind, prefix or None, fail_untyped=False)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise BadInput(
            f"--help {topic}: not a class with settings; {nearest(topic, [*TOPICS, *public])}"
        ) from error
    lines = [f"{path}: its settings, as options and as keys of a config", ""]
    for action in parser._actions:
        if (
            action.dest.endswith("help")
            or not action.option_strings
            or "CONFIG" in str(action.metavar)
        ):
            continue
        default = "" if action.required else f" (default: {_plain_default(action.default)})"
        lines.append(f"  {action.option_strings[0]}{' (required)' if action.required else default}")
        lines += textwrap.wrap(
            action.help or "", 110, initial_indent="      ", subsequent_indent="      "
        )
    if topic == "data":
        lines += ["", "Settings of other data: --help SparseFeatures, --help InductionTokens"]
    return "\n".join([*lines, ""])


def _plain_default(value: Any) -> str:
    """Return a default as one writes it in a config."""
    if isinstance(value, str | bool | list | dict | None):
        return json.dumps(value, default=lambda held: type(held).__name__)
    return str(value)
