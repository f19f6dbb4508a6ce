"""The rows that all harvests of prompts have in common, for one batch of prompts.

1. *Runs*: the prompts are run twice: clean, which gives the importances, and under those
   importances as masks.
2. *Layers*: the harvester determines which entries are nodes (A3), and their values.
3. *Rows*: the runs and layers become the tables prompts, nodes, edges, outputs and components.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from spd_lightning.attribution.autograd import biased, embeddings
from spd_lightning.attribution.closed_form.heads import HeadTable
from spd_lightning.attribution.graph import EdgeTable, Layer, node_numbers, with_positions
from spd_lightning.attribution.outputs import OutputNodes, every_output, likely_tokens
from spd_lightning.data.modules import Prompts
from spd_lightning.decomposition.components import IDENTITY, Mask
from spd_lightning.decomposition.metrics import component_norms, sizeable
from spd_lightning.decomposition.model import Clean, ComponentModel
from spd_lightning.errors import BadInput
from spd_lightning.harvest.moments import moments
from spd_lightning.store import KINDS, TABLES
from spd_lightning.training.decompose import Decomposition
from spd_lightning.units.components import check_own_importances

Names = Callable[[list[int]], list[str]]
"""A function from token ids to their text."""


class Runs(NamedTuple):
    """The clean run of a batch of prompts, and the run under its importances as masks.

    target, ci: the outputs [batch, pos, K] of the clean and the masked run, in single precision or
        better.
    nodes: chooses the outputs that are nodes (A3).
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
    """Run a batch of prompts clean and under importances as masks, without gradients.

    Args:
        model: the decomposed model.
        inputs: [batch, features] floating point, or [batch, pos] token ids.
        importances: the importances; the lower-leaky ones of the clean run if omitted.

    Raises:
        BadInput: a site has the same input for all prompts.
    """
    vectors = inputs.is_floating_point()
    with torch.no_grad():
        clean = model.clean(inputs)
        if importances is None:
            g = model.importances(clean).lower
        else:
            g = dict(importances)
        check_own_importances(g, inputs)
        masks = {site: Mask(values, 0.0) for site, values in g.items()}
        masked = model.masked(inputs, masks, clean)
        target = full(with_positions(clean.output))
        ci = full(with_positions(masked))
        nodes = every_output
        if not vectors:
            probabilities = ci.softmax(-1)
            nodes = likely_tokens(probabilities)
    return Runs(clean, g, target, ci, nodes)


def full(x: Tensor) -> Tensor:
    """Convert half precision to single precision; other tensors are unchanged."""
    if x.dtype in (torch.bfloat16, torch.float16):
        return x.float()
    return x


# ---- metadata ------------------------------------------------------------------------------------


def harvest_metadata(module: Decomposition) -> dict[str, Any]:
    """Return the metadata of every harvest of prompts: its run, its kind and its layers."""
    tokens = any(isinstance(m, nn.Embedding) for m in module.model.target.modules())
    return {
        "run": module.origin,
        "kind": "tokens" if tokens else "vectors",
        "checkpoint_digest": module.digest,
        "layers": layer_names(module.model),
        "C": module.model.counts,
    }


def layer_names(model: ComponentModel, frozen: bool = False) -> list[str]:
    """Return the names of all layers in forward order.

    They are the input or the embeddings, the sites, and the output. Frozen graphs also have a layer
    for each other module that adds a bias.
    """
    first = list(embeddings(model).values()) or ["input"]
    between = list(model.sites)
    biases = biased(model) if frozen else {}
    if biases:
        order = [name for name, _ in model.target.named_modules()]

        def place(name: str) -> int:
            return order.index(name.removesuffix(IDENTITY))

        between = sorted([*between, *biases], key=place)
    return [*first, *between, "output"]


def array(tensor: Tensor, dtype: Any = np.float32) -> np.ndarray:
    """Return the values of a tensor as an array of a type of the store.

    Raises:
        BadInput: a whole number does not fit into the type.
    """
    values = full(tensor.detach())
    as_array = values.cpu().numpy()
    if np.issubdtype(dtype, np.unsignedinteger):
        _check_fits(as_array, dtype)
    return as_array.astype(dtype, copy=False)


def _check_fits(numbers: np.ndarray, dtype: Any) -> None:
    """Raise BadInput if a number would not be itself in an unsigned type."""
    if not numbers.size:
        return
    smallest = int(numbers.min())
    largest = int(numbers.max())
    limit = int(np.iinfo(dtype).max)
    if smallest < 0 or largest > limit:
        number = smallest if smallest < 0 else largest
        raise BadInput(
            f"number {number} of a node, token or component: a harvest's tables hold numbers from "
            f"0 to {limit}; use shorter prompts, or a higher threshold for fewer nodes"
        )


# ---- tables --------------------------------------------------------------------------------------


def prompt_rows(prompts: Prompts, ids: list[int], names: Names) -> pl.DataFrame:
    """Return one row per prompt, with its token ids and their text.

    Prompts on vectors have their nonzero features in place of tokens.
    """
    if prompts.inputs.is_floating_point():
        token_ids = [row.nonzero().flatten().tolist() for row in prompts.inputs]
        tokens = []
        for values, features in zip(prompts.inputs.tolist(), token_ids, strict=True):
            tokens.append([f"f{i}={values[i]:.3g}" for i in features])
    else:
        token_ids = prompts.inputs.tolist()
        tokens = prompts.tokens or [names(row) for row in token_ids]
    columns = {
        "prompt_id": ids,
        "token_ids": token_ids,
        "tokens": tokens,
        "source": prompts.sources,
        "split": prompts.splits,
    }
    types = {"prompt_id": pl.UInt64, "token_ids": pl.List(pl.UInt32), "tokens": pl.List(pl.String)}
    return pl.DataFrame(columns, schema_overrides=types)


def node_rows(layers: list[Layer], ids: list[int]) -> pl.DataFrame:
    """Return one row per node."""
    prompt_ids = np.array(ids, dtype=np.uint64)
    names = dict.fromkeys(layer.name for layer in layers)
    layer_type = pl.Enum(list(names))
    frames = []
    for layer, numbers in zip(layers, node_numbers(layers), strict=True):
        prompt, pos, component = layer.nodes.nonzero().cpu().numpy().T  # [nodes] each
        importance = pl.lit(None, pl.Float32)
        if layer.importance is not None:
            importance = pl.Series(array(layer.importance[layer.nodes]))
        columns = {
            "prompt_id": prompt_ids[prompt],
            "node": array(numbers[layer.nodes], np.uint32),
            "pos": pos.astype(np.uint32),
            "component": component.astype(np.uint32),
            "activation": array(layer.value[layer.nodes]),
        }
        frame = pl.DataFrame(columns).with_columns(
            kind=pl.lit(layer.kind, pl.Enum(KINDS)),
            layer=pl.lit(layer.name, layer_type),
            importance=importance,
        )
        frames.append(frame)
    return pl.concat(frames)


def edge_rows(tables: Iterable[EdgeTable], ids: list[int]) -> pl.DataFrame:
    """Return one row per edge."""
    prompt_ids = np.array(ids, dtype=np.uint64)
    frames = [pl.DataFrame(schema=TABLES["edges"])]
    for table in tables:
        columns = {
            "prompt_id": _prompt_ids(table.prompt, prompt_ids),
            "source": _unsigned(table.source),
            "target": _unsigned(table.target),
            "attribution": array(table.attribution),
        }
        frames.append(pl.DataFrame(columns))
    return pl.concat(frames)


def _unsigned(numbers: Tensor) -> np.ndarray:
    """Return node numbers in the type of the store.

    Raises:
        BadInput: a number does not fit into it.
    """
    if numbers.dtype == torch.int32:
        return numbers.cpu().numpy().view(np.uint32)
    return array(numbers, np.uint32)


def _prompt_ids(prompt: Tensor, ids: np.ndarray) -> np.ndarray:
    """Return the id of the prompt of each edge.

    prompt: the number of each edge's prompt in the batch. Closed forms give one number, expanded to
        all edges (stride 0).
    """
    edges = len(prompt)
    if edges and prompt.stride() == (0,):
        first = int(prompt[0])
        only_id = ids[first]
        return np.full(edges, only_id)
    numbers = prompt.cpu().numpy()
    return ids[numbers]


def head_rows(tables: Iterable[HeadTable], ids: list[int]) -> pl.DataFrame:
    """Return one row per edge and attention head."""
    edges = []
    heads = [np.zeros(0, np.uint16)]
    for table in tables:
        edges.append(
            EdgeTable(
                prompt=table.prompt,
                source=table.source,
                target=table.target,
                attribution=table.attribution,
            )
        )
        heads.append(array(table.head, np.uint16))
    head = pl.Series(np.concatenate(heads))
    return edge_rows(edges, ids).with_columns(head=head)


def output_rows(runs: Runs, ids: list[int], names: Names) -> pl.DataFrame:
    """Return one row per output node, with its values under ci masks and in the target."""
    chosen = runs.nodes(runs.ci)  # [batch, pos, K]
    prompt, pos, token = chosen.nonzero().cpu().numpy().T  # [outputs] each
    prompt_ids = np.array(ids, dtype=np.uint64)
    columns: dict[str, Any] = {
        "prompt_id": prompt_ids[prompt],
        "pos": pos.astype(np.uint32),
        "token_id": token.astype(np.uint32),
        "token": token_strings(token, names),
    }
    has_tokens = runs.clean.output.ndim == 3
    for name, logits in (("ci", runs.ci), ("target", runs.target)):
        columns[f"{name}_probability"] = None
        if has_tokens:
            log_sum = logits.logsumexp(-1, keepdim=True)
            log_probability = (logits - log_sum)[chosen]  # [outputs]
            probability = log_probability.exp()
            columns[f"{name}_probability"] = array(probability)
        columns[f"{name}_logit"] = array(logits[chosen])
    types = {"token": pl.String, "ci_probability": pl.Float32, "target_probability": pl.Float32}
    return pl.DataFrame(columns, schema_overrides=types)


def token_strings(tokens: np.ndarray, names: Names) -> list[str]:
    """Return the text of each token; each distinct token is looked up once."""
    distinct, indices = np.unique(tokens, return_inverse=True)
    texts = names(distinct.tolist())
    return [texts[k] for k in indices]


def component_rows(module: Decomposition, layers: list[Layer], threshold: float) -> pl.DataFrame:
    """Return one row per component, with additive counts over this batch."""
    frames = []
    for layer in layers:
        if layer.kind != "component" or layer.importance is None:
            continue
        fires = layer.importance > threshold  # [batch, pos, C]
        sums = moments(fires, layer.importance, layer.value.detach())
        frames.append(site_rows(module, layer.name, sums))
    return pl.concat(frames)


def site_rows(module: Decomposition, site: str, sums: Mapping[str, np.ndarray]) -> pl.DataFrame:
    """Return one row per component of a site.

    `norm` and `alive` (a norm above 5 % of the site's largest) depend on the weights alone.

    sums: the columns that depend on the prompts, [C] each.
    """
    V = module.model[site].V
    U = module.model[site].U
    norms = component_norms(V, U).detach()  # [C]
    columns = {
        "component": np.arange(len(norms), dtype=np.uint32),
        "norm": array(norms),
        "alive": sizeable(V, U).cpu().numpy(),
        **sums,
    }
    frame = pl.DataFrame(columns)
    name = pl.lit(site)
    return frame.with_columns(layer=name).select(TABLES["components"].names())
