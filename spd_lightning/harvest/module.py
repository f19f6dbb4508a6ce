"""The base class of all harvesters, which opens the run's store, fills it, and closes it.

A harvester is a callback. It turns each predicted batch of prompts into rows and commits them as
one group of shards. Rows that are sums over prompts are kept in memory until a group has enough
prompts. Prompts in the store are skipped; prompts of a group that was not committed are computed
again. A harvest is the folder `<run>/harvest/<name>/`, which is created after all prompts and
settings have been checked.
"""

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import polars as pl
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from spd_lightning import budgets
from spd_lightning.attribution.graph import MODES, ModeName
from spd_lightning.data.modules import Prompts, StepData
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.errors import BadInput, check_range
from spd_lightning.harvest.native_decoder import log_why_slow
from spd_lightning.store import Store, Writer, added, gap_warning, prompt_hash
from spd_lightning.targets.protocols import context_of, vocab_of
from spd_lightning.training.decompose import Decomposition
from spd_lightning.training.multi_step import non_finite

log = logging.getLogger(__name__)


@runtime_checkable
class NamesTokens(Protocol):
    """Data that can name tokens."""

    def names(self, ids: list[int]) -> list[str]:
        """Return the text of each token."""
        ...


class Harvester(Callback, ABC):
    """A callback that turns prompts into the rows of one store.

    Attributes:
        name: the name of the harvest's folder in `<run>/harvest/`.
        folder: the path of this folder; None before predicting starts.
        names: the function of the data module that turns token ids into text.
        group: the smallest number of prompts in a group of shards.
        graph_mode: the kind of graph, for harvests of graphs; None for others.
    """

    def __init__(self, name: str, group: int = 1, graph_mode: ModeName | None = None):
        check_range(type(self).__name__, least=1, whole=True, group=group)
        self.name = name
        self.group = group
        self.graph_mode: ModeName | None = graph_mode
        self.folder: Path | None = None
        self.names: Callable[[list[int]], list[str]] = digits
        self._writer: Writer | None = None
        self._settings: dict[str, Any] = {}
        self._frames: list[dict[str, pl.DataFrame]] = []
        self._pending: set[int] = set()
        self._gap: float | None = None
        self._begun = 0.0  # when the group began

    @abstractmethod
    def manifest(self, module: Decomposition) -> dict[str, Any]:
        """Return the settings of the harvest; a store with other settings is not continued."""

    @abstractmethod
    def rows(
        self, module: Decomposition, prompts: Prompts, ids: list[int]
    ) -> Mapping[str, pl.DataFrame]:
        """Return the rows of a batch of prompts, by table."""

    def sums(self, module: Decomposition) -> Mapping[str, pl.DataFrame]:
        """Return the sums over all prompts of the group, by table, and begin the next group.

        Harvests whose rows all belong to a batch have none.
        """
        return {}

    def is_full(self) -> bool:
        """Return whether the sums of the group take so much memory that they should be written."""
        return False

    def at_once(self, model: ComponentModel, inputs: torch.Tensor) -> int:
        """Return the number of prompts of a batch that fit in memory together, which is at least 1.

        The estimate counts the entries of one dense array over all components and of a few arrays
        of logits.

        inputs: [batch, features] floating point, or [batch, pos] token ids.
        """
        positions = positions_of(inputs)
        components = sum(model.counts.values())
        vocab = vocab_of(model.target) or 0
        entries_per_position = components + budgets.LOGIT_ARRAYS * vocab
        entries_per_prompt = max(1, positions * entries_per_position)
        prompts = budgets.MAX_COMPONENT_NUMBERS // entries_per_prompt
        return max(1, prompts)

    def memory(self, model: ComponentModel, inputs: torch.Tensor) -> Mapping[str, int]:
        """Return the most bytes of rows that are in memory until they are written, by purpose.

        inputs: a batch of prompts.
        """
        return {}

    def check_prompts(self, module: Decomposition, prompts: Prompts) -> None:
        """Check prompts of one length, before anything is computed or written.

        Raises:
            BadInput: the model or this harvest does not accept one of the prompts.
        """
        if prompts.inputs.is_floating_point():
            return
        vocab = vocab_of(module.network)
        context = context_of(module.network)
        check_tokens(prompts, vocab, context)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "predict":
            return
        assert isinstance(pl_module, Decomposition)
        trained = {
            name: parameter
            for name, parameter in pl_module.named_parameters()
            if parameter.requires_grad
        }
        broken = non_finite(trained)
        if broken:
            raise BadInput(
                f"harvest '{self.name}': the weights '{broken}' are not finite; fit again at a "
                "lower learning rate"
            )
        data = vars(trainer).get("datamodule")  # Lightning sets it only if there is one
        self.names = data.names if isinstance(data, NamesTokens) else digits
        self._settings = self.manifest(pl_module)
        if isinstance(data, StepData):
            for prompts in data.groups():
                self.check_prompts(pl_module, prompts)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Decomposition)
        run = Path(trainer.default_root_dir)
        self.folder = run / "harvest" / self.name
        self._writer = Writer(self.folder, self._settings, trainer.global_rank, trainer.world_size)
        if self.graph_mode is not None and trainer.is_global_zero:
            mode = MODES[self.graph_mode]
            log_why_slow(pl_module.model, mode, self.name)
        self._frames = []
        self._pending = set()
        self._gap = None
        self._begun = time.monotonic()

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Prompts,
        *_: Any,
        **__: Any,
    ) -> None:
        assert self._writer is not None
        assert isinstance(pl_module, Decomposition)
        known = self._writer.finished | self._pending
        new: dict[int, int] = {}  # for each new prompt, its id and its first row in the batch
        for row, prompt in enumerate(batch.inputs):
            number = prompt_id(prompt)
            if number not in known:
                new.setdefault(number, row)
        ids = list(new)
        size = self.at_once(pl_module.model, batch.inputs)
        for start in range(0, len(ids), size):
            some = ids[start : start + size]
            rows = {number: new[number] for number in some}
            self._harvest(pl_module, batch, rows)

    def _harvest(self, module: Decomposition, batch: Prompts, new: Mapping[int, int]) -> None:
        """Compute the rows of some prompts of a batch, and commit them once a group is complete.

        new: for each of these prompts, its id and its row in the batch.
        """
        ids = list(new)
        # Attributions need gradients, and at least single precision.
        single_precision = torch.autocast(module.device.type, enabled=False)
        with torch.inference_mode(False), torch.enable_grad(), single_precision:
            prompts = batch.take(list(new.values()))  # a copy that gradients can be taken of
            rows = self.rows(module, prompts, ids)
        self._frames.append(dict(rows))
        self._pending.update(ids)
        seconds = time.monotonic() - self._begun
        is_late = seconds > budgets.MAX_UNCOMMITTED_SECONDS
        if len(self._pending) >= self.group or is_late or self.is_full():
            self._commit(module)
        elif self._rows_in_memory() > budgets.MAX_SUM_ROWS:
            self._frames = [self._joined()]

    def _rows_in_memory(self) -> int:
        count = 0
        for frames in self._frames:
            count += sum(frame.height for frame in frames.values())
        return count

    def _joined(self) -> dict[str, pl.DataFrame]:
        """Join the uncommitted frames of each table; rows of sums with the same keys are added."""
        joined = {}
        for table in self._frames[0]:
            parts = [frames[table] for frames in self._frames]
            joined[table] = added(table, parts)
        return joined

    def _commit(self, module: Decomposition) -> None:
        """Write the uncommitted rows as one group of shards."""
        assert self._writer is not None
        if self._frames:
            tables = self._joined() | dict(self.sums(module))
            self._writer.write(tables, self._gap)
        self._begun = time.monotonic()
        self._frames = []
        self._pending = set()
        self._gap = None

    def note_gap(self, gap: float) -> None:
        """Remember the gap of some frozen graphs (A6), to write it with them."""
        if self._gap is None:
            self._gap = max(gap, 0.0)
        else:
            self._gap = max(gap, self._gap)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._writer is not None
        assert isinstance(pl_module, Decomposition)
        self._commit(pl_module)
        self._writer.complete()
        self._writer.close()
        if trainer.is_global_zero:
            self._log_gap()

    def _log_gap(self) -> None:
        """Log the largest gap of frozen graphs, as a warning if in-edges do not add up (A6)."""
        assert self.folder is not None
        manifest = Store(self.folder).manifest
        if why := gap_warning(manifest):
            log.warning("harvest %s: %s", self.name, why)
        elif "gap" in manifest:
            log.info(
                "harvest %s: in-edges add up to the activations; largest gap %.1e",
                self.name,
                manifest["gap"],
            )

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if self._writer is not None:
            self._writer.close()


def check_tokens(prompts: Prompts, vocab: int | None, context: int | None) -> None:
    """Check that prompts are not empty, fit in the context, and have known tokens.

    Raises:
        BadInput: a prompt does not.
    """
    inputs = prompts.inputs
    length = inputs.shape[1]
    if not length:
        raise BadInput(f"prompt '{prompts.sources[0]}': it is empty; give it at least one token")
    if context is not None and length > context:
        remedy = "shorten it" if prompts.splits[0] == "given" else "lower data.n_ctx"
        raise BadInput(
            f"prompt '{prompts.sources[0]}': it has {length} tokens, and the target's context "
            f"holds {context}; {remedy}"
        )
    if vocab is None:
        return
    unknown = (inputs < 0) | (inputs >= vocab)  # [batch, pos]
    places = unknown.nonzero().tolist()
    if places:
        row, pos = places[0]
        raise BadInput(
            f"prompt '{prompts.sources[row]}': token {int(inputs[row, pos])} is outside the "
            f"target's vocabulary of {vocab}; use the tokenizer it was trained with"
        )


def positions_of(inputs: torch.Tensor) -> int:
    """Return the number of positions of each prompt of a batch; a vector has one.

    inputs: [batch, features] floating point, or [batch, pos] token ids.
    """
    return 1 if inputs.is_floating_point() else inputs.shape[1]


def digits(ids: list[int]) -> list[str]:
    """Return the ids as strings, as names of tokens whose text is unknown."""
    return [str(i) for i in ids]


def prompt_id(row: torch.Tensor) -> int:
    """Return the id of one prompt, a hash of its numbers."""
    numbers = row.cpu().contiguous().numpy()
    content = numbers.tobytes()
    return prompt_hash(content)
