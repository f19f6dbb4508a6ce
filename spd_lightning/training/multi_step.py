"""Several optimizer steps in one `training_step`, which makes small models fast.

Lightning has an overhead of about 0.3 ms per `training_step`. A toy's whole optimizer step takes
little longer. Our modules therefore receive a list of batches and take one step for each.
"""

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn

from spd_lightning.errors import BadInput, Diverged, check_range
from spd_lightning.training.schedule import Schedule

MOST_UNCHECKED = 100
"""Number of steps whose losses are collected on the device before they are checked to be finite.
A check waits for the device.
"""
LOWER = "lower the learning rate, or bound the gradients"
"""The remedy in messages about a training that diverges."""


class MultiStepModule(L.LightningModule, ABC):
    """A LightningModule whose `training_step` takes one optimizer step for each batch of a list.

    The optimizer has one or more parameter groups. A group's `peak` is the learning rate that the
    schedule scales.

    Attributes:
        checkpoint_every: updates between two checkpoints.
        keep_checkpoints: how many of the newest checkpoints are kept.
        recorded: the last logged step, with its losses and gradient norms.
        say: called with the progress of a long part of an evaluation.
    """

    def __init__(
        self,
        schedule: Schedule,
        inner_steps: int,
        log_every: int,
        threads: int | None = None,
        micro_batches: int = 1,
    ):
        super().__init__()
        place = type(self).__name__
        check_range(place, least=1, whole=True, inner_steps=inner_steps, log_every=log_every)
        check_range(place, least=1, whole=True, threads=threads, micro_batches=micro_batches)
        self.automatic_optimization = False
        self.schedule = schedule
        self.inner_steps = inner_steps
        self.log_every = log_every
        self.threads = threads
        self.micro_batches = micro_batches
        self.checkpoint_every = 500
        self.keep_checkpoints = 2
        self.recorded: tuple[int, dict[str, float]] = (-1, {})
        self.say: Callable[[str], None] = _say_nothing
        self._unchecked = list[tuple[int, Mapping[str, Tensor]]]()  # steps and their losses

    def save_checkpoints(self, every: int, keep: int) -> None:
        """Choose the updates between two checkpoints, and how many checkpoints to keep."""
        place = type(self).__name__
        check_range(place, least=1, whole=True, checkpoint_every=every)
        check_range(place, least=2, whole=True, keep_checkpoints=keep)
        self.checkpoint_every = every
        self.keep_checkpoints = keep

    @property
    @abstractmethod
    def network(self) -> nn.Module:
        """The network that batches go through."""

    @abstractmethod
    def objective(
        self, batch: Tensor, step: int, part: int = 0
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the loss of a batch or of one of its parts, and the terms to log.

        Args:
            batch: the batch, or the part.
            step: the optimizer step.
            part: number of the part.
        """

    def before_parts(self, parts: Sequence[Tensor], step: int) -> None:
        """Compute what depends on the whole batch, before its parts are processed one by one."""

    def after_backward(self) -> None:
        """Use the gradients for more than the update, for example for adversaries."""

    def clip(self) -> Mapping[str, Tensor]:
        """Clip gradients before an update, and return their norms by name."""
        return {}

    @property
    def steps(self) -> int:
        """The number of optimizer steps of this training."""
        return self.trainer.max_steps

    def try_on(self, inputs: Tensor) -> None:
        """Run the network once, to find unsuitable data before the work begins.

        Raises:
            BadInput: the network cannot process these inputs.
        """
        _check_tokens(inputs, getattr(self.network, "vocab", None))
        try:
            with torch.no_grad():
                self.network(inputs)
        except (RuntimeError, IndexError) as error:
            why = str(error).partition("\n")[0]
            raise BadInput(
                f"data: a batch {list(inputs.shape)} does not go through the target ({why}); use "
                "data made for it"
            ) from error

    def on_validation_batch_start(
        self, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.trainer.sanity_checking:
            self.try_on(batch)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = _shapes(checkpoint["state_dict"])
        expected = _shapes(self.state_dict())
        names = sorted({*saved, *expected})
        different = [name for name in names if saved.get(name) != expected.get(name)]
        if different:
            raise BadInput(
                f"checkpoint: weights of another model ('{different[0]}' differs); delete it, and "
                "run the same fit again to start over"
            )

    def setup(self, stage: str) -> None:
        """Set up the CPU for this module's work; `teardown` restores what others can rely on."""
        self._threads_before = torch.get_num_threads()
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        if self.trainer.strategy.root_device.type == "cpu":
            settle_allocator()
            # Dying components are full of denormals, which are a hundred times slower.
            torch.set_flush_denormal(True)

    def teardown(self, stage: str) -> None:
        torch.set_flush_denormal(False)
        torch.set_num_threads(self._threads_before)

    def training_step(self, batches: list[Tensor]) -> None:
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)  # not a list of several
        last = self.steps - 1
        for batch in batches:
            step = self.global_step
            factor = self.schedule.factor(step, self.steps)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            optimizer.zero_grad()
            losses = self._accumulate(batch, step)
            norms = self.clip()
            optimizer.step()
            for values in losses:
                self._unchecked.append((step, values))
            if len(self._unchecked) >= MOST_UNCHECKED:
                self.check_losses()
            if step % self.log_every == 0 or step == last:
                self.check_losses()  # logging waits for the device anyway
                logged = {**_means(losses), **norms}
                self._record(logged, factor, step)

    def _accumulate(self, batch: Tensor, step: int) -> list[Mapping[str, Tensor]]:
        """Compute the gradient of a batch's loss, one part of the batch after the other.

        Returns:
            The loss of each part, and the terms to log.
        """
        count = self.micro_batches
        size = len(batch)
        losses = list[Mapping[str, Tensor]]()
        if size % count:
            raise BadInput(
                f"micro_batches {count} in {type(self).__name__}: a batch of {size} cannot be "
                "divided into equal parts; use a divisor of data.batch_size"
            )
        parts = batch.chunk(count)
        self.before_parts(parts, step)
        for k, part in enumerate(parts):
            loss, terms = self.objective(part, step, k)
            self.manual_backward(loss / count)
            self.after_backward()
            losses.append({"loss": loss.detach(), **terms})
        return losses

    def check_losses(self) -> None:
        """Check that all losses since the last check are finite, in one exchange with the device.

        Raises:
            Diverged: a loss is not finite; the message names the first such step and term.
        """
        pending = self._unchecked
        self._unchecked = []
        places = list[tuple[int, str]]()  # step and name of each loss
        losses = list[Tensor]()
        for step, values in pending:
            for name, value in _terms_first(values):
                places.append((step, name))
                losses.append(value)
        if not losses:
            return
        finite = _are_finite(losses)
        good = bool(finite.all())
        strategy = self.trainer.strategy
        if strategy.reduce_boolean_decision(good, all=True):  # devices stop together
            return
        if good:
            raise Diverged("a loss on another device is not finite", LOWER)
        first = _first_false(finite)
        step, name = places[first]
        value = float(losses[first])
        what = "the loss" if name == "loss" else f"the loss term '{name}'"
        raise Diverged(f"{what} is {value} at step {step}", LOWER)

    def check_weights(self) -> None:
        """Check that all trained weights are finite.

        Raises:
            Diverged: a weight is not finite.
        """
        trained = dict[str, Tensor]()
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                trained[name] = parameter
        name = non_finite(trained)
        if name is not None:
            raise Diverged(
                f"the weights '{name}' are not finite after {self.global_step} steps", LOWER
            )

    def on_validation_start(self) -> None:
        """Check the losses first: a loss that diverged explains more than a figure."""
        self.check_losses()

    def on_train_end(self) -> None:
        """Check the last update."""
        self.check_losses()
        self.check_weights()

    def _record(self, values: Mapping[str, Tensor], factor: float, step: int) -> None:
        """Log the losses and gradient norms of a step."""
        strategy = self.trainer.strategy
        reduced: dict[str, float] = {}
        metrics: dict[str, float] = {}
        for name, value in values.items():
            mean = float(strategy.reduce(value))  # over the devices
            reduced[name] = mean
            metrics[f"train/{name}"] = mean
        metrics["train/lr_factor"] = factor
        self.recorded = (step, reduced)
        self.log("loss", reduced["loss"], prog_bar=True, logger=False)
        for logger in self.loggers:
            logger.log_metrics(metrics, step)


def _say_nothing(progress: str) -> None:
    pass


def _shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    shapes = {}
    for name, tensor in state.items():
        shapes[name] = tensor.shape
    return shapes


def _means(losses: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of each term over the parts of a batch."""
    means = {}
    for name in losses[0]:
        values = torch.stack([terms[name] for terms in losses])
        means[name] = values.mean()
    return means


def _terms_first(values: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Sort the terms of a loss before their sum, because a term explains more."""

    def is_sum(item: tuple[str, Tensor]) -> bool:
        return item[0] == "loss"

    return sorted(values.items(), key=is_sum)


def _are_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Return for each tensor whether all its values are finite, without waiting for the device."""
    flags = []
    for tensor in tensors:
        finite = tensor.detach().isfinite()
        flags.append(finite.all())
    return torch.stack(flags)


def _first_false(flags: Tensor) -> int:
    """Return the index of the first flag that is False."""
    numbers = flags.int()
    return int(numbers.argmin())


def non_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor with a non-finite value; None if there is none."""
    if not tensors:
        return None
    finite = _are_finite(tensors.values())
    if bool(finite.all()):
        return None
    first = _first_false(finite)
    names = list(tensors)
    return names[first]


def _check_tokens(inputs: Tensor, vocab: int | None) -> None:
    """Check that token ids are in the vocabulary; a GPU's own error would not name the token.

    Raises:
        BadInput: a token id is outside the vocabulary.
    """
    if vocab is None or inputs.is_floating_point() or not inputs.numel():
        return
    token = int(inputs.max())
    if token >= vocab:
        raise BadInput(
            f"data: token {token} is outside the target's vocabulary of {vocab}; use the "
            "tokenizer it was trained with"
        )


M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # from malloc.h


@cache
def settle_allocator() -> None:
    """Keep glibc from returning large blocks to the kernel, once per process.

    Otherwise it requests them again at every step, which is a third of the time of a toy's step. A
    different C library has a different allocator and is left alone.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_TOP_PAD, 1 << 28)
