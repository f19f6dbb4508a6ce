"""The LightningModule that takes a target apart.

train_target("targets/tms_5-2")  # once: it is kept
d = Decomposition("targets/tms_5-2", sites={"linear*": 20}, tied={"linear2": "linear1"})
Trainer(max_steps=2000).fit(d, SparseFeatures(5, 0.05, batch_size=1024))
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch import Callback
from torch import Tensor, nn

from spd_lightning.data.modules import generator_for
from spd_lightning.decomposition.adversaries import PersistentAdversary
from spd_lightning.decomposition.importance import Importance
from spd_lightning.decomposition.intervention import (
    Base,
    Intervened,
    intervene,
    named_edits,
    places,
)
from spd_lightning.decomposition.losses import Faithfulness, Losses, joined_means
from spd_lightning.decomposition.metrics import Part
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.decomposition.reconstruction import LossContext
from spd_lightning.errors import BadInput, Diverged, check_range
from spd_lightning.training.collapse_monitor import CollapseMonitor
from spd_lightning.training.evaluate import Evaluation, Totals, count, counts, figures_of
from spd_lightning.training.ground_truth import lone_features, truth, verdict
from spd_lightning.training.multi_step import LOWER, MultiStepModule
from spd_lightning.training.open_target import open_target
from spd_lightning.training.optimizer import Optimizer
from spd_lightning.training.pgd_sweep import pgd_sweep
from spd_lightning.training.saved import SavedDecomposition, save_decomposition

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FaithfulnessWarmup:
    """Updates on faithfulness alone before training begins, so that components start by adding up
    to the weights.

    Args:
        steps: how many; 0 for none.
        lr: their own AdamW's learning rate.
        weight_decay: and weight decay.
    """

    steps: int = 200
    lr: float = 0.01
    weight_decay: float = 0.1

    def __post_init__(self):
        check_range("warm_up", least=0, whole=True, steps=self.steps)
        check_range("warm_up", above=0, lr=self.lr)
        check_range("warm_up", least=0, weight_decay=self.weight_decay)


class Decomposition(MultiStepModule):
    """Splits a trained network's weight matrices into rank-one components and learns which of them
    each input needs.

    Source: SPD (arXiv 2506.20790); the laws of docs/method.md.

    Args:
        target: a trained network, or a reference to one: a config that has trained it (see
            `train_target`), or `hf:<folder or hub name>`, or `decoder:<folder or hub name>`.
        sites: fnmatch patterns of module names, each with a number of components.
        tied: site → partner, where the site's weight is the transpose of its partner's (D9).
        delta: whether what components miss of a weight takes part in masked runs (D3).
        importance: how causal importances are computed (G1).
        losses: the terms of the training loss (L7).
        optimizer: of components and importance functions.
        warm_up: updates on faithfulness alone, before the first step.
        evaluation: what to measure, and what is known to be true.
        inner_steps: optimizer steps taken in one `training_step`.
        log_every: updates between two logged ones.
        checkpoint_every: updates between two checkpoints, rounded up to whole `training_step`s.
        threads: processor threads; as many as torch takes if omitted. Small models are quickest on
            one.
        micro_batches: equal parts in which a batch is taken, one after the other: less memory, the
            update of the whole batch. Masks are drawn, and fresh adversaries climb, for each part
            on its own.
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
        optimizer: Optimizer = Optimizer(),  # noqa: B008
        warm_up: FaithfulnessWarmup = FaithfulnessWarmup(),
        evaluation: Evaluation = Evaluation(),  # noqa: B008
        inner_steps: int = 10,
        log_every: int = 50,
        checkpoint_every: int = 500,
        threads: int | None = None,
        micro_batches: int = 1,
        seed: int = 0,
    ):
        super().__init__(
            optimizer.schedule, inner_steps, log_every, checkpoint_every, threads, micro_batches
        )
        losses.check_adversaries(delta)
        for name, adversary in losses.persistent.items():
            if adversary.particles and micro_batches > 1:
                raise BadInput(
                    f"micro_batches {micro_batches} with particles in reconstruction '{name}': a "
                    "pool climbs on whole "
                    "batches; leave particles out, or micro_batches"
                )
        self.settings = {
            "sites": dict(sites),
            "tied": dict(tied or {}),
            "delta": delta,
            "importance": importance,
        }
        self.settings |= {"evaluation": evaluation, "seed": seed}
        network, self.target_spec = (
            open_target(target) if isinstance(target, str) else (target, None)
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = ComponentModel(network, sites, tied, importance, delta)
        self.losses, self.optimizer, self.warm_up = losses, optimizer, warm_up
        self.evaluation, self.seed = evaluation, seed
        self.arrays: dict[str, Tensor] = {}
        self.figures: dict[str, float] = {}
        self.warning: str | None = None
        self.origin, self.digest = "", ""  # the run it was loaded from, and its weights' digest
        self._inert: bool | None = None
        self._adversaries: dict[str, PersistentAdversary] = {}
        self._resumed: dict[
            str, Any
        ] = {}  # the state of adversaries from a checkpoint, until they are made
        self._progress = 0.0
        self._frequencies: Tensor | None = None
        self._rehearsed = False  # whether the figures are those of the evaluation before step 0

    @classmethod
    def from_pretrained(
        cls, reference: str | Path, target: nn.Module | None = None
    ) -> "Decomposition":
        """A decomposition from a run: its name, its folder, or `mlflow:…` / `wandb:…` in a tracker.

        Args:
            reference: the run.
            target: a network like the decomposed one, where that was given as an object; it gets
                its weights.

        Raises:
            BadInput: there is none, or its files are damaged or belong to another model.
        """
        saved = SavedDecomposition.read(reference)
        module = cls(saved.network(target), **saved.settings)
        saved.load_into(module.model)
        module.target_spec = saved.target_spec
        module.origin = saved.folder.resolve().name
        module.digest = saved.digest
        return module.eval()

    def save(self, folder: Path) -> None:
        """Write the decomposition into a folder, where `from_pretrained` finds it."""
        save_decomposition(self.model, self.settings, self.target_spec, folder)

    def intervene(
        self,
        inputs: Tensor,
        ablate: Iterable[str] = (),
        scale: Mapping[str, float] | None = None,
        set: Mapping[str, float] | None = None,
        keep: Iterable[str] | None = None,
        base: Base = "unmasked",
    ) -> Intervened:
        """Run the model with components ablated, scaled or set, or with only some of them kept.

        Components are named `layer:pos:component`, or `layer:component` at all positions. See
        `decomposition.intervention.intervene`: outputs of the target, of the base, and under the
        edits.

        Args:
            inputs: [batch, features] floating point, or [batch, pos] token ids.
            ablate: components that write nothing.
            scale: factors of what components write.
            set: values in the place of inner activations.
            keep: of all components these alone, and no delta.
            base: what is edited: the target itself (`unmasked`), or the model under its importances
                (`ci`).

        Raises:
            BadInput: there is no such component or position.
        """
        edits = named_edits(self.model, ablate, scale, set)
        return intervene(
            self.model, inputs, edits, None if keep is None else places(self.model, keep), base
        )

    # ---- training --------------------------------------------------------------------------------

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer.over(self.model)

    def configure_callbacks(self) -> list[Callback]:
        return [CollapseMonitor()]

    def on_train_start(self) -> None:
        if self.global_step == 0 and self._rehearsed:
            self._log_figures()
        if self.global_step == 0 and self.warm_up.steps:
            self._warm_up()

    def _warm_up(self) -> None:
        """Faithfulness alone, with an optimizer of its own."""
        w = self.warm_up
        loss = torch.tensor(0.0)
        term = Faithfulness()
        losses = list[Tensor]()
        optimizer = torch.optim.AdamW(
            self.model.components.parameters(), lr=w.lr, weight_decay=w.weight_decay
        )
        with torch.enable_grad():
            for _ in range(w.steps):
                loss = term(self.model)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
        finite = torch.stack(losses).isfinite()
        if not finite.all():
            step = int(finite.int().argmin())
            raise Diverged(
                f"the faithfulness is {float(losses[step])} at step {step} of the warm-up",
                "lower warm_up.lr",
            )
        self.check_weights()
        if self.trainer.is_global_zero:
            log.info("faithfulness after %d warm-up steps: %.2e", w.steps, loss.item())

    @property
    def network(self) -> nn.Module:
        """The target."""
        return self.model.target

    def before_parts(self, parts: Sequence[Tensor], step: int) -> None:
        """Measure how often components are important over the whole batch, for the frequency loss
        of each part (L3).
        """
        self._frequencies = None
        if len(parts) > 1 and self.losses.frequency.coeff:
            with torch.no_grad():
                merged = [self._merged(part) for part in parts]
                runs = [
                    LossContext.from_batch(self.model, rows, weights=weights)
                    for rows, weights in merged
                ]
                means = [
                    self.losses.minimality.means(
                        run.importances.upper, self._progress_at(step), run.weights
                    )
                    for run in runs
                ]
            self._frequencies = torch.stack([joined_means(part) for part in means]).mean(0)

    def objective(
        self, batch: Tensor, step: int, part: int = 0
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The training loss of a batch or a part of it (L7); masks are a function of (seed, step,
        part, rank) alone.
        """
        rows, weights = self._merged(batch)
        run = LossContext.from_batch(
            self.model, rows, self._generator(_stream("masks", part), step), weights, sample=True
        )
        run.adversaries, self._progress = self.adversaries(run, part), self._progress_at(step)
        run.frequencies = self._frequencies
        return self.losses(run, self._progress)

    def _progress_at(self, step: int) -> float:
        """The fraction of training at an optimizer step: 0 at the first, 1 at the last."""
        return step / max(1, self.steps - 1)

    def adversaries(self, run: LossContext, part: int = 0) -> Mapping[str, PersistentAdversary]:
        """The persistent adversary of every reconstruction that has one, made when the first batch
        shows the shapes.

        Each part of a batch has its own: they know samples by their place.
        """
        keys = {name: _stream(name, part) for name in self.losses.persistent}
        for name, settings in self.losses.persistent.items():
            if (key := keys[name]) not in self._adversaries:
                rank, world = (
                    (self.global_rank, self.trainer.world_size) if self._trainer else (0, 1)
                )
                generator = self._generator(f"adversary/{key}", 0, rank=0)
                g = run.importances.lower
                made = PersistentAdversary(settings, g, generator, rank, world, self.micro_batches)
                self._adversaries[key] = made
                if key in self._resumed:
                    made.restore(self._resumed.pop(key))
        return {name: self._adversaries[key] for name, key in keys.items()}

    def lasting_bytes(self) -> int:
        """Return the bytes that the persistent adversaries take."""
        return sum(adversary.bytes for adversary in self._adversaries.values())

    def after_backward(self) -> None:
        for adversary in self._adversaries.values():
            adversary.finish(self._progress)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["adversaries"] = {
            name: adversary.state() for name, adversary in self._adversaries.items()
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._resumed = checkpoint.get("adversaries", {})

    def _generator(self, stream: str, step: int, rank: int | None = None) -> torch.Generator:
        generator = generator_for(
            self.seed, stream, step, self.global_rank if rank is None else rank
        )
        if self.device.type == "cpu":
            return generator
        return torch.Generator(self.device).manual_seed(generator.initial_seed() % 2**63)

    def _merged(self, batch: Tensor) -> tuple[Tensor, Float[Tensor, " rows"] | None]:
        """A batch with all its zero rows as one, weighted by their number; exact where zeros are
        inert.

        Sparse inputs are mostly zero rows. Where a zero input is zero at every site, masks cannot
        change its output: it adds nothing to reconstruction, and one row says all about its
        importances. (Counting rows would stall a GPU, where the rows cost little; persistent
        adversaries know rows by their place.)
        """
        if (
            batch.device.type != "cpu"
            or not batch.is_floating_point()
            or batch.ndim != 2
            or self.losses.persistent
        ):
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
        o = self.optimizer
        parts = {
            "components": (self.model.components, o.clip_components),
            "importance": (self.model.importance_function, o.clip_importance),
        }
        logged = self.global_step % self.log_every == 0
        return {
            f"gradient_norm/{name}": nn.utils.clip_grad_norm_(
                part.parameters(), bound or float("inf")
            )
            for name, (part, bound) in parts.items()
            if bound or logged
        }

    # ---- evaluation ------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self._totals = Totals()
        self._ladder = dict[str, float]()

    def validation_step(self, batch: Tensor, batch_index: int) -> None:
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            self._full_precision(),
        ):  # an adversary needs gradients
            batch = batch.clone()
            first = self._generator("evaluation", batch_index, rank=0)
            run = LossContext.from_batch(self.model, batch, first)
            count(
                self.model,
                run,
                self.evaluation,
                self._totals,
                Part(self.global_rank, self.trainer.world_size),
            )
            if batch_index == 0:
                self._ladder = pgd_sweep(self.model, batch, self.evaluation, self.say)
                self._width = batch.shape[1] if batch.is_floating_point() else None

    def _full_precision(self) -> AbstractContextManager[Any]:
        """Figures are taken in float32 whatever the training's precision; a target in half
        precision keeps its own.
        """
        half = any(
            p.dtype in (torch.float16, torch.bfloat16) for p in self.model.target.parameters()
        )
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
        """Takes the figures of an evaluation, perhaps one that another process ran, and judges
        them.

        Raises:
            Diverged: a figure is not finite.
        """
        values = {name: float(value) for name, value in figures.items() if name != "loss"}
        for name, value in values.items():
            if not math.isfinite(value):
                when = f" after {self.global_step} steps" if self.global_step else ""
                raise Diverged(f"the figure '{name}' is {value} in the evaluation{when}", LOWER)
        self.figures = {
            name: round(value) if counts(name) else value for name, value in values.items()
        }
        known = "features" in self.figures
        self.warning = (
            verdict(self.figures, self.evaluation, round(self.figures["features"]))
            if known
            else None
        )

    def _figures(self) -> dict[str, float]:
        totals = self._totals.over_devices()
        settings = self.evaluation
        found = figures_of(self.model, totals, settings) | self._ladder
        found["loss/faithfulness"] = float(Faithfulness()(self.model))
        self.arrays = {
            f"mean_importance/{k[11:]}": totals.mean(k)
            for k in totals.sums
            if k.startswith("importance/")
        }
        self.arrays |= {
            f"density/{k[6:]}": totals.mean(k) for k in totals.sums if k.startswith("fired/")
        }
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
        """Nothing by itself: harvesters, callbacks that share the pass, read the batch (see
        harvest/).
        """


def _stream(name: str, part: int) -> str:
    """The name of what each part of a batch has for itself."""
    return f"{name}/{part}" if part else name
