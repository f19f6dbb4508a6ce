"""A summary of one component, as lines for a terminal."""

import math
import sys
from collections.abc import Iterator, Sequence

import polars as pl

from spd_lightning.analysis.contexts import ExampleKind
from spd_lightning.analysis.names import component_name
from spd_lightning.analysis.statistics import OF, STATISTICS, Of
from spd_lightning.analysis.store import Store
from spd_lightning.labels import is_bytes, joined

BAR = 30
"""The number of characters of the longest bar of a histogram."""

_BOLD = "\033[1;33m"
_PLAIN = "\033[0m"


def component_text(
    store: Store, name: str, kind: ExampleKind, window: int, top: int
) -> Iterator[str]:
    """Yield the lines: statistics, histogram of importances, tokens, correlations, examples."""
    row = store.component(name)
    yield f"{name} in harvest {store.path.name}, {store.manifest['prompts']} prompts"
    in_prompts = ""
    if row["prompts"] is not None:
        in_prompts = f", in {row['prompts']:,} prompts"
    yield (
        f"fires at {row['firings']:,} of {row['positions']:,} positions "
        f"({100 * row['density']:.3g} %){in_prompts}"
    )
    if not row["firings"]:
        yield "it never fires here, so there is nothing more to show"
        return
    yield (
        f"where it fires: mean importance {row['firing_importance']:.3f}, mean activation "
        f"{row['firing_activation']:+.3f}"
    )
    if "histograms" not in store.tables:
        yield ""
        yield f"for its tokens, correlations and examples, make statistics: {STATISTICS}"
        return
    yield from _histogram(store, name)
    yield ""
    yield "In the lists below: the share of its firings, and how many times as often as on average"
    yield "(≥ the lower end of a 95 % interval, by which the lists are sorted)."
    if "token_counts" in store.tables:
        for side in OF:
            yield from _tokens(store, name, side, top)
    yield from _correlations(store, name, top)
    yield from _examples(store, name, kind, window, top)


def _histogram(store: Store, name: str) -> Iterator[str]:
    """Yield the histogram of importances in eight bars."""
    bins = store.histogram(name).filter(quantity="importance")
    eighth = (pl.col("low") * 8).floor().cast(pl.Int64)
    eighths = bins.group_by(eighth=eighth).agg(pl.col("firings").sum())
    counts = dict(eighths.iter_rows())
    largest = max(counts.values(), default=1)
    yield ""
    yield "importance   firings"
    for k in range(8):
        firings = counts.get(k, 0)
        bar = "─" * round(BAR * firings / largest)
        yield f"{k / 8:.3f}–{(k + 1) / 8:.3f} {firings:>9,} {bar}".rstrip()


def _tokens(store: Store, name: str, side: Of, top: int) -> Iterator[str]:
    """Yield the tokens that occur there much more often than elsewhere."""
    rows = store.tokens(name, side)
    tokens = rows.filter(pl.col("token_id").is_not_null()).head(top)  # without the remainder
    title = "tokens where it fires" if side == "input" else "next tokens that the target predicts"
    yield ""
    yield f"{title}:"
    for token, recall, pmi, low in tokens.select("token", "recall", "pmi", "low").iter_rows():
        yield f"  {token!r:<16} {100 * recall:>5.1f} %  {_lift(pmi, low)}"


def _lift(pmi: float, low: float) -> str:
    """Return how much more often something occurs than on average; lists are ranked by `low`."""
    return f"{math.exp(pmi):>6.1f} × (≥ {math.exp(low):.1f})"


def _correlations(store: Store, name: str, top: int) -> Iterator[str]:
    """Yield the most correlated components."""
    if "cofirings" not in store.tables:
        return
    rows = store.correlations(name).head(top)
    yield ""
    yield "fires together with:"
    names = [component_name(row["layer"], row["component"]) for row in rows.to_dicts()]
    width = max(map(len, names), default=0)
    for other, row in zip(names, rows.iter_rows(named=True), strict=True):
        lift = _lift(row["pmi"], row["low"])
        yield f"  {other:<{width}} {100 * row['p_other']:>5.1f} %  {lift}"


def _examples(store: Store, name: str, kind: ExampleKind, window: int, top: int) -> Iterator[str]:
    """Yield examples, with the token at which it fires highlighted."""
    rows = store.contexts(name, kind, window).head(top)
    titles = {
        "importance": "examples with the largest importance",
        "uniform": "examples at random",
        "positive": "examples with the largest activation",
        "negative": "examples with the most negative activation",
    }
    yield ""
    yield f"{titles[kind]} (importance, activation):"
    for row in rows.iter_rows(named=True):
        text = highlighted(row["tokens"], row["pos"] - row["first"])
        importance = "  –  "
        if row["importance"] is not None:
            importance = f"{row['importance']:.3f}"
        yield f"  {importance} {row['activation']:+8.3f}  {text}"


def highlighted(tokens: Sequence[str], place: int) -> str:
    """Return a text on one line with one of its tokens marked: in color, or «like this».

    place: the marked token, counted from 0.
    """
    begin = "«"
    end = "»"
    if sys.stdout.isatty():
        begin = _BOLD
        end = _PLAIN
    space = " "  # without a tokenizer, tokens are numbers, and need spaces between them
    if any(" " in token or is_bytes(token) for token in tokens):
        space = ""
    before = joined(f"{token}{space}" for token in tokens[:place])
    after = joined(f"{space}{token}" for token in tokens[place + 1 :])
    marked = joined(tokens[place : place + 1])
    text = f"{before}{begin}{marked}{end}{after}"
    return text.replace("\n", "⏎").replace("\t", " ")
