"""Export of prompt graphs to other tools: circuit-tracer's JSON, NetworkX, and GraphML.

circuit-tracer's viewer opens the JSON. In its format, a row of the picture is one of our layers:
embeddings are the row `E`, sites are numbered from 0, and outputs come above the last site. Our
components take the place of a transcoder's features; rests and biases take the place of errors. A
node's `influence` is cumulative: the share that it and all nodes of more influence make up, which
is what the viewer's slider cuts at. Models on vectors have no positions, so each input gets its
own column, and everything else goes into the last one.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict
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
"""The version of circuit-tracer's format; in it, `feature` is layer and component as one number."""

_NO_XML = re.compile("[^\t\n\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Export:
    """A prompt's graph with everything else that other tools show.

    Args:
        store: The harvest.
        prompt: The prompt's id.
        whole: The prompt's whole graph, in which influence is counted.
        graph: The part to export.
        outputs: The nodes to be influenced, as in `influence`; all outputs if omitted.
    """

    store: Store
    prompt: int
    whole: Graph
    graph: Graph
    outputs: list[int] | None = None

    @property
    def label(self) -> str:
        """The name of the prompt."""
        if self._row:
            return prompt_label(self._row, most=10**6)
        all_probes = probes(self.store)
        count = len(all_probes)
        return together_label(count)

    @property
    def tokens(self) -> list[str]:
        """The prompt's tokens by position; for vectors, the active features."""
        return self._row.get("tokens", [])

    @property
    def token_ids(self) -> list[int]:
        """The ids of the tokens."""
        return self._row.get("token_ids", [])

    @cached_property
    def _row(self) -> dict[str, Any]:
        if self.prompt == ALL_PROBES:
            return {}
        prompt = self.store.scan("prompts", self.prompt)
        rows = self.store.collect(prompt).to_dicts()
        return rows[0] if rows else {}

    def nodes(self) -> list[dict[str, Any]]:
        """Return the nodes as rows.

        In addition to the columns of the graph, a row has name, token (of inputs and outputs),
        influence, and cumulative influence.
        """
        influences = influence(self.whole, self.outputs)["influence"].to_numpy()
        columns = {
            "node": self.whole.nodes["node"],
            "influence": influences,
            "cumulative": cumulative(influences),
        }
        outputs = self.store.scan("outputs", self.prompt).select(
            "pos", "token", component="token_id"
        )
        nodes = self.graph.nodes.join(
            pl.DataFrame(columns), on="node", how="left", maintain_order="left"
        )
        nodes = nodes.join(
            self.store.collect(outputs), on=["pos", "component"], how="left", maintain_order="left"
        )
        return [
            row | {"name": node_name(row), "token": self._token(row)} for row in nodes.to_dicts()
        ]

    def _token(self, row: Mapping[str, Any]) -> str | None:
        """Return the token of an input or output node; None for other nodes."""
        if row["kind"] == "output":
            return row["token"]
        if row["kind"] not in TOKENS:
            return None
        if self.store.manifest["kind"] == "vectors":
            return f"f{row['component']}"
        return self.tokens[row["pos"]]

    def edges(self) -> list[dict[str, Any]]:
        """Return the edges as rows, without those whose value is not finite."""
        attribution = pl.col("attribution")
        is_finite = attribution.is_finite()
        edges = self.graph.edges
        finite_edges = edges.filter(is_finite)
        return finite_edges.to_dicts()


# ---- NetworkX and GraphML ------------------------------------------------------------------------


_ATTRIBUTES = ("name", "kind", "layer", "pos", "component", "importance", "activation", "influence")


def digraph(export: Export) -> "networkx.DiGraph":
    """Return the graph in NetworkX.

    Nodes are identified by their numbers and have name, kind, layer, pos, component, activation,
    influence and, if defined, importance and token. An edge's `weight` is its attribution, with its
    sign.
    """
    import networkx

    graph = networkx.DiGraph()
    manifest = export.store.manifest
    for key in ("run", "harvest", "mode"):
        graph.graph[key] = str(manifest[key])
    graph.graph["prompt"] = _xml(export.label)
    graph.graph["prompt_id"] = str(export.prompt)
    for row in export.nodes():
        attributes = {name: row[name] for name in _ATTRIBUTES if row[name] is not None}
        if row["token"] is not None:
            attributes["token"] = _xml(row["token"])
        graph.add_node(row["node"], **attributes)
    for row in export.edges():
        graph.add_edge(row["source"], row["target"], weight=row["attribution"])
    return graph


def write_graphml(export: Export, path: Path) -> None:
    """Write the graph as GraphML, which Gephi, Cytoscape, igraph and NetworkX read.

    The file is written completely or not at all.

    Raises:
        BadInput: the disk does not accept the file.
    """
    import networkx

    with write_whole(path) as temporary:
        networkx.write_graphml_xml(digraph(export), temporary)


def _xml(text: str) -> str:
    """Escape the characters that XML cannot contain, for example a form feed as `\\u000c`."""

    def escaped(match: re.Match[str]) -> str:
        return f"\\u{ord(match[0]):04x}"

    return _NO_XML.sub(escaped, text)


# ---- circuit-tracer ------------------------------------------------------------------------------


def write_circuit_tracer(export: Export, path: Path) -> None:
    """Write the graph as JSON, and add it to the folder's graph-metadata.json.

    The graph's slug is `path.stem`. circuit-tracer's viewer, served from that folder, lists and
    opens it.

    Raises:
        BadInput: the disk does not accept a file, or graph-metadata.json is not a list of graphs.
    """
    content = circuit_tracer(export, path.stem)
    listing = path.with_name("graph-metadata.json")
    if path == listing:
        raise BadInput(
            f"'{path}': circuit-tracer's list of graphs has that name; choose another file name"
        )
    entries = [content["metadata"]]
    others = [entry for entry in _listed(listing) if entry.get("slug") != path.stem]
    everything = {"graphs": others + entries}
    write_json(path, content, seal=False)
    write_json(listing, everything, seal=False)


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
            f"'{listing}': not a list of graphs; move it away, or export to another folder"
        ) from error


def circuit_tracer(export: Export, slug: str) -> dict[str, Any]:
    """Return the graph in circuit-tracer's format, as JSON values.

    `slug` is the graph's name in the viewer, and must be the name of its file.
    """
    rows = export.nodes()
    picture = _Picture(export)
    likeliest = _likeliest(rows)
    nodes = {}
    for row in rows:
        is_likeliest = row["node"] in likeliest
        nodes[row["node"]] = picture.node(row) | {"is_target_logit": is_likeliest}
    inner = [row for row in rows if row["kind"] not in (*TOKENS, "output")]
    links = [
        {
            "source": nodes[edge["source"]]["node_id"],
            "target": nodes[edge["target"]]["node_id"],
            "weight": edge["attribution"],
        }
        for edge in export.edges()
    ]
    return {
        "metadata": {
            "slug": slug,
            "scan": local_scan(str(export.store.manifest["run"])),
            "transcoder_list": [],
            "prompt_tokens": picture.tokens,
            "prompt": export.label,
            "node_threshold": max((row["cumulative"] for row in inner), default=1.0),
            "schema_version": SCHEMA,
        },
        "qParams": {
            "pinnedIds": [],
            "supernodes": [],
            "linkType": "both",
            "clickedId": "",
            "sg_pos": "",
        },
        "nodes": list(nodes.values()),
        "links": links,
    }


def local_scan(run: str) -> str:
    """Return the name of a run's components for circuit-tracer's viewer, as a local folder.

    For a clicked component, the viewer requests examples under this name from a hub. If the name
    begins with "./", it only looks on its own server. (It fetches ./features/, ./data/ and
    ./graph_data/ from elsewhere too.) The folder does not exist, so the component is shown without
    examples.
    """
    return f"./components/{quote(run, safe='')}"


def _likeliest(nodes: list[dict[str, Any]]) -> set[int]:
    """Return the output of most weight at each position."""
    heaviest = dict[int, dict[str, Any]]()  # output by position
    for row in nodes:
        if row["kind"] != "output":
            continue
        pos = row["pos"]
        if pos not in heaviest or row["weight"] >= heaviest[pos]["weight"]:
            heaviest[pos] = row
    return {row["node"] for row in heaviest.values()}


class _Picture:
    """The places of nodes in circuit-tracer's picture: rows are layers, columns are positions."""

    def __init__(self, export: Export):
        store = export.store
        nodes = export.whole.nodes
        is_token = pl.col("kind").is_in(TOKENS)
        token_layers = nodes.filter(is_token)["layer"]
        ends = {"input", "output", *token_layers.cast(pl.String)}
        sites = [layer for layer in store.layers if layer not in ends]
        self.rows = {layer: row for row, layer in enumerate(sites)}
        self.embeddings = [layer for layer in store.layers if layer in ends]

        inputs: list[int] = []
        tokens = list(export.tokens)
        if store.manifest["kind"] == "vectors":
            is_input = pl.col("kind") == "input"
            inputs = nodes.filter(is_input)["component"].to_list()
            tokens = [f"f{component}" for component in inputs]
            tokens.append("")  # the column of the components
        self.inputs = {component: column for column, component in enumerate(inputs)}
        blank = max(0, 2 - len(tokens))  # the viewer cannot lay out a single column
        self.tokens = [""] * blank + tokens
        self.shift = blank + len(inputs)
        self.ids = export.token_ids

    def node(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return a node in circuit-tracer's format."""
        place = self._place(row)
        activation = row["activation"]
        is_finite = activation is not None and isfinite(activation)
        is_logit = place.kind == "logit"
        column = row["pos"] + self.shift
        if row["kind"] == "input":
            column = self.inputs[row["component"]]
        feature = place.number
        if row["kind"] == "component":
            feature = _paired(int(place.layer), place.number)
        return {
            "node_id": f"{place.layer}_{place.number}_{column}",
            "feature": feature,
            "layer": place.layer,
            "ctx_idx": column,
            "feature_type": place.kind,
            "token_prob": row["weight"],
            "is_target_logit": False,
            "run_idx": 0,
            "reverse_ctx_idx": 0,
            "jsNodeId": f"{'L' if is_logit else place.layer}_{place.number}-{column}",
            "clerp": place.text,
            "influence": None if is_logit else row["cumulative"],
            "activation": activation if is_finite else None,
        }

    def _place(self, row: Mapping[str, Any]) -> "_Place":
        kind = row["kind"]
        layer = row["layer"]
        component = row["component"]
        if kind == "output":
            token = component if row["token"] is None else row["token"]
            shown = str(token).replace('"', "″")  # the viewer ends the token at a quote
            text = f'Output "{shown}" (p={row["weight"]:.3f})'
            last_row = len(self.rows) + 1
            return _Place(str(last_row), component, "logit", text)
        if kind in TOKENS:
            number = self._embedding_number(row)
            text = f'Emb: "{row["token"]}"'
            return _Place("E", number, "embedding", text)
        site = str(self.rows[layer])
        if kind == "component":
            return _Place(site, component, "cross layer transcoder", f"{layer} {component}")
        number = -1 if kind == "rest" else -2
        return _Place(site, number, "mlp reconstruction error", f"{kind} of {layer}")

    def _embedding_number(self, row: Mapping[str, Any]) -> int:
        """Return the number of an input or embedding node in the row `E`."""
        if row["kind"] == "input":
            return row["component"]
        layer = row["layer"]
        nth = self.embeddings.index(layer)
        if nth > 0:  # not of tokens but, for example, of positions
            return -nth
        pos = row["pos"]
        return self.ids[pos]


class _Place(NamedTuple):
    """A node's place in the picture: its row, its number in the row, its type and its label."""

    layer: str
    number: int
    kind: str
    text: str


def _paired(x: int, y: int) -> int:
    """Return Cantor's number of a pair."""
    diagonal = x + y
    return diagonal * (diagonal + 1) // 2 + y
