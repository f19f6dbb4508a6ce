"""Plots of a decomposition, drawn when its final evaluation ends."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from spd_lightning import runs
from spd_lightning.decomposition.metrics import identity_order
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.training.decompose import Decomposition


class Figures(Callback):
    """Draws the figures of section E into `<folder>/figures/` after `trainer.validate`.

    Args:
        folder: the run's folder.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder) / "figures"

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        final = trainer.state.fn == "validate" and trainer.is_global_zero
        if final and isinstance(pl_module, Decomposition):
            for name, figure in draw(pl_module):
                self._save(name, figure)

    def _save(self, name: str, figure: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with runs.write_whole(self.folder / f"{name}.png") as temporary:
            figure.savefig(temporary, format="png", dpi=110, bbox_inches="tight")
        figure.clear()


def draw(module: Decomposition) -> Iterator[tuple[str, Any]]:
    """All figures that a module's last evaluation allows, by name."""
    model, arrays = module.model, {k: v.detach().cpu().float().numpy() for k, v in module.arrays.items()}
    sites = list(model.sites)
    yield "mean_importance", _lines(sites, arrays, "mean_importance", "mean importance")
    yield "density", _lines(sites, arrays, "density", "share of positions where it fires")
    yield "importance_histogram", _histograms(sites, arrays)
    if f"alone/{sites[0]}" in arrays:
        yield "importance", _heat_maps(sites, {s: arrays[f"alone/{s}"] for s in sites})
        permuted = {s: arrays[f"alone/{s}"][:, identity_order(module.arrays[f"alone/{s}"]).numpy()] for s in sites}
        yield "importance_permuted", _heat_maps(sites, permuted)
    yield "components", _matrices(model)
    if any(model.sites[s].d_out == 2 for s in sites):
        yield "vectors", _vectors(model, next(s for s in sites if model.sites[s].d_out == 2))
    for site in sites:
        if site.endswith("mlp_in"):
            yield f"neurons_{site.replace('.', '_')}", _neurons(model, site)


def _axes(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return figure, axes


def _lines(sites: list[str], arrays: dict[str, np.ndarray], kind: str, label: str) -> Any:
    """Sorted values of every component, on a linear and a logarithmic axis."""
    figure, axes = _axes(2, len(sites), 3.6, 2.4)
    for column, site in enumerate(sites):
        values = np.sort(arrays[f"{kind}/{site}"])[::-1]
        for row, scale in enumerate(("linear", "log")):
            axis = axes[row, column]
            axis.plot(np.maximum(values, 1e-9) if scale == "log" else values, ".-", markersize=4, linewidth=0.8)
            axis.set_yscale(scale)
            axis.set(title=site if row == 0 else None, xlabel="component, sorted", ylabel=label)
    return figure


def _histograms(sites: list[str], arrays: dict[str, np.ndarray]) -> Any:
    figure, axes = _axes(1, len(sites), 3.6, 2.6)
    for axis, site in zip(axes[0], sites, strict=True):
        counts = arrays[f"histogram/{site}"]
        axis.stairs(counts, np.linspace(0, 1, len(counts) + 1), fill=True)
        axis.set_yscale("log")
        axis.set(title=site, xlabel="importance", ylabel="positions × components")
    return figure


def _heat_maps(sites: list[str], maps: dict[str, np.ndarray]) -> Any:
    figure, axes = _axes(1, len(sites), 4.2, 3.4)
    image = None
    for axis, site in zip(axes[0], sites, strict=True):
        image = axis.imshow(maps[site], vmin=0, vmax=1, cmap="Blues", aspect="auto", interpolation="nearest")
        axis.set(title=site, xlabel="component", ylabel="input feature alone at 0.75")
    figure.colorbar(image, ax=axes[0].tolist(), label="importance")
    return figure


def _matrices(model: ComponentModel) -> Any:
    """V and U of every site."""
    figure, axes = _axes(2, len(model.sites), 4.2, 3.0)
    for column, site in enumerate(model.sites):
        V, U = (_numpy(m) for m in (model[site].V, model[site].U))
        for axis, matrix, title, labels in (
            (axes[0, column], V, f"{site}: V", ("component", "input")),
            (axes[1, column], U, f"{site}: U", ("output", "component")),
        ):
            limit = np.abs(matrix).max()
            image = axis.imshow(matrix, vmin=-limit, vmax=limit, cmap="RdBu", aspect="auto", interpolation="nearest")
            axis.set(title=title, xlabel=labels[0], ylabel=labels[1])
            figure.colorbar(image, ax=axis)
    return figure


def _vectors(model: ComponentModel, site: str) -> Any:
    """Columns of a weight into two dimensions, beside those that its components write."""
    V, U = (_numpy(m) for m in (model[site].V, model[site].U))
    columns = [("target", _numpy(model.sites[site].weight).T), ("components, summed", V @ U)]
    columns += [(f"component {c}", np.outer(V[:, c], U[c])) for c in np.argsort(-_norms(V, U))[:6]]
    figure, axes = _axes(2, 4, 2.4, 2.4)
    limit = 1.15 * np.abs(columns[0][1]).max()
    for axis, (title, vectors) in zip(axes.flat, columns, strict=False):
        for number, (x, y) in enumerate(vectors):
            axis.annotate("", (x, y), (0, 0), arrowprops={"arrowstyle": "->", "color": f"C{number % 10}"})
        axis.set(title=title, xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    for axis in list(axes.flat)[len(columns) :]:
        axis.set_axis_off()
    return figure


def _neurons(model: ComponentModel, site: str) -> Any:
    """How strongly each neuron serves each input feature: in the target, and in the best component of the feature."""
    W_in, V, U = (_numpy(m) for m in (model.sites[site].weight, model[site].V, model[site].U))
    embedding = _numpy(model.target.embedding)  # pyright: ignore[reportArgumentType]
    target = embedding @ W_in.T
    strength = (embedding @ V) * np.linalg.norm(U, axis=1)
    best = np.abs(strength).argmax(axis=1)
    component = (embedding @ V)[np.arange(len(best)), best][:, None] * U[best]
    figure, axes = _axes(1, 2, 4.6, 4.2)
    limit = np.abs(target).max()
    for axis, matrix, title in ((axes[0, 0], target, "target"), (axes[0, 1], component, "one component a feature")):
        image = axis.imshow(matrix, vmin=-limit, vmax=limit, cmap="RdBu", aspect="auto", interpolation="nearest")
        axis.set(title=f"{site}: {title}", xlabel="neuron", ylabel="input feature")
    figure.colorbar(image, ax=axes[0].tolist(), label="input weight of the neuron")
    return figure


def _norms(V: np.ndarray, U: np.ndarray) -> np.ndarray:
    return np.linalg.norm(V, axis=0) * np.linalg.norm(U, axis=1)


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().float().numpy()
