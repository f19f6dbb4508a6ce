"""Graphs of HuggingFace models through an equivalent decoder, which needs no backward pass.

A HuggingFace GPT-2, Llama, Mistral or Qwen2 (`hf:`) has an equivalent: our decoder with the same
weights. If every site also exists in the decoder, graphs are computed with the decoder, and layers
keep the names of the model. The numbers are the same.

GPT-2 has one map for queries, keys and values, which the decoder does not have. Load such a
checkpoint as `decoder:` to get closed forms. In frozen graphs, biases of maps that are not sites
are nodes, so these maps must exist in the decoder too.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from spd_lightning.attribution.autograd import biased
from spd_lightning.attribution.checks import Checks, LayerKey, changes
from spd_lightning.attribution.closed_form.heads import HeadTable, head_edges
from spd_lightning.attribution.closed_form.trace import closed_form_obstacle
from spd_lightning.attribution.dataset_edges import NodeSums, PairSums, dataset_edges
from spd_lightning.attribution.graph import EdgeTable, GraphSpec, Layer, LazyEdges, Mode
from spd_lightning.attribution.prompt_graphs import lazy_graphs
from spd_lightning.attribution.pruning import prune_edges
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.targets.conversion import equivalent_decoder
from spd_lightning.targets.huggingface import HuggingFaceLM
from spd_lightning.targets.protocols import vocab_of

log = logging.getLogger(__name__)


class NativeDecoder(NamedTuple):
    """The form of a decomposed model that its graphs are computed with.

    model: the equivalent decoder, or the model itself.
    names: the decoder's name of each module of the model; empty for the model itself.
    """

    model: ComponentModel
    names: dict[str, str]

    def graphs(
        self, spec: GraphSpec, min_share: float = 0.0
    ) -> tuple[list[Layer], Iterator[EdgeTable]]:
        """Compute `attribution_graphs` of the decoder, with the model's names of layers."""
        layers, graphs = self.parts(spec)
        return layers, (prune_edges(parts, min_share).table for parts in graphs)

    def parts(
        self, spec: GraphSpec, max_edges: int | None = None
    ) -> tuple[list[Layer], Iterator[LazyEdges]]:
        """Compute `lazy_graphs` of the decoder, with the model's names of layers."""
        decoder_spec = self._decoder_spec(spec)
        layers, graphs = lazy_graphs(decoder_spec, max_edges)
        renamed = []
        for layer in layers:
            name = self._model_name(layer.name)
            renamed.append(layer._replace(name=name))
        return renamed, graphs

    def heads(self, spec: GraphSpec, edges: Iterable[EdgeTable]) -> Iterator[HeadTable]:
        """Compute `head_edges` of the decoder, for edges of its graphs."""
        decoder_spec = self._decoder_spec(spec)
        return head_edges(decoder_spec, edges)

    def sums(
        self, spec: GraphSpec, wanted: Callable[[str], bool] = lambda layer: True
    ) -> tuple[list[NodeSums], list[PairSums]]:
        """Compute `dataset_edges` of the decoder, with the model's names of layers."""

        def wanted_in_decoder(layer: str) -> bool:
            return wanted(self._model_name(layer))

        nodes, pairs = dataset_edges(self._decoder_spec(spec), wanted_in_decoder)
        renamed_nodes = [node._replace(layer=self._model_name(node.layer)) for node in nodes]
        renamed_pairs = []
        for pair in pairs:
            renamed = pair._replace(
                source_layer=self._model_name(pair.source_layer),
                target_layer=self._model_name(pair.target_layer),
            )
            renamed_pairs.append(renamed)
        return renamed_nodes, renamed_pairs

    def changes(self, spec: GraphSpec, checks: Checks, factor: float) -> Tensor:
        """Compute `checks.changes` of the decoder, for edges of its graphs."""
        layers: list[LayerKey] = []
        for kind, name in checks.layers:
            decoder_name = self._decoder_name(name)
            layers.append((kind, decoder_name))
        renamed = checks._replace(layers=layers)
        decoder_spec = self._decoder_spec(spec)
        return changes(decoder_spec, renamed, factor)

    def _decoder_spec(self, spec: GraphSpec) -> GraphSpec:
        """Return the specification of the same graphs for the decoder."""
        threshold = spec.threshold
        if isinstance(threshold, Mapping):
            threshold = self._rename_sites(threshold)
        importances = self._rename_sites(spec.importances)
        return spec._replace(model=self.model, importances=importances, threshold=threshold)

    def _rename_sites(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Replace the keys, the model's names of sites, by the decoder's names."""
        return {self._decoder_name(site): tensor for site, tensor in values.items()}

    def _decoder_name(self, name: str) -> str:
        return self.names.get(name, name)

    def _model_name(self, name: str) -> str:
        model_names = {decoder_name: site for site, decoder_name in self.names.items()}
        return model_names.get(name, name)


def log_why_slow(model: ComponentModel, mode: Mode, harvest: str) -> None:
    """Log the reason if the graphs of a language model have no closed form."""
    if vocab_of(model.target) is None:
        return
    decoder = as_native_decoder(model, mode)
    why = closed_form_obstacle(decoder.model, mode)
    if why:
        log.info(
            "harvest %s: no closed forms (%s); computing edges by batched products, which gives "
            "the same numbers but is slower",
            harvest,
            why,
        )


def as_native_decoder(model: ComponentModel, mode: Mode) -> NativeDecoder:
    """Return the fastest form of a decomposed model for graphs of a mode.

    It is the model itself, or an equivalent decoder with the same components. It is computed once
    for each state of the target's weights.
    """
    # The decoder is cached and may need gradients later, so it cannot have inference tensors.
    with torch.inference_mode(False):
        # The address of a weight and the number of its changes identify its state.
        weights = tuple((p.data_ptr(), p._version) for p in model.target.parameters())
        return _as_native_decoder(model, mode, weights)


@lru_cache(maxsize=2)
def _as_native_decoder(
    model: ComponentModel, mode: Mode, weights: tuple[tuple[int, int], ...]
) -> NativeDecoder:
    del weights  # only a key of the cache
    unchanged = NativeDecoder(model, {})
    if closed_form_obstacle(model, mode) is None:
        return unchanged
    if not isinstance(model.target, HuggingFaceLM):
        return unchanged
    equivalent = equivalent_decoder(model.target)
    if equivalent is None:
        return unchanged
    decoder, names = equivalent
    if not names.keys() >= set(model.sites):
        return unchanged
    counts = {names[site]: C for site, C in model.counts.items()}
    other = ComponentModel(decoder, counts, delta=model.delta)
    for site in model.sites:
        name = names[site]
        key = name.replace(".", "/")
        other.components[key] = model[site]
    if mode.linearization == "frozen":
        expected_biases = {names.get(name) for name in biased(model)}
        if expected_biases != set(biased(other)):
            return unchanged
    if closed_form_obstacle(other, mode) is not None:
        return unchanged
    return NativeDecoder(other, names)
