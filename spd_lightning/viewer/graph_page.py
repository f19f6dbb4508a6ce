"""The graph page: what one prompt's attribution graph shows, as plain values, and the widget that
draws them.
"""

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
MANY_NODES = 600  # in a graph of more, those without a shown edge are left out
VALUES = {
    "vectors": {"under CI masks": "ci_logit", "target": "target_logit"},
    "tokens": {"p under CI masks": "ci_probability", "p of target": "target_probability"},
}


@dataclass(frozen=True)
class GraphSelection:
    """The selected prompt, and how much of its graph to show: see
    `analysis.graphs.prompt_graph`.
    """

    prompt: int
    top_k: int = 200
    threshold: float = 0.0
    min_importance: float = 0.0
    influence: float = 1.0

    @classmethod
    def read(cls, question: Mapping[str, Any]) -> "GraphSelection":
        """The selection that a browser asked for.

        Raises:
            BadInput: a value has the wrong type or lies outside its range.
        """
        return cls(
            prompt_id(question),
            integer(question, "top_k", MOST_EDGES),
            number(question, "threshold", 0, 1),
            number(question, "min_importance", 0, 1),
            number(question, "influence", 0, 1),
        )


@dataclass(frozen=True)
class GraphPage:
    """One prompt's graph, ready to draw.

    A node is {node, name, kind, layer (index into `layers`), pos, component, importance,
    activation, label, outputs}; an edge {source, target, attribution}, strongest first. Of a graph
    with many nodes, only those on an edge are here. `tokens` are the prompt's tokens by position,
    empty for models on vectors. `replacement` and `completeness` are the scores of the whole graph,
    None unless it is frozen (see `analysis.influence.Scores`). `checks` is the graph's
    `analysis.checks.Fidelity`, None for a harvest without any and for several prompts together.
    `frontier` holds the rows of that table by λ, where the harvest has one. `warning` says that
    frozen graphs of this harvest do not add up.
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
    """All that meets in one node: ends {node, name, label, attribution, heads}, strongest first,
    with counts and sums over all (None where a sum is not finite). `heads` lists what each head
    adds, {head, attribution}, where known.
    """

    ins: list[dict[str, Any]]
    outs: list[dict[str, Any]]
    in_count: int
    out_count: int
    in_sum: float | None
    out_sum: float | None


def page_data(store: Store, selection: GraphSelection) -> GraphPage:
    """The graph of the selected prompt, filtered as selected.

    Raises:
        BadInput: the harvest has no such prompt, or a file is damaged.
    """
    filters = selection.top_k, selection.threshold, selection.min_importance, selection.influence
    graph = prompt_graph(store, selection.prompt, *filters)
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
        frontier=finite(
            store.collect(store.scan("frontier", selection.prompt)).drop("prompt_id")
        ).to_dicts(),
        warning=gap_warning(store.manifest),
    )


def _checks(store: Store, prompt: int) -> dict[str, Any] | None:
    """How the prompt's graph stood up to interventions."""
    if prompt == ALL_PROBES or "graphs" not in store.tables:
        return None
    return asdict(fidelity(store, prompt))


def _prompt(store: Store, prompt: int) -> tuple[str, list[str]]:
    """Return a prompt's label, and its tokens by position (none for models on vectors)."""
    if prompt == ALL_PROBES:
        return together_label(len(probes(store))), []
    row = store.collect(store.scan("prompts", prompt)).row(0, named=True)
    return prompt_label(row), [] if store.manifest["kind"] == "vectors" else row["tokens"]


def node_data(store: Store, prompt: int, node: int) -> NodePage:
    """The strongest edges into and out of one node, of all edges that were stored.

    Raises:
        BadInput: the prompt has no such node, or a file is damaged.
    """
    nodes = tables(store, prompt)[0]
    if not (nodes["node"] == node).any():
        raise BadInput(
            f"node {node} is not in the graph of prompt {prompt}; it has {len(nodes)} nodes"
        )
    edges = node_edges(store, prompt, node)
    met = nodes.filter(pl.col("node").is_in([*edges.ins["source"], *edges.outs["target"]]))
    named = {
        held["node"]: {k: held[k] for k in ("node", "name", "label")}
        for held in _nodes(store, prompt, met)
    }
    heads = node_heads(store, prompt, node)
    ins, outs = (
        [
            named[row[end]]
            | {
                "attribution": row["attribution"],
                "heads": heads.get((row["source"], row["target"]), []),
            }
            for row in side.to_dicts()
        ]
        for end, side in (("source", finite(edges.ins)), ("target", finite(edges.outs)))
    )
    in_sum, out_sum = (
        total if isfinite(total) else None for total in (edges.in_sum, edges.out_sum)
    )
    return NodePage(ins, outs, edges.in_count, edges.out_count, in_sum, out_sum)


def _nodes(store: Store, prompt: int, nodes: pl.DataFrame) -> list[dict[str, Any]]:
    values = VALUES[store.manifest["kind"]]
    tokens = _prompt(store, prompt)[1]
    rows = store.collect(
        store.scan("outputs", prompt).select("pos", "token_id", "token", **values)
    ).to_dicts()
    outputs = {(row["pos"], row["token_id"]): row for row in rows}
    order = {layer: index for index, layer in enumerate(store.layers)}
    found = []
    for node in finite(nodes).to_dicts():
        output = outputs.get((node["pos"], node["component"])) if node["kind"] == "output" else None
        own = {
            "layer": order[node["layer"]],
            "name": node_name(node),
            "label": _label(node, tokens, output),
        }
        found.append(node | own | {"outputs": output and {name: output[name] for name in values}})
    return found


def _label(node: Mapping[str, Any], tokens: list[str], output: Mapping[str, Any] | None) -> str:
    """Return the label of an input or output node: a value for vectors, a token for text."""
    if node["kind"] not in ("input", "embedding", "output") or node["activation"] is None:
        return ""
    if tokens:
        return (
            tokens[node["pos"]] if node["kind"] != "output" else output["token"] if output else ""
        )
    return f"{node['activation'] + 0.0:.3g}".replace("-", "−")  # + 0.0: there is no −0


# The browser's side of it.


def graph_answer(library: Library, question: Any) -> dict[str, Any]:
    """The `GraphPage` that a browser asked for, as JSON values, or {"problem": one line}."""
    return library.answer(
        question, lambda store, asked: asdict(page_data(store, GraphSelection.read(asked)))
    )


def node_answer(library: Library, question: Any) -> dict[str, Any]:
    """The `NodePage` that a browser asked for, as JSON values, or {"problem": one line}."""

    def read(store: Store, asked: Mapping[str, Any]) -> dict[str, Any]:
        return asdict(node_data(store, prompt_id(asked), integer(asked, "node", 2**32 - 1)))

    return library.answer(question, read)


def contents(library: Library, run: str, harvest: str | None) -> dict[str, Any]:
    """Return the widget's first data: the harvest, and its prompts.

    Raises:
        BadInput: the run has no harvest, or one without edges, or an empty one, or it cannot be
            read.
    """
    store = library.store(run, harvest)
    if store.manifest["mode"] == "nodes":
        raise BadInput(
            f"harvest '{harvest}' of run '{run}': it has no graphs. Choose another harvest above, "
            "or harvest graphs: "
            "predict with --config graphs.yaml. The page Tokens shows this harvest."
        )
    listed = graph_list(store)
    if listed.is_empty():
        raise BadInput(
            f"harvest '{harvest}' of run '{run}': no prompts yet; refresh when `predict` has "
            "written some"
        )
    prompts = [
        {"id": str(i), "label": label, "split": split} for i, label, split in listed.iter_rows()
    ]
    written = f"{store.manifest.get('checkpoint_digest')} {store.manifest['shards']}"
    return {"run": run, "harvest": harvest, "prompts": prompts, "written": written}


def widgets(library: Library) -> Panel:
    """The interactive graph: a `gr.HTML` whose value is `contents` or {"problem": one line}."""
    import gradio as gr

    def graph(question: Any) -> dict[str, Any]:
        return graph_answer(library, question)

    def node(question: Any) -> dict[str, Any]:
        return node_answer(library, question)

    def draw(run: str, harvest: str | None) -> list[dict[str, Any]]:
        try:
            return [contents(library, run, harvest)]
        except BadInput as error:
            return [{"problem": str(error)}]

    template, shared, layout, frontier, script = (
        Path(__file__).with_name(name).read_text(encoding="utf-8")
        for name in ("graph.html", "widget.js", "graph_layout.js", "frontier.js", "graph.js")
    )
    shown = gr.HTML(
        value={},
        html_template=template,
        js_on_load=shared + layout + frontier + script,
        server_functions=[graph, node],
        apply_default_css=False,
        elem_id="graph",
    )
    return Panel(draw, outputs=[shown])
