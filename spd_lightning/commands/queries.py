"""Answer questions about a run: components, component, correlations, tokens, neighbors, search, ...

Each verb opens the harvest that can answer, and prints a table, or the JSON that the web endpoint
of the same name returns, or writes all rows to a file.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import polars as pl

from spd_lightning import runs
from spd_lightning.analysis import responses
from spd_lightning.analysis.harvests import open_harvest
from spd_lightning.analysis.names import component_name
from spd_lightning.analysis.neighbors import GRAPHS, SIDES
from spd_lightning.analysis.prompts import ALL_PROBES, find_prompt
from spd_lightning.analysis.statistics import OF
from spd_lightning.analysis.store import Store
from spd_lightning.commands import options
from spd_lightning.commands.component_text import component_text
from spd_lightning.commands.frames import print_frame, print_json, write
from spd_lightning.errors import BadInput

Json = dict[str, Any]

LIKELIEST = 3
"""The number of next tokens at each position that are printed."""


def components(argv: Sequence[str]) -> None:
    """List the components of a run with their statistics."""
    arguments, store = _open("components", argv, "statistics")

    def frame() -> pl.DataFrame:
        return store.components(arguments.layer, arguments.sort)

    def page() -> Json:
        return responses.components(
            store, arguments.layer, arguments.sort, arguments.page, arguments.size
        )

    columns = (
        *("component", "density", "firings", "prompts", "mean_importance", "firing_importance"),
        *("firing_activation", "norm", "alive"),
    )
    _answer(store, arguments, frame, page, columns)


def component(argv: Sequence[str]) -> None:
    """Show a summary of one component."""
    arguments, store = _open("component", argv, "statistics")
    name = arguments.component
    if arguments.json:
        answer = responses.component(store, name)
        answer["examples"] = []
        if "examples" in store.tables:
            examples = responses.activation_contexts(
                store, name, arguments.examples, arguments.window, arguments.top
            )
            answer["examples"] = examples["items"]
        print_json(answer)
        return
    for line in component_text(store, name, arguments.examples, arguments.window, arguments.top):
        print(line)


def correlations(argv: Sequence[str]) -> None:
    """List the components that fire together with a component."""
    arguments, store = _open("correlations", argv, "statistics")
    name = arguments.component

    def frame() -> pl.DataFrame:
        return store.correlations(name, arguments.sort)

    def page() -> Json:
        return responses.correlations(store, name, arguments.sort, arguments.page, arguments.size)

    columns = ("component", "firings", "together", "p_other", "p_this", "jaccard", "pmi", "low")
    _answer(store, arguments, frame, page, columns)


def tokens(argv: Sequence[str]) -> None:
    """List the tokens on which a component fires, and those that are predicted there."""
    arguments, store = _open("tokens", argv, "statistics")
    name = arguments.component
    sides = OF if arguments.of is None else (arguments.of,)
    if arguments.json:
        print_json(responses.tokens(store, name, arguments.of, arguments.sort, arguments.top))
        return
    frames = {side: store.tokens(name, side, arguments.sort) for side in sides}
    labeled = [frame.select(pl.lit(side).alias("of"), pl.all()) for side, frame in frames.items()]
    if write(pl.concat(labeled), arguments.csv, arguments.parquet):
        return
    for side, frame in frames.items():
        title = "tokens where it fires" if side == "input" else "next tokens that are predicted"
        print(f"\n{title}:")
        print_frame(
            frame.head(arguments.top).select(
                token=pl.col("token").map_elements(repr, pl.String).fill_null("all others"),
                **{name: name for name in ("count", "recall", "precision", "pmi", "low")},
            )
        )


def neighbors(argv: Sequence[str]) -> None:
    """List what drives a component, and what it drives."""
    arguments, store = _open("neighbors", argv, "edges")
    name = arguments.component
    if arguments.json:
        print_json(responses.neighbors(store, name, arguments.side, arguments.top))
        return
    sides = SIDES if arguments.side is None else (arguments.side,)
    frames = {side: store.neighbors(name, side, arguments.top) for side in sides}
    labeled = [
        frame.select(pl.lit(side).alias("side"), pl.col("kind").cast(pl.String), pl.exclude("kind"))
        for side, frame in frames.items()
    ]
    if write(pl.concat(labeled, how="vertical_relaxed"), arguments.csv, arguments.parquet):
        return
    for side, frame in frames.items():
        print(f"\n{side}:")
        print_frame(_named(frame).select("component", "edges", "sum", "prompts"))


def search(argv: Sequence[str]) -> None:
    """List the prompts on which all of the given components fire, or any of them."""
    arguments, store = _open("search", argv, "nodes")
    names = [name for name in arguments.components.split(",") if name.strip()]

    def frame() -> pl.DataFrame:
        return store.search(names, arguments.mode, arguments.min_importance)

    def page() -> Json:
        return responses.search(
            store, names, arguments.mode, arguments.min_importance, arguments.page, arguments.size
        )

    _answer(store, arguments, frame, page, ("prompt_id", "matched", "importance", "text"))


def prompts(argv: Sequence[str]) -> None:
    """List the prompts of a harvest, or those whose text matches."""
    arguments, store = _open("prompts", argv, "prompts")

    def frame() -> pl.DataFrame:
        return store.prompts(arguments.text, arguments.regex)

    def page() -> Json:
        return responses.prompts(
            store, arguments.text, arguments.regex, arguments.page, arguments.size
        )

    _answer(store, arguments, frame, page, ("prompt_id", "source", "positions", "text"))


def prompt(argv: Sequence[str]) -> None:
    """Show the strongest edges of one prompt's graph, and what the model predicts."""
    arguments, store = _open("prompt", argv, "graph")
    number = find_prompt(store, arguments.p)
    if number == ALL_PROBES:
        raise BadInput(
            f"prompt {arguments.p}: in the viewer, this is the graph of all probes together; give "
            "the number of one prompt, from 1"
        )
    if "nodes" not in store.tables:
        raise BadInput(f"harvest '{store.path}': it has no graphs; to make some: {GRAPHS}")
    settings = (
        arguments.top_k,
        arguments.ci_threshold,
        arguments.max_mean_ci,
        arguments.output_prob_threshold,
        arguments.normalize,
    )
    answer = responses.prompt(store, number, *settings)
    if arguments.json:
        print_json(answer)
        return
    edges = pl.DataFrame(
        answer["edges"], schema={"src": pl.String, "tgt": pl.String, "val": pl.Float64}
    )
    if write(edges, arguments.csv, arguments.parquet):
        return
    print(f"prompt {answer['prompt_id']}: {answer['text']}")
    total = answer["edges_total"]
    print(f"{len(answer['nodes']):,} nodes; the strongest {edges.height:,} of {total:,} edges:")
    print()
    print_frame(edges)
    if answer["outputs"]:
        print("\nthe likeliest next tokens at each position:")
        likely = pl.DataFrame(answer["outputs"]).sort("pos", -pl.col("ci_probability"))
        few = likely.group_by("pos", maintain_order=True).head(LIKELIEST)
        print_frame(few.select("pos", "token", "ci_probability", "target_probability"))


# ---- shared --------------------------------------------------------------------------------------


def _open(verb: str, argv: Sequence[str], question: str) -> tuple[argparse.Namespace, Store]:
    """Read the words of a verb, and open the harvest that can answer it."""
    arguments = options.read(verb, argv)
    run = runs.find(arguments.run)
    store = open_harvest(run, question, arguments.harvest)
    if not store.manifest["complete"]:
        print(
            f"harvest '{store.path.name}' is not complete: it has {store.manifest['prompts']} "
            "prompts so far",
            file=sys.stderr,
        )
    return arguments, store


def _answer(
    store: Store,
    arguments: argparse.Namespace,
    frame: Callable[[], pl.DataFrame],
    page: Callable[[], Json],
    columns: Sequence[str],
) -> None:
    """Print a page as JSON or as a table of some columns, or write all rows to files."""
    if arguments.csv is not None or arguments.parquet is not None:
        write(frame(), arguments.csv, arguments.parquet)
        return
    answer = page()
    if arguments.json:
        print_json(answer)
        return
    items = answer["items"]
    place = f"harvest {store.path.name}, {store.manifest['prompts']:,} prompts"
    if not items:
        print(f"nothing found in {place}")
        return
    print(f"{place}\n")
    rows = pl.DataFrame(items, infer_schema_length=None)
    if "name" in rows.columns:
        rows = rows.with_columns(component="name")
    print_frame(rows.select(columns))
    first = arguments.page * arguments.size
    total = answer["total"]
    if total > len(items):
        more = "" if answer["next"] is None else f"; next: --page {answer['next']}"
        print(f"{first + 1:,} to {first + len(items):,} of {total:,}{more}")


def _named(frame: pl.DataFrame) -> pl.DataFrame:
    """Replace the column `component` by names; an embedding row or output has its layer's name."""
    names = [
        component_name(layer, component)
        for layer, component in frame.select("layer", "component").iter_rows()
    ]
    return frame.with_columns(component=pl.Series(names, dtype=pl.String))
