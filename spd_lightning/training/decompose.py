"""The LightningModule that takes a target apart.

d = Decomposition(target="targets/tms_5-2", sites={"linear*": 20}, tied={"linear2": "linear1"})
Trainer(max_steps=2000).fit(d, SparseFeatures(5, 0.05, batch_size=1024))
"""

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch import Callback
from torch import Tensor, nn

from spd_lightning.decomposition.adversaries import PersistentAdversary
from spd_lightning.decomposition.importance import Importance
from spd_lightning.decomposition.losses import Faithfulness, Losses
from spd_lightning.decomposition.metrics import Part
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.decomposition.reconstruction import Pass
from spd_lightning.errors import BadInput
from spd_lightning.targets.data import generator_for
from spd_lightning.training.blocks import BlockModule
from spd_lightning.training.collapse import Collapse
from spd_lightning.training.evaluate import Evaluation, Totals, count, counts, figures_of
from spd_lightning.training.ladder import adversarial_ladder
from spd_lightning.training.schedule import Schedule
from spd_lightning.training.truth import lone_features, truth, verdict

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Optimiser:
    """AdamW without weight decay on components and importance functions.

    Args:
        lr: full learning rate.
        importance_lr: that of the importance functions, where it differs.
        betas: of AdamW.
        schedule: how the learning rate moves.
        clip_components: largest gradient norm of all V and U together; none where left out.
        clip_importance: largest gradient norm of all importance functions together; none where left out.
        components: whether V and U are trained at all; if not they stay as drawn, which makes a baseline.
    """

    lr: float = 1e-3
    importance_lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Schedule = field(default_factory=lambda: Schedule("cosine"))
    clip_components: float | None = None
    clip_importance: float | None = None
    components: bool = True

    def __post_init__(self):
        if self.lr <= 0:
            raise BadInput(f"lr {self.lr} in optimiser: it must be above 0")


@dataclass(frozen=True)
class WarmUp:
    """Updates on faithfulness alone before training begins, so that components start by adding up to the weights.

    Args:
        steps: how many; 0 for none.
        lr: their own AdamW's learning rate.
        weight_decay: and weight decay.
    """

    steps: int = 200
    lr: float = 0.01
    weight_decay: float = 0.1


class Decomposition(BlockModule):
    """Splits a trained network's weight matrices into rank-one components and learns which of them each input needs.

    Source: SPD (arXiv 2506.20790); the laws of docs/method.md.

    Args:
        target: a trained network, or the name of a config that trains one (kept, and reused by every decomposition).
        sites: fnmatch patterns of module names, each with a number of components.
        tied: site → partner, where the site's weight is the transpose of its partner's (D9).
        delta: whether what components miss of a weight takes part in masked runs (D3).
        importance: how causal importances are computed (G1).
        losses: the terms of the training loss (L7).
        optimiser: of components and importance functions.
        warm_up: updates on faithfulness alone, before the first step.
        evaluation: what to measure, and what is known to be true.
        inner_steps: optimiser steps taken in one `training_step`.
        log_every: updates between two logged ones.
        checkpoint_every: updates between two checkpoints, rounded up to whole `training_step`s.
        threads: processor threads; as many as torch takes where left out. Small models are quickest on one.
        seed: of initial values and masks.
    """

    def __init__(
        self,
        target: str | nn.Module,
        sites: dict[str, int],
        tied: dict[str, str] | None = None,
        delta: bool = True,
        importance: Importance = Importance(),  # noqa: B008  (frozen, like all defaults below)
        losses: Losses = Losses(),  # noqa: B008
        optimiser: Optimiser = Optimiser(),
        warm_up: WarmUp = WarmUp(),
        evaluation: Evaluation = Evaluation(),  # noqa: B008
        inner_steps: int = 10,
        log_every: int = 50,
        checkpoint_every: int = 500,
        threads: int | None = None,
        seed: int = 0,
    ):
        super().__init__(optimiser.schedule, inner_steps, log_every, checkpoint_every, threads)
        self.settings = {"sites": dict(sites), "tied": dict(tied or {}), "delta": delta, "importance": importance}
        self.settings |= {"evaluation": evaluation, "seed": seed}
        network, self.target_spec = _network(target)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = ComponentModel(network, sites, tied, importance, delta)
        self.losses, self.optimiser, self.warm_up = losses, optimiser, warm_up
        self.evaluation, self.seed = evaluation, seed
        self.arrays: dict[str, Tensor] = {}
        self.figures: dict[str, float] = {}
        self.warning: str | None = None
        self.origin, self.digest = "", ""  # the run it was loaded from, and its weights' digest
        self._inert: bool | None = None
        self._adversaries: dict[str, PersistentAdversary] = {}
        self._resumed: dict[str, Any] = {}  # the state of adversaries from a checkpoint, until they are made
        self._progress = 0.0
        self._rehearsed = False  # whether the figures are those of the evaluation before step 0

    @classmethod
    def from_pretrained(cls, reference: str | Path, target: nn.Module | None = None) -> "Decomposition":
        """A decomposition from a run: its name, its folder, or `mlflow:…` / `wandb:…` in a tracker.

        Args:
            reference: the run.
            target: a network like the decomposed one, where that was given as an object; it gets its weights.

        Raises:
            BadInput: there is none, or its files are damaged or belong to another model.
        """
        from spd_lightning.training.checkpoint import load_decomposition

        return load_decomposition(reference, target)

    # ---- training -----------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> torch.optim.Optimizer:
        o, importance = self.optimiser, list(self.model.importance_function.parameters())
        groups = [
            {"params": list(self.model.components.parameters()), "peak": o.lr if o.components else 0.0},
            {"params": importance, "peak": o.lr if o.importance_lr is None else o.importance_lr},
        ]
        return torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, weight_decay=0.0, fused=True)

    def configure_callbacks(self) -> list[Callback]:
        return [Collapse()]

    def on_train_start(self) -> None:
        if self.global_step == 0 and self._rehearsed:
            self._log_figures()
        if self.global_step == 0 and self.warm_up.steps:
            self._warm_up()

    def _warm_up(self) -> None:
        """Faithfulness alone, with an optimiser of its own."""
        w, loss, term = self.warm_up, torch.tensor(0.0), Faithfulness()
        optimiser = torch.optim.AdamW(self.model.components.parameters(), lr=w.lr, weight_decay=w.weight_decay)
        with torch.enable_grad():
            for _ in range(w.steps):
                loss = term(self.model)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        if self.trainer.is_global_zero:
            log.info("faithfulness after %d warm-up steps: %.2e", w.steps, loss.item())

    @property
    def network(self) -> nn.Module:
        """The target."""
        return self.model.target

    def objective(self, batch: Tensor, step: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The training loss of one batch (L7); masks are a pure function of (seed, step, rank)."""
        rows, weights = self._merged(batch)
        run = Pass.of(self.model, rows, self._generator("masks", step), weights, sample=True)
        run.adversaries, self._progress = self.adversaries(run), step / max(1, self.steps - 1)
        return self.losses(run, self._progress)

    def adversaries(self, run: Pass) -> Mapping[str, PersistentAdversary]:
        """The persistent adversary of every reconstruction that has one, made when the first batch shows the shapes."""
        for name, settings in self.losses.lasting.items():
            if name not in self._adversaries:
                rank, world = (self.global_rank, self.trainer.world_size) if self._trainer else (0, 1)
                generator, g = self._generator(f"adversary/{name}", 0, rank=0), run.importances.lower
                self._adversaries[name] = PersistentAdversary(settings, g, generator, rank, world)
                if name in self._resumed:
                    self._adversaries[name].restore(self._resumed.pop(name))
        return self._adversaries

    def after_backward(self) -> None:
        for adversary in self._adversaries.values():
            adversary.finish(self._progress)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["adversaries"] = {name: adversary.state() for name, adversary in self._adversaries.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._resumed = checkpoint.get("adversaries", {})

    def _generator(self, stream: str, step: int, rank: int | None = None) -> torch.Generator:
        generator = generator_for(self.seed, stream, step, self.global_rank if rank is None else rank)
        if self.device.type == "cpu":
            return generator
        return torch.Generator(self.device).manual_seed(generator.initial_seed() % 2**63)

    def _merged(self, batch: Tensor) -> tuple[Tensor, Float[Tensor, " rows"] | None]:
        """A batch with all its zero rows as one, weighted by their number; exact where zeros are inert.

        Sparse inputs are mostly zero rows. Where a zero input is zero at every site, masks cannot change its output:
        it adds nothing to reconstruction, and one row says all about its importances. (Counting rows would stall a
        GPU, where the rows cost little; persistent adversaries know rows by their place.)
        """
        if batch.device.type != "cpu" or not batch.is_floating_point() or batch.ndim != 2 or self.losses.lasting:
            return batch, None
        if self._inert is None:
            inputs = self.model.clean(torch.zeros_like(batch[:1])).inputs
            self._inert = not any(x.any() for x in inputs.values())
        if not self._inert:
            return batch, None
        rows = torch.cat([batch[batch.any(1)], batch.new_zeros(1, batch.shape[1])])
        weights = batch.new_ones(len(rows))
        weights[-1] = len(batch) - len(rows) + 1
        return rows, weights

    def clip(self) -> Mapping[str, Tensor]:
        """Bounds the gradients of components and of importance functions separately."""
        o = self.optimiser
        parts = {
            "components": (self.model.components, o.clip_components),
            "importance": (self.model.importance_function, o.clip_importance),
        }
        logged = self.global_step % self.log_every == 0
        return {
            f"gradient_norm/{name}": nn.utils.clip_grad_norm_(part.parameters(), bound or float("inf"))
            for name, (part, bound) in parts.items()
            if bound or logged
        }

    # ---- evaluation ---------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self._totals, self._ladder = Totals(), dict[str, float]()

    def validation_step(self, batch: Tensor, batch_index: int) -> None:
        with torch.inference_mode(False), torch.no_grad(), self._full_precision():  # an adversary needs gradients
            batch, first = batch.clone(), self._generator("evaluation", batch_index, rank=0)
            run = Pass.of(self.model, batch, first)
            count(self.model, run, self.evaluation, self._totals, Part(self.global_rank, self.trainer.world_size))
            if batch_index == 0:
                self._ladder = adversarial_ladder(self.model, batch, self.evaluation)
                self._width = batch.shape[1] if batch.is_floating_point() else None

    def _full_precision(self) -> AbstractContextManager[Any]:
        """Figures are taken in float32 whatever the training's precision; a target in half precision keeps its own."""
        half = any(p.dtype in (torch.float16, torch.bfloat16) for p in self.model.target.parameters())
        return nullcontext() if half else torch.autocast(self.device.type, enabled=False)

    def on_validation_epoch_end(self) -> None:
        with torch.no_grad():
            self.adopt(self._figures())
        self.log_dict({k: float(v) for k, v in self.figures.items()}, logger=False, sync_dist=True)
        self._rehearsed = self.trainer.sanity_checking  # then loggers are not listening yet
        if not self._rehearsed:
            self._log_figures()

    def _log_figures(self) -> None:
        for logger in self.loggers:
            logger.log_metrics(self.figures, self.global_step)

    def adopt(self, figures: Mapping[str, Any]) -> None:
        """Takes the figures of an evaluation, perhaps one that another process ran, and judges them."""
        self.figures = {k: round(float(v)) if counts(k) else float(v) for k, v in figures.items() if k != "loss"}
        known = "features" in self.figures
        self.warning = verdict(self.figures, self.evaluation, round(self.figures["features"])) if known else None

    def _figures(self) -> dict[str, float]:
        totals, settings = self._totals.over_devices(), self.evaluation
        found = figures_of(self.model, totals, settings) | self._ladder
        found["loss/faithfulness"] = float(Faithfulness()(self.model))
        self.arrays = {f"mean_importance/{k[11:]}": totals.mean(k) for k in totals.sums if k.startswith("importance/")}
        self.arrays |= {f"density/{k[6:]}": totals.mean(k) for k in totals.sums if k.startswith("fired/")}
        self.arrays |= {k: v for k, v in totals.sums.items() if k.startswith("histogram/")}
        if self._width is not None:
            alone = lone_features(self.model, self._width)
            self.arrays |= {f"alone/{site}": g for site, g in alone.importances.items()}
            found |= {"features": self._width, **truth(self.model, alone, settings)}
        return found

    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if batch_idx == 0:
            self.try_on(batch.inputs)

    def predict_step(self, batch: Any, batch_index: int) -> None:
        """Nothing by itself: harvesters, callbacks that share the pass, read the batch (see harvest/)."""


def _network(target: str | nn.Module) -> tuple[nn.Module, dict[str, Any] | None]:
    """The target itself and how to build it anew (None for one given as an object)."""
    if isinstance(target, nn.Module):
        return target, None
    from spd_lightning.training.pretraining import trained_target

    return trained_target(target)
