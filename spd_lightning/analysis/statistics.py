"""Statistics of components, from the tables of a harvest: section H of docs/method.md.

The tables hold sums for several groups of prompts. Queries first add up the groups, then divide.
"""

from typing import Any, Literal

import polars as pl

from spd_lightning.analysis.components import site
from spd_lightning.analysis.dataset_edges import NORMAL_95
from spd_lightning.analysis.names import component_of
from spd_lightning.errors import BadInput, command, nearest
from spd_lightning.store import Store
from spd_lightning.store.tables import summed

Of = Literal["input", "output"]
OF: tuple[Of, ...] = ("input", "output")

UNIT_MASS = 2.0**32
"""The integer that stands for a probability of 1 in the tables (`harvest.counting`)."""

_FORWARD = pl.col("layer").to_physical()

STATISTICS = command("predict --config NAME.yaml --config statistics.yaml")
"""The command that makes statistics, for messages."""

# ---- all components ------------------------------------------------------------------------------

COMPONENT_SORTS = (
    "density",
    "firings",
    "prompts",
    "mean_importance",
    "mean_activation",
    "firing_importance",
    "firing_activation",
    "norm",
    "layer",
)
"""The columns that components can be sorted by; all but `layer` are sorted from large to small."""


def components(store: Store, layer: str | None = None, sort: str = "density") -> pl.DataFrame:
    """Return one row per component, also for those that never fire.

    Columns layer, component, density, firings, positions, prompts (null if unknown),
    mean_importance, mean_activation (over all positions), firing_importance, firing_activation
    (over firings; null without any), importance_std, activation_std (over all positions), norm,
    alive.

    Args:
        store: a harvest with the table `components`.
        layer: only components of this site; of all sites if omitted.
        sort: one of `COMPONENT_SORTS`.

    Raises:
        BadInput: the harvest has no such site or no statistics, or the column to sort by is
            unknown.
    """
    if sort not in COMPONENT_SORTS:
        raise BadInput(f"sort '{sort[:60]}': {nearest(sort, COMPONENT_SORTS)}")
    require(store, "components")
    rows = store.scan("components")
    if layer is not None:
        rows = rows.filter(pl.col("layer") == site(store, layer))
    sums = summed("components", rows)
    N = pl.col("positions")
    n = pl.col("firings")
    has_fired = n > 0
    columns = sums.select(
        "layer",
        "component",
        "firings",
        "positions",
        "prompts",
        density=n / N,
        mean_importance=pl.col("importance_sum") / N,
        mean_activation=pl.col("activation_sum") / N,
        firing_importance=pl.when(has_fired).then(pl.col("firing_importance_sum") / n),
        firing_activation=pl.when(has_fired).then(pl.col("firing_activation_sum") / n),
        importance_std=_deviation("importance"),
        activation_std=_deviation("activation"),
        norm="norm",
        alive="alive",
    )
    order = [_FORWARD, pl.col("component")]
    if sort == "layer":
        return store.collect(columns.sort(order))
    first = -pl.col(sort).cast(pl.Float64)
    return store.collect(columns.sort([first, *order], nulls_last=True))


def _deviation(quantity: str) -> pl.Expr:
    """Return the standard deviation of a quantity over all positions."""
    N = pl.col("positions")
    mean = pl.col(f"{quantity}_sum") / N
    mean_square = pl.col(f"{quantity}_square_sum") / N
    variance = mean_square - mean.pow(2)
    return variance.clip(0).sqrt()  # rounding can make it negative


def component(store: Store, name: str) -> dict[str, Any]:
    """Return the row of one component in `components`, as a dictionary.

    Raises:
        BadInput: the harvest has no such component, or no statistics.
    """
    layer, number = component_of(store, name)
    rows = components(store, layer)
    return rows.row(by_predicate=pl.col("component") == number, named=True)


def histogram(store: Store, name: str) -> pl.DataFrame:
    """Return the histograms of a component's firings: columns quantity, low, high, firings.

    A bin holds importances in (low, high], or activations in [low, high) (negative ones in
    (low, high]). The outermost bins of activations also hold all larger ones.

    Raises:
        BadInput: the harvest has no such component, or no statistics.
    """
    rows = summed("histograms", _rows_of(store, "histograms", name))
    k = pl.col("bin").cast(pl.Float64)
    is_importance = pl.col("quantity") == "importance"
    # The ends of bin ±k of activations, nearer to 0 and farther from it (see `harvest.moments`).
    inner = pl.lit(2.0).pow((k.abs() - 49) / 4)
    outer = pl.lit(2.0).pow((k.abs() - 48) / 4)
    low = pl.when(k > 0).then(inner).when(k < 0).then(-outer).otherwise(0.0)
    high = pl.when(k > 0).then(outer).when(k < 0).then(-inner).otherwise(0.0)
    bins = rows.select(
        "quantity",
        low=pl.when(is_importance).then(k / 32).otherwise(low),
        high=pl.when(is_importance).then((k + 1) / 32).otherwise(high),
        firings="firings",
    )
    return store.collect(bins.sort(pl.col("quantity").to_physical(), "low"))


# ---- one component and others --------------------------------------------------------------------

CORRELATION_SORTS = ("pmi", "jaccard", "p_other", "p_this", "together")
"""The columns that correlated components can be sorted by; PMI by the lower end of its interval."""


def correlations(store: Store, name: str, sort: str = "pmi") -> pl.DataFrame:
    """Return the components that fire together with one component, the most correlated first.

    Columns layer, component, firings (of the other), together, p_other = P(other|this), p_this =
    P(this|other), jaccard, pmi, low, high (a 95 % interval of the PMI).

    Raises:
        BadInput: the harvest has no such component or no statistics, or the column to sort by is
            unknown.
    """
    if sort not in CORRELATION_SORTS:
        raise BadInput(f"sort '{sort[:60]}': {nearest(sort, CORRELATION_SORTS)}")
    layer, number = component_of(store, name)
    require(store, "cofirings")
    together = _firings_together(store, layer, number)
    counts = store.scan("components").group_by("layer", "component")
    counts = counts.agg(pl.col("firings", "positions").sum())
    this = (pl.col("layer") == layer) & (pl.col("component") == number)
    own = store.collect(counts.filter(this)).row(0, named=True)
    n = pl.lit(own["firings"])
    m = pl.col("firings")
    both = pl.col("together")
    rows = together.join(counts, on=["layer", "component"], how="left").select(
        "layer",
        "component",
        "firings",
        "together",
        p_other=both / n,
        p_this=both / m,
        jaccard=both / (n + m - both),
        **_pmi(both, n, m, pl.col("positions")),
    )
    key = "low" if sort == "pmi" else sort
    return store.collect(rows.sort(-pl.col(key), _FORWARD, "component"))


def _firings_together(store: Store, layer: str, number: int) -> pl.LazyFrame:
    """Return the components that fire together with one: columns layer, component, together.

    The table has each pair once, so the component can be the first or the second of a pair.
    """
    pairs = store.scan("cofirings")
    is_first = (pl.col("layer") == layer) & (pl.col("component") == number)
    is_second = (pl.col("other_layer") == layer) & (pl.col("other_component") == number)
    later = pairs.filter(is_first).select(
        "firings", layer="other_layer", component="other_component"
    )
    earlier = pairs.filter(is_second).select("firings", "layer", "component")
    others = pl.concat([later, earlier]).group_by("layer", "component")
    return others.agg(together=pl.col("firings").sum())


def _pmi(both: pl.Expr, first: pl.Expr, second: pl.Expr, positions: pl.Expr) -> dict[str, pl.Expr]:
    """Return the PMI of two events and its 95 % interval, as the columns pmi, low and high.

    The PMI is the logarithm of a ratio of two shares: of the commoner event in the rarer one, and
    of the commoner event in all positions. The interval treats their counts as independent.
    """
    pmi = (both * positions / (first * second)).log()
    rarer = pl.min_horizontal(first, second)
    commoner = pl.max_horizontal(first, second)
    variance = 1 / both - 1 / commoner + 1 / rarer - 1 / positions
    half = NORMAL_95 * variance.clip(0).sqrt()
    return {"pmi": pmi, "low": pmi - half, "high": pmi + half}


# ---- one component and tokens --------------------------------------------------------------------

TOKEN_SORTS = ("pmi", "recall", "precision", "count")
"""The columns that tokens can be sorted by; PMI by the lower end of its interval."""


def tokens(store: Store, name: str, of: Of = "input", sort: str = "pmi") -> pl.DataFrame:
    """Return the tokens at which a component fires, or those that the target predicts there.

    Columns token_id, token, count (firings, or probability mass in firings), recall, precision,
    lift, pmi, low, high (a 95 % interval of the PMI). The remainder of the predictions has the
    token_id null and comes last.

    Args:
        store: a harvest of statistics on text.
        name: `layer:component`.
        of: "input" for the tokens at which it fires; "output" for the tokens predicted next.
        sort: one of `TOKEN_SORTS`.

    Raises:
        BadInput: the harvest has no such component or no statistics of tokens, or the column to
            sort by is unknown.
    """
    if sort not in TOKEN_SORTS:
        raise BadInput(f"sort '{sort[:60]}': {nearest(sort, TOKEN_SORTS)}")
    if of not in OF:
        raise BadInput(f"of '{of[:60]}': {nearest(of, OF)}")
    own = component(store, name)
    require(store, "token_counts")
    counts = summed("token_counts", _rows_of(store, "token_counts", name))
    totals = summed("tokens", store.scan("tokens"))
    if of == "input":
        count = pl.col("input_firings").cast(pl.Float64)
        total = pl.col("positions").cast(pl.Float64)
    else:
        count = pl.col("output_mass").cast(pl.Float64) / UNIT_MASS
        total = pl.col("output_mass").cast(pl.Float64) / UNIT_MASS
    own_counts = counts.select("token_id", count=count).filter(pl.col("count") > 0)
    all_counts = totals.select("token_id", "token", total=total)
    n = pl.lit(own["firings"]).cast(pl.Float64)
    N = pl.lit(own["positions"]).cast(pl.Float64)
    K = pl.col("count")
    precision = K / pl.col("total")
    joined = own_counts.join(all_counts, on="token_id", how="left", nulls_equal=True)
    rows = joined.select(
        "token_id",
        "token",
        "count",
        recall=K / n,
        precision=precision,
        lift=precision / (n / N),
        **_pmi(K, n, pl.col("total"), N),
    )
    key = "low" if sort == "pmi" else sort
    is_rest = pl.col("token_id").is_null()
    return store.collect(rows.sort(is_rest, -pl.col(key), "token_id"))


# ---- what a harvest has --------------------------------------------------------------------------


def require(store: Store, table: str) -> None:
    """Check that a harvest has a table of statistics.

    Raises:
        BadInput: it does not.
    """
    if table in store.tables:
        return
    raise BadInput(
        f"harvest '{store.path}': it has no table '{table}'; to make statistics: {STATISTICS}"
    )


def _rows_of(store: Store, table: str, name: str) -> pl.LazyFrame:
    """Return the rows of one component in a table of statistics."""
    layer, number = component_of(store, name)
    require(store, table)
    rows = store.scan(table)
    return rows.filter(pl.col("layer") == layer, pl.col("component") == number)
