"""LightningDataModules for training, decomposing and probing targets, and those of the toy targets.

Every batch is a pure function of (seed, split, step, rank, world). No random state has to be saved,
a resumed run sees exactly the batches it would have seen, and no two devices see the same one. To
Lightning there is one epoch: it lasts from the trainer's `global_step` to its `max_steps`.
"""

import hashlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int, Shaped
from lightning import LightningDataModule
from torch import Tensor

from spd_lightning.errors import BadInput, check_range
from spd_lightning.targets.toy import PROBE, induction_tokens

T = TypeVar("T")


class Prompts(NamedTuple):
    """Inputs worth looking at one by one, and where each comes from."""

    inputs: Shaped[Tensor, "batch _"]
    sources: list[str]  # "feature 3", "random 17"
    splits: list[str]  # "probe" or "random"; of text "given" or "validation"
    tokens: list[list[str]] | None = (
        None  # what each token id stands for; None where inputs are not text
    )

    def take(self, rows: slice | list[int]) -> "Prompts":
        """The same, of these rows only."""
        at = range(len(self.sources))[rows] if isinstance(rows, slice) else rows
        sources = [self.sources[i] for i in at]
        splits = [self.splits[i] for i in at]
        return Prompts(
            self.inputs[rows], sources, splits, self.tokens and [self.tokens[i] for i in at]
        )


def _once(prompts: Prompts) -> Prompts:
    """Keep the first of equal prompts: two devices would not know of each other's."""
    rows = [row.cpu().contiguous().numpy().tobytes() for row in prompts.inputs]
    first = {row: k for k, row in reversed(list(enumerate(rows)))}
    return prompts if len(first) == len(rows) else prompts.take(sorted(first.values()))


class Batches(Generic[T]):
    """An iterable that makes its items again each time.

    Lightning takes any iterable. To a DataLoader without workers it objects that it has none, and
    they would not pay: a batch takes less time to make than to hand over.
    """

    def __init__(self, make: Callable[[], Iterator[T]], length: int | None = None) -> None:
        self._make, self._length = make, length

    def __iter__(self) -> Iterator[T]:
        return self._make()

    def __len__(self) -> int:
        """How many items there are.

        Raises TypeError where that depends on when one starts, which Lightning reads as "unknown".
        """
        if self._length is None:
            raise TypeError("these batches have no fixed length")
        return self._length


def generator_for(seed: int, split: str, step: int, rank: int) -> torch.Generator:
    """A fresh CPU generator for one batch; a hash mixes the four, so that neighboring steps share
    nothing.
    """
    key = hashlib.blake2b(f"{seed} {split} {step} {rank}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(key))


class StepData(LightningDataModule, ABC):
    """Batches by step number; a subclass says what is in each, and which inputs `predict` runs
    on.
    """

    def __init__(
        self, batch_size: int, seed: int, validation_batches: int, predict_batch_size: int
    ) -> None:
        super().__init__()
        place = type(self).__name__
        check_range(
            place, least=1, whole=True, batch_size=batch_size, predict_batch_size=predict_batch_size
        )
        check_range(place, least=0, whole=True, validation_batches=validation_batches)
        self.batch_size, self.seed, self.validation_batches = batch_size, seed, validation_batches
        self.predict_batch_size = predict_batch_size

    @abstractmethod
    def batch(
        self, step: int, rank: int = 0, split: str = "train", world: int = 1
    ) -> Shaped[Tensor, "batch _"]:
        """The batch of one step on one of `world` devices, the same whenever and wherever it is
        asked for.

        Args:
            step: counts batches from 0.
            rank: which device.
            split: "train" or "val".
            world: how many devices work on the step together.
        """

    @abstractmethod
    def groups(self) -> list[Prompts]:
        """All inputs that `predict` runs on, those of one length together."""

    def names(self, ids: Sequence[int]) -> list[str]:
        """Return readable names of token ids."""
        return [str(i) for i in ids]

    def train_dataloader(self) -> Batches[list[Tensor]]:
        """Lists of consecutive batches, as many as the module takes optimizer steps in one
        `training_step`.

        Lists start at multiples of the module's `inner_steps` (1 if it has none), so that a run
        resumed in between falls back into the same lists. They end with the trainer's `max_steps`;
        without a trainer they start at step 0 and never end.
        """
        if self.trainer is not None and self.trainer.max_steps < 0:
            raise BadInput(
                "max_steps -1 in trainer: data that are drawn on demand never end; set "
                "trainer.max_steps"
            )
        return Batches(self._train_lists)

    def val_dataloader(self) -> Batches[Tensor]:
        """The first batches of the split "val": each device its own, the same at every
        validation.
        """
        (rank, world) = self._rank_and_world()
        count = self.validation_batches
        return Batches(
            lambda: (self.batch(step, rank, "val", world) for step in range(count)), count
        )

    def predict_dataloader(self) -> Batches[Prompts]:
        """All prompts in batches of one length, dealt to the devices in turn: none left out, and
        equal ones once.
        """
        (rank, world) = self._rank_and_world()
        before = 0
        batches = list[Prompts]()
        for group in map(_once, self.groups()):
            mine = group.take(slice((rank - before) % world, None, world))
            size = self.predict_batch_size
            batches += [
                mine.take(slice(start, start + size)) for start in range(0, len(mine.sources), size)
            ]
            before += len(group.sources)
        return Batches(lambda: iter(batches), len(batches))

    def _train_lists(self) -> Iterator[list[Tensor]]:
        (rank, world) = self._rank_and_world()
        step = 0
        last = sys.maxsize
        size = 1
        if self.trainer is not None:
            step, last = self.trainer.global_step, self.trainer.max_steps
            size = getattr(self.trainer.lightning_module, "inner_steps", 1)
        while step < last:
            stop = min(step - step % size + size, last)
            yield [self.batch(index, rank, world=world) for index in range(step, stop)]
            step = stop

    def _rank_and_world(self) -> tuple[int, int]:
        return (
            (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        )


class SampledData(StepData):
    """Batches drawn on demand; a subclass says how to draw rows, and which inputs show one thing
    each.
    """

    def __init__(
        self,
        batch_size: int,
        seed: int,
        validation_batches: int,
        n_prompts: int,
        predict_batch_size: int,
    ) -> None:
        super().__init__(batch_size, seed, validation_batches, predict_batch_size)
        check_range(type(self).__name__, least=0, whole=True, n_prompts=n_prompts)
        self.n_prompts = n_prompts

    @abstractmethod
    def sample(self, rows: int, generator: torch.Generator) -> Shaped[Tensor, "rows _"]:
        """Draw that many inputs."""

    @abstractmethod
    def probes(self) -> tuple[Shaped[Tensor, "probes _"], list[str]]:
        """Inputs that show one thing each, and the names of what they show."""

    def batch(
        self, step: int, rank: int = 0, split: str = "train", world: int = 1
    ) -> Shaped[Tensor, "batch _"]:
        """The batch of one step on one device, whatever the number of devices."""
        return self.sample(self.batch_size, generator_for(self.seed, split, step, rank))

    def prompts(self) -> Prompts:
        """All inputs that `predict` runs on: the probes, then random inputs that are not all
        zero.
        """
        probes, sources = self.probes()
        random = self._random_prompts()
        return Prompts(
            torch.cat([probes, random]),
            sources + [f"random {index}" for index in range(len(random))],
            ["probe"] * len(probes) + ["random"] * len(random),
        )

    def groups(self) -> list[Prompts]:
        """All prompts: they have one length."""
        return [self.prompts()]

    def _random_prompts(self) -> Tensor:
        found = self.probes()[0][:0]
        step = 0
        while len(found) < self.n_prompts:
            drawn = self.sample(self.n_prompts, generator_for(self.seed, "predict", step, 0))
            found = torch.cat([found, drawn[drawn.any(dim=1)]])
            step = step + 1
        return found[: self.n_prompts]


class SparseFeatures(SampledData):
    """Vectors in which each feature is active now and then, independently of the others, and zero
    otherwise.
    """

    def __init__(
        self,
        n_features: int,
        probability: float,
        batch_size: int,
        low: float = 0.0,
        high: float = 1.0,
        seed: int = 0,
        validation_batches: int = 4,
        n_prompts: int = 64,
        predict_batch_size: int = 64,
    ) -> None:
        """Args: n_features: the length of a vector. probability: how often a feature is active,
        above 0 and up to 1. batch_size: vectors in a batch, on each device. low: an active
        feature's value is uniform from here ... high: ... to here. seed: chooses all batches.
        validation_batches: how many batches each device validates on. n_prompts: how many random
        vectors `predict` runs on, in addition to every feature alone at 0.75. predict_batch_size:
        vectors in a batch of `predict`.
        """
        super().__init__(batch_size, seed, validation_batches, n_prompts, predict_batch_size)
        check_range("SparseFeatures", least=1, whole=True, n_features=n_features)
        check_range("SparseFeatures", above=0, most=1, probability=probability)
        check_range("SparseFeatures", low=low, high=high)
        if not low < high:
            raise BadInput(f"low {low} in SparseFeatures: it must be below high, which is {high}")
        self.n_features, self.probability, self.low, self.high = n_features, probability, low, high

    def sample(self, rows: int, generator: torch.Generator) -> Float[Tensor, "rows features"]:
        """Draw vectors with one random number a feature: whether it is active, and how strongly if
        so.
        """
        drawn = torch.rand(rows, self.n_features, generator=generator)
        value = self.low + (self.high - self.low) / self.probability * drawn
        return torch.where(drawn < self.probability, value, 0.0)

    def probes(self) -> tuple[Float[Tensor, "features features"], list[str]]:
        """Every feature alone at 0.75."""
        return PROBE * torch.eye(self.n_features), [
            f"feature {index}" for index in range(self.n_features)
        ]


class InductionTokens(SampledData):
    """Token sequences `BOS T* S M T* S` that an induction head continues with M; token 0 is BOS."""

    def __init__(
        self,
        vocab: int,
        seq_len: int,
        batch_size: int,
        seed: int = 0,
        validation_batches: int = 4,
        n_prompts: int = 64,
        predict_batch_size: int = 64,
    ) -> None:
        """Args: vocab: how many tokens there are, BOS included; at least 3. seq_len: how many
        positions a sequence has; at least 4. batch_size: sequences in a batch, on each device.
        seed: chooses all batches. validation_batches: how many batches each device validates on.
        n_prompts: how many random sequences `predict` runs on, beside one that repeats each token.
        predict_batch_size: sequences in a batch of `predict`.
        """
        super().__init__(batch_size, seed, validation_batches, n_prompts, predict_batch_size)
        if vocab < 3 or seq_len < 4:
            raise BadInput(
                f"vocab {vocab} and seq_len {seq_len} in InductionTokens: `BOS S M S` needs 3 "
                "tokens and 4 positions"
            )
        self.vocab, self.seq_len = vocab, seq_len

    def sample(self, rows: int, generator: torch.Generator) -> Int[Tensor, "rows pos"]:
        """Draw sequences in which any token but BOS is repeated."""
        repeated = torch.randint(1, self.vocab, (rows, 1), generator=generator)
        return induction_tokens(repeated, self.vocab, self.seq_len, generator)

    def probes(self) -> tuple[Int[Tensor, "tokens pos"], list[str]]:
        """One sequence for every token but BOS, in which that token is the repeated one."""
        repeated = torch.arange(1, self.vocab).unsqueeze(1)
        tokens = induction_tokens(
            repeated, self.vocab, self.seq_len, generator_for(self.seed, "probe", 0, 0)
        )
        return tokens, [f"token {index}" for index in range(1, self.vocab)]
