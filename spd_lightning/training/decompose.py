"""The LightningModule that decomposes a target."""

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
from spd_lightning.decomposition.adversaries import Persistent, PersistentAdversary
from spd_lightning.decomposition.importance import Importance
from spd_lightning.decomposition.intervention import (
    Base,
    Intervened,
    intervene,
    named_edits,
    places,
)
from spd_lightning.decomposition.losses import Faithfulness, Losses, joined_means
from spd_lightning.decomposition.metrics import DeviceShare
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.decomposition.reconstruction import LossContext
from spd_lightning.errors import Diverged, check_range
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
    """Updates on faithfulness alone before training, so that components add up to the weights.

    Args:
        steps: number of updates; 0 for none.
        lr: learning rate of the warm-up's AdamW.
        weight_decay: weight decay of the warm-up's AdamW.
    """

    steps: int = 200
    lr: float = 0.01
    weight_decay: float = 0.1

    def __post_init__(self):
        place = "warm_up"
        check_range(place, least=0, whole=True, steps=self.steps)
        check_range(place, above=0, lr=self.lr)
        check_range(place, least=0, weight_decay=self.weight_decay)


class Decomposition(MultiStepModule):
    """Splits weight matrices into rank-one components and learns which ones each input needs.

    Source: SPD (arXiv 2506.20790); the laws of docs/method.md.

    Args:
        target: a trained network, or a reference to one: a config that has trained it (see
            `train_target`), or `hf:<folder, GGUF file or hub name>`, or `decoder:<…>`.
        sites: fnmatch patterns of module names, each with a number of components.
        tied: site → partner, if the site's weight is the transpose of its partner's (D9).
        delta: whether the delta component takes part in masked runs (D3).
        importance: how causal importances are computed (G1).
        losses: the terms of the training loss (L7).
        optimizer: the optimizer of components and importance functions.
        warm_up: updates on faithfulness alone, before the first step.
        evaluation: what to measure, and the known ground truth.
        inner_steps: optimizer steps in one `training_step`.
        log_every: updates between two logged ones.
        checkpoint_every: updates between two checkpoints, rounded up to whole `training_step`s.
        keep_checkpoints: number of checkpoints to keep, the newest ones; at least 2.
        threads: CPU threads; torch's default if omitted. Small models are fastest on one.
        micro_batches: equal parts in which a batch is processed, to save memory. The update is that
            of the whole batch. Each part has its own masks and fresh adversaries.
        seed: seed of initial values and masks.

    Examples:
        >>> import lightning as L
        >>> from spd_lightning import TMS, Decomposition, SparseFeatures
        >>> module = Decomposition(TMS(5, 2), sites={"linear*": 20}, tied={"linear2": "linear1"})
        >>> L.Trainer(max_steps=20).fit(module, SparseFeatures(5, 0.05, batch_size=64))
        >>> module.figures["loss/faithfulness"] < 1e-4  # components add up to the weights
        True
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
        keep_checkpoints: int = 2,
        threads: int | None = None,
        micro_batches: int = 1,
        seed: int = 0,
    ):
        super().__init__(optimizer.schedule, inner_steps, log_every, threads, micro_batches)
        self.save_checkpoints(checkpoint_every, keep_checkpoints)
        losses.check_adversaries(delta, micro_batches)
        self.settings = {
            "sites": dict(sites),
            "tied": dict(tied or {}),
            "delta": delta,
            "importance": importance,
            "evaluation": evaluation,
            "seed": seed,
        }
        if isinstance(target, str):
            network, self.target_spec = open_target(target)
        else:
            network, self.target_spec = target, None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = ComponentModel(network, sites, tied, importance, delta)
        self.losses, self.optimizer, self.warm_up = losses, optimizer, warm_up
        self.evaluation, self.seed = evaluation, seed
        self.arrays: dict[str, Tensor] = {}
        self.figures: dict[str, float] = {}
        self.warning: str | None = None
        self.origin = ""  # the run that it was loaded from
        self.digest = ""  # the digest of that run's weights
        self._inert: bool | None = None  # whether a zero input is zero at every site
        self._adversaries: dict[str, PersistentAdversary] = {}
        self._resumed: dict[str, Any] = {}  # checkpointed states of adversaries not made yet
        self._progress = 0.0
        self._frequencies: Tensor | None = None
        self._rehearsed = False  # whether the figures are from the evaluation before step 0

    @classmethod
    def from_pretrained(
        cls, reference: str | Path, target: nn.Module | None = None
    ) -> "Decomposition":
        """Load the decomposition of a run.

        Args:
            reference: the run: its name, its folder, or `mlflow:…` / `wandb:…` in a tracker.
            target: a network like the decomposed one, if that was given as an object. The saved
                weights are loaded into it.

        Raises:
            BadInput: the run has no decomposition, or its files are damaged or of another model.
        """
        saved = SavedDecomposition.read(reference)
        module = cls(saved.network(target), **saved.settings)
        saved.load_into(module.model)
        module.target_spec = saved.target_spec
        module.origin = saved.folder.resolve().name
        module.digest = saved.digest
        return module.eval()

    def save(self, folder: Path) -> None:
        """Write the decomposition into a folder, from which `from_pretrained` can load it."""
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

        Components are named `layer:pos:component`, or `layer:component` for all positions. The
        result has the outputs of the target, of the base and of the edited model.

        Args:
            inputs: [batch, features] floating point, or [batch, pos] token ids.
            ablate: components to switch off.
            scale: factors by which to scale components.
            set: values that replace inner activations.
            keep: the only components to keep on; the delta components are off, too.
            base: the model to edit: the target (`unmasked`), or the CI-masked model (`ci`).

        Raises:
            BadInput: a component or a position does not exist.
        """
        edits = named_edits(self.model, ablate, scale, set)
        remaining = None if keep is None else places(self.model, keep)
        return intervene(self.model, inputs, edits, remaining, base)

    # ---- training --------------------------------------------------------------------------------

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer.over(self.model)

    def configure_callbacks(self) -> list[Callback]:
        return [CollapseMonitor()]

    def on_train_start(self) -> None:
        if self.global_step > 0:
            return  # the training has been resumed
        if self._rehearsed:
            self._log_figures()
        if self.warm_up.steps:
            self._warm_up()

    def _warm_up(self) -> None:
        """Train the components on faithfulness alone, with a separate optimizer."""
        warm_up = self.warm_up
        loss = torch.tensor(0.0)
        term = Faithfulness()
        losses = list[Tensor]()
        optimizer = torch.optim.AdamW(
            self.model.components.parameters(), lr=warm_up.lr, weight_decay=warm_up.weight_decay
        )
        with torch.enable_grad():
            for _ in range(warm_up.steps):
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
            log.info("faithfulness after %d warm-up steps: %.2e", warm_up.steps, loss.item())

    @property
    def network(self) -> nn.Module:
        """The target."""
        return self.model.target

    def before_parts(self, parts: Sequence[Tensor], step: int) -> None:
        """Measure how often components are important in the whole batch, for the frequency loss."""
        losses = self.losses
        self._frequencies = None
        progress = self._progress_at(step)
        if len(parts) <= 1 or not losses.frequency.coefficient(progress):
            return  # a part measures its own frequencies
        means = list[Tensor]()  # [components] each
        with torch.no_grad():
            for part in parts:
                rows, weights = self._merged(part)
                run = LossContext.from_batch(self.model, rows, weights=weights)
                upper = run.importances.upper
                by_site = losses.minimality.means(upper, progress, run.weights)
                joined = joined_means(by_site)
                means.append(joined)
        by_part = torch.stack(means)  # [parts, components]
        self._frequencies = by_part.mean(0)

    def objective(
        self, batch: Tensor, step: int, part: int = 0
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the training loss of a batch or of a part of it (L7).

        Masks depend on (seed, step, part, rank) alone.
        """
        rows, weights = self._merged(batch)
        stream = _stream("masks", part)
        generator = self._generator(stream, step)
        run = LossContext.from_batch(self.model, rows, generator, weights, sample=True)
        run.adversaries = self.adversaries(run, part)
        run.frequencies = self._frequencies
        progress = self._progress_at(step)
        self._progress = progress
        return self.losses(run, progress)

    def _progress_at(self, step: int) -> float:
        """Return the fraction of training at an optimizer step: 0 at the first, 1 at the last."""
        last = self.steps - 1
        return step / max(1, last)

    def adversaries(self, run: LossContext, part: int = 0) -> Mapping[str, PersistentAdversary]:
        """Return the persistent adversary of every reconstruction that has one.

        They are made at the first batch, which shows the shapes. Each part of a batch has its own
        adversaries, because they identify samples by position in the batch.
        """
        adversaries = dict[str, PersistentAdversary]()
        for name, settings in self.losses.persistent.items():
            key = _stream(name, part)
            if key not in self._adversaries:
                self._adversaries[key] = self._make_adversary(key, settings, run)
            adversaries[name] = self._adversaries[key]
        return adversaries

    def _make_adversary(
        self, key: str, settings: Persistent, run: LossContext
    ) -> PersistentAdversary:
        rank, world = 0, 1
        if self._trainer:
            rank, world = self.global_rank, self.trainer.world_size
        adversary = PersistentAdversary(
            settings,
            run.importances.lower,
            self._generator(f"adversary/{key}", 0, rank=0),
            rank,
            world,
            self.micro_batches,
        )
        if key in self._resumed:
            adversary.restore(self._resumed.pop(key))
        return adversary

    def lasting_bytes(self) -> int:
        """Return the bytes of the persistent adversaries."""
        adversaries = self._adversaries.values()
        return sum(adversary.bytes for adversary in adversaries)

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
        if rank is None:
            rank = self.global_rank
        generator = generator_for(self.seed, stream, step, rank)
        if self.device.type == "cpu":
            return generator
        seed = generator.initial_seed() % 2**63
        return torch.Generator(self.device).manual_seed(seed)

    def _merged(self, batch: Tensor) -> tuple[Tensor, Float[Tensor, " rows"] | None]:
        """Merge all zero rows of a batch into one, weighted by their number.

        Sparse inputs are mostly zero rows. If a zero input is zero at every site, merging is exact:
        masks cannot change its output, so it adds nothing to the reconstruction losses, and one row
        gives its importances. Batches on a GPU are not merged, because counting rows would stall
        it. With persistent adversaries they are not, either: these identify rows by position.
        """
        on_cpu = batch.device.type == "cpu"
        are_vectors = batch.is_floating_point() and batch.ndim == 2
        if not on_cpu or not are_vectors or self.losses.persistent:
            return batch, None
        if self._inert is None:
            zero = torch.zeros_like(batch[:1])
            run = self.model.clean(zero)
            self._inert = not any(x.any() for x in run.inputs.values())
        if not self._inert:
            return batch, None
        has_entries = batch.any(1)  # [batch]
        non_zero = batch[has_entries]  # [rows − 1, features]
        zero = batch.new_zeros(1, batch.shape[1])  # stands for all zero rows
        rows = torch.cat([non_zero, zero])
        weights = batch.new_ones(len(rows))
        weights[-1] = len(batch) - len(non_zero)
        return rows, weights

    def clip(self) -> Mapping[str, Tensor]:
        """Clip the gradients of components and of importance functions separately."""
        settings = self.optimizer
        parts = {
            "components": (self.model.components, settings.clip_components),
            "importance": (self.model.importance_function, settings.clip_importance),
        }
        logged = self.global_step % self.log_every == 0
        norms = dict[str, Tensor]()
        for name, (part, bound) in parts.items():
            if bound or logged:
                largest = bound or float("inf")
                norm = nn.utils.clip_grad_norm_(part.parameters(), largest)
                norms[f"gradient_norm/{name}"] = norm
        return norms

    # ---- evaluation ------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self._totals = Totals()
        self._pgd_figures = dict[str, float]()

    def validation_step(self, batch: Tensor, batch_index: int) -> None:
        share = DeviceShare(self.global_rank, self.trainer.world_size)
        # An adversary needs gradients, which inference mode would forbid.
        with torch.inference_mode(False), torch.no_grad(), self._full_precision():
            batch = batch.clone()
            generator = self._generator("evaluation", batch_index, rank=0)
            run = LossContext.from_batch(self.model, batch, generator)
            count(self.model, run, self.evaluation, self._totals, share)
            if batch_index == 0:
                self._pgd_figures = pgd_sweep(self.model, batch, self.evaluation, self.say)
                self._width = batch.shape[1] if batch.is_floating_point() else None

    def _full_precision(self) -> AbstractContextManager[Any]:
        """Return a context without autocast, unless the target itself is in half precision."""
        target = self.model.target
        half = (torch.float16, torch.bfloat16)
        if any(parameter.dtype in half for parameter in target.parameters()):
            return nullcontext()
        return torch.autocast(self.device.type, enabled=False)

    def on_validation_epoch_end(self) -> None:
        with torch.no_grad():
            self.adopt(self._figures())
        figures = {name: float(value) for name, value in self.figures.items()}
        self.log_dict(figures, logger=False, sync_dist=True)
        self._rehearsed = self.trainer.sanity_checking  # loggers are not active yet
        if not self._rehearsed:
            self._log_figures()

    def _log_figures(self) -> None:
        step = self.global_step
        for logger in self.loggers:
            logger.log_metrics(self.figures, step)

    def adopt(self, figures: Mapping[str, Any]) -> None:
        """Take over the figures of an evaluation, and compare them with the ground truth.

        Args:
            figures: the figures; another process may have computed them.

        Raises:
            Diverged: a figure is not finite.
        """
        adopted: dict[str, float] = {}
        for name, figure in figures.items():
            if name == "loss":
                continue
            value = float(figure)
            self._check_finite(name, value)
            adopted[name] = round(value) if counts(name) else value
        self.figures = adopted
        self.warning = None
        if "features" in adopted:
            n_features = round(adopted["features"])
            self.warning = verdict(adopted, self.evaluation, n_features)

    def _check_finite(self, name: str, value: float) -> None:
        """Raise Diverged if a figure is not finite."""
        if math.isfinite(value):
            return
        step = self.global_step
        when = f" after {step} steps" if step else ""
        raise Diverged(f"the figure '{name}' is {value} in the evaluation{when}", LOWER)

    def _figures(self) -> dict[str, float]:
        """Return the figures of the evaluation that ends, and keep its arrays."""
        model = self.model
        totals = self._totals.over_devices()
        figures = figures_of(model, totals, self.evaluation)
        figures |= self._pgd_figures
        figures["loss/faithfulness"] = float(Faithfulness()(model))
        arrays: dict[str, Tensor] = {}
        for site in model.sites:
            arrays[f"mean_importance/{site}"] = totals.mean(f"importance/{site}")
            arrays[f"density/{site}"] = totals.mean(f"fired/{site}")
            arrays[f"histogram/{site}"] = totals.sums[f"histogram/{site}"]
        if self._width is not None:
            alone = lone_features(model, self._width)
            for site, importances in alone.importances.items():
                arrays[f"alone/{site}"] = importances
            figures["features"] = self._width
            figures |= truth(model, alone, self.evaluation)
        self.arrays = arrays
        return figures

    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if batch_idx == 0:
            self.try_on(batch.inputs)

    def predict_step(self, batch: Any, batch_index: int) -> None:
        """Do nothing: harvesters are callbacks that read the batch (see harvest/)."""


def _stream(name: str, part: int) -> str:
    """Return a name that is different for each part of a batch."""
    return f"{name}/{part}" if part else name
