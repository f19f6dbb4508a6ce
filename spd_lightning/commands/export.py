"""export: the graph of one prompt as a file for other tools, whole or pruned."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from spd_lightning import runs
from spd_lightning.analysis.export import Export, write_circuit_tracer, write_graphml
from spd_lightning.analysis.graphs import whole_graph
from spd_lightning.analysis.influence import Graph, expanded, outputs_at, pruned, scores
from spd_lightning.analysis.prompts import find_prompt
from spd_lightning.commands import options
from spd_lightning.errors import BadInput, nearest
from spd_lightning.store import Store
from spd_lightning.viewer.library import harvest_names

WRITERS = {".json": write_circuit_tracer, ".graphml": write_graphml}


def main(argv: Sequence[str]) -> None:
    """Write the graph of one prompt of a run: for circuit-tracer (.json), or as GraphML."""
    arguments = options.read("export", argv)
    path = Path(arguments.to)
    if path.suffix not in WRITERS:
        endings = " or ".join(WRITERS)
        raise BadInput(f"--to '{arguments.to}': unknown file type; end it in {endings}")
    if not path.parent.is_dir():
        raise BadInput(
            f"--to '{arguments.to}': folder '{path.parent}' does not exist; create it first"
        )
    store = harvest(arguments.run, arguments.harvest)
    prompt = find_prompt(store, arguments.prompt)
    graph = whole_graph(store, prompt)
    attributions = graph.edges["attribution"]
    if len(attributions) and not attributions.is_finite().any():
        raise BadInput(
            f"harvest '{store.path}': no attribution of this prompt is finite; run fit and predict "
            "again"
        )
    outputs = None
    if arguments.position is not None:
        outputs = outputs_at(graph, arguments.position)
    smaller = _prune(graph, arguments, outputs)
    export = Export(store, prompt, graph, smaller, outputs)
    WRITERS[path.suffix](export, path)
    beginning = export.label[:100]
    print(beginning)
    print(_facts(graph, smaller, outputs))
    if path.suffix == ".json":
        view = f"circuit-tracer start-server --graph_file_dir {path.parent}"
        print(f"graph: {path}    view it: {view}")
    else:
        print(f"graph: {path}")


def harvest(reference: str, name: str | None) -> Store:
    """Return a run's harvest of graphs: the one named, or the one that the viewer shows first.

    Raises:
        BadInput: the run has no such harvest, or it cannot be read.
    """
    run = runs.find(reference)
    paths = {path.name: path for path in run.harvests}
    if name is not None and name not in paths:
        raise BadInput(f"harvest '{name}': not in run '{run.name}'; {nearest(name, paths)}")
    candidates = harvest_names(run) if name is None else [name]
    for candidate in candidates:
        store = Store(paths[candidate]).require("run", "harvest", "kind", "mode", "C")
        if store.manifest["rows"]["edges"]:
            return store
    place = f"run '{run.name}'"
    if name:
        place = f"harvest '{name}' of {place}"
    makes_graphs = "PromptGraphs" in str(run.config.get("trainer"))
    added = [] if makes_graphs else ["graphs.yaml"]
    raise BadInput(f"{place}: it has no graphs; harvest them: {run.predict_command(*added)}")


def _prune(graph: Graph, arguments: argparse.Namespace, outputs: list[int] | None) -> Graph:
    """Prune a graph by the shares, or to the number of nodes, that the options give."""
    nodes = arguments.nodes
    edges = arguments.edges
    if arguments.budget is None:
        if nodes is None:
            nodes = 0.8
        if edges is None:
            edges = 0.98
        return pruned(graph, nodes, edges, outputs)
    if nodes is not None:
        raise BadInput("export: --nodes and --budget both choose nodes; use only one of them")
    if edges is None:
        edges = 1.0
    return expanded(graph, arguments.budget, edges, outputs)


def _facts(graph: Graph, smaller: Graph, outputs: list[int] | None) -> str:
    """Return a line with the size of the pruned graph, and its scores where they are defined."""
    facts = [
        f"{len(smaller.nodes):,} of {len(graph.nodes):,} nodes",
        f"{len(smaller.edges):,} of {len(graph.edges):,} edges",
    ]
    shares = scores(graph, outputs)
    if shares.replacement is not None:
        facts.append(f"replacement {shares.replacement:.3f}")
    if shares.completeness is not None:
        facts.append(f"completeness {shares.completeness:.3f}")
    return ", ".join(facts)
