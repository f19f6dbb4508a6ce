"""LightningCLI's parser, with error messages of one line.

jsonargparse reports an error in layers: the key of every level, each type that was tried and why it
did not fit, and the whole value. The layers are chained exceptions. Going down the chain gives the
place of the error key by key; the last layer is the cause.
"""

import importlib
import json
import re
import textwrap
from argparse import Action
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import yaml
from jsonargparse import get_loader, set_dumper, set_loader
from lightning.pytorch.cli import LightningArgumentParser

import spd_lightning
from spd_lightning import classes
from spd_lightning.config import MORE_LINE_ENDS, check_keys
from spd_lightning.errors import BadInput, nearest, shown


class SettingError(BadInput):
    """An error in a setting, and its place."""

    def __init__(self, place: str, why: str):
        message = f"{place}: {why}" if place else why
        super().__init__(f"config: {message}")
        self.place = place
        self.why = why


_yaml_of_jsonargparse = get_loader("yaml")


def _load_once_only(text: str) -> Any:
    """Read YAML of a file or of the command line like jsonargparse, but reject duplicate keys."""
    check_keys(text)
    return _yaml_of_jsonargparse(text)


def _dump_all_characters(settings: Any) -> str:
    """Return settings as YAML. jsonargparse's own writer loses the line ends of Unicode."""
    readable = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    if MORE_LINE_ENDS & set(readable):
        return yaml.safe_dump(settings, sort_keys=False)
    return readable


set_dumper("yaml", _dump_all_characters)
set_loader("yaml", _load_once_only, exceptions=(yaml.YAMLError,))


class Parser(LightningArgumentParser):
    """A parser with one-line error messages and without abbreviated options."""

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs["allow_abbrev"] = False
        super().__init__(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        key = re.match(r'Parser key "([^"]+)":', str(message))
        place = key[1] if key and key[1] != "config" else ""
        known = user_error(ex)
        if isinstance(known, SettingError):
            inner, why = known.place, known.why
        elif known:
            inner, why = "", str(known)
        else:
            layers = [str(layer) for layer in causes(ex)]
            inner, why = self._cause(layers or [str(message)])
        places = [part for part in (place, inner) if part]
        raise SettingError(".".join(places), why) from ex

    def _cause(self, layers: list[str]) -> tuple[str, str]:
        """Return the setting in this parser, and what is wrong with it, from the layers."""
        text = "\n".join(layers)
        if m := re.search(r"Importing '(.+?)' is not allowed", text):
            return "", _not_allowed(m[1])
        problem = r"^Problem with given class_path '(.+?)':(.*)"
        if m := re.search(problem, text, re.DOTALL | re.MULTILINE):
            first_line = m[2].strip().partition("\n")[0]
            return "", _no_class(m[1], first_line)
        leaf = layers[-1]
        if m := re.match(r"Expected a dot import path string: (.+)", leaf):
            return "", _no_class(m[1], "names no package")
        if m := re.match(r"Not a valid subclass of (\S+)\. Got value: (.*)", leaf):
            return "", f"'{m[2]}' is not a {m[1]}; give its class_path, and init_args"
        if m := re.match(r"Import path (\S+) does not correspond to a subclass of (\S+)", leaf):
            return "", f"class_path '{m[1]}' is not a {m[2]}"
        if m := re.match(r"(?:Group '(.+)' does not accept option|Option) '(.+?)'", leaf):
            keys = [key for key in m.groups() if key]
            return self._unknown(".".join(keys))
        if m := re.match(r"unrecognized arguments: --([^\s=]+)", leaf):
            return self._unknown(m[1])
        if m := re.match(r"unrecognized arguments: (\S+)", leaf):
            return "", f"unexpected argument '{m[1]}'; write options as --key value"
        if m := re.match(r"the following arguments are required: (.+)", leaf):
            return m[1], "missing; it has no default"
        if m := re.match(r"argument --(\S+): expected one argument", leaf):
            return m[1], f"no value; for example: --{m[1]}=1"
        if m := re.match(r"Expected an? (.+)\. Got value: (.*)", leaf, re.DOTALL):
            union = layers[-2] if len(layers) > 1 else ""
            types = re.findall(r"- Expected an? (.+)", union) or [m[1]]
            return "", _wrong_type(m[2], types)
        return "", " ".join(leaf.split())[:300]

    def _unknown(self, name: str) -> tuple[str, str]:
        """Return the first unknown part of a dotted name, and a message with the nearest one."""
        known = {action.dest for action in self._actions}
        parent = ""
        for part in name.split("."):
            children = set[str]()
            for key in known:
                if key.startswith(parent):
                    children.add(key.removeprefix(parent).split(".")[0])
            children -= _NO_SETTINGS
            if part not in children:
                hint = nearest(part, children) if children else "is a class_path missing?"
                return parent + part, f"no such setting; {hint}"
            parent += f"{part}."
        return name, "no such setting"


_NO_SETTINGS = {"help", "config", "print_config", "print_shtab"}
_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
_KINDS |= {"dict": "'key: value' pairs", "list": "a list", "NoneType": "null"}


def _wrong_type(value: str, types: list[str]) -> str:
    """Return the message about a value that has none of the possible types."""
    value = " ".join(value.split())[:80]
    expected = " or ".join(map(_readable, types))
    choices = re.findall(r"'(\w+)'", expected)
    hint = nearest(value, choices)
    message = f"'{value}' is not {expected}"
    return f"{message}; {hint}" if hint.startswith("did") else message


def _readable(kind: str) -> str:
    """Return the everyday name of a type."""
    if m := re.match(r"typing\.Literal\[(.*)\]", kind):
        return f"one of {m[1]}"
    name = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", kind)
    return _KINDS.get(name, name)


_BASES = ("lightning.LightningModule", "lightning.LightningDataModule")
"""The class that jsonargparse assumes for a setting without a class_path."""


def _not_allowed(path: str) -> str:
    """Return the message about a class that a config must not name."""
    if path in _BASES:
        return "no class_path; name the class, for example class_path: spd_lightning.Decomposition"
    package = path.partition(".")[0]
    remedy = f"allow your own package on the command line: --allow_classes {package}"
    if hint := _did_you_mean(path):
        remedy = f"{hint} Or {remedy}"
    return f"class_path '{path}': not one that a config may name; {remedy}"


def _no_class(path: str, why: str) -> str:
    """Return the message about a class that does not exist."""
    remedy = _did_you_mean(path) or "write package.Class"
    return f"class_path '{path}': {why}; {remedy}"


def _did_you_mean(path: str) -> str:
    """Return a hint to the public class with the most similar name; empty if none is similar."""
    public = [f"spd_lightning.{name}" for name in spd_lightning.__all__]
    hint = nearest(path, public)
    return hint if hint.startswith("did") else ""


def reject_unknown(
    given: Mapping[str, Any], parsed: Mapping[str, Any], place: tuple[str, ...] = ()
) -> None:
    """Reject mappings under unknown keys, because jsonargparse ignores them if they are empty.

    Args:
        given: the settings as given.
        parsed: the same settings after parsing.
        place: keys above these settings.

    Raises:
        BadInput: a key is unknown.
    """
    for key, value in given.items():
        if not isinstance(value, Mapping):
            continue
        keys = (*place, key)
        if key not in parsed:
            name = ".".join(part for part in keys if part != "init_args")
            hint = nearest(key, set(parsed) - _NO_SETTINGS)
            raise SettingError(name, f"no such setting; {hint}")
        inner = parsed[key]
        if isinstance(inner, Mapping):
            reject_unknown(value, inner, keys)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and its causes.

    A config given as text is tried as a path first; that error is not a cause.
    """
    while error is not None:
        if str(error).startswith("File does not exist"):
            return
        yield error
        error = error.__cause__ or error.__context__


def user_error(error: BaseException | None) -> BadInput | None:
    """Return the outermost cause that was written for the user."""
    for cause in causes(error):
        if isinstance(cause, BadInput):
            return cause
    return None


def as_one_line_error(error: Exception) -> BadInput:
    """Turn an error raised while building from a config into one line for the user."""
    known = user_error(error)
    if known:
        return BadInput(str(known))
    *_, last = causes(error)
    message = " ".join(str(last).split())
    return SettingError("", message[:300])


# ---- help ----------------------------------------------------------------------------------------

TOPICS = {
    "model": ("spd_lightning.Decomposition", "model"),
    "data": ("spd_lightning.Text", "data"),
    "trainer": ("lightning.pytorch.Trainer", "trainer"),
    "reconstruction": (
        "spd_lightning.decomposition.reconstruction.Reconstruction",
        "model.losses.reconstruction.NAME",
    ),
}
"""The class of each topic of --help, and the prefix of its options."""


def settings_of(topic: str) -> str:
    """Return the settings of a part of a config or of a public class, with defaults and help.

    Args:
        topic: `model`, `data`, `trainer`, `reconstruction`, or the name of a class, with or without
            `spd_lightning.`.

    Raises:
        BadInput: the part or class does not exist.
    """
    path, prefix = TOPICS.get(topic, (topic, ""))
    if "." not in path:
        path = f"spd_lightning.{path}"
    module, _, name = path.rpartition(".")
    public = spd_lightning.__all__
    hint = nearest(topic, [*TOPICS, *public])
    if module == "spd_lightning" and name not in public:
        raise BadInput(f"--help {topic}: no such settings; {hint}")
    if not (topic in TOPICS or classes.allowed(path)):
        raise BadInput(f"--help {shown(topic)}: not a class with settings; {hint}")
    try:
        kind = getattr(importlib.import_module(module), name)
        parser = LightningArgumentParser(prog="", usage="", add_help=False)
        parser.add_class_arguments(kind, prefix or None, fail_untyped=False)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise BadInput(f"--help {topic}: not a class with settings; {hint}") from error
    lines = [f"{path}: its settings, as options and as keys of a config", ""]
    for action in parser._actions:
        lines += _help_lines(action)
    if topic == "data":
        lines += ["", "Settings of other data: --help SparseFeatures, --help InductionTokens"]
    return "\n".join([*lines, ""])


def _help_lines(action: Action) -> list[str]:
    """Return an option with its default and its help; nothing if it is not a setting."""
    is_help = action.dest.endswith("help")
    takes_config = "CONFIG" in str(action.metavar)
    if is_help or takes_config or not action.option_strings:
        return []
    note = "required" if action.required else f"default: {_plain_default(action.default)}"
    option = f"  {action.option_strings[0]} ({note})"
    indent = 6 * " "
    text = textwrap.wrap(action.help or "", 110, initial_indent=indent, subsequent_indent=indent)
    return [option, *text]


def _plain_default(value: Any) -> str:
    """Return a default value as one would write it in a config."""

    def name_of_type(item: Any) -> str:
        return type(item).__name__

    if isinstance(value, str | bool | list | dict | None):
        return json.dumps(value, default=name_of_type)
    return str(value)
