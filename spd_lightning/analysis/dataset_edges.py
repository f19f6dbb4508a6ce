"""The strongest sums of edges into and out of a component over a whole corpus, with their signs.

A harvest of sums has two sums for each pair of components: one of the attributions to the target's
activation, and one of the attributions to its size |activation|. The first cancels if the source
drives the target up in some places and down in others. The second shows whether the source makes
the target larger. The sums can be divided in three ways (section A of docs/method.md):

    sum           not divided: totals over the corpus
    mean          divided by the number of positions at which the source is a node
    normalized    divided by Σ g of the source and by the RMS of the target: per full firing, in
                  units of the target's usual size

A sum over few edges is mostly chance, so each comes with a 95 % interval, and rows are ranked by
the end of the interval that is nearer to 0. With P prompts, a sum S, and the sum Q of the squares
of each prompt's sum, the interval is

    S ± 1.96 √( P/(P−1) · (Q − S²/P) )

It shows how much the sum would vary over P other prompts from the same corpus. The divisor counts
as known.
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
_COUNTS = ("firings", "positions", "importance_sum", "activation_square_sum")
MIN_EDGES = 10
"""Pairs with fewer edges than this are left out by default."""
NORMAL_95 = 1.96
"""The half-width of a 95 % interval of a normal distribution, in standard deviations."""
BESIDE = ("rest", "bias")
"""Nodes of frozen graphs that share a layer's name with its components."""


def corpus_harvests(harvests: Iterable[Path]) -> list[Path]:
    """Return the folders, among those of some harvests, that hold sums over a corpus, newest first.

    A harvest that cannot be read is left out; it is reported when it is opened.
    """
    from spd_lightning.store.manifest import read_settings

    with_sums = []
    for path in harvests:
        try:
            settings = read_settings(path)
        except BadInput:
            continue
        if settings.get("corpus"):
            with_sums.append(path)
    return sorted(with_sums, key=_time_begun, reverse=True)


def _time_begun(harvest: Path) -> float:
    return (harvest / "manifest.json").stat().st_mtime


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

    Columns kind, layer, component, edges (their number), to_activation, to_size (both metrics, on
    the scale), low, high (a 95 % interval of the metric; null if the corpus is a single prompt).
    Rows are ordered by how far the interval of |metric| stays above 0, then by |metric|, then by
    layer and component.

    Args:
        store: a harvest of sums.
        layer: the component's layer.
        component: its number in the layer.
        side: whether to return what drives it or what it drives.
        scale: what sums are divided by.
        metric: what rows are ranked by.
        top_k: the largest number of rows to return.
        min_edges: pairs with fewer edges than this are left out.

    Raises:
        BadInput: the harvest has no sums, no such layer, or no such component; or a file is
            damaged.
    """
    check(store, layer, component)
    this, other = ("target", "source") if side == "sources" else ("source", "target")
    in_layer = pl.col(f"{this}_layer") == layer
    has_number = pl.col(this) == component
    ends_here = in_layer & has_number
    if this == "source":
        is_beside = pl.col("source_kind").is_in(BESIDE)
        ends_here &= ~is_beside
    pair = ["source_kind", "source_layer", "source", "target_layer", "target"]
    shards = store.scan("dataset_edges").filter(ends_here)
    sums = shards.group_by(pair).agg(pl.col("edges", *_SUMS).sum())
    frequent = sums.filter(pl.col("edges") >= min_edges)
    prompts = store.manifest["prompts"]
    with_intervals = _with_half_widths(frequent, prompts)
    divided = _scaled(store, with_intervals, scale)
    half = "half" if metric == "activation" else "half_abs_target"
    rows = divided.select(
        kind=pl.col("source_kind") if other == "source" else pl.lit(None),
        layer=f"{other}_layer",
        component=other,
        edges="edges",
        to_activation="sum",
        to_size="sum_abs_target",
        half=half,
    )
    column = METRICS[metric]
    value = pl.col(column)
    half_width = pl.col("half")
    nearer_end = value.abs() - half_width
    certain = nearer_end.clip(0).fill_null(0)
    order: list[pl.Expr | str] = [
        -certain,
        -value.abs(),
        pl.col("layer").to_physical(),
        "component",
    ]
    nonzero = rows.filter(value != 0)
    ranked = nonzero.sort(order).head(top_k)
    intervals = ranked.with_columns(low=value - half_width, high=value + half_width)
    return store.collect(intervals.drop("half"))


def _with_half_widths(sums: pl.LazyFrame, prompts: int) -> pl.LazyFrame:
    """Add half the width of each sum's 95 % interval over prompts; null if there is one prompt."""

    def half_width(total: str, squares: str) -> pl.Expr:
        if prompts < 2:
            return pl.lit(None, dtype=pl.Float64)
        square = pl.col(total).pow(2)  # S²
        spread = pl.col(squares) - square / prompts  # Q − S²/P
        spread = spread.clip(0)  # rounding can make it negative
        variance = spread * prompts / (prompts - 1)
        return NORMAL_95 * variance.sqrt()

    return sums.with_columns(
        half=half_width("sum", "prompt_square_sum"),
        half_abs_target=half_width("sum_abs_target", "prompt_square_sum_abs_target"),
    )


def _scaled(store: Store, sums: pl.LazyFrame, scale: Scale) -> pl.LazyFrame:
    """Divide both sums of each pair, and their intervals, as the scale says."""
    if scale == "sum":
        return sums
    shards = store.scan("dataset_nodes")
    nodes = shards.group_by("kind", "layer", "component").agg(pl.col(*_COUNTS).sum())
    sources = nodes.select(
        source_kind="kind",
        source_layer="layer",
        source="component",
        firings="firings",
        g="importance_sum",
    )
    mean_square = pl.col("activation_square_sum") / pl.col("positions")
    components = nodes.filter(~pl.col("kind").is_in(BESIDE))
    targets = components.select(target_layer="layer", target="component", rms=mean_square.sqrt())
    source_keys = ["source_kind", "source_layer", "source"]
    target_keys = ["target_layer", "target"]
    joined = sums.join(sources, on=source_keys, how="left")
    joined = joined.join(targets, on=target_keys, how="left")
    if scale == "mean":
        divisor = pl.col("firings")
    else:
        divisor = pl.col("g") * pl.col("rms")
    scaled = pl.col("sum", "sum_abs_target", "half", "half_abs_target")
    return joined.with_columns(scaled / divisor)


def check(store: Store, layer: str, component: int) -> None:
    """Reject a component that a harvest of sums does not have.

    Raises:
        BadInput: the harvest has no sums, no such layer, or no such component.
    """
    if "dataset_nodes" not in store.tables:
        raise BadInput(
            f"harvest '{store.path}': it has no sums over a corpus; run predict with --config "
            "dataset_edges.yaml"
        )
    known = _components(store, layer) if layer in store.layers else []
    if not len(known):
        nodes = store.scan("dataset_nodes")
        names = nodes.select(pl.col("layer").cast(pl.String).unique())
        layers = store.collect(names)["layer"]
        raise BadInput(
            f"layer '{layer}' is not in harvest '{store.path}'; {nearest(layer, layers)}"
        )
    if component not in known:
        near = min(known, key=lambda other: (abs(other - component), other))
        raise BadInput(
            f"component {component} of '{layer}' is not in harvest '{store.path}'; the nearest is "
            f"{near}"
        )


def _components(store: Store, layer: str) -> pl.Series:
    """Return the components of a layer that have sums, in order."""
    in_layer = pl.col("layer") == layer
    is_beside = pl.col("kind").is_in(BESIDE)
    nodes = store.scan("dataset_nodes")
    components = nodes.filter(in_layer, ~is_beside).select("component")
    distinct = components.unique().sort("component")
    return store.collect(distinct)["component"]


def named(store: Store, rows: pl.DataFrame) -> list[str]:
    """Name the rows of `strongest`: layer:component, a token with its text, a rest by its kind."""
    layers = set(rows["layer"])
    token_layers = store.manifest["token_layers"]
    token_strings = {}
    if layers.intersection(token_layers):
        token_strings = _tokens(store)
    names = []
    nodes = rows.select("kind", "layer", "component")
    for kind, layer, component in nodes.iter_rows():
        name = _name(store, token_strings, kind, layer, component)
        names.append(name)
    return names


def _name(
    store: Store, token_strings: dict[int, str], kind: str | None, layer: str, component: int
) -> str:
    if kind in BESIDE:
        return f"{layer} {kind}"
    name = f"{layer}:{component}"
    token_layers = store.manifest["token_layers"]
    if layer not in token_layers:
        return name
    token = token_strings.get(component)
    if token is None:
        return name
    return f"{name} {token!r}"


def _tokens(store: Store) -> dict[int, str]:
    """Return the text of every token of the corpus."""
    prompts = store.scan("prompts")
    lists = prompts.select("token_ids", "tokens")
    pairs = lists.explode("token_ids", "tokens")
    distinct = store.collect(pairs.unique("token_ids"))
    return dict(distinct.iter_rows())
