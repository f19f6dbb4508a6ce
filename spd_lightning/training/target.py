"""Training the networks that are to be taken apart.

A target is an ordinary network with `forward`, `loss(inputs)` and `unrepresented()`. Training one
is an ordinary fit.
"""

from collections.abc import Mapping
from typing import Literal

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
        lr: full learning rate.
        weight_decay: AdamW's.
        decay: what decays: all parameters, or matrices alone (embeddings too, but no biases and
            gains).
        betas: AdamW's.
        clip: largest gradient norm of all parameters together; none if omitted.
        schedule: how the learning rate moves.
        inner_steps: optimizer steps taken in one `training_step`.
        log_every: updates between two logged ones.
        checkpoint_every: updates between two checkpoints, rounded up to whole `training_step`s.
        threads: processor threads; as many as torch takes if omitted.
        micro_batches: equal parts in which a batch is taken, one after the other: less memory, the
            same update.
        retries: how many further seeds to try when the trained target leaves features
            unrepresented.
        seed: of the initial weights.
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
        threads: int | None = None,
        micro_batches: int = 1,
        retries: int = 10,
        seed: int = 0,
    ):
        super().__init__(schedule, inner_steps, log_every, checkpoint_every, threads, micro_batches)
        check_range("TargetTraining", above=0, lr=lr)
        check_range("TargetTraining", above=0, hint="leave it out for none", clip=clip)
        check_range("TargetTraining", least=0, weight_decay=weight_decay)
        check_range("TargetTraining", least=0, below=1, betas=betas)
        check_range("TargetTraining", least=0, whole=True, retries=retries)
        self.target, self.lr, self.weight_decay, self.retries = target, lr, weight_decay, retries
        self.decay, self.betas, self.bound = decay, betas, clip

    @property
    def network(self) -> nn.Module:
        """The target."""
        return self.target

    def objective(
        self, batch: Tensor, step: int, part: int = 0
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The target's own loss."""
        return self.target.loss(batch), {}  # pyright: ignore[reportCallIssue]

    def clip(self) -> Mapping[str, Tensor]:
        """Bounds the gradient of all parameters together."""
        if self.bound is None and self.global_step % self.log_every:
            return {}
        bound = float("inf") if self.bound is None else self.bound
        return {"gradient_norm": nn.utils.clip_grad_norm_(self.target.parameters(), bound)}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [p for p in self.target.parameters() if p.requires_grad]
        groups = [{"params": trained, "weight_decay": self.weight_decay}]
        if self.decay == "matrices":
            groups = [
                {"params": [p for p in trained if p.ndim >= 2], "weight_decay": self.weight_decay},
                {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
            ]
        groups = [group | {"peak": self.lr} for group in groups if group["params"]]
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, fused=True)

    # ---- validation ------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self._losses = torch.zeros(
            2, dtype=torch.float64, device=self.device
        )  # their sum, and how many rows

    def validation_step(self, batch: Tensor) -> None:
        with torch.autocast(self.device.type, enabled=False):
            loss = self.target.loss(batch)  # pyright: ignore[reportCallIssue]
        self._losses += torch.stack([loss * len(batch), torch.full_like(loss, len(batch))])

    def on_validation_epoch_end(self) -> None:
        total, rows = self.trainer.strategy.reduce(self._losses, reduce_op="sum")  # pyright: ignore[reportArgumentType]
        if not (total / rows).isfinite():
            raise Diverged(
                f"the {VALIDATION} is {float(total / rows)} after {self.global_step} steps", LOWER
            )
        self.log(VALIDATION, total / rows, logger=False, sync_dist=True)
        if not self.trainer.sanity_checking:
            for logger in self.loggers:
                logger.log_metrics({VALIDATION: float(total / rows)}, self.global_step)
