"""The store with the queries of this package as methods: `Store(path).search([...])`."""

from spd_lightning import store as tables
from spd_lightning.analysis import contexts, neighbors, prompt_view, statistics
from spd_lightning.analysis import search as searches


class Store(tables.Store):
    """One harvest, opened for reading, with queries as methods.

    All methods of `spd_lightning.store.Store` are available; `scan` returns a table as a lazy
    frame. The queries return polars frames. They need statistics (`Statistics`), nodes
    (`PromptNodes`) or graphs (`PromptGraphs`, `DatasetEdges`), as their help says. Components are
    named `layer:component`.

    Args:
        path: the harvest's folder, which contains manifest.json, or its address in an object store.
        skip_damaged: omit every group of shards with a damaged file instead of raising an error.

    Examples:
        >>> import lightning as L
        >>> from spd_lightning import TMS, Decomposition, PromptNodes, SparseFeatures, Store
        >>> module = Decomposition(TMS(5, 2), sites={"linear*": 20})
        >>> trainer = L.Trainer(callbacks=[PromptNodes()], default_root_dir="mine")
        >>> _ = trainer.predict(module, SparseFeatures(5, 0.05, batch_size=1))
        >>> store = Store("mine/harvest/nodes")
        >>> store.search(["linear1:0", "linear2:3"], mode="any").columns
        ['prompt_id', 'matched', 'importance']
    """

    # A function in a class is a method: its first parameter, `store`, is this object.
    components = statistics.components
    component = statistics.component
    histogram = statistics.histogram
    tokens = statistics.tokens
    correlations = statistics.correlations
    contexts = contexts.contexts
    search = searches.search
    prompts = searches.prompts
    prompt = prompt_view.prompt
    neighbors = neighbors.neighbors
