"""The components page: a site's importances on probe inputs, its matrices, how often its components
fire.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
from jaxtyping import Float32, Int64

from spd_lightning.analysis.components import (
    component_summary,
    identity_order,
    importance_matrix,
    sites,
    size_order,
)
from spd_lightning.analysis.prompts import prompt_list
from spd_lightning.analysis.weights import Factors, factors
from spd_lightning.errors import BadInput
from spd_lightning.store import Store
from spd_lightning.viewer import edge_tables, plots
from spd_lightning.viewer.library import Library
from spd_lightning.viewer.panel import Panel, problem, sentence, shortened

IDENTITY, SIZE = "Permute columns toward the identity", "Most important columns first"
MOST_PROMPTS, MOST_COMPONENTS, MOST_ROWS = 200, 300, 512


@dataclass(frozen=True)
class ComponentSelection:
    """The selected site (the first one if None), and whether to permute columns.

    `over` says which importance stands for a text: the mean over its positions, or the largest,
    which in a long text is often 1.
    """

    site: str | None = None
    permuted: bool = True
    over: Literal["mean", "largest"] = "mean"


@dataclass(frozen=True)
class ComponentPage:
    """A site's components, ready to draw.

    `order` names the component in each column, of the importances as of V and U; `prompts` the rows
    of `importances`. `over` is None where prompts have one position, `weights` for a harvest
    without its run; `note` says whatever was left out.
    """

    sites: list[str]
    site: str
    prompts: list[str]
    order: Int64[np.ndarray, " shown"]
    importances: Float32[np.ndarray, "prompt shown"]
    weights: Factors | None
    summary: pl.DataFrame
    note: str
    over: Literal["mean", "largest"] | None = None


def page_data(store: Store, run: Path, selection: ComponentSelection) -> ComponentPage:
    """The page of one site.

    Args:
        store: The harvest.
        run: The folder of the run it belongs to, where the weights are.
        selection: What to show.

    Raises:
        BadInput: the harvest has no such site, or a file cannot be read.
    """
    known = sites(store)
    if not known:
        raise BadInput(
            f"harvest '{store.path}': it has no site with components; harvest again with `predict`"
        )
    site = selection.site or known[0]
    listed = prompt_list(store)
    probes = listed.filter(pl.col("split") == "probe") if "probe" in listed["split"] else listed
    shown = probes.head(MOST_PROMPTS)
    over = None if store.manifest["kind"] == "vectors" else selection.over
    matrix = importance_matrix(store, shown["prompt_id"].to_list(), site, over or "largest")
    permuted = size_order(matrix) if over else identity_order(matrix)
    order = (permuted if selection.permuted else np.arange(matrix.shape[1]))[:MOST_COMPONENTS]
    weights = factors(run, site)
    return ComponentPage(
        sites=known,
        site=site,
        prompts=shown["label"].to_list(),
        order=order,
        importances=matrix[:, order],
        weights=weights and Factors(weights.V[:, order], weights.U[order]),
        summary=component_summary(store, site),
        note=_note(matrix, len(probes), weights is None),
        over=over,
    )


def _note(matrix: np.ndarray, n_probes: int, bare: bool) -> str:
    sentences = []
    if matrix.shape[1] > MOST_COMPONENTS:
        sentences.append(f"{MOST_COMPONENTS} of {matrix.shape[1]} components are shown.")
    if n_probes > MOST_PROMPTS:
        sentences.append(f"{MOST_PROMPTS} of {n_probes} prompts are shown.")
    if bare:
        sentences.append(
            "The matrices V and U are not here: this harvest stands without its run's "
            "decomposition."
        )
    return " ".join(sentences)


def widgets(library: Library) -> Panel:
    """The page's controls and plots."""
    import gradio as gr

    with gr.Row(elem_classes="spd-controls"):
        site = gr.Dropdown(label="Site", choices=[], container=False, scale=0, min_width=310)
        permuted = gr.Checkbox(label=IDENTITY, value=True, container=False)
        kinds = [("mean over a text", "mean"), ("largest in a text", "largest")]
        over = gr.Radio(
            kinds,
            value="mean",
            show_label=False,
            container=False,
            visible=False,
            scale=0,
            min_width=330,
        )
    note = gr.HTML(apply_default_css=False)
    charts = [
        gr.Plot(label=name, container=False, show_label=False)
        for name in ("importance", "V", "U", "bars")
    ]
    with gr.Row(elem_classes="spd-controls"):
        component = gr.Number(
            label="Component", precision=0, minimum=0, visible=False, scale=0, min_width=180
        )
    tables = gr.HTML(apply_default_css=False, visible=False)

    def draw(
        run: str, harvest: str | None, wanted: Any, permute: Any, wanted_over: Any, c: Any
    ) -> list[Any]:
        try:
            store = library.store(run, harvest)
            known = wanted if wanted in sites(store) else None
            kind = "largest" if wanted_over == "largest" else "mean"
            held = library.run(run)
            page = page_data(store, held.path, ComponentSelection(known, bool(permute), kind))
            shown, edges = edge_tables.update(
                held, page.site, c, int(page.order[0]), len(page.summary)
            )
        except BadInput as error:
            return [*[gr.update()] * 3, problem(str(error)), *[gr.update(visible=False)] * 6]
        drawn = [gr.update(value=figure, visible=figure is not None) for figure in figures(page)]
        known_sites = [(shortened(name), name) for name in page.sites]
        controls = [
            gr.update(choices=known_sites, value=page.site),
            gr.update(label=SIZE if page.over else IDENTITY),
        ]
        below = [gr.update(value=value, visible=shown is not None) for value in (shown, edges)]
        return [
            *controls,
            gr.update(visible=page.over is not None),
            sentence(page.note),
            *drawn,
            *below,
        ]

    controls = [site, permuted, over]
    return Panel(
        draw, outputs=[*controls, note, *charts, component, tables], inputs=[*controls, component]
    )


def figures(page: ComponentPage) -> list[Any]:
    """The page's plots: importances, V, U (None without weights), and the ranked bars."""
    columns = [str(c) for c in page.order]
    prompts = [name if len(name) <= 30 else f"{name[:29]}…" for name in page.prompts]
    left = 24 + 7 * max(
        map(len, [*prompts, "output 00"])
    )  # one margin for all, so that columns stand in line
    title = f"Causal importance of the components of {shortened(page.site, 60)}"
    if page.over:
        title += f", {'mean over' if page.over == 'mean' else 'largest in'} each text"
    heat = plots.heat_map(
        page.importances, prompts, columns, title=title, entry="importance", left=left
    )
    bars = plots.ranked_bars(page.summary)
    if page.weights is None:
        return [heat, None, None, bars]
    sides = [("V", "reads", page.weights.V, "input"), ("U", "writes", page.weights.U.T, "output")]
    return [
        heat,
        *(_matrix(name, verb, matrix, end, columns, left) for name, verb, matrix, end in sides),
        bars,
    ]


def _matrix(
    name: str, verb: str, matrix: np.ndarray, end: str, columns: list[str], left: int
) -> Any:
    """A heat map of V or U; of a matrix with very many rows (an embedding), of the rows with the
    largest entries.
    """
    title = f"{name}: what each component {verb}"
    shown = np.arange(len(matrix))
    if len(matrix) > MOST_ROWS:
        shown = np.sort(np.argsort(-np.abs(matrix).max(axis=1), kind="stable")[:MOST_ROWS])
        title += f" ({MOST_ROWS} of {len(matrix)} rows, those with the largest entries)"
    rows = [f"{end} {i}" for i in shown]
    return plots.heat_map(
        matrix[shown], rows, columns, title=title, entry=name, left=left, signed=True
    )
