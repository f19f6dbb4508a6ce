"""The parts that all harvesters share: finding the run's store, skipping what it holds, closing it.

A harvester is a callback. On every predicted batch it turns prompts into rows and commits them as
one group of shards; sums over prompts are held back until a group has enough of them. Prompts that
the store already holds are not computed again; those of a group that was not committed are. A
harvest lives in `<run>/harvest/<name>/`; nothing is there before all prompts and settings have been
found fit.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import polars as pl
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from spd_lightning.attribution.graph import MODES
from spd_lightning.data.modules import Prompts, StepData
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.errors import BadInput, check_range
from spd_lightning.harvest.native_decoder import log_why_slow
from spd_lightning.store import Store, Writer, added, gap_warning, prompt_hash
from spd_lightning.training.decompose import Decomposition
from spd_lightning.training.multi_step import non_finite

log = logging.getLogger(__name__)

DENSE = 1 << 25
LOGITS = 4
"""Numbers in one array over all components of the prompts that are harvested together; arrays of
logits beside it.
"""

PAIRS = 1 << 16
"""Pairs of positions, of all prompts whose edges are held together."""

HELD = 1 << 23
"""Rows held back at most before sums of the same are added up."""


class Harvester(Callback, ABC):
    """A callback that turns prompts into the rows of one store.

    Attributes:
        name: the harvest's folder below `<run>/harvest/`.
        folder: that folder, once predicting has begun.
        names: what tokens look like, as the data module says.
        group: how many prompts a group of shards has at least.
    """

    def __init__(self, name: str, group: int = 1):
        check_range(type(self).__name__, least=1, whole=True, group=group)
        self.name, self.group = name, group
        self.folder: Path | None = None
        self.names: Callable[[list[int]], list[str]] = digits
        self._writer: Writer | None = None
        self._settings: dict[str, Any] = {}
        self._held: list[dict[str, pl.DataFrame]] = []
        self._pending: set[int] = set()
        self._gap: float | None = None

    @abstractmethod
    def manifest(self, module: Decomposition) -> dict[str, Any]:
        """The settings of the harvest; a store made under other settings is not continued."""

    @abstractmethod
    def rows(
        self, module: Decomposition, prompts: Prompts, ids: list[int]
    ) -> Mapping[str, pl.DataFrame]:
        """The rows of a batch of prompts, by table."""

    def at_once(self, model: ComponentModel, inputs: torch.Tensor) -> int:
        """How many prompts of a batch fit into memory together: at least one.

        inputs: [batch, features] floating point, or [batch, pos] token ids. Counted are the numbers
        of one dense array over all components, and several arrays of logits.
        """
        positions = 1 if inputs.is_floating_point() else inputs.shape[1]
        numbers = sum(model.counts.values()) + LOGITS * int(getattr(model.target, "vocab", 0))
        return max(1, DENSE // max(1, positions * numbers))

    def refuse(self, module: Decomposition, prompts: Prompts) -> None:
        """Looks at prompts of one length before anything is computed or written.

        Raises:
            BadInput: the model, or this harvest, cannot take one of them.
        """
        if not prompts.inputs.is_floating_point():
            refuse_tokens(
                prompts, *(getattr(module.network, name, None) for name in ("vocab", "context"))
            )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "predict":
            return
        assert isinstance(pl_module, Decomposition)
        if name := non_finite(
            {name: p for name, p in pl_module.named_parameters() if p.requires_grad}
        ):
            raise BadInput(
                f"harvest '{self.name}': the weights '{name}' are not finite; fit again, more "
                "slowly"
            )
        data = getattr(trainer, "datamodule", None)
        self.names = getattr(data, "names", digits)
        self._settings = self.manifest(pl_module)
        for prompts in data.groups() if isinstance(data, StepData) else ():
            self.refuse(pl_module, prompts)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Decomposition)
        self.folder = Path(trainer.default_root_dir) / "harvest" / self.name
        self._writer = Writer(self.folder, self._settings, trainer.global_rank, trainer.world_size)
        if trainer.is_global_zero and (mode := getattr(self, "mode", None)):
            log_why_slow(pl_module.model, MODES[mode], self.name)
        self._held = []
        self._pending = set()
        self._gap = None

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
        ids = [prompt_id(row) for row in batch.inputs]
        known = self._writer.finished | self._pending
        fresh = [k for k, i in enumerate(ids) if i not in known and i not in ids[:k]]
        size = self.at_once(pl_module.model, batch.inputs)
        for start in range(0, len(fresh), size):
            self._harvest(pl_module, batch, fresh[start : start + size], ids)

    def _harvest(
        self, module: Decomposition, batch: Prompts, chosen: list[int], ids: list[int]
    ) -> None:
        """Make the rows of some prompts of a batch: in single precision, and with gradients, for
        attributions.
        """
        plain = torch.autocast(module.device.type, enabled=False)
        mine = [ids[k] for k in chosen]
        with torch.inference_mode(False), torch.enable_grad(), plain:
            self._held.append(dict(self.rows(module, batch.take(chosen), mine)))
        self._pending.update(mine)
        if len(self._pending) >= self.group:
            self._commit()
        elif sum(frame.height for frames in self._held for frame in frames.values()) > HELD:
            self._held = [self._together()]

    def _together(self) -> dict[str, pl.DataFrame]:
        return {
            table: added(table, [frames[table] for frames in self._held]) for table in self._held[0]
        }

    def _commit(self) -> None:
        """Write what is held as one group of shards."""
        assert self._writer is not None
        if self._held:
            self._writer.write(self._together(), self._gap)
        self._held = []
        self._pending = set()
        self._gap = None

    def missed(self, gap: float) -> None:
        """Note by how much the in-edges of some frozen graphs miss the activations (A6), to be
        written with them.
        """
        self._gap = max(gap, self._gap or 0.0)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._writer is not None
        self._commit()
        self._writer.complete()
        self._writer.close()
        if trainer.is_global_zero:
            self._tell_of_gap()

    def _tell_of_gap(self) -> None:
        """Print how far the in-edges of frozen graphs are from adding up, loudly if they do not
        (A6).
        """
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


def refuse_tokens(prompts: Prompts, vocab: int | None, context: int | None) -> None:
    """Raises BadInput where a prompt is empty, longer than a model's context, or has tokens that it
    does not know.
    """
    inputs = prompts.inputs
    length = prompts.inputs.shape[1]
    if not length:
        raise BadInput(f"prompt '{prompts.sources[0]}': it is empty; give it a token at least")
    if context is not None and length > context:
        remedy = "shorten it" if prompts.splits[0] == "given" else "lower data.n_ctx"
        holds = f"the target's context holds {context}"
        raise BadInput(
            f"prompt '{prompts.sources[0]}': it has {length} tokens, and {holds}; {remedy}"
        )
    if vocab is not None and (strange := ((inputs < 0) | (inputs >= vocab)).nonzero().tolist()):
        row, pos = strange[0]
        raise BadInput(
            f"prompt '{prompts.sources[row]}': token {int(inputs[row, pos])} is outside the "
            "target's vocabulary of "
            f"{vocab}; take the tokenizer it was trained with"
        )


def digits(ids: list[int]) -> list[str]:
    """Tokens that nobody can name go by their numbers."""
    return [str(i) for i in ids]


def prompt_id(row: torch.Tensor) -> int:
    """The id of one prompt: a hash of its numbers."""
    return prompt_hash(row.cpu().contiguous().numpy().tobytes())
