"""The base class of all LightningDataModules, and the data of the toy targets.

Every batch is a pure function of (seed, split, step, rank, world). So no random state has to be
saved, a resumed run sees the same batches as one that was not interrupted, and no two devices see
the same batch. Lightning sees a single epoch, from the trainer's `global_step` to its `max_steps`.
"""

import hashlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Int, Shaped
from lightning import LightningDataModule
from torch import Tensor

from spd_lightning.errors import BadInput, check_range
from spd_lightning.targets.toy import PROBE, induction_tokens

T = TypeVar("T")


@runtime_checkable
class TakesInnerSteps(Protocol):
    """A LightningModule that makes several optimizer steps in one `training_step`."""

    inner_steps: int


@runtime_checkable
class EncodesText(Protocol):
    """A data module that can turn a text into token ids."""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        ...


class Prompts(NamedTuple):
    """Inputs of `predict`, each with its source."""

    inputs: Shaped[Tensor, "batch _"]
    sources: list[str]  # "feature 3", "random 17"
    splits: list[str]  # "probe" or "random"; for text "given", "validation" or "training"
    tokens: list[list[str]] | None = None  # the text of each token; None if inputs are not text

    def take(self, rows: slice | list[int]) -> "Prompts":
        """Return some of the prompts."""
        numbers: Sequence[int]
        if isinstance(rows, slice):
            every_row = range(len(self.sources))
            numbers = every_row[rows]
        else:
            numbers = rows
        return Prompts(
            self.inputs[rows],
            sources=[self.sources[i] for i in numbers],
            splits=[self.splits[i] for i in numbers],
            tokens=self.tokens and [self.tokens[i] for i in numbers],
        )


def _drop_duplicates(prompts: Prompts) -> Prompts:
    """Keep the first of equal prompts, since two devices could not detect each other's."""
    first = dict[bytes, int]()  # row by a hash of the content
    for row, values in enumerate(prompts.inputs):
        array = values.cpu().contiguous().numpy()
        content = hashlib.blake2b(array.tobytes(), digest_size=16)
        first.setdefault(content.digest(), row)
    if len(first) == len(prompts.inputs):
        return prompts
    rows = list(first.values())
    return prompts.take(rows)


class Batches(Generic[T]):
    """An iterable that makes its items again whenever it is iterated.

    Lightning accepts any iterable. It would warn about a DataLoader without workers, but workers
    would not pay off: a batch takes less time to make than to transfer between processes.
    """

    def __init__(self, make: Callable[[], Iterator[T]], length: int | None = None) -> None:
        self._make = make
        self._length = length

    def __iter__(self) -> Iterator[T]:
        return self._make()

    def __len__(self) -> int:
        """Return the number of items.

        Raises:
            TypeError: the number depends on where one starts; Lightning takes this as "unknown".
        """
        if self._length is None:
            raise TypeError("these batches have no fixed length")
        return self._length


def generator_for(seed: int, split: str, step: int, rank: int) -> torch.Generator:
    """Return a fresh CPU generator for one batch.

    Its seed is a hash of the four arguments, so that neighboring steps have unrelated seeds.
    """
    label = f"{seed} {split} {step} {rank}"
    hashed = hashlib.blake2b(label.encode(), digest_size=8)
    mixed = int.from_bytes(hashed.digest())
    generator = torch.Generator()
    return generator.manual_seed(mixed)


class StepData(LightningDataModule, ABC):
    """Batches by step number; a subclass defines their content and the inputs of `predict`."""

    def __init__(
        self, batch_size: int, seed: int, validation_batches: int, predict_batch_size: int
    ) -> None:
        super().__init__()
        place = type(self).__name__
        check_range(
            place, least=1, whole=True, batch_size=batch_size, predict_batch_size=predict_batch_size
        )
        check_range(place, least=0, whole=True, validation_batches=validation_batches)
        self.batch_size = batch_size
        self.seed = seed
        self.validation_batches = validation_batches
        self.predict_batch_size = predict_batch_size

    @abstractmethod
    def batch(
        self, step: int, rank: int = 0, split: str = "train", world: int = 1
    ) -> Shaped[Tensor, "batch _"]:
        """Return the batch of one step on one of `world` devices, a function of these arguments.

        Args:
            step: number of the batch, counted from 0.
            rank: number of the device.
            split: "train" or "val".
            world: number of devices that share the step.
        """

    @abstractmethod
    def groups(self) -> list[Prompts]:
        """Return all inputs of `predict`, grouped by length."""

    def names(self, ids: Sequence[int]) -> list[str]:
        """Return readable names of token ids."""
        return [str(i) for i in ids]

    def train_dataloader(self) -> Batches[list[Tensor]]:
        """Return lists of consecutive batches, one batch per optimizer step of a `training_step`.

        Lists start at multiples of the module's `inner_steps` (1 if it has none), so that a resumed
        run continues with the same lists. They end at the trainer's `max_steps`; without a trainer
        they start at step 0 and never end.
        """
        if self.trainer is not None and self.trainer.max_steps < 0:
            raise BadInput(
                "max_steps -1 in trainer: data that is drawn on demand never ends; set "
                "trainer.max_steps"
            )
        return Batches(self._train_lists)

    def val_dataloader(self) -> Batches[Tensor]:
        """Return the first batches of the split "val", the same ones at every validation.

        Each device gets different batches.
        """
        rank, world = self._rank_and_world()
        count = self.validation_batches

        def make() -> Iterator[Tensor]:
            for step in range(count):
                yield self.batch(step, rank, "val", world)

        return Batches(make, count)

    def predict_dataloader(self) -> Batches[Prompts]:
        """Return the distinct prompts in batches of one length.

        Prompts are dealt to the devices in turn, and every prompt goes to exactly one device.
        """
        rank, world = self._rank_and_world()
        size = self.predict_batch_size
        batches = list[Prompts]()
        dealt = 0  # number of prompts in earlier groups
        for group in map(_drop_duplicates, self.groups()):
            # Prompt i of a group is number dealt + i of all. It goes to this device if that number
            # is the rank modulo the number of devices.
            first = (rank - dealt) % world
            share = slice(first, None, world)
            prompts = group.take(share)
            for start in range(0, len(prompts.sources), size):
                stop = start + size
                batch = prompts.take(slice(start, stop))
                batches.append(batch)
            dealt += len(group.sources)
        return Batches(lambda: iter(batches), len(batches))

    def _train_lists(self) -> Iterator[list[Tensor]]:
        rank, world = self._rank_and_world()
        step = 0
        last = sys.maxsize
        size = 1
        if self.trainer is not None:
            step = self.trainer.global_step
            last = self.trainer.max_steps
            module = self.trainer.lightning_module
            if isinstance(module, TakesInnerSteps):
                size = module.inner_steps
        while step < last:
            aligned = step - step % size  # a resumed training can begin within a list
            stop = min(aligned + size, last)
            yield [self.batch(index, rank, world=world) for index in range(step, stop)]
            step = stop

    def _rank_and_world(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size


class SampledData(StepData):
    """Batches that are drawn on demand; a subclass draws their rows and defines the probes."""

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
        """Draw `rows` inputs."""

    @abstractmethod
    def probes(self) -> tuple[Shaped[Tensor, "probes _"], list[str]]:
        """Return inputs that show one feature or token each, and their names."""

    def batch(
        self, step: int, rank: int = 0, split: str = "train", world: int = 1
    ) -> Shaped[Tensor, "batch _"]:
        """Return the batch of one step on one device; the number of devices does not matter."""
        generator = generator_for(self.seed, split, step, rank)
        return self.sample(self.batch_size, generator)

    def prompts(self) -> Prompts:
        """Return all inputs of `predict`: the probes, then random inputs that are not all zero."""
        probes, names = self.probes()
        random = self._random_prompts()
        random_names = [f"random {index}" for index in range(len(random))]
        probe_splits = ["probe"] * len(probes)
        random_splits = ["random"] * len(random)
        return Prompts(
            inputs=torch.cat([probes, random]),
            sources=names + random_names,
            splits=probe_splits + random_splits,
        )

    def groups(self) -> list[Prompts]:
        """Return all prompts as one group: they have the same length."""
        return [self.prompts()]

    def _random_prompts(self) -> Tensor:
        probes, _ = self.probes()
        prompts = probes[:0]  # none yet, but of the right shape and type
        step = 0
        while len(prompts) < self.n_prompts:
            generator = generator_for(self.seed, "predict", step, 0)
            inputs = self.sample(self.n_prompts, generator)
            nonzero = inputs.any(dim=1)
            prompts = torch.cat([prompts, inputs[nonzero]])
            step += 1
        return prompts[: self.n_prompts]


class SparseFeatures(SampledData):
    """Vectors whose features are rarely active, independently of each other, and zero otherwise.

    Examples:
        >>> from spd_lightning import SparseFeatures
        >>> data = SparseFeatures(n_features=100, probability=0.05, batch_size=1024)
        >>> batch = data.batch(step=0)
        >>> batch.shape
        torch.Size([1024, 100])
        >>> round((batch > 0).float().mean().item(), 2)  # the share of active features
        0.05
    """

    def __init__(
        self,
        n_features: int,
        probability: float,
        batch_size: int = 1024,
        low: float = 0.0,
        high: float = 1.0,
        seed: int = 0,
        validation_batches: int = 4,
        n_prompts: int = 64,
        predict_batch_size: int = 64,
    ) -> None:
        """
        Args:
            n_features: the length of a vector.
            probability: how often a feature is active, above 0 and up to 1.
            batch_size: vectors per batch on each device.
            low: lower bound of an active feature's value, which is uniform.
            high: upper bound of that value.
            seed: determines all batches.
            validation_batches: number of batches on which each device validates.
            n_prompts: number of random vectors for `predict`, in addition to each feature alone at
                0.75.
            predict_batch_size: vectors per batch of `predict`.
        """
        super().__init__(batch_size, seed, validation_batches, n_prompts, predict_batch_size)
        check_range("SparseFeatures", least=1, whole=True, n_features=n_features)
        check_range("SparseFeatures", above=0, most=1, probability=probability)
        check_range("SparseFeatures", low=low, high=high)
        if not low < high:
            raise BadInput(f"low {low} in SparseFeatures: it must be below high, which is {high}")
        self.n_features = n_features
        self.probability = probability
        self.low = low
        self.high = high

    def sample(self, rows: int, generator: torch.Generator) -> Float[Tensor, "rows features"]:
        """Draw vectors, with one random number per feature.

        A feature is active if its number u is below the probability p. Given that, u / p is uniform
        in [0, 1), and the value is low + (high − low) u / p.
        """
        drawn = torch.rand(rows, self.n_features, generator=generator)
        length = self.high - self.low
        scale = length / self.probability
        value = self.low + scale * drawn
        is_active = drawn < self.probability
        return torch.where(is_active, value, 0.0)

    def probes(self) -> tuple[Float[Tensor, "features features"], list[str]]:
        """Return every feature alone at 0.75."""
        count = self.n_features
        inputs = PROBE * torch.eye(count)
        names = [f"feature {index}" for index in range(count)]
        return inputs, names


class InductionTokens(SampledData):
    """Token sequences `BOS T* S M T* S`, which an induction head continues with M (BOS is 0).

    Examples:
        >>> from spd_lightning import InductionTokens
        >>> data = InductionTokens(vocab=10, seq_len=8, batch_size=2)
        >>> data.batch(step=0)  # an induction head continues the first sequence with 1
        tensor([[0, 6, 2, 8, 1, 6, 5, 8],
                [0, 8, 3, 6, 8, 3, 3, 6]])
    """

    def __init__(
        self,
        vocab: int,
        seq_len: int,
        batch_size: int = 64,
        seed: int = 0,
        validation_batches: int = 4,
        n_prompts: int = 64,
        predict_batch_size: int = 64,
    ) -> None:
        """
        Args:
            vocab: number of tokens including BOS; at least 3.
            seq_len: positions per sequence; at least 4.
            batch_size: sequences per batch on each device.
            seed: determines all batches.
            validation_batches: number of batches on which each device validates.
            n_prompts: number of random sequences for `predict`, in addition to one for each token
                that can be repeated.
            predict_batch_size: sequences per batch of `predict`.
        """
        super().__init__(batch_size, seed, validation_batches, n_prompts, predict_batch_size)
        if vocab < 3 or seq_len < 4:
            raise BadInput(
                f"vocab {vocab} and seq_len {seq_len} in InductionTokens: `BOS S M S` needs 3 "
                "tokens and 4 positions"
            )
        self.vocab = vocab
        self.seq_len = seq_len

    def sample(self, rows: int, generator: torch.Generator) -> Int[Tensor, "rows pos"]:
        """Draw sequences in which a random token other than BOS is repeated."""
        repeated = torch.randint(low=1, high=self.vocab, size=(rows, 1), generator=generator)
        return induction_tokens(repeated, self.vocab, self.seq_len, generator)

    def probes(self) -> tuple[Int[Tensor, "tokens pos"], list[str]]:
        """Return one sequence for every token other than BOS, in which that token is repeated."""
        repeated = torch.arange(1, self.vocab).unsqueeze(1)  # [tokens, 1]
        generator = generator_for(self.seed, "probe", 0, 0)
        tokens = induction_tokens(repeated, self.vocab, self.seq_len, generator)
        names = [f"token {token}" for token in range(1, self.vocab)]
        return tokens, names
