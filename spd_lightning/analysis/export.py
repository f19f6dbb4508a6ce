"""Prompt graphs for other tools: circuit-tracer's JSON, which its viewer opens, NetworkX, and
GraphML.

In circuit-tracer's format a row of the picture is a layer of ours: embeddings are the row `E`,
sites count from 0, outputs stand above the last. A component is what a transcoder's feature is
there, a rest or a bias what an error is. A node's `influence` is cumulative, the share that it and
all nodes of more influence make up: what the viewer's slider cuts at. Models on vectors have no
positions, so each input gets a column of its own there, and all else the last.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict
from urllib.parse import quote

import polars as pl

from spd_lightning.analysis.graphs import node_name
from spd_lightning.analysis.influence import TOKENS, Graph, cumulative, influence
from spd_lightning.analysis.prompts import ALL_PROBES, probes, prompt_label, together_label
from spd_lightning.errors import BadInput
from spd_lightning.json_files import open_ended, parsed
from spd_lightning.runs import write_json, write_whole
from spd_lightning.store import Store

if TYPE_CHECKING:
    import networkx

SCHEMA = 1
"""Of circuit-tracer's format: `feature` holds layer and component as one number."""

_NO_XML = re.compile("[^\t\n\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Export:
    """A prompt's graph with all that other tools show beside it.

    Args:
        store: The harvest.
        prompt: The prompt's id.
        whole: Its graph, which influence is counted in.
        graph: What of it is exported.
        outputs: Whose influence is shown: of these nodes, as in `influence`; of all outputs if
            omitted.
    """

    store: Store
    prompt: int
    whole: Graph
    graph: Graph
    outputs: list[int] | None = None

    @property
    def label(self) -> str:
        """The name of the prompt."""
        return (
            prompt_label(self._row, most=10**6)
            if self._row
            else together_label(len(probes(self.store)))
        )

    @property
    def tokens(self) -> list[str]:
        """The prompt's tokens by position; of vectors, the active features."""
        return self._row["tokens"] if self._row else []

    @property
    def token_ids(self) -> list[int]:
        """Their ids."""
        return self._row["token_ids"] if self._row else []

    @cached_property
    def _row(self) -> dict[str, Any]:
        rows = self.store.collect(self.store.scan("prompts", self.prompt)).to_dicts()
        return rows[0] if rows and self.prompt != ALL_PROBES else {}

    def nodes(self) -> list[dict[str, Any]]:
        """Its nodes as rows, with their name, token (of inputs and outputs), influence and
        cumulative influence.
        """
        found = influence(self.whole, self.outputs)["influence"].to_numpy()
        columns = {
            "node": self.whole.nodes["node"],
            "influence": found,
            "cumulative": cumulative(found),
        }
        outputs = self.store.scan("outputs", self.prompt).select(
            "pos", "token", component="token_id"
        )
        nodes = self.graph.nodes.join(
            pl.DataFrame(columns), on="node", how="left", maintain_order="left"
        ).join(
            self.store.collect(outputs), on=["pos", "component"], how="left", maintain_order="left"
        )
        vectors = self.store.manifest["kind"] == "vectors"
        tokens = self.tokens
        rows = []
        for row in nodes.to_dicts():
            own = row["token"] if row["kind"] == "output" else None
            if row["kind"] in TOKENS:
                own = f"f{row['component']}" if vectors else tokens[row["pos"]]
            rows.append(row | {"name": node_name(row), "token": own})
        return rows

    def edges(self) -> list[dict[str, Any]]:
        """Its edges as rows; those without a finite value are left out."""
        return self.graph.edges.filter(pl.col("attribution").is_finite()).to_dicts()


# ---- NetworkX and GraphML ------------------------------------------------------------------------


def digraph(export: Export) -> "networkx.DiGraph":
    """The graph in NetworkX: nodes go by their numbers, an edge's `weight` is its attribution, with
    its sign.

    Nodes have name, kind, layer, pos, component, activation, influence and, where there is one,
    importance and token.
    """
    import networkx

    made = networkx.DiGraph()
    made.graph |= {key: str(export.store.manifest[key]) for key in ("run", "harvest", "mode")}
    made.graph |= {"prompt": _xml(export.label), "prompt_id": str(export.prompt)}
    for row in export.nodes():
        held = {name: row[name] for name in _HELD if row[name] is not None}
        made.add_node(
            row["node"],
            **held | ({"token": _xml(row["token"])} if row["token"] is not None else {}),
        )
    made.add_weighted_edges_from(
        (row["source"], row["target"], row["attribution"]) for row in export.edges()
    )
    return made


_HELD = ("name", "kind", "layer", "pos", "component", "importance", "activation", "influence")


def write_graphml(export: Export, path: Path) -> None:
    """The graph as GraphML, which Gephi, Cytoscape, igraph and NetworkX read; whole or not at all.

    Raises:
        BadInput: the disk refuses.
    """
    import networkx

    with write_whole(path) as temporary:
        networkx.write_graphml_xml(digraph(export), temporary)


def _xml(text: str) -> str:
    """The text with what XML cannot hold written out, `\\u000c` for a form feed."""
    return _NO_XML.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


# ---- circuit-tracer ------------------------------------------------------------------------------


def write_circuit_tracer(export: Export, path: Path) -> None:
    """The graph as JSON under the slug `path.stem`, and its line in the folder's
    graph-metadata.json.

    The viewer of circuit-tracer, served from that folder, lists and opens it.

    Raises:
        BadInput: the disk refuses, or there is a graph-metadata.json that is none.
    """
    content = circuit_tracer(export, path.stem)
    listing = path.with_name("graph-metadata.json")
    if path == listing:
        raise BadInput(
            f"'{path}': circuit-tracer's list of graphs has that name; choose another for the graph"
        )
    graphs = [one for one in _listed(listing) if one.get("slug") != path.stem]
    write_json(path, content, seal=False)
    write_json(listing, {"graphs": [*graphs, content["metadata"]]}, seal=False)


@open_ended
class Listing(TypedDict):
    """circuit-tracer's list of the graphs in a folder."""

    graphs: list[dict[str, Any]]


def _listed(listing: Path) -> list[dict[str, Any]]:
    if not listing.exists():
        return []
    try:
        return parsed(listing.read_bytes(), Listing)["graphs"]
    except (OSError, ValueError) as error:
        raise BadInput(
            f"'{listing}': no list of graphs; move it away, or export elsewhere"
        ) from error


def circuit_tracer(export: Export, slug: str) -> dict[str, Any]:
    """The graph in circuit-tracer's format, as JSON values; `slug` names it there and must be its
    file's name.
    """
    nodes = export.nodes()
    columns = _Columns(export)
    likeliest = _likeliest(nodes)
    made = {
        row["node"]: columns.node(row) | {"is_target_logit": row["node"] in likeliest}
        for row in nodes
    }
    cut = max(
        (row["cumulative"] for row in nodes if row["kind"] not in (*TOKENS, "output")), default=1.0
    )
    return {
        "metadata": {
            "slug": slug,
            "scan": local_scan(str(export.store.manifest["run"])),
            "transcoder_list": [],
            "prompt_tokens": columns.tokens,
            "prompt": export.label,
            "node_threshold": cut,
            "schema_version": SCHEMA,
        },
        "qParams": {
            "pinnedIds": [],
            "supernodes": [],
            "linkType": "both",
            "clickedId": "",
            "sg_pos": "",
        },
        "nodes": list(made.values()),
        "links": [
            {
                "source": made[e["source"]]["node_id"],
                "target": made[e["target"]]["node_id"],
                "weight": e["attribution"],
            }
            for e in export.edges()
        ],
    }


def local_scan(run: str) -> str:
    """Return the name of a run's components for circuit-tracer's viewer, as a folder beside its own
    page.

    For a clicked component the viewer asks a hub for examples under this name, unless it begins
    with "./": then it looks on its own server alone. (It fetches ./features/, ./data/ and
    ./graph_data/ from elsewhere too.) There are none, so it shows the component without examples.
    """
    return f"./components/{quote(run, safe='')}"


def _likeliest(nodes: list[dict[str, Any]]) -> set[int]:
    """The output of most weight at each position."""
    outputs = sorted(
        (row for row in nodes if row["kind"] == "output"), key=lambda row: row["weight"]
    )
    return set({row["pos"]: row["node"] for row in outputs}.values())


class _Columns:
    """Where nodes stand in circuit-tracer's picture: rows are layers, columns positions."""

    def __init__(self, export: Export):
        kinds = export.whole.nodes.select(pl.col("layer", "kind").cast(pl.String)).unique().rows()
        ends = {"input", "output"} | {layer for layer, kind in kinds if kind in TOKENS}
        self.rows = {
            layer: row
            for row, layer in enumerate(one for one in export.store.layers if one not in ends)
        }
        self.embeddings = [layer for layer in export.store.layers if layer in ends]
        vectors = export.store.manifest["kind"] == "vectors"
        inputs = (
            export.whole.nodes.filter(pl.col("kind") == "input")["component"].to_list()
            if vectors
            else []
        )
        self.inputs = {component: column for column, component in enumerate(inputs)}
        tokens = [f"f{component}" for component in inputs] if vectors else list(export.tokens)
        tokens += [""] * vectors
        blank = max(0, 2 - len(tokens))  # its viewer cannot lay out a single column
        self.tokens = [""] * blank + tokens
        self.shift = blank + len(inputs)
        self.ids = export.token_ids

    def node(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A node of ours as one of theirs."""
        layer, feature, kind, text = self._place(row)
        pos = self.inputs[row["component"]] if row["kind"] == "input" else row["pos"] + self.shift
        number = _paired(int(layer), feature) if row["kind"] == "component" else feature
        activation = row["activation"]
        return {
            "node_id": f"{layer}_{feature}_{pos}",
            "feature": number,
            "layer": layer,
            "ctx_idx": pos,
            "feature_type": kind,
            "token_prob": row["weight"],
            "is_target_logit": False,
            "run_idx": 0,
            "reverse_ctx_idx": 0,
            "jsNodeId": f"{'L' if kind == 'logit' else layer}_{feature}-{pos}",
            "clerp": text,
            "influence": None if kind == "logit" else row["cumulative"],
            "activation": activation if activation is not None and isfinite(activation) else None,
        }

    def _place(self, row: Mapping[str, Any]) -> tuple[str, int, str, str]:
        """Row, number within it, type, and what it is called."""
        kind = row["kind"]
        layer = row["layer"]
        component = row["component"]
        if kind == "output":
            token = str(row["token"] if row["token"] is not None else component).replace(
                '"', "″"
            )  # it ends at a quote
            return (
                str(len(self.rows) + 1),
                component,
                "logit",
                f'Output "{token}" (p={row["weight"]:.3f})',
            )
        if kind in TOKENS:
            nth = self.embeddings.index(layer)  # of positions, say; tokens' own come first
            number = component if kind == "input" else -nth if nth else self.ids[row["pos"]]
            return "E", number, "embedding", f'Emb: "{row["token"]}"'
        if kind == "component":
            return (
                str(self.rows[layer]),
                component,
                "cross layer transcoder",
                f"{layer} {component}",
            )
        number = -1 if kind == "rest" else -2
        return str(self.rows[layer]), number, "mlp reconstruction error", f"{kind} of {layer}"


def _paired(x: int, y: int) -> int:
    """Cantor's number of a pair."""
    return (x + y) * (x + y + 1) // 2 + y
