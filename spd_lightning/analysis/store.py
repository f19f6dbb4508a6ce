"""The store with the queries of this package as methods: `Store(path).search([...])`."""

from collections.abc import Sequence
from typing import Any

import polars as pl

from spd_lightning import store as tables
from spd_lightning.analysis.contexts import ExampleKind, contexts
from spd_lightning.analysis.neighbors import Side, neighbors
from spd_lightning.analysis.normalize import Normalization
from spd_lightning.analysis.prompt_view import PromptView, prompt
from spd_lightning.analysis.search import Mode, prompts, search
from spd_lightning.analysis.statistics import (
    Of,
    component,
    components,
    correlations,
    histogram,
    tokens,
)


class Store(tables.Store):
    """One harvest, opened for reading, with queries that return polars frames.

    A store shows the rows that were committed when it was opened; open it again to see later ones.
    `scan` returns a table as a lazy frame. The queries need statistics (`Statistics`), nodes
    (`PromptNodes`) or graphs (`PromptGraphs`, `DatasetEdges`), as their help says. Components are
    named `layer:component`.

    Args:
        path: the harvest's folder, which contains manifest.json.
        skip_damaged: omit every group of shards with a damaged file instead of raising an error.

    Raises:
        BadInput: the manifest is missing, cannot be read, or has another schema.

    Examples:
        >>> import lightning as L
        >>> from spd_lightning import TMS, Decomposition, PromptNodes, SparseFeatures, Store
        >>> module = Decomposition(TMS(5, 2), sites={"linear*": 20})
        >>> trainer = L.Trainer(callbacks=[PromptNodes()], default_root_dir="mine")
        >>> _ = trainer.predict(module, SparseFeatures(5, 0.05, batch_size=1))
        >>> store = Store("mine/harvest/nodes")
        >>> store.layers
        ['input', 'linear1', 'linear2', 'output']
        >>> store.scan("prompts").filter(split="probe").collect()["source"].to_list()[:2]
        ['feature 0', 'feature 1']
        >>> store.search(["linear1:0", "linear2:3"], mode="any").columns
        ['prompt_id', 'matched', 'importance']
    """

    def components(self, layer: str | None = None, sort: str = "density") -> pl.DataFrame:
        """Return one row per component: see `analysis.statistics.components`."""
        return components(self, layer, sort)

    def component(self, name: str) -> dict[str, Any]:
        """Return the statistics of one component: see `analysis.statistics.component`."""
        return component(self, name)

    def histogram(self, name: str) -> pl.DataFrame:
        """Return the histograms of one component: see `analysis.statistics.histogram`."""
        return histogram(self, name)

    def tokens(self, name: str, of: Of = "input", sort: str = "pmi") -> pl.DataFrame:
        """Return the tokens of one component: see `analysis.statistics.tokens`."""
        return tokens(self, name, of, sort)

    def correlations(self, name: str, sort: str = "pmi") -> pl.DataFrame:
        """Return what fires with a component: see `analysis.statistics.correlations`."""
        return correlations(self, name, sort)

    def contexts(
        self, name: str, kind: ExampleKind = "importance", window: int = 20
    ) -> pl.DataFrame:
        """Return examples of a component's firings: see `analysis.contexts.contexts`."""
        return contexts(self, name, kind, window)

    def search(
        self, components: Sequence[str], mode: Mode = "all", min_importance: float = 0.0
    ) -> pl.DataFrame:
        """Return the prompts on which components fire: see `analysis.search.search`."""
        return search(self, components, mode, min_importance)

    def prompts(self, text: str | None = None, regex: str | None = None) -> pl.DataFrame:
        """Return the prompts whose text matches: see `analysis.search.prompts`."""
        return prompts(self, text, regex)

    def prompt(
        self,
        prompt_id: int,
        top_k: int = 200,
        ci_threshold: float = 0.0,
        max_mean_ci: float = 1.0,
        output_prob_threshold: float = 0.0,
        normalize: Normalization = "none",
    ) -> PromptView:
        """Return one prompt's nodes and strongest edges: see `analysis.prompt_view.prompt`."""
        return prompt(
            self, prompt_id, top_k, ci_threshold, max_mean_ci, output_prob_threshold, normalize
        )

    def neighbors(self, name: str, side: Side = "sources", top: int = 20) -> pl.DataFrame:
        """Return what drives a component, or what it drives: see `analysis.neighbors.neighbors`."""
        return neighbors(self, name, side, top)
