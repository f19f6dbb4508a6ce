"""Training the networks that are to be taken apart.

A target is an ordinary network with `forward`, `loss(inputs)` and `unrepresented()`. Training one is an ordinary fit.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from spd_lightning.errors import BadInput
from spd_lightning.training.blocks import BlockModule
from spd_lightning.training.schedule import Schedule


class TargetTraining(BlockModule):
    """Trains a target network on its own loss with AdamW.

    Args:
        target: the network: a module with `loss(inputs) -> scalar`.
        lr: full learning rate.
        weight_decay: AdamW's.
        schedule: how the learning rate moves.
        inner_steps: optimiser steps taken in one `training_step`.
        log_every: updates between two logged ones.
        retries: how many further seeds to try when the trained target leaves features unrepresented.
        seed: of the initial weights.
    """

    def __init__(
        self,
        target: nn.Module,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        schedule: Schedule = Schedule(),  # noqa: B008  (frozen)
        inner_steps: int = 25,
        log_every: int = 100,
        retries: int = 10,
        seed: int = 0,
    ):
        super().__init__(schedule, inner_steps, log_every)
        if lr <= 0:
            raise BadInput(f"lr {lr} in TargetTraining: it must be above 0")
        self.target, self.lr, self.weight_decay, self.retries = target, lr, weight_decay, retries

    @property
    def network(self) -> nn.Module:
        """The target."""
        return self.target

    def objective(self, batch: Tensor, step: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The target's own loss."""
        return self.target.loss(batch), {}  # pyright: ignore[reportCallIssue]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [p for p in self.target.parameters() if p.requires_grad]
        return torch.optim.AdamW(
            [{"params": trained, "peak": self.lr}], lr=self.lr, weight_decay=self.weight_decay, fused=True
        )

    def validation_step(self, batch: Tensor) -> None:
        self.log("loss/target", self.target.loss(batch), sync_dist=True, batch_size=len(batch))  # pyright: ignore[reportCallIssue]
