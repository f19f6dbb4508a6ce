"""Several optimizer steps in one `training_step`, and a processor that is not wasted on small
models.

Lightning spends about 0.3 ms around each `training_step`. A toy's whole optimizer step takes little
more, so modules here receive a list of batches and take one step for each.
"""

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from spd_lightning.errors import BadInput, Diverged, check_range
from spd_lightning.training.schedule import Schedule

MOST_UNCHECKED = 100
"""Losses that are collected on the device before it is looked whether they are finite: looking
waits for the device.
"""
LOWER = "lower the learning rate, or bound the gradients"
"""What to do about a training that diverges."""


class MultiStepModule(L.LightningModule, ABC):
    """A LightningModule whose `training_step` takes one optimizer step for each batch of a list.

    Its optimizer has one parameter group or more; a group's `peak` is the learning rate that the
    schedule scales.
    """

    def __init__(
        self,
        schedule: Schedule,
        inner_steps: int,
        log_every: int,
        checkpoint_every: int = 500,
        threads: int | None = None,
        micro_batches: int = 1,
    ):
        super().__init__()
        place = type(self).__name__
        check_range(place, least=1, whole=True, inner_steps=inner_steps, log_every=log_every)
        check_range(
            place,
            least=1,
            whole=True,
            checkpoint_every=checkpoint_every,
            micro_batches=micro_batches,
        )
        check_range(place, least=1, whole=True, threads=threads)
        self.automatic_optimization = False
        self.schedule, self.inner_steps = schedule, inner_steps
        self.log_every, self.checkpoint_every, self.threads = log_every, checkpoint_every, threads
        self.micro_batches = micro_batches
        self.recorded: tuple[int, dict[str, float]] = (
            -1,
            {},
        )  # the newest logged step and its losses and norms
        self.say: Callable[[str], None] = (
            _nobody_listens  # told how far a long part of an evaluation is
        )
        self._unchecked: list[
            tuple[int, Mapping[str, Tensor]]
        ] = []  # steps and losses not yet known to be finite

    @property
    @abstractmethod
    def network(self) -> nn.Module:
        """The network that batches go through."""

    @abstractmethod
    def objective(
        self, batch: Tensor, step: int, part: int = 0
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss of a batch, or of a part of it by number, and what to log of it."""

    def before_parts(self, parts: Sequence[Tensor], step: int) -> None:
        """Compute what depends on the whole batch, before its parts are processed one by one."""

    def after_backward(self) -> None:
        """Use the gradients for more than the update, for example for adversaries."""

    def clip(self) -> Mapping[str, Tensor]:
        """Bounds gradients before an update and names their norms."""
        return {}

    @property
    def steps(self) -> int:
        """How many optimizer steps this training has."""
        return self.trainer.max_steps

    def try_on(self, inputs: Tensor) -> None:
        """Runs the network once, before work begins.

        Raises:
            BadInput: it cannot take such inputs.
        """
        _known(inputs, getattr(self.network, "vocab", None))
        try:
            with torch.no_grad():
                self.network(inputs)
        except (RuntimeError, IndexError) as error:
            why = str(error).partition("\n")[0]
            raise BadInput(
                f"data: a batch {list(inputs.shape)} does not go through the target ({why}); take "
                "data made for it"
            ) from error

    def on_validation_batch_start(
        self, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.trainer.sanity_checking:
            self.try_on(batch)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        held, own = (
            {k: v.shape for k, v in state.items()}
            for state in (checkpoint["state_dict"], self.state_dict())
        )
        if held != own:
            name = min(k for k in {*held, *own} if held.get(k) != own.get(k))
            raise BadInput(
                f"checkpoint: weights of another model ('{name}' differs); delete it, and run the "
                "same fit again to "
                "start over"
            )

    def setup(self, stage: str) -> None:
        """The processor's settings for this module's work; `teardown` puts back what others may
        rely on.
        """
        self._threads_before = torch.get_num_threads()
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        if self.trainer.strategy.root_device.type == "cpu":
            settle_allocator()
            torch.set_flush_denormal(
                True
            )  # dying components are full of denormals, a hundred times slower than others

    def teardown(self, stage: str) -> None:
        torch.set_flush_denormal(False)
        torch.set_num_threads(self._threads_before)

    def training_step(self, batches: list[Tensor]) -> None:
        optimizer = self.optimizers()
        for batch in batches:
            step = self.global_step
            factor = self.schedule.factor(step, self.steps)
            for group in optimizer.param_groups:  # pyright: ignore[reportAttributeAccessIssue]
                group["lr"] = group["peak"] * factor
            optimizer.zero_grad()  # pyright: ignore[reportAttributeAccessIssue]
            found = self._accumulate(batch, step)
            norms = self.clip()
            optimizer.step()  # pyright: ignore[reportAttributeAccessIssue]
            self._unchecked += [(step, values) for values in found]
            if len(self._unchecked) >= MOST_UNCHECKED:
                self.check_losses()
            if step % self.log_every == 0 or step == self.steps - 1:
                self.check_losses()  # logging waits for the device anyway
                means = {
                    name: torch.stack([values[name] for values in found]).mean()
                    for name in found[0]
                }
                self._record({**means, **norms}, factor, step)

    def _accumulate(self, batch: Tensor, step: int) -> list[Mapping[str, Tensor]]:
        """Leaves the gradient of a batch's loss, one part of the batch after the other; what to log
        of each part.
        """
        count = self.micro_batches
        found = list[Mapping[str, Tensor]]()
        if len(batch) % count:
            raise BadInput(
                f"micro_batches {count} in {type(self).__name__}: a batch of {len(batch)} cannot "
                "be cut so; take a "
                "divisor of data.batch_size"
            )
        parts = batch.chunk(count)
        self.before_parts(parts, step)
        for k, part in enumerate(parts):
            loss, terms = self.objective(part, step, k)
            self.manual_backward(loss / count)
            self.after_backward()
            found.append({"loss": loss.detach(), **terms})
        return found

    def check_losses(self) -> None:
        """Looks whether all losses since the last check are finite, in one exchange with the
        device.

        Raises:
            Diverged: one is not; it names the first such step and term.
        """
        pending = self._unchecked
        self._unchecked = []
        named = [
            (step, name, value) for step, values in pending for name, value in _terms_first(values)
        ]
        if not named:
            return
        finite = torch.stack([value.detach().isfinite().all() for _, _, value in named])
        good = bool(finite.all())
        if self.trainer.strategy.reduce_boolean_decision(good, all=True):  # devices stop together
            return
        if good:
            raise Diverged("a loss on another device is not finite", LOWER)
        step, name, value = named[int(finite.int().argmin())]
        what = "the loss" if name == "loss" else f"the loss term '{name}'"
        raise Diverged(f"{what} is {float(value)} at step {step}", LOWER)

    def check_weights(self) -> None:
        """Looks whether all trained weights are finite.

        Raises:
            Diverged: one is not.
        """
        trained = {name: p for name, p in self.named_parameters() if p.requires_grad}
        if name := non_finite(trained):
            raise Diverged(
                f"the weights '{name}' are not finite after {self.global_step} steps", LOWER
            )

    def on_validation_start(self) -> None:
        """The loss that diverged is named rather than a figure that follows from it."""
        self.check_losses()

    def on_train_end(self) -> None:
        """The last update may have been the fatal one."""
        self.check_losses()
        self.check_weights()

    def _record(self, values: Mapping[str, Tensor], factor: float, step: int) -> None:
        reduced = {f"train/{k}": float(self.trainer.strategy.reduce(v)) for k, v in values.items()}
        self.recorded = (
            step,
            {name.removeprefix("train/"): value for name, value in reduced.items()},
        )
        self.log("loss", reduced["train/loss"], prog_bar=True, logger=False)
        for logger in self.loggers:
            logger.log_metrics({**reduced, "train/lr_factor": factor}, step)


def _nobody_listens(what: str) -> None:
    pass


def _terms_first(values: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """The terms of a loss before their sum: a term says more about what went wrong."""
    return sorted(values.items(), key=lambda item: item[0] == "loss")


def non_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor with a number that is infinite or none; None if all are
    finite.
    """
    if not tensors:
        return None
    finite = torch.stack([tensor.detach().isfinite().all() for tensor in tensors.values()])
    return None if bool(finite.all()) else list(tensors)[int(finite.int().argmin())]


def _known(inputs: Tensor, vocab: int | None) -> None:
    """Raises BadInput where token ids reach beyond a vocabulary; a GPU would not say which."""
    if vocab is None or inputs.is_floating_point() or not inputs.numel():
        return
    if (token := int(inputs.max())) >= vocab:
        raise BadInput(
            f"data: token {token} is outside the target's vocabulary of {vocab}; take the "
            "tokenizer it was trained with"
        )


M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # from malloc.h


@cache
def settle_allocator() -> None:
    """Keeps glibc from giving big blocks back to the kernel at every step, only to fetch them
    again; once a process.

    That fetching is a third of a toy's step. Another C library has another allocator, and is left
    alone.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 1 << 28)):
        mallopt(option, value)
