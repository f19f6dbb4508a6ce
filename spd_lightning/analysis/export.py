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
        return together_label(len(probes(self.store)))

    @property
    def tokens(self) -> list[str]:
        """The prompt's tokens by position; for vectors, the active features."""
        return self._row["tokens"] if self._row else []

    @property
    def token_ids(self) -> list[int]:
        """The ids of the tokens."""
        return self._row["token_ids"] if self._row else []

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
            "pos",
            "token",
            component="token_id",
        )
        nodes = self.graph.nodes.join(
            pl.DataFrame(columns),
            on="node",
            how="left",
            maintain_order="left",
        )
        nodes = nodes.join(
            self.store.collect(outputs),
            on=["pos", "component"],
            how="left",
            maintain_order="left",
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
        is_finite = pl.col("attribution").is_finite()
        return self.graph.edges.filter(is_finite).to_dicts()


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
    graph.graph |= {key: str(manifest[key]) for key in ("run", "harvest", "mode")}
    graph.graph |= {"prompt": _xml(export.label), "prompt_id": str(export.prompt)}
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
    others = [entry for entry in _listed(listing) if entry.get("slug") != path.stem]
    write_json(path, content, seal=False)
    write_json(listing, {"graphs": [*others, content["metadata"]]}, seal=False)


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
    outputs = [row for row in nodes if row["kind"] == "output"]
    outputs.sort(key=lambda row: row["weight"])
    by_position = {row["pos"]: row["node"] for row in outputs}  # the last one wins
    return set(by_position.values())


class _Picture:
    """The places of nodes in circuit-tracer's picture: rows are layers, columns are positions."""

    def __init__(self, export: Export):
        layers = export.store.layers
        columns = export.whole.nodes.select(pl.col("layer", "kind").cast(pl.String))
        ends = {"input", "output"}
        ends |= {layer for layer, kind in columns.unique().rows() if kind in TOKENS}
        sites = [layer for layer in layers if layer not in ends]
        self.rows = {layer: row for row, layer in enumerate(sites)}
        self.embeddings = [layer for layer in layers if layer in ends]
        if export.store.manifest["kind"] == "vectors":
            is_input = pl.col("kind") == "input"
            inputs = export.whole.nodes.filter(is_input)["component"].to_list()
            tokens = [*(f"f{component}" for component in inputs), ""]
        else:
            inputs = []
            tokens = list(export.tokens)
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
            token = str(row["token"] if row["token"] is not None else component)
            token = token.replace('"', "″")  # the viewer ends the token at a quote
            text = f'Output "{token}" (p={row["weight"]:.3f})'
            last_row = str(len(self.rows) + 1)
            return _Place(last_row, component, "logit", text)
        if kind in TOKENS:
            text = f'Emb: "{row["token"]}"'
            return _Place("E", self._embedding_number(row), "embedding", text)
        site = str(self.rows[layer])
        if kind == "component":
            return _Place(site, component, "cross layer transcoder", f"{layer} {component}")
        number = -1 if kind == "rest" else -2
        return _Place(site, number, "mlp reconstruction error", f"{kind} of {layer}")

    def _embedding_number(self, row: Mapping[str, Any]) -> int:
        """Return the number of an input or embedding node in the row `E`."""
        if row["kind"] == "input":
            return row["component"]
        nth = self.embeddings.index(row["layer"])
        # The first embedding is that of tokens. Others, for example of positions, count down.
        return -nth if nth else self.ids[row["pos"]]


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
