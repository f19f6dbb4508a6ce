"""How well the graphs of a harvest hold up: edges against interventions, and how far in-edges add
up.
"""

from dataclasses import dataclass

import polars as pl

from spd_lightning.store import AGREEMENT, Store


@dataclass(frozen=True)
class Fidelity:
    """Figures of some graphs; None where the harvest holds nothing to tell them from.

    `gap` is the mean over prompts of Σ|activation − Σ in-edges| / Σ|activation|, of all edges,
    written or not. Of the `checked` edges, whose sources were switched off while all other sites
    stood still, `correlation` is Pearson's between edge and loss of the target, and
    `relative_error` is ‖loss − edge‖ / ‖edge‖, over all prompts together.
    """

    prompts: int
    edges: int
    gap: float | None
    checked: int
    correlation: float | None
    relative_error: float | None


def fidelity(store: Store, prompt: int | None = None) -> Fidelity:
    """The figures of a whole harvest, or of one prompt's graph.

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
    facts = store.collect(graphs.select(**sums))
    tried = store.collect(checks.select(**AGREEMENT))
    return Fidelity(**facts.row(0, named=True), **tried.row(0, named=True))
