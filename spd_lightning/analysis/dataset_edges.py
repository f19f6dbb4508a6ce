"""The strongest sums of edges into and out of a component over a whole corpus, with their signs.

A harvest of sums has two for each pair of components: of the attributions to the target's
activation, and of those to its size |activation|. The first cancels where the target is driven up
here and down there; the second says whether the source makes it larger. What they are divided by is
chosen here (section A of docs/method.md):

    sum           nothing: totals over the corpus
    mean          the positions at which the source is a node
    normalized    Σ g of the source and RMS of the target: per full firing, in units of the
                  target's usual size

A sum over few edges is mostly chance, so each comes with a 95 % interval, and rows are ranked by
the end of it that is nearer to 0. With P prompts, a sum S and the sum Q of the squares of each
prompt's own sum, the interval is

    S ± 1.96 √( P/(P−1) · (Q − S²/P) )

that is, how far the sum would vary over as many other prompts of the kind. What it is divided by
counts as known.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import polars as pl

from spd_lightning.errors import BadInput, nearest
from spd_lightning.store import Store

Side = Literal["sources", "targets"]
Scale = Literal["sum", "mean", "normalized"]
Metric = Literal["activation", "size"]
SCALES: tuple[Scale, ...] = ("sum", "mean", "normalized")
METRICS: dict[Metric, str] = {"activation": "to_activation", "size": "to_size"}
_SUMS = ("sum", "sum_abs_target", "prompt_square_sum", "prompt_square_sum_abs_target")
MIN_EDGES = 10
"""The number of edges below which a pair is left out unless it is asked for."""
NORMAL_95 = 1.96
"""The half-width of a 95 % interval of a normal distribution, in standard deviations."""
BESIDE = ("rest", "bias")
"""Nodes of frozen graphs that share a layer's name with its components."""


def corpus_harvests(harvests: Iterable[Path]) -> list[Path]:
    """Return the folders, among those of some harvests, that hold sums over a corpus, newest
    first.
    """
    from spd_lightning.store.manifest import read_settings

    found = []
    for path in harvests:
        try:
            if read_settings(path).get("corpus"):
                found.append(path)
        except BadInput:  # whoever opens it is told
            continue
    return sorted(found, key=lambda path: (path / "manifest.json").stat().st_mtime, reverse=True)


def strongest(
    store: Store,
    layer: str,
    component: int,
    side: Side = "sources",
    scale: Scale = "normalized",
    metric: Metric = "activation",
    top_k: int = 20,
    min_edges: int = MIN_EDGES,
) -> pl.DataFrame:
    """Return the strongest sources or targets of a component over the corpus.

    Columns kind, layer, component, edges (how many), to_activation, to_size (both metrics, on the
    scale), low, high (a 95 % interval of the metric; null if the corpus is a single prompt). Rows
    are in order of how far the interval of |metric| stays above 0, then of |metric|, then of layer
    and component.

    Args:
        store: a harvest of sums.
        layer: the component's layer.
        component: its number there.
        side: whether to return what drives it or what it drives.
        scale: what sums are divided by.
        metric: what rows are ranked by.
        top_k: how many rows to return.
        min_edges: pairs with fewer edges than this are left out.

    Raises:
        BadInput: the harvest has no sums, no such layer, or no such component; or a file is
            damaged.
    """
    check(store, layer, component)
    here, there = ("target", "source") if side == "sources" else ("source", "target")
    mine = (pl.col(f"{here}_layer") == layer) & (pl.col(here) == component)
    if here == "source":
        mine &= ~pl.col("source_kind").is_in(BESIDE)
    ends = ["source_kind", "source_layer", "source", "target_layer", "target"]
    sums = (
        store.scan("dataset_edges").filter(mine).group_by(ends).agg(pl.col("edges", *_SUMS).sum())
    )
    with_intervals = _with_half_widths(
        sums.filter(pl.col("edges") >= min_edges), store.manifest["prompts"]
    )
    divided = _scaled(store, with_intervals, scale)
    half = pl.col("half" if metric == "activation" else "half_abs_target")
    rows = divided.select(
        kind=pl.col("source_kind") if there == "source" else pl.lit(None),
        layer=f"{there}_layer",
        component=there,
        edges="edges",
        to_activation="sum",
        to_size="sum_abs_target",
        half=half,
    )
    value = pl.col(METRICS[metric])
    certain = (value.abs() - pl.col("half")).clip(0).fill_null(0)
    order: list[pl.Expr | str] = [
        -certain,
        -value.abs(),
        pl.col("layer").to_physical(),
        "component",
    ]
    ranked = rows.filter(value != 0).sort(order).head(top_k)
    interval = ranked.with_columns(low=value - pl.col("half"), high=value + pl.col("half"))
    return store.collect(interval.drop("half"))


def _with_half_widths(sums: pl.LazyFrame, prompts: int) -> pl.LazyFrame:
    """Sums with half the width of their 95 % intervals over prompts; null if there is one
    prompt.
    """

    def half(total: str, squares: str) -> pl.Expr:
        if prompts < 2:
            return pl.lit(None, dtype=pl.Float64)
        spread = pl.col(squares) - pl.col(total).pow(2) / prompts
        return NORMAL_95 * (spread.clip(0) * prompts / (prompts - 1)).sqrt()

    return sums.with_columns(
        half=half("sum", "prompt_square_sum"),
        half_abs_target=half("sum_abs_target", "prompt_square_sum_abs_target"),
    )


def _scaled(store: Store, sums: pl.LazyFrame, scale: Scale) -> pl.LazyFrame:
    """Divide both sums of each pair, and their intervals, by what the scale asks for."""
    if scale == "sum":
        return sums
    keys = ["kind", "layer", "component"]
    counts = [
        pl.col(c).sum() for c in ("firings", "positions", "importance_sum", "activation_square_sum")
    ]
    nodes = store.scan("dataset_nodes").group_by(keys).agg(counts)
    source = nodes.select(
        source_kind="kind",
        source_layer="layer",
        source="component",
        firings="firings",
        g="importance_sum",
    )
    rms = (pl.col("activation_square_sum") / pl.col("positions")).sqrt()
    targets = nodes.filter(~pl.col("kind").is_in(BESIDE))
    target = targets.select(target_layer="layer", target="component", rms=rms)
    joined = sums.join(source, on=["source_kind", "source_layer", "source"], how="left")
    joined = joined.join(target, on=["target_layer", "target"], how="left")
    by = pl.col("firings") if scale == "mean" else pl.col("g") * pl.col("rms")
    return joined.with_columns(pl.col("sum", "sum_abs_target", "half", "half_abs_target") / by)


def check(store: Store, layer: str, component: int) -> None:
    """Refuses a component that a harvest of sums does not have.

    Raises:
        BadInput: the harvest has no sums, no such layer, or no such component.
    """
    if "dataset_nodes" not in store.tables:
        raise BadInput(
            f"harvest '{store.path}': it holds no sums over a corpus; predict with --config "
            "dataset_edges.yaml"
        )
    own = store.scan("dataset_nodes").filter(
        pl.col("layer") == layer, ~pl.col("kind").is_in(BESIDE)
    )
    known = (
        store.collect(own.select(pl.col("component").unique().sort()))["component"]
        if layer in store.layers
        else []
    )
    if not len(known):
        held = store.collect(
            store.scan("dataset_nodes").select(pl.col("layer").cast(pl.String).unique())
        )["layer"]
        raise BadInput(f"layer '{layer}' is not in harvest '{store.path}'; {nearest(layer, held)}")
    if component not in known:
        near = min(known, key=lambda c: (abs(c - component), c))
        raise BadInput(
            f"component {component} of '{layer}' is not in harvest '{store.path}'; the nearest is "
            f"{near}"
        )


def named(store: Store, rows: pl.DataFrame) -> list[str]:
    """Name the rows of `strongest`: layer:component, a token with its text, a rest by its kind."""
    token_strings = (
        _tokens(store) if set(rows["layer"]) & set(store.manifest["token_layers"]) else {}
    )
    return [
        _name(store, token_strings, *row)
        for row in rows.select("kind", "layer", "component").iter_rows()
    ]


def _name(
    store: Store, token_strings: dict[int, str], kind: str | None, layer: str, component: int
) -> str:
    if kind in BESIDE:
        return f"{layer} {kind}"
    look = token_strings.get(component) if layer in store.manifest["token_layers"] else None
    return f"{layer}:{component}" if look is None else f"{layer}:{component} {look!r}"


def _tokens(store: Store) -> dict[int, str]:
    """Return the text of every token of the corpus."""
    both = (
        store.scan("prompts")
        .select("token_ids", "tokens")
        .explode("token_ids", "tokens")
        .unique("token_ids")
    )
    return dict(store.collect(both).iter_rows())
