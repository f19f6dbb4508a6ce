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

from spd_lightning import budgets
from spd_lightning.attribution.autograd import embeddings
from spd_lightning.attribution.graph import (
    EdgeTable,
    GraphSpec,
    Layer,
    LayerKey,
    node_numbers,
    with_positions,
)
from spd_lightning.attribution.linearize import Frozen
from spd_lightning.decomposition.components import Site
from spd_lightning.decomposition.model import ComponentModel, Map, flattened
from spd_lightning.targets.protocols import vocab_of

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
        n_rows = prompts * self._width
        self._places = numbers[0].new_zeros(n_rows, 3, dtype=torch.long)
        self._writes = torch.zeros(n_rows, dtype=torch.bool, device=numbers[0].device)
        for k, layer in enumerate(layers):
            prompt, pos, component = layer.nodes.nonzero(as_tuple=True)  # [nodes] each
            number = numbers[k][layer.nodes]
            row = self._row(prompt, number)
            layer_number = torch.full_like(pos, k)
            self._places[row] = torch.stack([layer_number, pos, component], dim=1)
            self._writes[row] = layer.kind == "component"

    def _row(self, prompt: Tensor, number: Tensor) -> Int[Tensor, " nodes"]:
        """Return the rows of nodes in the tables of all prompts' nodes."""
        first_row = prompt.long() * self._width
        return first_row + number

    def places(self, prompt: Tensor, number: Tensor) -> Int[Tensor, "nodes 3"]:
        """Return layer, position and component of nodes, given their prompts and numbers."""
        row = self._row(prompt, number)
        return self._places[row]

    def sample_edges(self, table: EdgeTable, count: int, generator: torch.Generator) -> EdgeTable:
        """Draw up to `count` edges of a prompt that start at components, strong ones more often.

        The sizes of these edges are laid end to end and cut into `count` equal parts. At a random
        place of each part an edge is drawn. So the expected number of draws of an edge is its share
        of the total times `count`, and a dominant edge is always drawn.
        """
        source_row = self._row(table.prompt, table.source)
        writes = self._writes[source_row]  # [edges]
        size = table.attribution.abs().nan_to_num(0.0, 0.0)
        size = size * writes
        ends = size.cumsum(0, dtype=torch.float64)  # [edges]: where each edge ends
        rows = table.source.new_zeros(0, dtype=torch.long)
        if len(ends) and ends[-1]:
            total = ends[-1]
            within = torch.rand(count, generator=generator, dtype=torch.float64)
            places = (torch.arange(count) + within) / count  # [count]: from 0 to 1
            places = places.to(ends.device) * total
            rows = torch.searchsorted(ends, places, right=True)
        last = len(ends) - 1
        rows = rows.clamp(max=last).unique()
        columns = [column[rows] for column in table]
        return EdgeTable(*columns)

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
    by_prompt = torch.stack(by_layer).sum(0)
    return int(by_prompt.max())


# ---- edges ---------------------------------------------------------------------------------------


def changes(spec: GraphSpec, checks: Checks, factor: float = 0.0) -> Float[Tensor, " checks"]:
    """Return the change of each edge's target if its source is scaled and other sites are fixed.

    For an exact edge (A6), or a factor near 1, it is (factor − 1) · attribution.
    """
    rows = torch.arange(len(checks.prompt), device=spec.inputs.device)
    if not len(rows):
        g = next(iter(spec.importances.values()))
        return g.new_zeros(0)
    chunks = rows.split(_trials_at_once(spec))
    changes_of_chunks = []
    for chunk in chunks:
        some = checks.rows(chunk)
        trial = _Trial(spec, some, factor)
        changes_of_chunks.append(trial.run())
    return torch.cat(changes_of_chunks)


def _trials_at_once(spec: GraphSpec) -> int:
    """Return the number of edges that one run can check."""
    inputs = spec.inputs
    width = max(1, inputs.shape[1])  # features, or positions
    if inputs.is_floating_point():
        per_row = width
    else:
        vocab = vocab_of(spec.model.target) or 0
        per_position = max(width, vocab)  # attention scores or logits
        per_row = width * per_position
    return max(1, budgets.MAX_TRIAL_NUMBERS // per_row)


class _Trial:
    """One forward pass with a row for each prompt as it is, and then a row for each check.

    Attributes:
        first_rows: the number of prompts, whose rows come first.
        rows: for each row the number of its prompt's first row.
        change: the change of each check's target.
    """

    def __init__(self, spec: GraphSpec, checks: Checks, factor: float):
        self.spec = spec
        self.model = spec.model
        self.mode = spec.mode
        self.checks = checks
        self.factor = factor
        prompts, first_row = checks.prompt.unique(return_inverse=True)  # [prompts], [checks]
        self.first_rows = len(prompts)
        unedited = torch.arange(self.first_rows, device=first_row.device)
        self.rows = torch.cat([unedited, first_row])
        self.inputs = spec.inputs[prompts][self.rows]
        self.g: dict[str, Tensor] = {}
        for site, g in spec.importances.items():
            self.g[site] = g[prompts].detach()
        any_g = next(iter(self.g.values()))
        self.change = any_g.new_zeros(len(first_row))

    def run(self) -> Float[Tensor, " checks"]:
        """Run the model, and return the change of each target."""
        if not self.spec.frozen:
            self._forward(nullcontext())
            return self.change
        # A frozen graph: first a run of every row as it is, which gives the constants of the
        # graph's run; then the changes, with these constants.
        constants = list[Tensor]()
        factor = self.factor

        def record(value: Tensor) -> Tensor:
            constant = value.detach()
            constants.append(constant.clone())  # the model may overwrite the value itself
            return constant

        self.factor = 1.0
        self._forward(Frozen(record))

        recorded = iter(constants)
        self.factor = factor
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
            values = self.spec.reading(out)
            self._read(("output", "output"), values, None)

    # ---- sites -----------------------------------------------------------------------------------

    def _at_site(self, site: Site, x: Tensor, original: Map) -> Tensor:
        """Read the targets of a site, and return its output in the graph's run with the edits."""
        key: LayerKey = ("component", site.name)
        components = self.model[site.name]
        x = x.detach()  # the rules of A6 do not apply inside a site
        with torch.no_grad():
            if site.kind != "embedding":
                # Components of embeddings have no in-edges, so no check ends there.
                V = components.V.detach()
                self._read(key, x, V)
            # One row per prompt gives the graph's run; its copies are the rows of the checks.
            first_x = x[: self.first_rows]
            first_y = self._graph_output(site, first_x, original)
            y = first_y[self.rows]
            if self.mode.delta == "flow":
                y = y + self._delta_change(site, x, original)
            self._edit(site, x, y)
        return _as_path(y)

    def _edit(self, site: Site, x: Tensor, y: Tensor) -> None:
        """Add (f − 1) w_i U_i to the output of a site in place, for the checks that start there."""
        U = self.model[site.name].U.detach()
        row, pos, component = self._ends_in(("component", site.name), self.checks.source)
        first_row = self.rows[row]
        w = self._weight(site, x, first_row, pos, component)  # [checks]
        scaled = (self.factor - 1) * w
        edit = scaled[:, None] * U[component]  # [checks, d_out]
        by_position = with_positions(y)
        by_position.index_put_((row, pos), edit, accumulate=True)

    def _graph_output(self, site: Site, x: Tensor, original: Map) -> Tensor:
        """Return the site's output in the graph's own run, one row per prompt."""
        mode = self.mode
        if mode.mask == "ones" and mode.delta != "off":
            # Nothing is masked: it is the target's own output (D5).
            return original(x)
        components = self.model[site.name]
        V = components.V.detach()
        U = components.U.detach()
        bias = 0.0
        if site.bias is not None:
            bias = site.bias
        a = site.inner(x, V)
        w = a
        if mode.mask == "ci":
            w = self.g[site.name] * a
        y = w @ U + bias
        if mode.delta == "off":
            return y
        return y + original(x) - bias - a @ U

    def _weight(
        self, site: Site, x: Tensor, row: Tensor, pos: Tensor, component: Tensor
    ) -> Float[Tensor, " nodes"]:
        """Return w = m a of some nodes."""
        V = self.model[site.name].V.detach()
        if site.kind == "embedding":
            # At an embedding, a is a row of V (D2).
            tokens = x[row, pos]
            a = V[tokens, component]
        else:
            # Only single entries of x V are needed.
            by_position = with_positions(x)
            vectors = by_position[row, pos]  # [nodes, d_in]
            read = V.T[component]  # [nodes, d_in]
            a = (vectors * read).sum(-1)
        if self.mode.mask == "ones":
            return a
        g = with_positions(self.g[site.name])  # [batch, pos, C]
        return a * g[row, pos, component]

    def _delta_change(self, site: Site, x: Tensor, original: Map) -> Tensor:
        """Return the change of the delta's output, for graphs whose delta carries gradient."""
        components = self.model[site.name]
        a = site.inner(x, components.V)
        delta = original(x) - a @ components.U
        unedited = delta[self.rows]
        return delta - unedited

    def _at_embedding(self, module: nn.Module, original: Map) -> Map:
        """Return a forward pass of an embedding whose output the rules of A6 follow."""
        rows = len(self.rows)

        def forward(*args, **kwargs):
            out = original(*args, **kwargs)
            vectors = self.model.folded(out)
            every_row = vectors.expand(rows, -1, -1).detach()
            added_dims = vectors.ndim - out.ndim
            y = flattened(every_row, added_dims)
            return _as_path(y)

        return forward

    # ---- checks ----------------------------------------------------------------------------------

    def _ends_in(
        self, key: LayerKey, ends: Int[Tensor, "checks 3"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Select checks with an end in a layer; return their rows, and its pos and component."""
        is_layer = [layer == key for layer in self.checks.layers]
        is_layer = torch.tensor(is_layer, device=ends.device)  # [layers]
        layer_number = ends[:, 0]
        checks = is_layer[layer_number].nonzero()[:, 0]
        row = self.first_rows + checks
        _, pos, component = ends[checks].unbind(1)
        return row, pos, component

    def _read(self, key: LayerKey, x: Tensor, V: Tensor | None) -> None:
        """Store how far each target of a layer has moved from its value in the graph's run.

        V: the vectors that the layer's components read; None if x holds the targets themselves.
        """
        row, pos, component = self._ends_in(key, self.checks.target)
        first_row = self.rows[row]
        x = with_positions(x)
        edited = x[row, pos]  # [checks, K]
        unedited = x[first_row, pos]  # [checks, K]
        moved = edited - unedited
        if V is None:
            change = moved.gather(1, component[:, None])[:, 0]
        else:
            read = V.T[component]  # [checks, K]
            change = (moved * read).sum(-1)
        check = row - self.first_rows
        self.change[check] = change.to(self.change.dtype)


def _as_path(y: Tensor) -> Tensor:
    """Let a tensor carry a gradient, as a copy that the model may change in place."""
    if not torch.is_grad_enabled():
        return y
    return y.requires_grad_().clone()


# ---- nodes ---------------------------------------------------------------------------------------


class Inflow:
    """The sum of all in-edges of each node, for the graphs of some prompts.

    Args:
        model: the decomposition.
        layers: the layers of the graphs.
    """

    def __init__(self, model: ComponentModel, layers: list[Layer]):
        has_in_edges = {name for name, site in model.sites.items() if site.kind != "embedding"}
        has_in_edges.add("output")
        self._targets: list[tuple[Layer, Tensor]] = []
        for layer, numbers in zip(layers, node_numbers(layers), strict=True):
            if layer.kind not in ("component", "output"):
                continue
            if layer.name in has_in_edges:
                self._targets.append((layer, numbers))
        self._width = most_nodes(layers)
        self._batch = len(layers[0].nodes)
        n_rows = self._batch * self._width
        self._sums = layers[-1].value.new_zeros(n_rows)

    def add(self, table: EdgeTable) -> None:
        """Add some of the edges."""
        first_row = table.prompt.long() * self._width
        row = first_row + table.target
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
            is_node = layer.nodes
            prompt = is_node.nonzero()[:, 0]  # [nodes]
            row = prompt * self._width + numbers[is_node]
            value = layer.value.detach()[is_node]
            gap = value - self._sums[row]
            missed.index_add_(0, prompt, gap.abs())
            size.index_add_(0, prompt, value.abs())
        return missed / size
