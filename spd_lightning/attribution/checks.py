"""Checks of a graph: its edges against interventions, its nodes against the sum of what enters them
(section A).

An edge states what its target would lose if its source were ablated and every other site kept its
output (A1). An intervention tests this. In a batch of copies of one prompt, every site returns its
output from the graph's own run, except that each copy scales one component at one position.
Everything between the sites is recomputed, and the target is read. If the maps of a graph are
linear (`linearize`, A6), the change equals the edge. In `jacobian` modes this holds for small
changes, and a full ablation shows how far the model is from linear.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from spd_lightning.attribution.graph import EdgeTable, GraphSpec, Layer, NodeKind, node_numbers
from spd_lightning.attribution.linearize import Frozen
from spd_lightning.decomposition.components import Site
from spd_lightning.decomposition.model import ComponentModel, Map, flattened

CHUNK = 1 << 24
"""Numbers held at once by one run of trials."""

# ---- which edges ---------------------------------------------------------------------------------

Key = tuple[NodeKind, str]
"""A layer of a graph: what its nodes are, and its name."""


class Checks(NamedTuple):
    """Edges to try: of each its prompt in the batch, and both ends as (number of the layer,
    position, component).

    layers: what those numbers stand for. Sources are components; targets are components or outputs.
    """

    layers: list[Key]
    prompt: Int[Tensor, " checks"]
    source: Int[Tensor, "checks 3"]
    target: Int[Tensor, "checks 3"]

    def rows(self, index: Any) -> "Checks":
        """Some of them."""
        return Checks(self.layers, *(column[index] for column in self[1:]))


class Graphs:
    """The nodes of the graphs of a batch of prompts by their numbers, for draws among their edges.

    Args:
        layers: the layers of the graphs.
    """

    def __init__(self, layers: list[Layer]):
        self.layers: list[Key] = [(layer.kind, layer.name) for layer in layers]
        numbers = node_numbers(layers)
        self._width = _most(layers)
        self._places = numbers[0].new_zeros(len(layers[0].nodes) * self._width, 3, dtype=torch.long)
        self._writes = torch.zeros_like(self._places[:, 0], dtype=torch.bool)
        for k, (layer, number) in enumerate(zip(layers, numbers, strict=True)):
            prompt, pos, i = layer.nodes.nonzero(as_tuple=True)
            at = prompt * self._width + number[layer.nodes]
            self._places[at] = torch.stack([torch.full_like(pos, k), pos, i], dim=1)
            self._writes[at] = layer.kind == "component"

    def places(self, prompt: Tensor, number: Tensor) -> Int[Tensor, "nodes 3"]:
        """Nodes by their prompts and numbers: layer, position, component."""
        return self._places[prompt.long() * self._width + number]

    def sample_edges(self, table: EdgeTable, count: int, generator: torch.Generator) -> EdgeTable:
        """Up to `count` of the edges of a prompt that start at components, the stronger the
        likelier.

        The sizes of these edges are laid end to end and cut into `count` equal parts, and at a
        random place of each part an edge is taken. So an edge is expected as often as its share of
        them all, and a dominant one is certain.
        """
        writes = self._writes[table.prompt.long() * self._width + table.source]
        reach = (table.attribution.abs().nan_to_num(0.0, 0.0) * writes).cumsum(
            0, dtype=torch.float64
        )
        found = table.source.new_zeros(0, dtype=torch.long)
        if len(reach) and reach[-1]:
            places = (
                torch.arange(count) + torch.rand(count, generator=generator, dtype=torch.float64)
            ) / count
            found = torch.searchsorted(reach, places.to(reach.device) * reach[-1], right=True)
        return EdgeTable(*(column[found.clamp(max=len(reach) - 1).unique()] for column in table))

    def checks(self, table: EdgeTable) -> Checks:
        """Edges that start at components, to be tried."""
        ends = (self.places(table.prompt, number) for number in (table.source, table.target))
        return Checks(self.layers, table.prompt.long(), *ends)


def _most(layers: list[Layer]) -> int:
    """How many nodes the largest graph has."""
    return int(torch.stack([layer.nodes.flatten(1).sum(1) for layer in layers]).sum(0).max())


# ---- edges ---------------------------------------------------------------------------------------


def changes(spec: GraphSpec, checks: Checks, factor: float = 0.0) -> Float[Tensor, " checks"]:
    """Return how much the target of each edge gains when its source is scaled and all other sites
    are held fixed.

    An edge that is exact (A6), or a factor near 1, gives (factor − 1) · attribution.
    """
    inputs = spec.inputs
    length = spec.inputs.shape[1]
    widest = (
        1
        if inputs.is_floating_point()
        else max(length, int(getattr(spec.model.target, "vocab", 0)))
    )
    parts = torch.arange(len(checks.prompt), device=inputs.device).split(
        max(1, CHUNK // max(1, length * widest))
    )
    found = [_Trial(spec, checks.rows(part), factor)() for part in parts if len(part)]
    return torch.cat(found) if found else next(iter(spec.importances.values())).new_zeros(0)


class _Trial:
    """One forward pass: a row for each prompt as it is, then a row for each check."""

    def __init__(self, spec: GraphSpec, checks: Checks, factor: float):
        self.spec = spec
        self.model = spec.model
        self.mode = spec.mode
        self.checks = checks
        self.factor = factor
        prompts, slots = checks.prompt.unique(return_inverse=True)
        self.plain = len(prompts)
        self.rows = torch.cat([torch.arange(self.plain, device=slots.device), slots])
        """For each row, that of its prompt as it is."""
        self.inputs = spec.inputs[prompts][self.rows]
        self.g = {name: g[prompts].detach() for name, g in spec.importances.items()}
        self.change = next(iter(self.g.values())).new_zeros(len(slots))

    def __call__(self) -> Tensor:
        if not self.spec.frozen:
            self._run(nullcontext())
            return self.change
        # First every row as it is, which gives the constants of the graph's run; then the changes,
        # with these constants.
        constants = list[Tensor]()
        factor = self.factor

        def keep(value: Tensor) -> Tensor:
            constants.append(value.detach().clone())  # the model may overwrite the value itself
            return value.detach()

        self.factor = 1.0
        self._run(Frozen(keep))
        self.factor = factor
        kept = iter(constants)
        self._run(Frozen(lambda value: next(kept)))
        return self.change

    def _run(self, linear: AbstractContextManager) -> None:
        """Runs the model and reads the targets."""
        vectors = self.inputs.is_floating_point()
        x = self.inputs.detach().clone().requires_grad_() if vectors else self.inputs
        sites = {site.module for site in self.model.sites.values()}
        tables = [
            m for m in self.model.target.modules() if isinstance(m, nn.Embedding) and m not in sites
        ]
        # No gradient is asked for, but which values would carry one tells the rules of A6 what is a
        # path.
        with (
            torch.set_grad_enabled(self.spec.frozen),
            linear,
            self.model.replaced(self._at_site, self._at_table, tables),
        ):
            out = self.model.target(x)
        with torch.no_grad():
            self._read(("output", "output"), self.spec.reading(out), None)

    def _at_site(self, site: Site, x: Tensor, own: Map) -> Tensor:
        key: Key = ("component", site.name)
        x = x.detach()  # no rule of A6 speaks of what is computed here
        with torch.no_grad():
            if site.kind != "embedding":
                self._read(key, x, self.model[site.name].V.detach())
            y = self._as_it_is(site, x[: self.plain], own)[self.rows]
            if self.mode.delta == "flow":
                y = y + self._moved(site, x, own)
            row, pos, i = self._mine(key, self.checks.source)
            more = (self.factor - 1) * self._weight(site, x, self.rows[row], pos, i)
            added = more[:, None] * self.model[site.name].U.detach()[i]
            _by_position(y).index_put_((row, pos), added, accumulate=True)
        return _path(y)

    def _as_it_is(self, site: Site, x: Tensor, own: Map) -> Tensor:
        """Return the site's output in the graph's own run, one row a prompt."""
        if self.mode.mask == "ones" and self.mode.delta != "off":
            return own(x)  # D5
        V = self.model[site.name].V.detach()
        U = self.model[site.name].U.detach()
        bias = 0.0 if site.bias is None else site.bias
        a = site.inner(x, V)
        w = a if self.mode.mask == "ones" else self.g[site.name] * a
        y = w @ U + bias
        return y if self.mode.delta == "off" else y + own(x) - bias - a @ U

    def _weight(
        self, site: Site, x: Tensor, row: Tensor, pos: Tensor, i: Tensor
    ) -> Float[Tensor, " nodes"]:
        """w = m a of some nodes."""
        V = self.model[site.name].V.detach()
        ids = site.kind == "embedding"
        x = (x if ids else _by_position(x))[row, pos]
        a = V[x, i] if ids else (x * V.T[i]).sum(-1)
        return a if self.mode.mask == "ones" else a * _by_position(self.g[site.name])[row, pos, i]

    def _moved(self, site: Site, x: Tensor, own: Map) -> Tensor:
        """Return the delta's contribution where a site's input has changed, in graphs whose delta
        carries gradient.
        """
        moved = own(x) - site.inner(x, self.model[site.name].V) @ self.model[site.name].U
        return moved - moved[self.rows]

    def _mine(self, key: Key, ends: Int[Tensor, "checks 3"]) -> tuple[Tensor, Tensor, Tensor]:
        """Select the checks that have an end in a layer: their rows, and that end's position and
        component.
        """
        same = torch.tensor([layer == key for layer in self.checks.layers], device=ends.device)
        found = same[ends[:, 0]].nonzero()[:, 0]
        return self.plain + found, ends[found, 1], ends[found, 2]

    def _read(self, key: Key, x: Tensor, V: Tensor | None) -> None:
        """How far each target of this layer has moved from its value in the graph's run."""
        row, pos, j = self._mine(key, self.checks.target)
        x = _by_position(x)
        moved = x[row, pos] - x[self.rows[row], pos]
        read = moved.gather(1, j[:, None])[:, 0] if V is None else (moved * V.T[j]).sum(-1)
        self.change[row - self.plain] = read.to(self.change.dtype)

    def _at_table(self, module: nn.Module, own: Map) -> Map:
        def forward(*args, **kwargs):
            out = own(*args, **kwargs)
            vectors = self.model.folded(out)
            spread = vectors.expand(len(self.rows), *vectors.shape[-2:]).detach()
            return _path(flattened(spread, vectors.ndim - out.ndim))

        return forward


def _path(y: Tensor) -> Tensor:
    """Make a tensor carry a gradient, as a copy that the model may change in place (a leaf it may
    not).
    """
    return y.requires_grad_().clone() if torch.is_grad_enabled() else y


def _by_position(x: Tensor) -> Tensor:
    """A view [batch, pos, K] of [batch, K] or of that itself."""
    return x if x.ndim == 3 else x[:, None]


# ---- nodes ---------------------------------------------------------------------------------------


class Inflow:
    """The sums of all in-edges of each node, for the graphs of some prompts.

    Args:
        model: the decomposition.
        layers: the layers of the graphs.
    """

    def __init__(self, model: ComponentModel, layers: list[Layer]):
        fed = {name for name, site in model.sites.items() if site.kind != "embedding"} | {"output"}
        held = zip(layers, node_numbers(layers), strict=True)
        self._targets = [
            (t, n) for t, n in held if t.name in fed and t.kind in ("component", "output")
        ]
        self._width = _most(layers)
        self._batch = len(layers[0].nodes)
        self._sums = layers[-1].value.new_zeros(self._batch * self._width)

    def add(self, table: EdgeTable) -> None:
        """Takes some of the edges."""
        self._sums.index_add_(
            0, table.prompt.long() * self._width + table.target, table.attribution
        )

    def gaps(self) -> Float[Tensor, " batch"]:
        """By how much the in-edges of each prompt's targets miss their values: Σ_T |a_T − Σ
        in-edges| / Σ_T |a_T|.

        Targets are outputs, and components but those of embeddings, which nothing enters. Zero for
        frozen graphs (A6) when all edges have been taken; NaN where all values are zero.
        """
        missed, size = (self._sums.new_zeros(self._batch) for _ in range(2))
        for layer, numbers in self._targets:
            prompt = layer.nodes.nonzero()[:, 0]
            value = layer.value.detach()[layer.nodes]
            entered = self._sums[prompt * self._width + numbers[layer.nodes]]
            missed.index_add_(0, prompt, (value - entered).abs())
            size.index_add_(0, prompt, value.abs())
        return missed / size
