"""The columns of every table, each with its type and a sentence for readers.

`make docs` generates docs/tables.md from here.
Layers are categorical in these types; in a store, they are an Enum over the layers of the manifest,
in forward order.
"""

from typing import Any, Literal, NamedTuple

import polars as pl

KINDS = ("component", "input", "embedding", "output", "rest", "bias")
"""The kinds of nodes of a graph."""

QUANTITIES = ("importance", "activation")
"""The quantities of a component that have a histogram."""

EXAMPLE_KINDS = ("uniform", "importance", "positive", "negative")
"""The kinds of examples of a component."""

INDEX = "nodes_by_component"
"""A second copy of `nodes`, sorted by component, to read all prompts of a component together."""


class Column(NamedTuple):
    """The type of a column, and what it holds."""

    dtype: Any
    help: str


class Table(NamedTuple):
    """The columns of a table, what its rows are, and the columns by which a shard is sorted.

    Prompts keep their order, and so do rows that are equal in the columns `sorted_by`. `merge` says
    what becomes of the rows of several groups of prompts: they are all kept; or rows with the same
    keys, which are the columns `sorted_by`, are added up; or the examples that are not among the
    first of their kind any more are dropped.
    """

    help: str
    sorted_by: tuple[str, ...]
    columns: dict[str, Column]
    merge: Literal["keep", "add", "trim"] = "keep"


_PROMPT_ID = Column(pl.UInt64, "The prompt: a hash of its content, equal on all machines.")
_LAYER = Column(pl.Categorical(), "The layer: a site, an embedding, `input` or `output`.")
_KIND = Column(
    pl.Enum(KINDS),
    "component, input, embedding or output; in frozen graphs also rest (what other components and "
    "delta write) and bias.",
)
_POS = Column(pl.UInt32, "The position in the prompt, from 0 up.")
_COMPONENT = Column(
    pl.UInt32,
    "The number of the component in its site; of an input or output, the feature or token; 0 of "
    "nodes that stand for a whole position.",
)
_SOURCE = Column(pl.UInt32, "The source: its column `node` in the table `nodes`.")
_TARGET = Column(pl.UInt32, "The target: its column `node` in the table `nodes`.")
_ATTRIBUTION = Column(pl.Float32, "The attribution ∂a_target/∂a_source · a_source (law A1).")
_ENTRY = Column(pl.UInt32, "The component, or the row of an embedding: a token or a position.")

_NODES = {
    "prompt_id": _PROMPT_ID,
    "node": Column(pl.UInt32, "The number of the node within its prompt."),
    "kind": _KIND,
    "layer": _LAYER,
    "pos": _POS,
    "component": _COMPONENT,
    "importance": Column(pl.Float32, "The causal importance g; null for all kinds but component."),
    "activation": Column(
        pl.Float32,
        "The inner activation a = x V; of an output, its logit or what the graph explains in its "
        "place; of a node that stands for a whole position, the norm of its vector.",
    ),
}

_LOSS_MASKS = ("ci", "stochastic", "adversarial")
_LABEL_MASKS = ("target", *_LOSS_MASKS)

TABLES: dict[str, Table] = {
    "prompts": Table(
        "One row per prompt.",
        (),
        {
            "prompt_id": _PROMPT_ID,
            "token_ids": Column(
                pl.List(pl.UInt32), "Its tokens; of vectors, the features that are not zero."
            ),
            "tokens": Column(
                pl.List(pl.String),
                "The text of each token, or `<0xC3>` for each byte of a token that holds only a "
                "part of a character; `labels.joined` restores the text.",
            ),
            "source": Column(pl.String, "Where it comes from: a file and line, or a corpus."),
            "split": Column(
                pl.String,
                "The part of the data: given, validation or training for text; probe or random "
                "for toys.",
            ),
        },
    ),
    "nodes": Table(
        "One row per node of a graph: an entry that is in use at a position (law A3).",
        ("prompt_id", "node"),
        _NODES,
    ),
    INDEX: Table(
        "The same rows as `nodes`, sorted by component.",
        ("layer", "component", "prompt_id", "pos"),
        _NODES,
    ),
    "edges": Table(
        "One row per edge of a graph.",
        ("prompt_id", "source", "target"),
        {
            "prompt_id": _PROMPT_ID,
            "source": _SOURCE,
            "target": _TARGET,
            "attribution": _ATTRIBUTION,
        },
    ),
    "head_edges": Table(
        "The part of an edge that goes through each attention head; the rows of an edge add up.",
        ("prompt_id", "source", "target", "head"),
        {
            "prompt_id": _PROMPT_ID,
            "source": _SOURCE,
            "target": _TARGET,
            "head": Column(pl.UInt16, "The attention head."),
            "attribution": Column(pl.Float32, "The part of the edge that goes through this head."),
        },
    ),
    "checks": Table(
        "Edges that were tested by intervention.",
        ("prompt_id", "source", "target"),
        {
            "prompt_id": _PROMPT_ID,
            "source": _SOURCE,
            "target": _TARGET,
            "attribution": _ATTRIBUTION,
            "factor": Column(pl.Float32, "The factor by which the source was multiplied."),
            "change": Column(
                pl.Float32,
                "The change of the target; an exact edge gives (factor − 1) · attribution.",
            ),
        },
    ),
    "graphs": Table(
        "One row per graph: its size, and how far to trust it.",
        ("prompt_id",),
        {
            "prompt_id": _PROMPT_ID,
            "nodes": Column(pl.UInt32, "The number of nodes."),
            "edges": Column(pl.UInt64, "The number of edges that were written."),
            "edges_total": Column(pl.UInt64, "The number of edges before pruning."),
            "gap": Column(
                pl.Float64,
                "How far in-edges are from adding up to the activations, over all edges: "
                "Σ|a − Σ in-edges| / Σ|a|; 0 in frozen graphs (law A6).",
            ),
            "checked": Column(pl.UInt32, "The number of rows in `checks`."),
            "correlation": Column(
                pl.Float64,
                "Pearson's correlation of attributions and measured changes; null unless two "
                "edges differ.",
            ),
            "relative_error": Column(pl.Float64, "‖change/(factor − 1) − edge‖ / ‖edge‖."),
        },
    ),
    "outputs": Table(
        "One row per output node of a language model: a likely token at a position.",
        ("prompt_id", "pos"),
        {
            "prompt_id": _PROMPT_ID,
            "pos": _POS,
            "token_id": Column(pl.UInt32, "The token."),
            "token": Column(pl.String, "Its text."),
            "ci_probability": Column(pl.Float32, "Its probability with importances as masks."),
            "ci_logit": Column(pl.Float32, "Its logit with importances as masks."),
            "target_probability": Column(pl.Float32, "Its probability in the target."),
            "target_logit": Column(pl.Float32, "Its logit in the target."),
        },
    ),
    "components": Table(
        "One row per component and group of prompts; counts and sums are added up over groups.",
        ("layer", "component"),
        {
            "layer": _LAYER,
            "component": _COMPONENT,
            "firings": Column(pl.Int64, "The number of positions at which it is a node."),
            "positions": Column(pl.Int64, "The number of all positions."),
            "prompts": Column(pl.Int64, "The number of prompts with at least one firing."),
            "importance_sum": Column(pl.Float64, "Σ g over all positions."),
            "importance_square_sum": Column(pl.Float64, "Σ g² over all positions."),
            "activation_sum": Column(pl.Float64, "Σ a over all positions."),
            "activation_square_sum": Column(pl.Float64, "Σ a² over all positions."),
            "firing_importance_sum": Column(pl.Float64, "Σ g over its firings."),
            "firing_importance_square_sum": Column(pl.Float64, "Σ g² over its firings."),
            "firing_activation_sum": Column(pl.Float64, "Σ a over its firings, with its sign."),
            "firing_activation_square_sum": Column(pl.Float64, "Σ a² over its firings."),
            "norm": Column(pl.Float32, "The Frobenius norm of its matrix; equal in all groups."),
            "alive": Column(
                pl.Boolean, "Whether its matrix is not a remnant; equal in all groups."
            ),
        },
        "add",
    ),
    "histograms": Table(
        "How its importance and its activation are distributed over its firings: one row per "
        "component, quantity and bin that occurs, and group.",
        ("layer", "component", "quantity", "bin"),
        {
            "layer": _LAYER,
            "component": _COMPONENT,
            "quantity": Column(pl.Enum(QUANTITIES), "importance or activation."),
            "bin": Column(
                pl.Int16,
                "Of importances, k for values in (k/32, (k+1)/32]. Of activations, ±k for sizes in "
                "[2^((k−49)/4), 2^((k−48)/4)) with that sign, k from 1 to 96; the first and last "
                "bins also hold all smaller and larger ones, and 0 holds zeros.",
            ),
            "firings": Column(pl.Int64, "The number of firings in the bin."),
        },
        "add",
    ),
    "cofirings": Table(
        "Pairs of components that fire at the same positions: one row per pair that occurs, and "
        "group. The component comes before the other one in forward order.",
        ("layer", "component", "other_layer", "other_component"),
        {
            "layer": _LAYER,
            "component": _COMPONENT,
            "other_layer": Column(pl.Categorical(), "The layer of the other component."),
            "other_component": Column(pl.UInt32, "The number of the other component in its site."),
            "firings": Column(pl.Int64, "The number of positions at which both fire."),
        },
        "add",
    ),
    "token_counts": Table(
        "What stands at the firings of a component, and what the target predicts there: one row "
        "per component and token that occurs, and group.",
        ("layer", "component", "token_id"),
        {
            "layer": _LAYER,
            "component": _COMPONENT,
            "token_id": Column(
                pl.UInt32,
                "The token; null for the remainder: all predictions that are not among the 32 "
                "likeliest at a position.",
            ),
            "input_firings": Column(pl.Int64, "The number of firings at this token."),
            "output_mass": Column(
                pl.UInt64,
                "Σ over its firings of the target's probability of this token as the next, in "
                "units of 2⁻³².",
            ),
        },
        "add",
    ),
    "tokens": Table(
        "All positions by token: one row per token that occurs, and group.",
        ("token_id",),
        {
            "token_id": Column(pl.UInt32, "The token; null for the remainder, as above."),
            "token": Column(pl.String, "Its text."),
            "positions": Column(pl.Int64, "The number of positions at this token."),
            "output_mass": Column(
                pl.UInt64,
                "Σ over all positions of the target's probability of this token as the next, in "
                "units of 2⁻³².",
            ),
        },
        "add",
    ),
    "examples": Table(
        "Firings of a component to look at: those with the smallest keys, of each kind.",
        ("layer", "component", "kind", "key", "prompt_id", "pos"),
        {
            "layer": _LAYER,
            "component": _COMPONENT,
            "kind": Column(
                pl.Enum(EXAMPLE_KINDS),
                "How it was chosen: uniform (at random over all firings), importance (the "
                "largest), positive or negative (the largest activations of that sign).",
            ),
            "key": Column(
                pl.UInt64,
                "The smaller, the earlier: a hash of the firing, below the order of its value for "
                "all kinds but uniform (law H1).",
            ),
            "prompt_id": _PROMPT_ID,
            "pos": _POS,
            "importance": Column(pl.Float32, "The causal importance g."),
            "activation": Column(pl.Float32, "The inner activation a = x V."),
        },
        merge="trim",
    ),
    "dataset_edges": Table(
        "Edges over a corpus: one row per pair of components that share an edge, and group.",
        ("target_layer", "target", "source_layer", "source_kind", "source"),
        {
            "source_kind": Column(pl.Enum(KINDS), "The kind of the source."),
            "source_layer": Column(pl.Categorical(), "The layer of the source."),
            "source": _ENTRY,
            "target_layer": Column(pl.Categorical(), "The layer of the target."),
            "target": Column(pl.UInt32, "The component, or the token of an output."),
            "edges": Column(pl.UInt64, "The number of edges."),
            "sum": Column(pl.Float64, "Σ A: the sum of their attributions."),
            "sum_abs_target": Column(
                pl.Float64, "Σ A·sign(a_target): attributions to the size of the target."
            ),
            "prompt_square_sum": Column(
                pl.Float64, "Σ over prompts of the square of each prompt's own `sum`."
            ),
            "prompt_square_sum_abs_target": Column(
                pl.Float64, "Σ over prompts of the square of each prompt's own `sum_abs_target`."
            ),
        },
        "add",
    ),
    "dataset_nodes": Table(
        "Normalizers of dataset edges: one row per component, or row of an embedding, and group.",
        ("layer", "kind", "component"),
        {
            "kind": _KIND,
            "layer": _LAYER,
            "component": _ENTRY,
            "firings": Column(pl.Int64, "The number of positions at which it is a node."),
            "positions": Column(pl.Int64, "The number of all positions."),
            "importance_sum": Column(
                pl.Float64, "Σ g over all positions; the firings of layers without importances."
            ),
            "activation_square_sum": Column(pl.Float64, "Σ a² over all positions."),
        },
        "add",
    ),
    "frontier": Table(
        "Circuits of several sizes: one row per prompt and λ, and one without λ for the "
        "importance function itself.",
        ("prompt_id", "lambda"),
        {
            "prompt_id": _PROMPT_ID,
            "lambda": Column(pl.Float64, "The weight of the minimality loss; null without λ."),
            "chosen": Column(pl.Boolean, "Whether this circuit became the prompt's graph."),
            "nodes": Column(pl.UInt32, "The number of components with g > 0."),
            "important": Column(pl.UInt32, "The number of components above the threshold."),
            "pos": Column(pl.UInt32, "The position whose prediction should stay."),
            "label": Column(pl.UInt32, "The token whose probability should stay."),
            "token": Column(pl.String, "Its text."),
            **{
                f"loss_{masks}": Column(pl.Float32, f"The loss under {masks} masks.")
                for masks in _LOSS_MASKS
            },
            **{
                f"p_{masks}": Column(
                    pl.Float32,
                    "The label's probability "
                    + ("in the target." if masks == "target" else f"under {masks} masks."),
                )
                for masks in _LABEL_MASKS
            },
            "kept": Column(
                pl.Float32, "The share of the target's answer that the adversary leaves."
            ),
            "adversary_steps": Column(pl.UInt32, "The number of steps of the adversary."),
            "steps": Column(pl.UInt32, "The number of steps of the optimization."),
        },
    ),
}


def markdown() -> str:
    """Return the page docs/tables.md."""
    lines = [
        "# Tables",
        "",
        "A harvest is a folder of Parquet files. `Store(folder).scan(table)` returns a table as a",
        "lazy polars frame. This page is generated from `spd_lightning/store/columns.py`.",
    ]
    for name, table in TABLES.items():
        names = ", ".join(f"`{column}`" for column in table.sorted_by)
        order = f"sorted by {names}" if names else "in the order of the data"
        lines += ["", f"## {name}", "", table.help, "", f"Rows are {order}.", ""]
        lines += ["| column | type | meaning |", "|---|---|---|"]
        for column, (dtype, meaning) in table.columns.items():
            lines.append(f"| `{column}` | {_type_name(dtype)} | {_escape(meaning)} |")
    return "\n".join(lines) + "\n"


def _type_name(dtype: Any) -> str:
    """Return the name of a type as readers know it."""
    if isinstance(dtype, pl.List):
        return f"list of {_type_name(dtype.inner)}"
    if isinstance(dtype, pl.Enum | pl.Categorical):
        return "name"
    return str(dtype)


def _escape(text: str) -> str:
    """Escape bars, which would end a cell."""
    return text.replace("|", "\\|")
