"""export: the graph of one prompt as a file for other tools, whole or without what hardly
matters.
"""

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
    """Writes the graph of one prompt of a run: for circuit-tracer (.json), or as GraphML."""
    asked = options.read("export", argv)
    path = Path(asked.to)
    if path.suffix not in WRITERS:
        raise BadInput(
            f"--to '{asked.to}': not a kind of file that is written; end it in "
            f"{' or '.join(WRITERS)}"
        )
    if not path.parent.is_dir():
        raise BadInput(f"--to '{asked.to}': there is no folder '{path.parent}'; make it first")
    store = harvest(asked.run, asked.harvest)
    prompt = find_prompt(store, asked.prompt)
    whole = whole_graph(store, prompt)
    attributions = whole.edges["attribution"]
    if len(attributions) and not attributions.is_finite().any():
        raise BadInput(
            f"harvest '{store.path}': no attribution of this prompt is finite; fit and harvest "
            "again"
        )
    outputs = None if asked.position is None else outputs_at(whole, asked.position)
    kept = _kept(whole, asked, outputs)
    made = Export(store, prompt, whole, kept, outputs)
    WRITERS[path.suffix](made, path)
    print(f"{made.label[:100]}\n{_facts(whole, kept, outputs)}")
    view = f"circuit-tracer start-server --graph_file_dir {path.parent}"
    print(f"graph: {path}" + (f"    see it: {view}" if path.suffix == ".json" else ""))


def harvest(run: str, name: str | None) -> Store:
    """Return a run's harvest of graphs: the one of this name, or the one that the viewer shows
    first.

    Raises:
        BadInput: the run has no such harvest, or it cannot be read.
    """
    found = runs.find(run)
    held = {path.name: path for path in found.harvests}
    if name is not None and name not in held:
        raise BadInput(f"harvest '{name}': not in run '{found.name}'; {nearest(name, held)}")
    for one in harvest_names(found) if name is None else [name]:
        store = Store(held[one]).require("run", "harvest", "kind", "mode", "C")
        if store.manifest["rows"]["edges"]:
            return store
    named = f"harvest '{name}' of run '{found.name}'" if name else f"run '{found.name}'"
    raise BadInput(
        f"{named}: it has no graphs; harvest them: predict with spd_lightning.PromptGraphs"
    )


def _kept(whole: Graph, asked: argparse.Namespace, outputs: list[int] | None) -> Graph:
    """Prune a graph as the options say."""
    if asked.budget is None:
        nodes = 0.8 if asked.nodes is None else asked.nodes
        edges = 0.98 if asked.edges is None else asked.edges
        return pruned(whole, nodes, edges, outputs)
    if asked.nodes is not None:
        raise BadInput(
            "export: --nodes and --budget are two ways to choose nodes; leave one of them out"
        )
    return expanded(whole, asked.budget, 1.0 if asked.edges is None else asked.edges, outputs)


def _facts(whole: Graph, kept: Graph, outputs: list[int] | None) -> str:
    nodes = f"{len(kept.nodes):,} of {len(whole.nodes):,} nodes"
    edges = f"{len(kept.edges):,} of {len(whole.edges):,} edges"
    found = scores(whole, outputs)
    said = {"replacement": found.replacement, "completeness": found.completeness}
    shares = [f"{name} {value:.3f}" for name, value in said.items() if value is not None]
    return ", ".join([nodes, edges, *shares])
