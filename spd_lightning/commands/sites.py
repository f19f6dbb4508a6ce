"""sites: list the modules of a target that can be decomposed, and write a first config for it.

Modules whose names differ only in numbers form a group, and a pattern names the group:
`model.layers.*.mlp.up_proj`. No weights are loaded; the shapes follow from a checkpoint's
configuration.

The suggested number of components is twice the largest possible rank of the weight. With fewer
components than its rank, they cannot add up to the weight. A map in superposition carries more
features than its rank, so the number is also at least the larger width of the map, up to 1000.
Published recipes take one to five times the rank. Memory and time grow with the number.
"""

from __future__ import annotations  # some types are of modules that load torch

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spd_lightning import config as configs
from spd_lightning import runs
from spd_lightning.commands import loading, options
from spd_lightning.errors import BadInput

if TYPE_CHECKING:
    from torch import nn

KINDS = {"linear": "Linear", "conv1d": "Conv1D", "embedding": "Embedding"}
SUPERPOSED = 1000
"""The largest number of features that a map in superposition is assumed to carry."""
FEW_LAYERS = 4
"""A first config decomposes all layers of models with at most this many, else a middle one."""
CONTEXT = 512
"""The largest number of tokens in a window of a first config."""


@dataclass(frozen=True)
class Group:
    """Modules of one kind and shape whose names differ only in numbers.

    Attributes:
        pattern: matches all of the names, and no other.
        names: the names of the modules.
        kind: Linear, Conv1D or Embedding.
        d_in: the width of the input.
        d_out: the width of the output.
    """

    pattern: str
    names: list[str]
    kind: str
    d_in: int
    d_out: int

    @property
    def components(self) -> int:
        """Return the number of components to start with, a multiple of ten."""
        rank = min(self.d_in, self.d_out)
        width = max(self.d_in, self.d_out)
        features = min(width, SUPERPOSED)
        number = max(2 * rank, features)
        return math.ceil(number / 10) * 10

    @property
    def layered(self) -> bool:
        """Return whether the modules are in the layers of a network, not before or after them."""
        return "*" in self.pattern


def main(argv: Sequence[str]) -> None:
    """Print the modules of a target in groups, and write a first config if --write is given."""
    arguments = options.read("sites", argv)
    path = None
    if arguments.write is not None:
        path = Path(arguments.write)
        _check_file(path)
    with loading.trainer():
        network = _network(arguments.target)
        groups = grouped(network, apart=arguments.all)
        if not groups:
            raise BadInput(
                f"target '{arguments.target}': it has no Linear, Conv1D or Embedding; use another"
            )
        if arguments.json:
            print(_as_json(groups))
        else:
            print("\n".join([*table(groups), *_left_out(network)]))
        if path is None:
            return
        text = first_config(arguments.target, network, grouped(network))
        with runs.write_whole(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        if not arguments.json:
            print(f"\nconfig: {path}    next: python -m spd_lightning plan --config {path}")


def _check_file(path: Path) -> None:
    """Raise BadInput if a config cannot be written to this path."""
    if path.suffix not in (".yaml", ".yml"):
        raise BadInput(f"--write '{path}': a config is YAML; end it in .yaml")
    if path.exists():
        raise BadInput(f"--write '{path}': it already exists; choose another name")
    if not path.parent.is_dir():
        raise BadInput(f"--write '{path}': folder '{path.parent}' does not exist; create it first")


def _network(reference: str) -> nn.Module:
    """Return an untrained network like the one that a reference names, without allocating it."""
    from spd_lightning.planning.dry_run import fake_tensors
    from spd_lightning.planning.estimate import outline

    build = outline(reference)
    with fake_tensors():
        return build()


def _left_out(network: nn.Module) -> Iterator[str]:
    """Yield a line about matrices that cannot be sites, such as custom experts and routers."""
    from spd_lightning.decomposition.components import available

    maps = available(network)
    others = []
    for name, parameter in network.named_parameters():
        module, _, _ = name.rpartition(".")
        if parameter.ndim >= 2 and module not in maps:
            others.append(f"{name} {list(parameter.shape)}")
    if not others:
        return
    unnamed = len(others) - 3
    named = ", ".join(others[:3])
    if unnamed > 0:
        named += f" and {unnamed} more"
    yield ""
    yield f"cannot be decomposed (not a Linear, Conv1D or Embedding): {named}"


# ---- groups --------------------------------------------------------------------------------------


def grouped(network: nn.Module, apart: bool = False) -> list[Group]:
    """Return the modules of a network that can be decomposed, in groups.

    Args:
        network: any module.
        apart: whether every module is a group of its own.
    """
    from spd_lightning.decomposition.components import IDENTITY, available

    members: dict[tuple[str, str, int, int], list[str]] = {}
    for name, site in available(network).items():
        if name.endswith(IDENTITY):
            continue
        pattern = name
        if not apart:
            pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        key = (pattern, KINDS[site.kind], site.d_in, site.d_out)
        members.setdefault(key, []).append(name)
    patterns = [pattern for pattern, *_ in members]
    groups = []
    for (pattern, kind, d_in, d_out), names in members.items():
        ambiguous = patterns.count(pattern) > 1  # it matches modules of several shapes
        if ambiguous or len(names) == 1:
            groups += [Group(name, [name], kind, d_in, d_out) for name in names]
        else:
            groups.append(Group(pattern, names, kind, d_in, d_out))
    return groups


def table(groups: Sequence[Group]) -> Iterator[str]:
    """Yield the lines of a table of groups."""
    patterns = [group.pattern for group in groups]
    width = max(map(len, ["pattern", *patterns]))
    heads = f"{'maps':>5}  {'kind':<9}  {'d_in':>7}  {'d_out':>7}  {'components':>10}"
    yield f"{'pattern':<{width}}  {heads}"
    for group in groups:
        cells = (
            f"{group.pattern:<{width}}",
            f"{len(group.names):>5}",
            f"{group.kind:<9}",
            f"{group.d_in:>7}",
            f"{group.d_out:>7}",
            f"{group.components:>10}",
        )
        yield "  ".join(cells)


def _as_json(groups: Sequence[Group]) -> str:
    """Return the groups as JSON text."""
    values = []
    for group in groups:
        fields = asdict(group)
        values.append({**fields, "components": group.components})
    return json.dumps(values, indent=1)


# ---- a first config ------------------------------------------------------------------------------


def chosen(groups: Sequence[Group]) -> dict[str, int]:
    """Return the patterns to start with, each with a number of components.

    They match all modules in the layers of a shallow network, or those in a middle layer of a deep
    one. Embeddings are omitted.
    """
    groups = [group for group in groups if group.kind != "Embedding"]
    layered = [group for group in groups if group.layered]
    if not layered:
        return {group.pattern: group.components for group in groups}
    depths = [len(group.names) for group in layered]
    deepest = max(depths)
    if deepest <= FEW_LAYERS:
        return {group.pattern: group.components for group in layered}
    patterns = {}
    for group in layered:
        names = group.names
        middle = len(names) // 2
        name = names[middle]
        patterns[name] = group.components
    return patterns


def first_config(reference: str, network: nn.Module, groups: Sequence[Group]) -> str:
    """Return the text of a config that decomposes a target."""
    patterns = chosen(groups)
    kind, _, name = reference.partition(":")
    if kind in ("hf", "decoder") and name:
        return _config_of_checkpoint(reference, name, network, patterns)
    return _config_of_trained_target(reference, network, patterns)


def _config_of_checkpoint(
    reference: str, name: str, network: nn.Module, patterns: dict[str, int]
) -> str:
    """Return a config that decomposes a checkpoint, with comments."""
    from spd_lightning.targets.protocols import context_of

    shallow = any("*" in pattern for pattern in patterns)
    sites = [f"      {json.dumps(pattern)}: {count}" for pattern, count in patterns.items()]
    if _has_tokenizer(name):
        tokens = f"tokenizer: {json.dumps(name)}"
    else:
        tokens = (
            f"vocab: {network.vocab}  # no tokenizer in the folder, so one is trained; name the "
            "model's own if you have it"
        )
    context = context_of(network) or CONTEXT
    return _LANGUAGE.format(
        reference=json.dumps(reference),
        base="lm-subset.yaml" if shallow else "lm-layerwise.yaml",
        sites="\n".join(sites),
        tokens=tokens,
        seq_len=min(context, CONTEXT),
    )


def _has_tokenizer(name: str) -> bool:
    """Return whether a checkpoint has a tokenizer; those on the hub are assumed to have one."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return True
    for file in TOKENIZERS:
        path = folder / file
        if path.exists():
            return True
    return False


def _config_of_trained_target(reference: str, network: nn.Module, patterns: dict[str, int]) -> str:
    """Return a config that decomposes the target of another config, on the same data."""
    from spd_lightning.targets.protocols import vocab_of

    data = configs.load(reference).get("data", {})
    is_text = str(data.get("class_path")).endswith(".Text")
    settings: dict[str, Any] = {"target": reference, "sites": patterns}
    if not is_text:
        losses: dict[str, Any] = {"minimality": {"coeff": 3e-3, "p": 1.0}}
        settings["losses"] = losses
        settings["optimizer"] = {"lr": 5e-3, "schedule": {"kind": "cosine", "warmup": 200}}
        if vocab_of(network) is not None:  # outputs are logits
            losses["reconstruction"] = {
                "all": {"divergence": "kl"},
                "layerwise": {"divergence": "kl"},
            }
            settings["evaluation"] = {"divergence": "kl"}
    config = {
        "base": "lm-subset.yaml" if is_text else "toy.yaml",
        "model": {"init_args": settings},
        "data": data,
        "trainer": {"max_steps": 4000 if is_text else 2500},
    }
    header = f"# A first decomposition of {reference}, written by `sites --write`.\n"
    return header + configs.dump(config)


TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
"""Files that show that a checkpoint's folder has a tokenizer."""

_LANGUAGE = """\
# A first decomposition of {reference}, written by `sites --write`.
# my-checkpoint.yaml explains each key.
base: {base}
model:
  init_args:
    target: {reference}
    sites:  # patterns of module names, each with its number of components
{sites}
data:
  init_args:
    corpus: stories  # or your own: a path or glob of .txt, .jsonl or .parquet files, or hf:NAME
    {tokens}
    seq_len: {seq_len}
    batch_size: 8
trainer:
  max_steps: 5000
"""
