"""Training of the networks to decompose.

A target is an ordinary network with `forward`, `loss(inputs)` and `unrepresented()`. It is trained
like any other network.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spd_lightning.errors import Diverged, check_range
from spd_lightning.training.multi_step import LOWER, MultiStepModule
from spd_lightning.training.schedule import Schedule

VALIDATION = "validation/loss"


class TargetTraining(MultiStepModule):
    """Trains a target network on its own loss with AdamW.

    Args:
        target: the network: a module with `loss(inputs) -> scalar`.
        lr: peak learning rate.
        weight_decay: weight decay of AdamW.
        decay: the parameters that decay: all, or only matrices (with embeddings, without biases and
            gains).
        betas: betas of AdamW.
        clip: maximum gradient norm of all parameters together; no bound if omitted.
        schedule: how the learning rate changes.
        inner_steps: optimizer steps in one `training_step`.
        log_every: updates between two logged ones.
        checkpoint_every: updates between two checkpoints, rounded up to whole `training_step`s.
        keep_checkpoints: number of checkpoints to keep, the newest ones; at least 2.
        threads: CPU threads; torch's default if omitted.
        micro_batches: equal parts in which a batch is processed, one after the other. This saves
            memory and keeps the update of the whole batch.
        retries: number of further seeds to try if the trained target leaves features unrepresented.
        seed: seed of the initial weights.

    Examples:
        >>> import lightning as L
        >>> from spd_lightning import TMS, SparseFeatures, TargetTraining
        >>> _ = L.seed_everything(0)
        >>> training = TargetTraining(TMS(n_features=5, n_hidden=2), lr=0.01)
        >>> L.Trainer(max_steps=1500).fit(training, SparseFeatures(5, 0.05, batch_size=512))
        >>> training.target.unrepresented()  # all five features have been learned
        []
    """

    def __init__(
        self,
        target: nn.Module,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        decay: Literal["all", "matrices"] = "all",
        betas: tuple[float, float] = (0.9, 0.999),
        clip: float | None = None,
        schedule: Schedule = Schedule(),  # noqa: B008  (frozen)
        inner_steps: int = 25,
        log_every: int = 100,
        checkpoint_every: int = 500,
        keep_checkpoints: int = 2,
        threads: int | None = None,
        micro_batches: int = 1,
        retries: int = 10,
        seed: int = 0,
    ):
        super().__init__(schedule, inner_steps, log_every, threads, micro_batches)
        self.save_checkpoints(checkpoint_every, keep_checkpoints)
        check_range("TargetTraining", above=0, lr=lr)
        check_range("TargetTraining", above=0, hint="omit it for no bound", clip=clip)
        check_range("TargetTraining", least=0, weight_decay=weight_decay)
        check_range("TargetTraining", least=0, below=1, betas=betas)
        check_range("TargetTraining", least=0, whole=True, retries=retries)
        self.target = target
        self.lr, self.betas = lr, betas
        self.weight_decay, self.decay = weight_decay, decay
        self.bound = clip
        self.retries = retries

    @property
    def network(self) -> nn.Module:
        """The target."""
        return self.target

    def objective(
        self, batch: Tensor, step: int, part: int = 0
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the target's loss; it has no further terms."""
        return self.target.loss(batch), {}  # pyright: ignore[reportCallIssue]

    def clip(self) -> Mapping[str, Tensor]:
        """Clip the gradient of all parameters together."""
        logged = self.global_step % self.log_every == 0
        if self.bound is None and not logged:
            return {}
        bound = float("inf") if self.bound is None else self.bound
        norm = nn.utils.clip_grad_norm_(self.target.parameters(), bound)
        return {"gradient_norm": norm}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        decaying = [p for p in self.target.parameters() if p.requires_grad]
        others = []
        if self.decay == "matrices":
            others = [p for p in decaying if p.ndim < 2]
            decaying = [p for p in decaying if p.ndim >= 2]
        groups = list[dict[str, Any]]()
        for parameters, weight_decay in ((decaying, self.weight_decay), (others, 0.0)):
            if parameters:
                group = {"params": parameters, "weight_decay": weight_decay, "peak": self.lr}
                groups.append(group)
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, fused=True)

    # ---- validation ------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        # The sum of the losses of all rows, and the number of rows.
        self._losses = torch.zeros(2, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: Tensor) -> None:
        with torch.autocast(self.device.type, enabled=False):
            loss = self.target.loss(batch)  # pyright: ignore[reportCallIssue]
        rows = len(batch)
        self._losses += torch.stack([loss * rows, torch.full_like(loss, rows)])

    def on_validation_epoch_end(self) -> None:
        strategy: Any = self.trainer.strategy  # its annotation of reduce_op is too narrow
        total, rows = strategy.reduce(self._losses, reduce_op="sum")
        loss = total / rows
        if not loss.isfinite():
            problem = f"the {VALIDATION} is {float(loss)} after {self.global_step} steps"
            raise Diverged(problem, LOWER)
        self.log(VALIDATION, loss, logger=False, sync_dist=True)
        if not self.trainer.sanity_checking:
            for logger in self.loggers:
                logger.log_metrics({VALIDATION: float(loss)}, self.global_step)
