"""sites: the maps of a target that can be decomposed, as patterns, and a first config for one's own
target.

Maps whose names differ in numbers alone are one group, and a pattern names the group:
`model.layers.*.mlp.up_proj`. No weights are loaded: a checkpoint's shapes are in its configuration.

The number of components that is suggested is twice the rank that the map can have, since with fewer
than its rank components cannot add up to the weight. A map in superposition carries more features
than its rank: so it is at least the larger width of the map, up to 1000. Published recipes take one
to five times the rank. Memory and time grow with it.
"""

from __future__ import annotations  # sites are of a module that loads torch

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
"""How many features, at most, a map is assumed to carry beyond its rank."""
FEW_LAYERS = 4
"""Up to so many layers, a first config decomposes all of them; of deeper models, one in the middle.
"""
CONTEXT = 512
"""How many tokens a window of a first config has at most."""


@dataclass(frozen=True)
class Group:
    """Maps of one kind and shape whose names differ in their numbers alone.

    Attributes:
        pattern: names all of them, and no other.
        names: their names.
        kind: Linear, Conv1D or Embedding.
        d_in: the width that they read.
        d_out: the width that they write.
    """

    pattern: str
    names: list[str]
    kind: str
    d_in: int
    d_out: int

    @property
    def components(self) -> int:
        """Return the number of components to begin with, a multiple of ten."""
        narrow, wide = sorted((self.d_in, self.d_out))
        wanted = max(2 * narrow, min(wide, SUPERPOSED))
        return math.ceil(wanted / 10) * 10

    @property
    def layered(self) -> bool:
        """Whether its maps are in the layers of a network, and not before or behind them."""
        return "*" in self.pattern


def main(argv: Sequence[str]) -> None:
    """Print the maps of a target, in groups; write a first config for it."""
    asked = options.read("sites", argv)
    path = None if asked.write is None else Path(asked.write)
    if path is not None:
        _check_file(path)
    with loading.trainer():
        network = _network(asked.target)
        groups = grouped(network, apart=asked.all)
        if not groups:
            raise BadInput(
                f"target '{asked.target}': no Linear, Conv1D or Embedding in it; take another"
            )
        print(_as_json(groups) if asked.json else "\n".join([*table(groups), *_left_out(network)]))
        if path is not None:
            with runs.write_whole(path) as temporary:
                temporary.write_text(
                    first_config(asked.target, network, grouped(network)), encoding="utf-8"
                )
            if not asked.json:
                print(f"\nconfig: {path}    next: python -m spd_lightning plan --config {path}")


def _check_file(path: Path) -> None:
    if path.suffix not in (".yaml", ".yml"):
        raise BadInput(f"--write '{path}': a config is YAML; end it in .yaml")
    if path.exists():
        raise BadInput(f"--write '{path}': it exists, and is not overwritten; choose another name")
    if not path.parent.is_dir():
        raise BadInput(f"--write '{path}': there is no folder '{path.parent}'; make it first")


def _network(reference: str) -> nn.Module:
    """Return an untrained network like the one that a reference means, without memory for its
    weights.
    """
    from spd_lightning.planning.dry_run import fake_tensors
    from spd_lightning.planning.estimate import outline

    build = outline(reference)
    with fake_tensors():
        return build()


def _left_out(network: nn.Module) -> Iterator[str]:
    """Yield a line on the matrices of a network that cannot be sites, such as experts and routers
    of their own kind.
    """
    from spd_lightning.decomposition.components import available

    maps = available(network)
    others = [
        f"{name} {list(parameter.shape)}"
        for name, parameter in network.named_parameters()
        if parameter.ndim >= 2 and name.rpartition(".")[0] not in maps
    ]
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        yield ""
        some = ", ".join(others[:3])
        yield f"cannot be decomposed (no Linear, Conv1D or Embedding): {some}{more}"


# ---- groups --------------------------------------------------------------------------------------


def grouped(network: nn.Module, apart: bool = False) -> list[Group]:
    """Return the maps of a network in groups, in the network's order.

    Args:
        network: any module.
        apart: whether every map is a group of its own.
    """
    from spd_lightning.decomposition.components import IDENTITY, available

    found = {name: site for name, site in available(network).items() if not name.endswith(IDENTITY)}
    members: dict[tuple[str, str, int, int], list[str]] = {}
    for name, site in found.items():
        pattern = name if apart else re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        members.setdefault((pattern, KINDS[site.kind], site.d_in, site.d_out), []).append(name)
    shapes = [pattern for pattern, *_ in members]
    groups = []
    for (pattern, kind, d_in, d_out), names in members.items():
        if len(names) == 1 or shapes.count(pattern) > 1:  # a pattern would name too many
            groups += [Group(name, [name], kind, d_in, d_out) for name in names]
        else:
            groups.append(Group(pattern, names, kind, d_in, d_out))
    return groups


def table(groups: Sequence[Group]) -> Iterator[str]:
    """Yield the groups as lines."""
    width = max(len("pattern"), *(len(group.pattern) for group in groups))
    yield (
        f"{'pattern':<{width}}  {'maps':>5}  {'kind':<9}  {'d_in':>7}  {'d_out':>7}  "
        f"{'components':>10}"
    )
    for group in groups:
        shape = f"{group.d_in:>7}  {group.d_out:>7}"
        yield (
            f"{group.pattern:<{width}}  {len(group.names):>5}  {group.kind:<9}  {shape}  "
            f"{group.components:>10}"
        )


def _as_json(groups: Sequence[Group]) -> str:
    return json.dumps(
        [{**asdict(group), "components": group.components} for group in groups], indent=1
    )


# ---- a first config ------------------------------------------------------------------------------


def chosen(groups: Sequence[Group]) -> dict[str, int]:
    """Return patterns to begin with: of a shallow network all maps in layers, of a deep one those
    of a middle layer.
    """
    layered = [group for group in groups if group.layered and group.kind != "Embedding"]
    if not layered:
        return {group.pattern: group.components for group in groups if group.kind != "Embedding"}
    depth = max(len(group.names) for group in layered)
    if depth <= FEW_LAYERS:
        return {group.pattern: group.components for group in layered}
    return {group.names[len(group.names) // 2]: group.components for group in layered}


def first_config(reference: str, network: nn.Module, groups: Sequence[Group]) -> str:
    """Return the text of a config that decomposes a target."""
    kind, _, name = reference.partition(":")
    if kind in ("hf", "decoder") and name:
        return _of_checkpoint(reference, name, network, chosen(groups))
    return _of_config(reference, network, chosen(groups))


def _of_checkpoint(reference: str, name: str, network: nn.Module, patterns: dict[str, int]) -> str:
    """Return a config of a checkpoint, its keys explained."""
    shallow = any("*" in pattern for pattern in patterns)
    folder = Path(name).expanduser()
    if folder.is_dir() and not any((folder / file).exists() for file in TOKENIZERS):
        tokens = (
            f"vocab: {network.vocab}  # no tokenizer in the folder: one is trained here; better "
            "name its own"
        )
    else:
        tokens = f"tokenizer: {json.dumps(name)}"
    return _LANGUAGE.format(
        reference=json.dumps(reference),
        base="lm-subset.yaml" if shallow else "lm-layerwise.yaml",
        sites="\n".join(
            f"      {json.dumps(pattern)}: {count}" for pattern, count in patterns.items()
        ),
        tokens=tokens,
        seq_len=min(int(getattr(network, "context", CONTEXT)), CONTEXT),
    )


def _of_config(reference: str, network: nn.Module, patterns: dict[str, int]) -> str:
    """Return a config of a target that a config trains, on the data that it is trained on."""
    data = configs.load(reference).get("data", {})
    text = str(data.get("class_path")).endswith(".Text")
    given: dict[str, Any] = {"target": reference, "sites": patterns}
    if not text:
        losses: dict[str, Any] = {"minimality": {"coeff": 3e-3, "p": 1.0}}
        given["losses"] = losses
        given["optimizer"] = {"lr": 5e-3, "schedule": {"kind": "cosine", "warmup": 200}}
        if hasattr(network, "vocab"):  # outputs are logits
            losses["reconstruction"] = {name: {"divergence": "kl"} for name in ("all", "layerwise")}
            given["evaluation"] = {"divergence": "kl"}
    whole = {
        "base": "lm-subset.yaml" if text else "toy.yaml",
        "model": {"init_args": given},
        "data": data,
        "trainer": {"max_steps": 4000 if text else 2500},
    }
    return (
        f"# A first decomposition of {reference}, written by `sites "
        f"--write`.\n{configs.dump(whole)}"
    )


TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
"""Files by which a checkpoint's folder shows that it holds a tokenizer."""

_LANGUAGE = """\
# A first decomposition of {reference}, written by `sites --write`. my-checkpoint.yaml explains each
# key.
base: {base}
model:
  init_args:
    target: {reference}
    sites:  # patterns of module names, each with a number of components
{sites}
data:
  init_args:
    corpus: stories  # better yours: a path or glob of .txt, .jsonl or .parquet files, or hf:NAME
    {tokens}
    seq_len: {seq_len}
    batch_size: 8
trainer:
  max_steps: 5000
"""
