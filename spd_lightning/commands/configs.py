"""list: the shipped configs by purpose, each with the first line of its header."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from spd_lightning import config as configs
from spd_lightning.commands import options

GROUPS = (
    "toys",
    "language models, offline",
    "language models, from the network",
    "targets, trained by the decompositions that name them",
    "shared parts, and overrides to add to others",
)


def main(argv: Sequence[str]) -> None:
    """Print the configs there are, grouped by purpose, each with the first line of its header."""
    options.read("list", argv)
    print(listing())


def listing() -> str:
    """All shipped configs, a line each, in groups."""
    held: dict[str, list[str]] = {group: [] for group in GROUPS}
    for name, config, first in shipped():
        held[group_of(config)].append(f"  {name:<36} {first}")
    return "\n\n".join("\n".join([group, *lines]) for group, lines in held.items() if lines)


def shipped() -> Iterator[tuple[str, dict[str, Any], str]]:
    """Every shipped config: its name, its content with all it builds on, and the first line of its
    header.
    """
    for path in sorted(configs.SHIPPED.rglob("*.yaml")):
        first = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
        yield str(path.relative_to(configs.SHIPPED)), configs.load(str(path)), first


def group_of(config: Mapping[str, Any]) -> str:
    """Return the purpose of a config, judged by its content."""
    model = _part(config, "model")
    data = _part(config, "data")
    given = _part(model, "init_args")
    if str(model.get("class_path")).endswith("TargetTraining") and _part(given, "target").get(
        "class_path"
    ):
        return GROUPS[3]
    if not model.get("class_path") or not given.get("sites"):
        return GROUPS[4]
    if not str(data.get("class_path")).endswith(".Text"):
        return GROUPS[0]
    return GROUPS[2] if needs_network(config) else GROUPS[1]


def needs_network(config: Mapping[str, Any]) -> bool:
    """Whether its data, its tokenizer or its target come from the hub, where they are not on this
    machine already.
    """
    target = _part(_part(config, "model"), "init_args").get("target")
    data = _part(_part(config, "data"), "init_args")
    named = [target] if str(target).startswith(("hf:", "decoder:")) else []
    named += [
        data[key]
        for key in ("corpus", "tokenizer")
        if data.get(key) and (key, data[key]) not in _LOCAL
    ]
    return any(
        not Path(str(name).partition(":")[2] or str(name)).expanduser().exists() for name in named
    )


_LOCAL = {("corpus", "stories"), ("corpus", "stdlib")}


def _part(config: Any, key: str) -> Mapping[str, Any]:
    value = config.get(key) if isinstance(config, Mapping) else None
    return value if isinstance(value, Mapping) else {}
