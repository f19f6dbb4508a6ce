"""list: the shipped configs by purpose, each with the first line of its header."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from spd_lightning import config as configs
from spd_lightning.commands import options
from spd_lightning.errors import BadInput
from spd_lightning.paths import expanded

GROUPS = (
    "toys",
    "language models, offline",
    "language models, downloaded",
    "targets, trained by the decompositions that name them",
    "shared parts, and overrides to add to other configs",
)


def main(argv: Sequence[str]) -> None:
    """Print the shipped configs by purpose, each with the first line of its header."""
    options.read("list", argv)
    print(listing())


def listing() -> str:
    """Return all shipped configs in groups, one line each."""
    lines: dict[str, list[str]] = {group: [] for group in GROUPS}
    for name, config, first_line in shipped():
        group = group_of(config)
        lines[group].append(f"  {name:<36} {first_line}")
    blocks: list[str] = []
    for group, members in lines.items():
        if not members:
            continue
        block = "\n".join([group, *members])
        blocks.append(block)
    return "\n\n".join(blocks)


def shipped() -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield every shipped config: its name, its merged content, the first line of its header."""
    for path in sorted(configs.SHIPPED.rglob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        first_line, _, _ = text.partition("\n")
        purpose = first_line.removeprefix("# ")
        name = path.relative_to(configs.SHIPPED)
        config = configs.load(str(path))
        yield str(name), config, purpose


def group_of(config: Mapping[str, Any]) -> str:
    """Return the group of a config, judged by its content."""
    toys, offline, online, targets, parts = GROUPS
    model = _part(config, "model")
    settings = _part(model, "init_args")
    model_class = str(model.get("class_path"))
    target_class = _part(settings, "target").get("class_path")
    if model_class.endswith("TargetTraining") and target_class:
        return targets
    if not model.get("class_path") or not settings.get("sites"):
        return parts
    data_class = str(_part(config, "data").get("class_path"))
    if not data_class.endswith(".Text"):
        return toys
    return online if needs_network(config) else offline


def needs_network(config: Mapping[str, Any]) -> bool:
    """Return whether the data, tokenizer or target come from a hub and are not on this machine."""
    model = _part(config, "model")
    target = str(_part(model, "init_args").get("target"))
    references: list[str] = []
    if target.startswith(("hf:", "decoder:")):
        references.append(target)
    data = _part(config, "data")
    settings = _part(data, "init_args")
    for key in ("corpus", "tokenizer"):
        value = settings.get(key)
        if value and (key, value) not in _LOCAL:
            references.append(str(value))
    return not all(map(_is_local, references))


def _is_local(reference: str) -> bool:
    """Return whether a reference, such as `hf:FOLDER`, names something on this machine."""
    name = reference.removeprefix("hf:").removeprefix("decoder:")
    try:
        return expanded(name).exists()
    except BadInput:  # its package is not installed
        return False


_LOCAL = {("corpus", "stories"), ("corpus", "stdlib")}


def _part(config: Any, key: str) -> Mapping[str, Any]:
    """Return a mapping inside a config, or an empty one."""
    if not isinstance(config, Mapping):
        return {}
    value = config.get(key)
    if not isinstance(value, Mapping):
        return {}
    return value
