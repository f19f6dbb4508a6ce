"""export: the graph of one prompt as a file for other tools, whole or without what hardly matters."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from spd_lightning import runs
from spd_lightning.analysis.export import Export, write_circuit_tracer, write_graphml
from spd_lightning.analysis.graphs import whole_graph
from spd_lightning.analysis.influence import Graph, expanded, outputs_at, pruned, scores
from spd_lightning.analysis.prompts import find_prompt
from spd_lightning.errors import BadInput, nearest
from spd_lightning.store import Store
from spd_lightning.viewer.library import harvest_names

WRITERS = {".json": write_circuit_tracer, ".graphml": write_graphml}
OPTIONS = {"--harvest": "graphs-unmasked", "--prompt": "0", "--to": "graph.json", "--nodes": "0.8", "--edges": "0.98"}
OPTIONS |= {"--budget": "100", "--position": "12"}
"""Every option, and a value that it may take."""


def export(words: Sequence[str]) -> None:
    """Writes the graph of one prompt of a run: for circuit-tracer (.json), or as GraphML."""
    asked = _read(words)
    path = Path(asked.to)
    if path.suffix not in WRITERS:
        raise BadInput(f"--to '{asked.to}': not a kind of file that is written; end it in {' or '.join(WRITERS)}")
    if not path.parent.is_dir():
        raise BadInput(f"--to '{asked.to}': there is no folder '{path.parent}'; make it first")
    store = harvest(asked.run, asked.harvest)
    prompt = find_prompt(store, asked.prompt)
    whole = whole_graph(store, prompt)
    outputs = None if asked.position is None else outputs_at(whole, _number("--position", asked.position))
    kept = _kept(whole, asked, outputs)
    made = Export(store, prompt, whole, kept, outputs)
    WRITERS[path.suffix](made, path)
    print(f"{made.label[:100]}\n{_facts(whole, kept, outputs)}")
    view = f"circuit-tracer start-server --graph_file_dir {path.parent}"
    print(f"graph: {path}" + (f"    see it: {view}" if path.suffix == ".json" else ""))


def _read(words: Sequence[str]) -> argparse.Namespace:
    """What the words ask for.

    Raises:
        BadInput: an option is unknown or has no value, or there is not exactly one run.
    """
    parser = argparse.ArgumentParser(prog="export", add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("run", nargs="?")
    for option in OPTIONS:
        parser.add_argument(option)
    parser.set_defaults(prompt="0", to="graph.json")
    try:
        asked, rest = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        name = str(error.argument_name)
        raise BadInput(f"export: '{name}' needs a value; for example: {name} {OPTIONS.get(name, '')}") from error
    for word in rest:
        if word.startswith("-"):
            raise BadInput(f"export: '{word}' is none of its options; {nearest(word, OPTIONS)}")
        raise BadInput(f"export: '{word}' is one word too many; see: python -m spd_lightning --help")
    if asked.run is None:
        raise BadInput("export: name a run; for example: export stories-2L ('runs' shows the runs there are)")
    return asked


def harvest(run: str, name: str | None) -> Store:
    """Return a run's harvest of graphs: the one of this name, or the one that the viewer shows first.

    Raises:
        BadInput: the run has no such harvest, or it cannot be read.
    """
    found = runs.find(run)
    held = {path.name: path for path in found.harvests}
    if name is not None and name not in held:
        raise BadInput(f"harvest '{name}': not in run '{found.name}'; {nearest(name, held)}")
    for one in harvest_names(found) if name is None else [name]:
        store = Store(held[one])
        if store.manifest["rows"]["edges"]:
            return store
    named = f"harvest '{name}' of run '{found.name}'" if name else f"run '{found.name}'"
    raise BadInput(f"{named}: it has no graphs; harvest them: predict with spd_lightning.PromptGraphs")


def _kept(whole: Graph, asked: argparse.Namespace, outputs: list[int] | None) -> Graph:
    """What of a graph is to be exported."""
    if asked.budget is None:
        shares = _share("--nodes", asked.nodes, 0.8), _share("--edges", asked.edges, 0.98)
        return pruned(whole, *shares, outputs)
    if asked.nodes is not None:
        raise BadInput("export: --nodes and --budget are two ways to choose nodes; leave one of them out")
    return expanded(whole, _number("--budget", asked.budget), _share("--edges", asked.edges, 1.0), outputs)


def _number(option: str, word: str) -> int:
    if not (word.isascii() and word.isdecimal()):
        raise BadInput(f"{option} '{word}': not a number from 0 up; for example: {option} {OPTIONS[option]}")
    return int(word)


def _share(option: str, word: str | None, otherwise: float) -> float:
    try:
        share = otherwise if word is None else float(word)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise BadInput(
            f"{option} '{word}': a share of influence; take one from 0 to 1, for example {option} {otherwise}"
        )
    return share


def _facts(whole: Graph, kept: Graph, outputs: list[int] | None) -> str:
    counts = f"{len(kept.nodes):,} of {len(whole.nodes):,} nodes, {len(kept.edges):,} of {len(whole.edges):,} edges"
    found = scores(whole, outputs)
    said = {"replacement": found.replacement, "completeness": found.completeness}
    return ", ".join([counts, *(f"{name} {value:.3f}" for name, value in said.items() if value is not None)])
