"""The components page: a site's importances on probe inputs, its matrices, and its firing rates."""

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

    `over` chooses the importance that represents a text: the mean over its positions, or the
    largest, which is often 1 in a long text.
    """

    site: str | None = None
    permuted: bool = True
    over: Literal["mean", "largest"] = "mean"


@dataclass(frozen=True)
class ComponentPage:
    """A site's components, ready to draw.

    `order` holds the component of each column, for the importances and for V and U. `prompts` holds
    the names of the rows of `importances`. `over` is None if prompts have one position. `weights`
    is None for a harvest without its run. `note` says what is not shown.
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
    """Return the page of one site.

    Args:
        store: The harvest.
        run: The folder of the harvest's run, which contains the weights.
        selection: The site, and how to show it.

    Raises:
        BadInput: the harvest has no such site, or a file cannot be read.
    """
    known = sites(store)
    if not known:
        raise BadInput(
            f"harvest '{store.path}': it has no sites with components; run predict again"
        )
    site = selection.site or known[0]
    prompts = prompt_list(store)
    if "probe" in prompts["split"]:
        prompts = prompts.filter(pl.col("split") == "probe")
    shown = prompts.head(MOST_PROMPTS)
    over = None if store.manifest["kind"] == "vectors" else selection.over
    prompt_ids = shown["prompt_id"].to_list()
    matrix = importance_matrix(store, prompt_ids, site, over or "largest")  # [prompt, C]
    order = _order(matrix, over is not None, selection.permuted)[:MOST_COMPONENTS]
    weights = factors(run, site)
    if weights is not None:
        shown_weights = Factors(weights.V[:, order], weights.U[order])
    else:
        shown_weights = None
    return ComponentPage(
        sites=known,
        site=site,
        prompts=shown["label"].to_list(),
        order=order,
        importances=matrix[:, order],
        weights=shown_weights,
        summary=component_summary(store, site),
        note=_note(matrix, len(prompts), weights is None),
        over=over,
    )


def _order(matrix: np.ndarray, texts: bool, permuted: bool) -> Int64[np.ndarray, " C"]:
    """Return the component in each column of the matrix."""
    if not permuted:
        return np.arange(matrix.shape[1])
    return size_order(matrix) if texts else identity_order(matrix)


def _note(matrix: np.ndarray, n_prompts: int, bare: bool) -> str:
    """Return sentences that say what is not shown."""
    sentences = []
    if matrix.shape[1] > MOST_COMPONENTS:
        sentences.append(f"{MOST_COMPONENTS} of {matrix.shape[1]} components are shown.")
    if n_prompts > MOST_PROMPTS:
        sentences.append(f"{MOST_PROMPTS} of {n_prompts} prompts are shown.")
    if bare:
        sentences.append(
            "The matrices V and U are missing: the decomposition is not in the folder of the run."
        )
    return " ".join(sentences)


def widgets(library: Library) -> Panel:
    """Create the page's controls and plots."""
    import gradio as gr

    with gr.Row(elem_classes="spd-controls"):
        site = gr.Dropdown(label="Site", choices=[], container=False, scale=0, min_width=310)
        permuted = gr.Checkbox(label=IDENTITY, value=True, container=False)
        over = gr.Radio(
            choices=[("mean over a text", "mean"), ("largest in a text", "largest")],
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
            selection = ComponentSelection(
                site=wanted if wanted in sites(store) else None,
                permuted=bool(permute),
                over="largest" if wanted_over == "largest" else "mean",
            )
            owner = library.run(run)
            page = page_data(store, owner.path, selection)
            first = int(page.order[0])
            shown, edges = edge_tables.update(owner, page.site, c, first, len(page.summary))
        except BadInput as error:
            unchanged = [gr.update()] * 3
            hidden = [gr.update(visible=False)] * 6
            return [*unchanged, problem(str(error)), *hidden]
        known_sites = [(shortened(name), name) for name in page.sites]
        has_edges = shown is not None
        return [
            gr.update(choices=known_sites, value=page.site),
            gr.update(label=SIZE if page.over else IDENTITY),
            gr.update(visible=page.over is not None),
            sentence(page.note),
            *[gr.update(value=figure, visible=figure is not None) for figure in figures(page)],
            gr.update(value=shown, visible=has_edges),
            gr.update(value=edges, visible=has_edges),
        ]

    controls = [site, permuted, over]
    return Panel(
        draw, outputs=[*controls, note, *charts, component, tables], inputs=[*controls, component]
    )


def figures(page: ComponentPage) -> list[Any]:
    """Return the page's plots: importances, V, U (None without weights), and the ranked bars."""
    columns = [str(c) for c in page.order]
    prompts = [name if len(name) <= 30 else f"{name[:29]}…" for name in page.prompts]
    widest = max(map(len, [*prompts, "output 00"]))
    left = 24 + 7 * widest  # one margin for all plots, so that their columns are aligned
    title = f"Causal importance of the components of {shortened(page.site, 60)}"
    if page.over:
        title += f", {'mean over' if page.over == 'mean' else 'largest in'} each text"
    importances = plots.heat_map(
        page.importances, prompts, columns, title=title, entry="importance", left=left
    )
    V = U = None
    if page.weights is not None:
        V = _matrix("V", "reads", page.weights.V, "input", columns, left)
        U = _matrix("U", "writes", page.weights.U.T, "output", columns, left)
    return [importances, V, U, plots.ranked_bars(page.summary)]


def _matrix(
    name: str, verb: str, matrix: np.ndarray, end: str, columns: list[str], left: int
) -> Any:
    """Draw V or U as a heat map.

    If it has too many rows, as for an embedding, only those with the largest entries are shown.
    """
    title = f"{name}: what each component {verb}"
    shown = np.arange(len(matrix))
    if len(matrix) > MOST_ROWS:
        largest = np.abs(matrix).max(axis=1)
        order = np.argsort(-largest, kind="stable")
        shown = np.sort(order[:MOST_ROWS])
        title += f" ({MOST_ROWS} of {len(matrix)} rows, those with the largest entries)"
    return plots.heat_map(
        matrix[shown],
        [f"{end} {row}" for row in shown],
        columns,
        title=title,
        entry=name,
        left=left,
        signed=True,
    )
