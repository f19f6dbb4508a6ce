"""Quality of the graphs of a harvest: edges against interventions, and sums of in-edges."""

from dataclasses import dataclass

import polars as pl

from spd_lightning.store import AGREEMENT, Store


@dataclass(frozen=True)
class Fidelity:
    """Quality figures of some graphs; None if the harvest has no data for a figure.

    `gap` is the mean over prompts of Σ|activation − Σ in-edges| / Σ|activation|. It counts all
    edges, including those that were not stored.

    The sources of the `checked` edges were ablated one by one while all other sites were held
    fixed, and the loss of the target's value was measured. Over the checked edges of all prompts,
    `correlation` is Pearson's r between edge and loss, and `relative_error` is
    ‖loss − edge‖ / ‖edge‖.
    """

    prompts: int
    edges: int
    gap: float | None
    checked: int
    correlation: float | None
    relative_error: float | None


def fidelity(store: Store, prompt: int | None = None) -> Fidelity:
    """Return the quality figures of a whole harvest, or of one prompt's graph.

    Raises:
        BadInput: a file is damaged.
    """
    graphs = store.scan("graphs", prompt)
    checks = store.scan("checks", prompt)
    sums = {
        "prompts": pl.len(),
        "edges": pl.col("edges").cast(pl.Int64).sum(),
        "gap": pl.col("gap").mean(),
    }
    totals = store.collect(graphs.select(**sums))
    agreement = store.collect(checks.select(**AGREEMENT))
    return Fidelity(**totals.row(0, named=True), **agreement.row(0, named=True))
