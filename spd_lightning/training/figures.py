"""Plots of a decomposition, drawn when its final evaluation ends.

A figure has a panel for each site, in a grid of several rows where there are many, so that it stays
about a page wide.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
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
"""Sites whose V and U are drawn; the picture of more would be all frames."""
MOST_ENTRIES = 1 << 24
"""Entries up to which a site's V and U are drawn; one with a row for every token says little, and
takes long.
"""
MOST_CELLS = 400
"""Rows and columns of a drawn matrix; of a larger one, each cell shows the largest entry of a
block.
"""


class Figures(Callback):
    """Draws the figures of section E into `<folder>/figures/` after `trainer.validate`.

    Before training begins all are drawn once and thrown away, so that what cannot be drawn fails at
    once.

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
            bar = trainer.progress_bar_callback
            with (
                bar.stage("figures", "figure")
                if isinstance(bar, Progress)
                else nullcontext() as drawn
            ):
                for name, figure in draw(pl_module):
                    self._save(name, figure)
                    if drawn is not None:
                        drawn.update(1)

    def _save(self, name: str, figure: Any) -> None:
        make_folder(self.folder)
        with runs.write_whole(self.folder / f"{name}.png") as temporary:
            figure.savefig(temporary, format="png", dpi=110, bbox_inches="tight")
        figure.clear()


def _rehearse(figure: Any) -> None:
    """Draws what a figure shows and none of its lettering, which takes most of the time."""
    for axis in figure.axes:
        axis.set_axis_off()
        axis.set_title("")
    figure.set_layout_engine("none")
    figure.savefig(BytesIO(), format="png", dpi=10)
    figure.clear()


def draw(module: Decomposition) -> Iterator[tuple[str, Any]]:
    """All figures that a module's last evaluation allows, by name."""
    model = module.model
    arrays = {k: v.detach().cpu().float().numpy() for k, v in module.arrays.items()}
    sites = list(model.sites)
    yield "mean_importance", _lines(sites, arrays, "mean_importance", "mean importance")
    yield "density", _lines(sites, arrays, "density", "share of positions where it fires")
    yield "importance_histogram", _histograms(sites, arrays)
    if f"alone/{sites[0]}" in arrays:
        yield "importance", _heat_maps(sites, {s: arrays[f"alone/{s}"] for s in sites})
        permuted = {
            s: arrays[f"alone/{s}"][:, identity_order(module.arrays[f"alone/{s}"]).numpy()]
            for s in sites
        }
        yield "importance_permuted", _heat_maps(sites, permuted)
    if (matrices := _matrices(model)) is not None:
        yield "components", matrices
    if any(model.sites[s].d_out == 2 for s in sites):
        yield "vectors", _vectors(model, next(s for s in sites if model.sites[s].d_out == 2))
    for site in sites:
        if site.endswith("mlp_in"):
            yield f"neurons_{site.replace('.', '_')}", _neurons(model, site)


def _axes(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _panels(
    sites: Sequence[str], width: float, height: float, stacked: int = 1
) -> tuple[Any, list[list[Any]]]:
    """A figure with `stacked` axes above each other for each site, in a grid no wider than a
    page.
    """
    columns = min(len(sites), 4 if len(sites) <= 16 else 6)
    scale = min(1.0, 16 / (columns * width))
    figure, axes = _axes(
        stacked * -(-len(sites) // columns), columns, scale * width, scale * height
    )
    held = [
        [axes[stacked * (k // columns) + s, k % columns] for s in range(stacked)]
        for k in range(len(sites))
    ]
    for (top, *_), site in zip(held, sites, strict=True):
        top.set_title(site, fontsize=9)
    for axis in {*axes.flat} - {axis for panel in held for axis in panel}:
        axis.set_axis_off()
    for axis in axes.flat:
        axis.tick_params(labelsize=7)
    return figure, held


def _whole_numbers(*axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    for axis in axes:
        axis.set_major_locator(MaxNLocator(6, integer=True))


def _lines(sites: list[str], arrays: dict[str, np.ndarray], kind: str, label: str) -> Any:
    """Sorted values of every component, on a linear and a logarithmic axis."""
    figure, panels = _panels(sites, 3.6, 2.2, stacked=2)
    for panel, site in zip(panels, sites, strict=True):
        values = np.sort(arrays[f"{kind}/{site}"])[::-1]
        for axis, scale in zip(panel, ("linear", "log"), strict=True):
            axis.plot(
                np.maximum(values, 1e-9) if scale == "log" else values,
                ".-",
                markersize=3,
                linewidth=0.8,
            )
            axis.set_yscale(scale)
            _whole_numbers(axis.xaxis)
    figure.supxlabel("component, sorted", fontsize=9)
    figure.supylabel(label, fontsize=9)
    return figure


def _histograms(sites: list[str], arrays: dict[str, np.ndarray]) -> Any:
    figure, panels = _panels(sites, 3.6, 2.4)
    for (axis,), site in zip(panels, sites, strict=True):
        counts = arrays[f"histogram/{site}"]
        axis.stairs(counts, np.linspace(0, 1, len(counts) + 1), fill=True)
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
    """V above U of the first sites whose matrices are of a size that can be drawn; None where there
    is no such site.
    """
    sizes = {site: max(model[site].V.numel(), model[site].U.numel()) for site in model.sites}
    sites = [site for site, size in sizes.items() if size <= MOST_ENTRIES][:MOST_MATRICES]
    if not sites:
        return None
    figure, panels = _panels(sites, 4.2, 2.8, stacked=2)
    for panel, site in zip(panels, sites, strict=True):
        for axis, name, rows in zip(panel, "VU", ("input", "output"), strict=True):
            matrix = _numpy(model[site].V if name == "V" else model[site].U.T)
            cells = _largest(matrix)
            limit = np.abs(matrix).max()
            extent = (-0.5, matrix.shape[1] - 0.5, matrix.shape[0] - 0.5, -0.5)
            image = axis.imshow(
                cells,
                vmin=-limit,
                vmax=limit,
                cmap="RdBu",
                aspect="auto",
                interpolation="nearest",
                extent=extent,
            )
            axis.set_ylabel(f"{name}: {rows}", fontsize=8)
            _whole_numbers(axis.xaxis, axis.yaxis)
            figure.colorbar(image, ax=axis).ax.tick_params(labelsize=7)
    figure.supxlabel("component", fontsize=9)
    return figure


def _largest(matrix: np.ndarray) -> np.ndarray:
    """The matrix in at most 400 × 400 cells; each shows the entry of largest size among those it
    stands for.
    """
    for axis in (0, 1):
        starts = np.linspace(
            0, matrix.shape[axis], min(matrix.shape[axis], MOST_CELLS), endpoint=False
        ).astype(int)
        high = np.maximum.reduceat(matrix, starts, axis)
        low = np.minimum.reduceat(matrix, starts, axis)
        matrix = np.where(high >= -low, high, low)
    return matrix


def _vectors(model: ComponentModel, site: str) -> Any:
    """Columns of a weight into two dimensions, beside those that its components write."""
    V, U = (_numpy(m) for m in (model[site].V, model[site].U))
    columns = [("target", _numpy(model.sites[site].weight).T), ("components, summed", V @ U)]
    columns += [(f"component {c}", np.outer(V[:, c], U[c])) for c in np.argsort(-_norms(V, U))[:6]]
    figure, axes = _axes(2, 4, 2.4, 2.4)
    limit = 1.15 * np.abs(columns[0][1]).max()
    for axis, (title, vectors) in zip(axes.flat, columns, strict=False):
        for number, (x, y) in enumerate(vectors):
            axis.annotate(
                "", (x, y), (0, 0), arrowprops={"arrowstyle": "->", "color": f"C{number % 10}"}
            )
        axis.set(title=title, xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    for axis in list(axes.flat)[len(columns) :]:
        axis.set_axis_off()
    return figure


def _neurons(model: ComponentModel, site: str) -> Any:
    """How strongly each neuron serves each input feature: in the target, and in the best component
    of the feature.
    """
    W_in, V, U = (_numpy(m) for m in (model.sites[site].weight, model[site].V, model[site].U))
    embedding = _numpy(model.target.embedding)  # pyright: ignore[reportArgumentType]
    target = embedding @ W_in.T
    strength = (embedding @ V) * np.linalg.norm(U, axis=1)
    best = np.abs(strength).argmax(axis=1)
    component = (embedding @ V)[np.arange(len(best)), best][:, None] * U[best]
    figure, axes = _axes(1, 2, 4.6, 4.2)
    limit = np.abs(target).max()
    for axis, matrix, title in (
        (axes[0, 0], target, "target"),
        (axes[0, 1], component, "one component a feature"),
    ):
        image = axis.imshow(
            matrix, vmin=-limit, vmax=limit, cmap="RdBu", aspect="auto", interpolation="nearest"
        )
        axis.set(title=f"{site}: {title}", xlabel="neuron", ylabel="input feature")
    figure.colorbar(image, ax=axes[0].tolist(), label="input weight of the neuron")
    return figure


def _norms(V: np.ndarray, U: np.ndarray) -> np.ndarray:
    return np.linalg.norm(V, axis=0) * np.linalg.norm(U, axis=1)


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().float().numpy()
