"""Rows of a batch of prompts: what every harvest of prompts writes, whatever else it finds out
about them.

1. *Run* the prompts twice: clean, which gives the importances, and under those importances as
   masks.
2. *Layers* say which entries are nodes (A3) and what their values are; a harvester makes them.
3. *Rows*: the tables prompts, nodes, edges, outputs and components are read off the two runs and
   the layers.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from spd_lightning.attribution.autograd import biased
from spd_lightning.attribution.closed_form.heads import HeadTable
from spd_lightning.attribution.graph import EdgeTable, Layer, node_numbers
from spd_lightning.attribution.outputs import OutputNodes, every_output, likely_tokens
from spd_lightning.data.modules import Prompts
from spd_lightning.decomposition.components import IDENTITY, Mask
from spd_lightning.decomposition.metrics import component_norms, sizeable
from spd_lightning.decomposition.model import Clean, ComponentModel
from spd_lightning.errors import BadInput
from spd_lightning.store import KINDS, TABLES
from spd_lightning.training.decompose import Decomposition

Names = Callable[[list[int]], list[str]]
"""Token ids to what they look like."""


class Runs(NamedTuple):
    """A batch of prompts run clean and under its importances; `nodes` chooses which outputs are
    nodes (A3).

    target, ci: outputs [batch, pos, K] of the clean run and under the importances, in single
    precision or better.
    """

    clean: Clean
    importances: dict[str, Tensor]
    target: Tensor
    ci: Tensor
    nodes: OutputNodes


def run_clean_and_masked(
    model: ComponentModel,
    inputs: Shaped[Tensor, "batch _"],
    importances: Mapping[str, Tensor] | None = None,
) -> Runs:
    """Run a batch of prompts clean and under importances, the clean run's lower-leaky ones unless
    told otherwise.

    inputs: [batch, features] floating point, or [batch, pos] token ids. No gradients.

    Raises:
        BadInput: a site does not see prompts one by one.
    """
    with torch.no_grad():
        clean = model.clean(inputs)
        g = model.importances(clean).lower if importances is None else dict(importances)
        places = inputs.shape[:1] if inputs.is_floating_point() else inputs.shape
        if alike := [site for site, values in g.items() if values.shape[:-1] != places]:
            raise BadInput(
                f"site '{alike[0]}': it reads the same for all prompts, so none has its own; leave "
                "it out"
            )
        masked = model.masked(inputs, {site: Mask(v, 0.0) for site, v in g.items()}, clean)
        target, ci = (full(shape3(out)) for out in (clean.output, masked))
        nodes = every_output if inputs.is_floating_point() else likely_tokens(ci.softmax(-1))
    return Runs(clean, g, target, ci, nodes)


def shape3(x: Tensor) -> Tensor:
    """[batch, K] and [batch, pos, K] alike as [batch, pos, K]."""
    return x[:, None] if x.ndim == 2 else x


def full(x: Tensor) -> Tensor:
    """In single precision at least."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


# ---- what a harvest says of itself ---------------------------------------------------------------


def embeddings(model: ComponentModel) -> dict[nn.Module, str]:
    """The embeddings of the target that are not sites, with their names."""
    sites = {site.module for site in model.sites.values()}
    return {
        m: n
        for n, m in model.target.named_modules()
        if isinstance(m, nn.Embedding) and m not in sites
    }


def harvest_metadata(module: Decomposition) -> dict[str, Any]:
    """Return the metadata that every harvest of prompts has: the weights' digest, and the layers in
    forward order.
    """
    tokens = any(isinstance(m, nn.Embedding) for m in module.model.target.modules())
    return {
        "run": module.origin,
        "kind": "tokens" if tokens else "vectors",
        "checkpoint_digest": module.digest,
        "layers": layer_names(module.model),
        "C": module.model.counts,
    }


def layer_names(model: ComponentModel, frozen: bool = False) -> list[str]:
    """The names of all layers: inputs or embeddings, sites (in frozen graphs also what else adds a
    bias), output.
    """
    between = list(model.sites)
    if frozen and (adding := biased(model)):
        order = [name for name, _ in model.target.named_modules()]
        between = sorted(
            [*between, *adding], key=lambda name: order.index(name.removesuffix(IDENTITY))
        )
    return [*([*embeddings(model).values()] or ["input"]), *between, "output"]


def array(tensor: Tensor, dtype: Any = np.float32) -> np.ndarray:
    """A tensor's values in the store's type."""
    return full(tensor.detach()).cpu().numpy().astype(dtype, copy=False)


# ---- tables --------------------------------------------------------------------------------------


def prompt_rows(prompts: Prompts, ids: list[int], names: Names) -> pl.DataFrame:
    """One row a prompt: its token ids and how they look; of vectors, the features that are not
    zero.
    """
    vectors = prompts.inputs.is_floating_point()
    token_ids = [
        row.nonzero().flatten().tolist() if vectors else row.tolist() for row in prompts.inputs
    ]
    if vectors:
        rows = zip(prompts.inputs.tolist(), token_ids, strict=True)
        tokens = [[f"f{i}={row[i]:.3g}" for i in held] for row, held in rows]
    else:
        tokens = prompts.tokens or [names(row) for row in token_ids]
    columns = {"prompt_id": ids, "token_ids": token_ids, "tokens": tokens}
    columns |= {"source": prompts.sources, "split": prompts.splits}
    types = {"prompt_id": pl.UInt64, "token_ids": pl.List(pl.UInt32), "tokens": pl.List(pl.String)}
    return pl.DataFrame(columns, schema_overrides=types)


def node_rows(layers: list[Layer], ids: list[int]) -> pl.DataFrame:
    """One row a node."""
    prompt_ids = np.array(ids, dtype=np.uint64)
    names = pl.Enum(list(dict.fromkeys(layer.name for layer in layers)))
    frames = []
    for layer, numbers in zip(layers, node_numbers(layers), strict=True):
        prompt, pos, component = layer.nodes.nonzero().cpu().numpy().T
        importance = (
            None if layer.importance is None else pl.Series(array(layer.importance[layer.nodes]))
        )
        columns = {
            "prompt_id": prompt_ids[prompt],
            "node": array(numbers[layer.nodes], np.uint32),
            "pos": pos.astype(np.uint16),
            "component": component.astype(np.uint32),
            "activation": array(layer.value[layer.nodes]),
        }
        frames.append(
            pl.DataFrame(columns).with_columns(
                kind=pl.lit(layer.kind, pl.Enum(KINDS)),
                layer=pl.lit(layer.name, names),
                importance=pl.lit(None, pl.Float32) if importance is None else importance,
            )
        )
    return pl.concat(frames)


def edge_rows(tables: Iterable[EdgeTable], ids: list[int]) -> pl.DataFrame:
    """One row an edge."""
    prompt_ids = np.array(ids, dtype=np.uint64)
    frames = [
        pl.DataFrame(
            {
                "prompt_id": _owners(table.prompt, prompt_ids),
                "source": table.source.int().cpu().numpy().view(np.uint32),
                "target": table.target.int().cpu().numpy().view(np.uint32),
                "attribution": array(table.attribution),
            }
        )
        for table in tables
    ]
    return pl.concat([pl.DataFrame(schema=TABLES["edges"]), *frames])


def _owners(prompt: Tensor, ids: np.ndarray) -> np.ndarray:
    """The ids of the prompts that edges belong to; closed forms give the edges of one prompt as one
    number, spread.
    """
    if len(prompt) and prompt.stride() == (0,):
        return np.full(len(prompt), ids[int(prompt[0])])
    return ids[prompt.cpu().numpy()]


def head_rows(tables: Iterable[HeadTable], ids: list[int]) -> pl.DataFrame:
    """One row an edge and head."""
    tables = list(tables)
    frame = edge_rows((EdgeTable(t.prompt, t.source, t.target, t.attribution) for t in tables), ids)
    heads = np.concatenate([np.zeros(0, np.uint16), *(array(t.head, np.uint16) for t in tables)])
    return frame.with_columns(head=pl.Series(heads))


def output_rows(runs: Runs, ids: list[int], names: Names) -> pl.DataFrame:
    """Return rows of the table `outputs`: the model's outputs under its importances next to the
    target's.
    """
    chosen = runs.nodes(runs.ci)
    prompt, pos, token = chosen.nonzero().cpu().numpy().T
    columns: dict[str, Any] = {
        "prompt_id": np.array(ids, dtype=np.uint64)[prompt],
        "pos": pos.astype(np.uint16),
        "token_id": token.astype(np.uint32),
        "token": token_strings(token, names),
    }
    tokens = runs.clean.output.ndim == 3
    for name, logits in (("ci", runs.ci), ("target", runs.target)):
        probability = (
            (logits - logits.logsumexp(-1, keepdim=True))[chosen].exp() if tokens else None
        )
        columns[f"{name}_probability"] = None if probability is None else array(probability)
        columns[f"{name}_logit"] = array(logits[chosen])
    types = {"token": pl.String, "ci_probability": pl.Float32, "target_probability": pl.Float32}
    return pl.DataFrame(columns, schema_overrides=types)


def token_strings(tokens: np.ndarray, names: Names) -> list[str]:
    """Return the text of some tokens."""
    known, which = np.unique(tokens, return_inverse=True)
    shown = names(known.tolist())
    return [shown[k] for k in which]


def component_rows(module: Decomposition, layers: list[Layer], threshold: float) -> pl.DataFrame:
    """Additive counts of this batch; norms, and whether they exceed 5 % of the site's largest, are
    the weights' own.
    """
    frames = []
    for layer in layers:
        if layer.kind != "component" or layer.importance is None:
            continue
        parts = module.model[layer.name]
        norms = component_norms(parts.V, parts.U).detach()
        frames.append(
            pl.DataFrame(
                {
                    "component": np.arange(len(norms), dtype=np.uint32),
                    "firings": array((layer.importance > threshold).sum((0, 1)), np.int64),
                    "positions": np.full(len(norms), layer.nodes[..., 0].numel(), dtype=np.int64),
                    "importance_sum": array(layer.importance.sum((0, 1)), np.float64),
                    "activation_sum": array(layer.value.sum((0, 1)), np.float64),
                    "norm": array(norms),
                    "alive": sizeable(parts.V, parts.U).cpu().numpy(),
                }
            ).with_columns(layer=pl.lit(layer.name))
        )
    return pl.concat(frames)
