"""Plots of a decomposition, drawn at the end of its final evaluation.

A figure has one panel per site. The panels form a grid that is at most about a page wide.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from spd_lightning import runs
from spd_lightning.decomposition.metrics import identity_order
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.files import make_folder
from spd_lightning.training.decompose import Decomposition
from spd_lightning.training.progress import Progress

MOST_MATRICES = 24
"""Maximum number of sites whose V and U are drawn; with more, the panels would be too small."""
MOST_ENTRIES = 1 << 24
"""Maximum number of entries of a V or U that is drawn. Embeddings with a row for every token take
long to draw and show little.
"""
MOST_CELLS = 400
"""Maximum rows and columns of a drawn matrix. In a larger matrix, each cell shows the largest entry
of a block.
"""


class Figures(Callback):
    """Draws the figures of section E into `<folder>/figures/` after `trainer.validate`.

    Before training, all figures are drawn once and discarded, so that errors show up early.

    Args:
        folder: the run's folder.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder) / "figures"

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not (trainer.is_global_zero and isinstance(pl_module, Decomposition)):
            return
        if trainer.sanity_checking:
            for _, figure in draw(pl_module):
                _rehearse(figure)
        elif trainer.state.fn == "validate":
            progress = trainer.progress_bar_callback
            stage: AbstractContextManager[Any] = nullcontext()
            if isinstance(progress, Progress):
                stage = progress.stage("figures", "figure")
            with stage as bar:
                for name, figure in draw(pl_module):
                    self._save(name, figure)
                    if bar is not None:
                        bar.update(1)

    def _save(self, name: str, figure: Any) -> None:
        make_folder(self.folder)
        path = self.folder / f"{name}.png"
        with runs.write_whole(path) as temporary:
            figure.savefig(temporary, format="png", dpi=110, bbox_inches="tight")
        figure.clear()


def _rehearse(figure: Any) -> None:
    """Draw a figure without its text, which takes most of the time, and discard it."""
    for axis in figure.axes:
        axis.set_axis_off()
        axis.set_title("")
    figure.set_layout_engine("none")
    figure.savefig(BytesIO(), format="png", dpi=10)
    figure.clear()


def draw(module: Decomposition) -> Iterator[tuple[str, Any]]:
    """Yield the names and figures that the module's last evaluation provides data for."""
    model = module.model
    arrays = {name: _numpy(array) for name, array in module.arrays.items()}
    sites = list(model.sites)
    yield "mean_importance", _lines(sites, arrays, "mean_importance", "mean importance")
    yield "density", _lines(sites, arrays, "density", "share of positions where it fires")
    yield "importance_histogram", _histograms(sites, arrays)
    if f"alone/{sites[0]}" in arrays:
        alone = {site: arrays[f"alone/{site}"] for site in sites}  # [features, C] each
        yield "importance", _heat_maps(sites, alone)
        permuted = {}
        for site in sites:
            order = identity_order(module.arrays[f"alone/{site}"]).numpy()
            permuted[site] = alone[site][:, order]
        yield "importance_permuted", _heat_maps(sites, permuted)
    matrices = _matrices(model)
    if matrices is not None:
        yield "components", matrices
    planar = [site for site in sites if model.sites[site].d_out == 2]
    if planar:
        yield "vectors", _vectors(model, planar[0])
    for site in sites:
        if site.endswith("mlp_in"):
            yield f"neurons_{site.replace('.', '_')}", _neurons(model, site)


def _axes(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """Return a figure and its grid of axes, each of them of this size in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = (width * columns, height * rows)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _panels(
    sites: Sequence[str], width: float, height: float, stacked: int = 1
) -> tuple[Any, list[list[Any]]]:
    """Return a figure with one panel per site, and the axes of each panel.

    Args:
        sites: the sites.
        width: width of an axis in inches, before the figure is fitted to the page.
        height: height of an axis in inches.
        stacked: number of axes above each other in a panel.
    """
    most_columns = 4 if len(sites) <= 16 else 6
    columns = min(len(sites), most_columns)
    rows = math.ceil(len(sites) / columns)
    scale = min(1.0, 16 / (columns * width))
    figure, axes = _axes(stacked * rows, columns, scale * width, scale * height)
    panels = list[list[Any]]()
    for number, site in enumerate(sites):
        row, column = divmod(number, columns)
        panel = [axes[stacked * row + offset, column] for offset in range(stacked)]
        panel[0].set_title(site, fontsize=9)
        panels.append(panel)
    used = {axis for panel in panels for axis in panel}
    for axis in axes.flat:
        axis.tick_params(labelsize=7)
        if axis not in used:
            axis.set_axis_off()
    return figure, panels


def _whole_numbers(*axes: Any) -> None:
    """Put ticks at integers only."""
    from matplotlib.ticker import MaxNLocator

    for axis in axes:
        axis.set_major_locator(MaxNLocator(6, integer=True))


def _lines(sites: list[str], arrays: dict[str, np.ndarray], kind: str, label: str) -> Any:
    """Plot the sorted values of all components, on a linear and a logarithmic axis."""
    figure, panels = _panels(sites, 3.6, 2.2, stacked=2)
    for panel, site in zip(panels, sites, strict=True):
        values = np.sort(arrays[f"{kind}/{site}"])[::-1]
        for axis, scale in zip(panel, ("linear", "log"), strict=True):
            drawn = np.maximum(values, 1e-9) if scale == "log" else values
            axis.plot(drawn, ".-", markersize=3, linewidth=0.8)
            axis.set_yscale(scale)
            _whole_numbers(axis.xaxis)
    figure.supxlabel("component, sorted", fontsize=9)
    figure.supylabel(label, fontsize=9)
    return figure


def _histograms(sites: list[str], arrays: dict[str, np.ndarray]) -> Any:
    figure, panels = _panels(sites, 3.6, 2.4)
    for (axis,), site in zip(panels, sites, strict=True):
        counts = arrays[f"histogram/{site}"]
        edges = np.linspace(0, 1, len(counts) + 1)
        axis.stairs(counts, edges, fill=True)
        axis.set_yscale("log")
    figure.supxlabel("importance", fontsize=9)
    figure.supylabel("positions × components", fontsize=9)
    return figure


def _heat_maps(sites: list[str], maps: dict[str, np.ndarray]) -> Any:
    figure, panels = _panels(sites, 4.2, 3.4)
    image = None
    for (axis,), site in zip(panels, sites, strict=True):
        image = axis.imshow(
            maps[site], vmin=0, vmax=1, cmap="Blues", aspect="auto", interpolation="nearest"
        )
        _whole_numbers(axis.xaxis, axis.yaxis)
    figure.supxlabel("component", fontsize=9)
    figure.supylabel("input feature alone at 0.75", fontsize=9)
    figure.colorbar(image, ax=[axis for (axis,) in panels], label="importance")
    return figure


def _matrices(model: ComponentModel) -> Any | None:
    """Draw V above U for the first sites that are small enough; return None if none is."""
    sites = []
    for site in model.sites:
        size = max(model[site].V.numel(), model[site].U.numel())
        if size <= MOST_ENTRIES:
            sites.append(site)
    sites = sites[:MOST_MATRICES]
    if not sites:
        return None
    figure, panels = _panels(sites, 4.2, 2.8, stacked=2)
    for panel, site in zip(panels, sites, strict=True):
        matrices = (model[site].V, model[site].U.T)
        labels = ("V: input", "U: output")
        for axis, matrix, label in zip(panel, matrices, labels, strict=True):
            image = _draw_matrix(axis, _numpy(matrix))
            axis.set_ylabel(label, fontsize=8)
            _whole_numbers(axis.xaxis, axis.yaxis)
            figure.colorbar(image, ax=axis).ax.tick_params(labelsize=7)
    figure.supxlabel("component", fontsize=9)
    return figure


def _draw_matrix(axis: Any, matrix: np.ndarray) -> Any:
    """Draw a matrix with a color scale around 0, and return its image."""
    limit = np.abs(matrix).max()
    rows, columns = matrix.shape
    return axis.imshow(
        _largest(matrix),
        vmin=-limit,
        vmax=limit,
        cmap="RdBu",
        aspect="auto",
        interpolation="nearest",
        extent=(-0.5, columns - 0.5, rows - 0.5, -0.5),
    )


def _largest(matrix: np.ndarray) -> np.ndarray:
    """Shrink a matrix to at most 400 × 400 cells, each the largest entry of its block by size."""
    for axis in (0, 1):
        size = matrix.shape[axis]
        cells = min(size, MOST_CELLS)
        starts = np.linspace(0, size, cells, endpoint=False).astype(int)
        high = np.maximum.reduceat(matrix, starts, axis)
        low = np.minimum.reduceat(matrix, starts, axis)
        matrix = np.where(high >= -low, high, low)
    return matrix


def _vectors(model: ComponentModel, site: str) -> Any:
    """Draw the columns of a weight with two outputs, next to those of its largest components."""
    V = _numpy(model[site].V)
    U = _numpy(model[site].U)
    weight = _numpy(model.sites[site].weight).T  # [d_in, 2]
    drawings = {"target": weight, "components, summed": V @ U}
    norms = np.linalg.norm(V, axis=0) * np.linalg.norm(U, axis=1)  # [C]
    for c in np.argsort(-norms)[:6]:
        drawings[f"component {c}"] = np.outer(V[:, c], U[c])
    figure, axes = _axes(2, 4, 2.4, 2.4)
    limit = 1.15 * np.abs(weight).max()
    for axis, (title, vectors) in zip(axes.flat, drawings.items(), strict=False):
        for number, (x, y) in enumerate(vectors):
            arrow = {"arrowstyle": "->", "color": f"C{number % 10}"}
            axis.annotate("", (x, y), (0, 0), arrowprops=arrow)
        axis.set(title=title, xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    for axis in list(axes.flat)[len(drawings) :]:
        axis.set_axis_off()
    return figure


def _neurons(model: ComponentModel, site: str) -> Any:
    """Draw each neuron's input weight for each feature, in the target and in one component."""
    W_in = _numpy(model.sites[site].weight)  # [neurons, d_in]
    V = _numpy(model[site].V)  # [d_in, C]
    U = _numpy(model[site].U)  # [C, neurons]
    embedding = _numpy(model.target.embedding)  # pyright: ignore[reportArgumentType]
    target = embedding @ W_in.T  # [features, neurons]
    read = embedding @ V  # [features, C]
    strength = read * np.linalg.norm(U, axis=1)
    best = np.abs(strength).argmax(axis=1)  # [features]: the strongest component
    read_by_best = read[np.arange(len(best)), best]
    component = read_by_best[:, None] * U[best]  # [features, neurons]
    figure, axes = _axes(1, 2, 4.6, 4.2)
    limit = np.abs(target).max()
    panels = ((target, "target"), (component, "one component per feature"))
    image = None
    for axis, (matrix, title) in zip(axes[0], panels, strict=True):
        image = axis.imshow(
            matrix, vmin=-limit, vmax=limit, cmap="RdBu", aspect="auto", interpolation="nearest"
        )
        axis.set(title=f"{site}: {title}", xlabel="neuron", ylabel="input feature")
    figure.colorbar(image, ax=axes[0].tolist(), label="input weight of the neuron")
    return figure


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().float().numpy()
