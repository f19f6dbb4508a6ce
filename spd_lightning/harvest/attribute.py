"""One call from a text to its attribution graph."""

from collections.abc import Sequence
from typing import NamedTuple

import polars as pl
import torch
from torch import Tensor

from spd_lightning import runs
from spd_lightning.attribution.graph import ModeName
from spd_lightning.data.modules import EncodesText, Prompts, StepData
from spd_lightning.errors import BadInput, shown
from spd_lightning.harvest.graphs import PromptGraphs
from spd_lightning.harvest.module import NamesTokens, prompt_id
from spd_lightning.store import TABLES
from spd_lightning.store.tables import ordered
from spd_lightning.training.decompose import Decomposition
from spd_lightning.training.session import data_of


class Attribution(NamedTuple):
    """The attribution graph of one prompt.

    Attributes:
        nodes: columns node, kind, layer, pos, component, importance, activation.
        edges: columns source and target (numbers of nodes), attribution.
        outputs: the likely next tokens, with their probabilities under importances as masks and in
            the target.
        tokens: the text of each token of the prompt; for a vector, the features that are not zero.
        gap: Σ|a − Σ in-edges| / Σ|a| over all nodes: the share of the activations a that in-edges
            do not add up to; 0 up to rounding for mode "frozen".
    """

    nodes: pl.DataFrame
    edges: pl.DataFrame
    outputs: pl.DataFrame
    tokens: list[str]
    gap: float


def attribute(
    module: Decomposition,
    prompt: str | Sequence[int] | Tensor,
    mode: ModeName = "unmasked",
    threshold: float = 0.0,
    min_share: float = 0.0,
    data: StepData | None = None,
) -> Attribution:
    """Return the attribution graph of one prompt; nothing is written.

    Args:
        module: the decomposition.
        prompt: a text, token ids, or a tensor: [pos] of token ids, or [features] of a vector.
        mode: the kind of graph (see `PromptGraphs`).
        threshold: importance above which a component is a node.
        min_share: edges below this share of the total |attribution| into their target are left out.
        data: the data module, which knows the tokenizer; if omitted, that of the module's run.

    Raises:
        BadInput: the prompt does not fit the model, or a text is given and no tokenizer is known.

    Examples:
        >>> import torch
        >>> from spd_lightning import TMS, Decomposition, attribute
        >>> module = Decomposition(TMS(5, 2), sites={"linear*": 20})
        >>> graph = attribute(module, torch.tensor([0.0, 0.75, 0.0, 0.0, 0.0]), mode="frozen")
        >>> graph.tokens, graph.gap < 1e-4
        (['f1=0.75'], True)
        >>> strongest = graph.edges.sort(-graph.edges["attribution"].abs()).head(3)
        >>> strongest.columns
        ['source', 'target', 'attribution']
    """
    if data is None and (isinstance(prompt, str) or module.origin):
        data = _data_of_run(module)
    inputs = _inputs(prompt, data)
    harvester = PromptGraphs(mode, threshold, min_share, checks=0)
    if isinstance(data, NamesTokens):
        harvester.names = data.names
    prompts = Prompts(inputs.to(module.device), ["given 0"], ["given"])
    harvester.check_prompts(module, prompts)
    with torch.autocast(module.device.type, enabled=False):
        tables = harvester.rows(module, prompts, [prompt_id(inputs[0])])
    frames = {}
    for table in ("nodes", "edges", "outputs"):
        columns = [name for name in TABLES[table] if name != "prompt_id"]
        frames[table] = ordered(table, tables[table]).select(columns)
    tokens = tables["prompts"]["tokens"][0].to_list()
    gap = tables["graphs"]["gap"][0]
    return Attribution(**frames, tokens=tokens, gap=gap)


def _inputs(prompt: str | Sequence[int] | Tensor, data: StepData | None) -> Tensor:
    """Return a prompt as a batch of one: [1, features] floating point, or [1, pos] token ids."""
    if isinstance(prompt, Tensor):
        if prompt.ndim != 1:
            raise BadInput(
                f"prompt of shape {list(prompt.shape)}: give one prompt, a tensor of one dimension"
            )
        return prompt[None]
    if not isinstance(prompt, str):
        return torch.tensor([list(prompt)])
    if not isinstance(data, EncodesText):
        raise BadInput(
            f"prompt '{shown(prompt)}': the data of this run is not text; give token ids or a "
            "vector"
        )
    return torch.tensor([data.encode(prompt)])


def _data_of_run(module: Decomposition) -> StepData:
    """Return the data module of the run that a decomposition was loaded from."""
    if not module.origin:
        raise BadInput(
            "attribute: this decomposition does not come from a run, so its tokenizer is not "
            "known; give data=Text(...), or token ids"
        )
    return data_of(runs.find(module.origin).path)
