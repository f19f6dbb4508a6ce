"""Checks of a graph: edges against interventions, and nodes against their in-edges (section A).

An edge states what its target would lose if its source were ablated and every other site kept its
output (A1). An intervention tests this:

1. *Copies.* A batch holds each prompt once, and one more copy of it for each edge to check.
2. *Intervene.* Every site returns its output from the graph's own run, except that each copy scales
   one component at one position. Everything between the sites is recomputed.
3. *Read.* The target's change against the prompt's first row is the result.

If the maps of a graph are linear (`linearize`, A6), the change equals the edge. In `jacobian` modes
this holds for small changes, and a full ablation shows how far the model is from linear.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from spd_lightning.attribution.autograd import embeddings
from spd_lightning.attribution.graph import EdgeTable, GraphSpec, Layer, LayerKey, node_numbers
from spd_lightning.attribution.linearize import Frozen
from spd_lightning.decomposition.components import Site
from spd_lightning.decomposition.model import ComponentModel, Map, flattened
from spd_lightning.targets.protocols import vocab_of

MAX_TRIAL_NUMBERS = 1 << 24
"""The count of numbers that one run of trials holds at once."""

# ---- which edges ---------------------------------------------------------------------------------


class Checks(NamedTuple):
    """Edges to check: for each its prompt, and both ends as (number of the layer, pos, component).

    layers: the layers that these numbers stand for. Sources are components; targets are components
        or outputs.
    """

    layers: list[LayerKey]
    prompt: Int[Tensor, " checks"]
    source: Int[Tensor, "checks 3"]
    target: Int[Tensor, "checks 3"]

    def rows(self, index: Any) -> "Checks":
        """Return some of the edges."""
        return Checks(
            layers=self.layers,
            prompt=self.prompt[index],
            source=self.source[index],
            target=self.target[index],
        )


class Graphs:
    """The nodes of the graphs of a batch of prompts by their numbers, for draws among their edges.

    Args:
        layers: the layers of the graphs.
    """

    def __init__(self, layers: list[Layer]):
        self.layers: list[LayerKey] = [(layer.kind, layer.name) for layer in layers]
        numbers = node_numbers(layers)
        prompts = len(layers[0].nodes)
        self._width = most_nodes(layers)
        self._places = numbers[0].new_zeros(prompts * self._width, 3, dtype=torch.long)
        self._writes = torch.zeros_like(self._places[:, 0], dtype=torch.bool)
        for k, (layer, number) in enumerate(zip(layers, numbers, strict=True)):
            prompt, pos, component = layer.nodes.nonzero(as_tuple=True)  # [nodes] each
            row = prompt * self._width + number[layer.nodes]
            layer_number = torch.full_like(pos, k)
            self._places[row] = torch.stack([layer_number, pos, component], dim=1)
            self._writes[row] = layer.kind == "component"

    def _row(self, prompt: Tensor, number: Tensor) -> Int[Tensor, " nodes"]:
        """Return the rows of nodes in the tables of all prompts' nodes."""
        return prompt.long() * self._width + number

    def places(self, prompt: Tensor, number: Tensor) -> Int[Tensor, "nodes 3"]:
        """Return layer, position and component of nodes, given their prompts and numbers."""
        return self._places[self._row(prompt, number)]

    def sample_edges(self, table: EdgeTable, count: int, generator: torch.Generator) -> EdgeTable:
        """Draw up to `count` edges of a prompt that start at components, strong ones more often.

        The sizes of these edges are laid end to end and cut into `count` equal parts. At a random
        place of each part an edge is drawn. So the expected number of draws of an edge is its share
        of the total times `count`, and a dominant edge is always drawn.
        """
        writes = self._writes[self._row(table.prompt, table.source)]  # [edges]
        size = table.attribution.abs().nan_to_num(0.0, 0.0) * writes
        ends = size.cumsum(0, dtype=torch.float64)  # where each edge ends
        rows = table.source.new_zeros(0, dtype=torch.long)
        if len(ends) and ends[-1]:
            within = torch.rand(count, generator=generator, dtype=torch.float64)
            places = (torch.arange(count) + within) / count  # from 0 to 1
            rows = torch.searchsorted(ends, places.to(ends.device) * ends[-1], right=True)
        rows = rows.clamp(max=len(ends) - 1).unique()
        return EdgeTable(*(column[rows] for column in table))

    def checks(self, table: EdgeTable) -> Checks:
        """Return edges that start at components, as edges to check."""
        return Checks(
            layers=self.layers,
            prompt=table.prompt.long(),
            source=self.places(table.prompt, table.source),
            target=self.places(table.prompt, table.target),
        )


def most_nodes(layers: list[Layer]) -> int:
    """Return the number of nodes of the largest graph of a batch."""
    by_layer = [layer.nodes.flatten(1).sum(1) for layer in layers]  # [prompt] each
    return int(torch.stack(by_layer).sum(0).max())


# ---- edges ---------------------------------------------------------------------------------------


def changes(spec: GraphSpec, checks: Checks, factor: float = 0.0) -> Float[Tensor, " checks"]:
    """Return the change of each edge's target if its source is scaled and other sites are fixed.

    For an exact edge (A6), or a factor near 1, it is (factor − 1) · attribution.
    """
    rows = torch.arange(len(checks.prompt), device=spec.inputs.device)
    trials = [
        _Trial(spec, checks.rows(some), factor).run()
        for some in rows.split(_trials_at_once(spec))
        if len(some)
    ]
    if trials:
        return torch.cat(trials)
    return next(iter(spec.importances.values())).new_zeros(0)


def _trials_at_once(spec: GraphSpec) -> int:
    """Return the number of edges that one run can check."""
    inputs, length = spec.inputs, spec.inputs.shape[1]
    if inputs.is_floating_point():
        return max(1, MAX_TRIAL_NUMBERS // max(1, length))
    widest = max(length, vocab_of(spec.model.target) or 0)
    return max(1, MAX_TRIAL_NUMBERS // (length * widest))


class _Trial:
    """One forward pass with a row for each prompt as it is, and then a row for each check.

    Attributes:
        first_rows: the number of prompts, whose rows come first.
        rows: for each row the number of its prompt's first row.
        change: the change of each check's target.
    """

    def __init__(self, spec: GraphSpec, checks: Checks, factor: float):
        self.spec, self.model, self.mode = spec, spec.model, spec.mode
        self.checks, self.factor = checks, factor
        prompts, slots = checks.prompt.unique(return_inverse=True)
        self.first_rows = len(prompts)
        first = torch.arange(self.first_rows, device=slots.device)
        self.rows = torch.cat([first, slots])
        self.inputs = spec.inputs[prompts][self.rows]
        self.g = {site: g[prompts].detach() for site, g in spec.importances.items()}
        self.change = next(iter(self.g.values())).new_zeros(len(slots))

    def run(self) -> Float[Tensor, " checks"]:
        """Run the model, and return the change of each target."""
        if not self.spec.frozen:
            self._forward(nullcontext())
            return self.change
        # A frozen graph: first a run of every row as it is, which gives the constants of the
        # graph's run; then the changes, with these constants.
        constants, factor = list[Tensor](), self.factor

        def record(value: Tensor) -> Tensor:
            constants.append(value.detach().clone())  # the model may overwrite the value itself
            return value.detach()

        self.factor = 1.0
        self._forward(Frozen(record))
        self.factor = factor
        recorded = iter(constants)
        self._forward(Frozen(lambda value: next(recorded)))
        return self.change

    def _forward(self, linear: AbstractContextManager) -> None:
        """Run the model and read the targets."""
        x = self.inputs
        if x.is_floating_point():
            x = x.detach().clone().requires_grad_()
        # No gradient is computed, but the rules of A6 follow the values that would carry one.
        replaced = self.model.replaced(self._at_site, self._at_embedding, embeddings(self.model))
        with torch.set_grad_enabled(self.spec.frozen), linear, replaced:
            out = self.model.target(x)
        with torch.no_grad():
            self._read(("output", "output"), self.spec.reading(out), None)

    # ---- sites -----------------------------------------------------------------------------------

    def _at_site(self, site: Site, x: Tensor, own: Map) -> Tensor:
        """Read the targets of a site, and return its output in the graph's run with the edits."""
        key: LayerKey = ("component", site.name)
        components = self.model[site.name]
        x = x.detach()  # the rules of A6 do not apply inside a site
        with torch.no_grad():
            if site.kind != "embedding":
                self._read(key, x, components.V.detach())
            y = self._graph_output(site, x[: self.first_rows], own)[self.rows]
            if self.mode.delta == "flow":
                y = y + self._delta_change(site, x, own)
            row, pos, component = self._ends_in(key, self.checks.source)
            weight = self._weight(site, x, self.rows[row], pos, component)
            edit = ((self.factor - 1) * weight)[:, None] * components.U.detach()[component]
            _with_positions(y).index_put_((row, pos), edit, accumulate=True)
        return _as_path(y)

    def _graph_output(self, site: Site, x: Tensor, own: Map) -> Tensor:
        """Return the site's output in the graph's own run, one row a prompt."""
        if self.mode.mask == "ones" and self.mode.delta != "off":
            return own(x)  # D5
        V, U = self.model[site.name].V.detach(), self.model[site.name].U.detach()
        bias = 0.0 if site.bias is None else site.bias
        a = site.inner(x, V)
        w = a if self.mode.mask == "ones" else self.g[site.name] * a
        y = w @ U + bias
        if self.mode.delta == "off":
            return y
        return y + own(x) - bias - a @ U

    def _weight(
        self, site: Site, x: Tensor, row: Tensor, pos: Tensor, component: Tensor
    ) -> Float[Tensor, " nodes"]:
        """Return w = m a of some nodes."""
        V = self.model[site.name].V.detach()
        if site.kind == "embedding":
            tokens = x[row, pos]
            a = V[tokens, component]
        else:
            vectors = _with_positions(x)[row, pos]  # [nodes, d_in]
            a = (vectors * V.T[component]).sum(-1)
        if self.mode.mask == "ones":
            return a
        g = _with_positions(self.g[site.name])
        return a * g[row, pos, component]

    def _delta_change(self, site: Site, x: Tensor, own: Map) -> Tensor:
        """Return the change of the delta's output, for graphs whose delta carries gradient."""
        components = self.model[site.name]
        delta = own(x) - site.inner(x, components.V) @ components.U
        return delta - delta[self.rows]

    def _at_embedding(self, module: nn.Module, own: Map) -> Map:
        def forward(*args, **kwargs):
            out = own(*args, **kwargs)
            vectors = self.model.folded(out)
            every_row = vectors.expand(len(self.rows), *vectors.shape[-2:]).detach()
            return _as_path(flattened(every_row, vectors.ndim - out.ndim))

        return forward

    # ---- checks ----------------------------------------------------------------------------------

    def _ends_in(
        self, key: LayerKey, ends: Int[Tensor, "checks 3"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Select checks with an end in a layer; return their rows, and its pos and component."""
        is_layer = torch.tensor([layer == key for layer in self.checks.layers], device=ends.device)
        checks = is_layer[ends[:, 0]].nonzero()[:, 0]
        row = self.first_rows + checks
        return row, ends[checks, 1], ends[checks, 2]

    def _read(self, key: LayerKey, x: Tensor, V: Tensor | None) -> None:
        """Store how far each target of a layer has moved from its value in the graph's run.

        V: the vectors that the layer's components read; None if x holds the targets themselves.
        """
        row, pos, component = self._ends_in(key, self.checks.target)
        x = _with_positions(x)
        moved = x[row, pos] - x[self.rows[row], pos]  # [checks, K]
        if V is None:
            change = moved.gather(1, component[:, None])[:, 0]
        else:
            change = (moved * V.T[component]).sum(-1)
        self.change[row - self.first_rows] = change.to(self.change.dtype)


def _as_path(y: Tensor) -> Tensor:
    """Let a tensor carry a gradient, as a copy that the model may change in place."""
    return y.requires_grad_().clone() if torch.is_grad_enabled() else y


def _with_positions(x: Tensor) -> Float[Tensor, "batch pos K"]:
    """Return a view [batch, pos, K] of a tensor [batch, K] or [batch, pos, K]."""
    return x if x.ndim == 3 else x[:, None]


# ---- nodes ---------------------------------------------------------------------------------------


class Inflow:
    """The sum of all in-edges of each node, for the graphs of some prompts.

    Args:
        model: the decomposition.
        layers: the layers of the graphs.
    """

    def __init__(self, model: ComponentModel, layers: list[Layer]):
        fed = {name for name, site in model.sites.items() if site.kind != "embedding"} | {"output"}
        self._targets = [
            (layer, numbers)
            for layer, numbers in zip(layers, node_numbers(layers), strict=True)
            if layer.name in fed and layer.kind in ("component", "output")
        ]
        self._width = most_nodes(layers)
        self._batch = len(layers[0].nodes)
        self._sums = layers[-1].value.new_zeros(self._batch * self._width)

    def add(self, table: EdgeTable) -> None:
        """Add some of the edges."""
        row = table.prompt.long() * self._width + table.target
        self._sums.index_add_(0, row, table.attribution)

    def gaps(self) -> Float[Tensor, " batch"]:
        """Return how far the in-edges of each prompt miss: Σ_T |a_T − Σ in-edges| / Σ_T |a_T|.

        Targets are outputs, and components except those of embeddings, which have no in-edges. The
        gap is zero for frozen graphs (A6) once all edges were added, and NaN if all values are
        zero.
        """
        missed = self._sums.new_zeros(self._batch)
        size = self._sums.new_zeros(self._batch)
        for layer, numbers in self._targets:
            prompt = layer.nodes.nonzero()[:, 0]  # [nodes]
            value = layer.value.detach()[layer.nodes]
            inflow = self._sums[prompt * self._width + numbers[layer.nodes]]
            missed.index_add_(0, prompt, (value - inflow).abs())
            size.index_add_(0, prompt, value.abs())
        return missed / size
