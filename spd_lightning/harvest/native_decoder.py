"""Graphs of models that have a decoder's parts under other names: the same numbers, without a
backward pass.

A HuggingFace GPT-2, Llama, Mistral or Qwen2 taken as it is (`hf:`) has an equivalent, our own
decoder with the same weights. Where the sites have their places in it, graphs are the decoder's,
and names stay those of the model. (GPT-2's one map for queries, keys and values has none: take such
a checkpoint as `decoder:` to have closed forms. In frozen graphs biases of maps that are not sites
are nodes, so they must have their places too.)
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from spd_lightning.attribution.autograd import biased
from spd_lightning.attribution.checks import Checks, Key, changes
from spd_lightning.attribution.closed_form.heads import HeadTable, head_edges
from spd_lightning.attribution.closed_form.trace import closed_form_obstacle
from spd_lightning.attribution.dataset_edges import NodeSums, PairSums, dataset_edges
from spd_lightning.attribution.graph import EdgeTable, GraphSpec, Layer, LazyEdges, Mode
from spd_lightning.attribution.prompt_graphs import lazy_graphs
from spd_lightning.attribution.pruning import prune_edges
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.targets.conversion import equivalent_decoder
from spd_lightning.targets.huggingface import HuggingFaceLM

log = logging.getLogger(__name__)


class NativeDecoder(NamedTuple):
    """A decomposed model as graphs are made of it; names: the decoder's names of the model's own
    modules.
    """

    model: ComponentModel
    names: dict[str, str]

    def graphs(
        self, spec: GraphSpec, min_share: float = 0.0
    ) -> tuple[list[Layer], Iterator[EdgeTable]]:
        """Compute `attribution_graphs` of the equivalent decoder, under the model's own names."""
        layers, graphs = self.parts(spec)
        return layers, (prune_edges(parts, min_share).table for parts in graphs)

    def parts(
        self, spec: GraphSpec, max_edges: int | None = None
    ) -> tuple[list[Layer], Iterator[LazyEdges]]:
        """Compute `lazy_graphs` of the equivalent decoder, under the model's own names."""
        layers, graphs = lazy_graphs(self._theirs(spec), max_edges)
        return [layer._replace(name=self._own(layer.name)) for layer in layers], graphs

    def heads(self, spec: GraphSpec, edges: Iterable[EdgeTable]) -> Iterator[HeadTable]:
        """Compute `head_edges` for edges of such graphs."""
        return head_edges(self._theirs(spec), edges)

    def sums(
        self, spec: GraphSpec, wanted: Callable[[str], bool] = lambda layer: True
    ) -> tuple[list[NodeSums], list[PairSums]]:
        """Compute `dataset_edges` of the equivalent decoder, under the model's own names."""
        own = self._own
        nodes, pairs = dataset_edges(self._theirs(spec), lambda layer: wanted(own(layer)))
        ends = (
            {"source_layer": own(pair.source_layer), "target_layer": own(pair.target_layer)}
            for pair in pairs
        )
        renamed = [pair._replace(**names) for pair, names in zip(pairs, ends, strict=True)]
        return [node._replace(layer=own(node.layer)) for node in nodes], renamed

    def changes(self, spec: GraphSpec, checks: Checks, factor: float) -> Tensor:
        """Compute `checks.changes` for edges of such graphs."""
        theirs: list[Key] = [(kind, self.names.get(name, name)) for kind, name in checks.layers]
        return changes(self._theirs(spec), checks._replace(layers=theirs), factor)

    def _theirs(self, spec: GraphSpec) -> GraphSpec:
        """Return the specification of the same graphs for the equivalent decoder."""

        def renamed(sites: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {self.names.get(name, name): values for name, values in sites.items()}

        threshold = (
            renamed(spec.threshold) if isinstance(spec.threshold, Mapping) else spec.threshold
        )
        return spec._replace(
            model=self.model, importances=renamed(spec.importances), threshold=threshold
        )

    def _own(self, name: str) -> str:
        return {theirs: own for own, theirs in self.names.items()}.get(name, name)


def log_why_slow(model: ComponentModel, mode: Mode, harvest: str) -> None:
    """Says why graphs of a language model have no closed form, if that is so."""
    if hasattr(model.target, "vocab") and (
        why := closed_form_obstacle(as_native_decoder(model, mode).model, mode)
    ):
        log.info(
            "harvest %s: no closed forms (%s); edges by batched products: slower, the same numbers",
            harvest,
            why,
        )


def as_native_decoder(model: ComponentModel, mode: Mode) -> NativeDecoder:
    """The quickest form of a decomposed model for graphs of a mode: itself, or a decoder's with the
    same components.
    """
    with torch.inference_mode(
        False
    ):  # the decoder outlives the mode it is made in, and gradients may be asked of it
        return _as_native_decoder(
            model, mode, tuple((p.data_ptr(), p._version) for p in model.target.parameters())
        )


@lru_cache(maxsize=2)
def _as_native_decoder(
    model: ComponentModel, mode: Mode, weights: tuple[tuple[int, int], ...]
) -> NativeDecoder:
    """The same, made once for each state of the target's weights: where they lie, and how often
    they were changed.
    """
    del weights
    itself = NativeDecoder(model, {})
    if closed_form_obstacle(model, mode) is None or not isinstance(model.target, HuggingFaceLM):
        return itself
    found = equivalent_decoder(model.target)
    if found is None or not all(name in found[1] for name in model.sites):
        return itself
    decoder, names = found
    counts = {names[name]: C for name, C in model.counts.items()}
    other = ComponentModel(decoder, counts, delta=model.delta)
    for name in model.sites:
        other.components[names[name].replace(".", "/")] = model[name]
    same = mode.linearization != "frozen" or {names.get(name) for name in biased(model)} == set(
        biased(other)
    )
    return (
        NativeDecoder(other, names)
        if same and closed_form_obstacle(other, mode) is None
        else itself
    )
