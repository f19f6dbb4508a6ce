"""The graph page: one prompt's attribution graph as plain values, and the widget that draws it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import polars as pl

from spd_lightning.analysis.checks import fidelity
from spd_lightning.analysis.graphs import node_edges, node_heads, node_name, prompt_graph, tables
from spd_lightning.analysis.prompts import (
    ALL_PROBES,
    graph_list,
    probes,
    prompt_label,
    together_label,
)
from spd_lightning.errors import BadInput
from spd_lightning.store import Store, gap_warning
from spd_lightning.viewer.library import Library
from spd_lightning.viewer.panel import Panel, finite, integer, number, prompt_id

MOST_EDGES = 5000
MANY_NODES = 600  # in larger graphs, nodes without a visible edge are left out
VALUES = {
    "vectors": {"under CI masks": "ci_logit", "target": "target_logit"},
    "tokens": {"p under CI masks": "ci_probability", "p of target": "target_probability"},
}


@dataclass(frozen=True)
class GraphSelection:
    """The selected prompt, and the filters of `analysis.graphs.prompt_graph`."""

    prompt: int
    top_k: int = 200
    threshold: float = 0.0
    min_importance: float = 0.0
    influence: float = 1.0

    @classmethod
    def read(cls, request: Mapping[str, Any]) -> "GraphSelection":
        """Read the selection from a browser's request.

        Raises:
            BadInput: a value has the wrong type or lies outside its range.
        """
        return cls(
            prompt=prompt_id(request),
            top_k=integer(request, "top_k", MOST_EDGES),
            threshold=number(request, "threshold", 0, 1),
            min_importance=number(request, "min_importance", 0, 1),
            influence=number(request, "influence", 0, 1),
        )


@dataclass(frozen=True)
class GraphPage:
    """One prompt's graph, ready to draw.

    A node is {node, name, kind, layer (index into `layers`), pos, component, importance,
    activation, label, outputs}; an edge is {source, target, attribution}, strongest first. In a
    graph with many nodes, those without a visible edge are left out. `tokens` are the prompt's
    tokens by position, empty for models on vectors. `replacement` and `completeness` are the scores
    of the whole graph, None unless it is frozen (see `analysis.influence.Scores`). `checks` is the
    graph's `analysis.checks.Fidelity`, None if the harvest has no checks and for several prompts
    together. `frontier` holds the rows of that table by λ, if the harvest has one. `warning` is not
    empty if frozen graphs of this harvest do not add up.
    """

    label: str
    mode: str
    layers: list[str]
    tokens: list[str]
    nodes: list[dict[str, Any]]
    edges: list[dict[str, Any]]
    nodes_total: int
    edges_total: int
    edges_passing: int
    largest: float
    replacement: float | None
    completeness: float | None
    checks: dict[str, Any] | None
    frontier: list[dict[str, Any]]
    warning: str


@dataclass(frozen=True)
class NodePage:
    """The edges of one node, with counts and sums over all of them.

    An edge is described by its other end, {node, name, label, attribution, heads}, strongest first.
    `heads` lists the contribution of each head, {head, attribution}, if known. A sum is None if it
    is not finite.
    """

    ins: list[dict[str, Any]]
    outs: list[dict[str, Any]]
    in_count: int
    out_count: int
    in_sum: float | None
    out_sum: float | None


def page_data(store: Store, selection: GraphSelection) -> GraphPage:
    """Return the graph of the selected prompt, filtered as selected.

    Raises:
        BadInput: the harvest has no such prompt, or a file is damaged.
    """
    graph = prompt_graph(
        store,
        selection.prompt,
        top_k=selection.top_k,
        threshold=selection.threshold,
        min_importance=selection.min_importance,
        influence=selection.influence,
    )
    frontier = store.collect(store.scan("frontier", selection.prompt)).drop("prompt_id")
    label, tokens = _prompt(store, selection.prompt)
    nodes = graph.nodes
    if len(nodes) > MANY_NODES:
        ends = pl.concat([graph.edges["source"], graph.edges["target"]]).unique()
        nodes = nodes.filter(pl.col("node").is_in(ends.implode()))
    return GraphPage(
        label=label,
        mode=store.manifest["mode"],
        layers=store.layers,
        tokens=tokens,
        nodes=_nodes(store, selection.prompt, nodes),
        edges=finite(graph.edges).to_dicts(),
        nodes_total=graph.nodes_total,
        edges_total=graph.edges_total,
        edges_passing=graph.edges_passing,
        largest=graph.largest,
        replacement=graph.scores.replacement,
        completeness=graph.scores.completeness,
        checks=_checks(store, selection.prompt),
        frontier=finite(frontier).to_dicts(),
        warning=gap_warning(store.manifest),
    )


def _checks(store: Store, prompt: int) -> dict[str, Any] | None:
    """Return how well the prompt's graph agrees with interventions."""
    if prompt == ALL_PROBES or "graphs" not in store.tables:
        return None
    figures = fidelity(store, prompt)
    return asdict(figures)


def _prompt(store: Store, prompt: int) -> tuple[str, list[str]]:
    """Return a prompt's label, and its tokens by position (none for models on vectors)."""
    if prompt == ALL_PROBES:
        return together_label(len(probes(store))), []
    row = store.collect(store.scan("prompts", prompt)).row(0, named=True)
    tokens = [] if store.manifest["kind"] == "vectors" else row["tokens"]
    return prompt_label(row), tokens


def node_data(store: Store, prompt: int, node: int) -> NodePage:
    """Return the strongest edges into and out of one node, among all stored edges.

    Raises:
        BadInput: the prompt has no such node, or a file is damaged.
    """
    nodes, _ = tables(store, prompt)
    if not (nodes["node"] == node).any():
        raise BadInput(
            f"node {node} is not in the graph of prompt {prompt}; it has {len(nodes)} nodes"
        )
    edges = node_edges(store, prompt, node)
    heads = node_heads(store, prompt, node)
    neighbors = nodes.filter(pl.col("node").is_in([*edges.ins["source"], *edges.outs["target"]]))
    names = {}
    for row in _nodes(store, prompt, neighbors):
        names[row["node"]] = {key: row[key] for key in ("node", "name", "label")}

    def other_ends(side: pl.DataFrame, end: str) -> list[dict[str, Any]]:
        rows = []
        for row in finite(side).to_dicts():
            edge = {
                "attribution": row["attribution"],
                "heads": heads.get((row["source"], row["target"]), []),
            }
            rows.append(names[row[end]] | edge)
        return rows

    return NodePage(
        ins=other_ends(edges.ins, "source"),
        outs=other_ends(edges.outs, "target"),
        in_count=edges.in_count,
        out_count=edges.out_count,
        in_sum=edges.in_sum if isfinite(edges.in_sum) else None,
        out_sum=edges.out_sum if isfinite(edges.out_sum) else None,
    )


def _nodes(store: Store, prompt: int, nodes: pl.DataFrame) -> list[dict[str, Any]]:
    """Return nodes of a graph as rows with their layers as indices, names, labels and outputs."""
    values = VALUES[store.manifest["kind"]]
    _, tokens = _prompt(store, prompt)
    table = store.scan("outputs", prompt).select("pos", "token_id", "token", **values)
    outputs = {(row["pos"], row["token_id"]): row for row in store.collect(table).to_dicts()}
    layer_index = {layer: index for index, layer in enumerate(store.layers)}
    rows = []
    for node in finite(nodes).to_dicts():
        output = None
        if node["kind"] == "output":
            output = outputs.get((node["pos"], node["component"]))
        more = {
            "layer": layer_index[node["layer"]],
            "name": node_name(node),
            "label": _label(node, tokens, output),
            "outputs": output and {name: output[name] for name in values},
        }
        rows.append(node | more)
    return rows


def _label(node: Mapping[str, Any], tokens: list[str], output: Mapping[str, Any] | None) -> str:
    """Return the label of an input or output node: a value for vectors, a token for text."""
    kind = node["kind"]
    if kind not in ("input", "embedding", "output") or node["activation"] is None:
        return ""
    if not tokens:
        value = node["activation"] + 0.0  # turns −0 into 0
        return f"{value:.3g}".replace("-", "−")
    if kind != "output":
        return tokens[node["pos"]]
    return output["token"] if output else ""


# ---- responses to a browser ----------------------------------------------------------------------


def graph_response(library: Library, request: Any) -> dict[str, Any]:
    """Return the `GraphPage` that a browser requests, as JSON values, or {"problem": one line}."""

    def read(store: Store, request: Mapping[str, Any]) -> dict[str, Any]:
        selection = GraphSelection.read(request)
        return asdict(page_data(store, selection))

    return library.respond(request, read)


def node_response(library: Library, request: Any) -> dict[str, Any]:
    """Return the `NodePage` that a browser requests, as JSON values, or {"problem": one line}."""

    def read(store: Store, request: Mapping[str, Any]) -> dict[str, Any]:
        prompt = prompt_id(request)
        node = integer(request, "node", 2**32 - 1)
        return asdict(node_data(store, prompt, node))

    return library.respond(request, read)


def contents(library: Library, run: str, harvest: str | None) -> dict[str, Any]:
    """Return the widget's first data: the harvest, and its prompts.

    Raises:
        BadInput: the run has no harvest, or the harvest has no graphs, is empty or unreadable.
    """
    store = library.store(run, harvest)
    if store.manifest["mode"] == "nodes":
        command = library.run(run).predict_command("graphs.yaml")
        raise BadInput(
            f"harvest '{harvest}' of run '{run}': it has no graphs. Choose another harvest above, "
            f"or harvest graphs: {command}. The page Tokens shows this harvest."
        )
    graphs = graph_list(store)
    if graphs.is_empty():
        raise BadInput(
            f"harvest '{harvest}' of run '{run}': no prompts yet; refresh when `predict` has "
            "written some"
        )
    prompts = [
        {"id": str(prompt), "label": label, "split": split}
        for prompt, label, split in graphs.iter_rows()
    ]
    written = f"{store.manifest.get('checkpoint_digest')} {store.manifest['shards']}"
    return {"run": run, "harvest": harvest, "prompts": prompts, "written": written}


def widgets(library: Library) -> Panel:
    """Create the interactive graph: a `gr.HTML` with `contents` or {"problem": one line}."""
    import gradio as gr

    def graph(request: Any) -> dict[str, Any]:
        return graph_response(library, request)

    def node(request: Any) -> dict[str, Any]:
        return node_response(library, request)

    def draw(run: str, harvest: str | None) -> list[dict[str, Any]]:
        try:
            return [contents(library, run, harvest)]
        except BadInput as error:
            return [{"problem": str(error)}]

    def file(name: str) -> str:
        return Path(__file__).with_name(name).read_text(encoding="utf-8")

    scripts = ("widget.js", "graph_layout.js", "frontier.js", "graph.js")
    shown = gr.HTML(
        value={},
        html_template=file("graph.html"),
        js_on_load="".join(file(name) for name in scripts),
        server_functions=[graph, node],
        apply_default_css=False,
        elem_id="graph",
    )
    return Panel(draw, outputs=[shown])
